"""What every message of ours is to Flower: a text and a block of bytes.

Imports nothing heavy, so that the process which Flower starts for a message starts fast.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

TEXT, DATA = "text", "data"
ENCODING = "safetensors"
MOST_TEXT, MOST_DATA = 64 * 2**20, 2**31 - 1
"""Largest text and block that are read, in bytes; more than that is no message of ours."""


@dataclass(frozen=True)
class Envelope:
    """A message before it is understood.

    Attributes:
        text: what is asked or answered, as JSON.
        data: a serialised state; empty where there is none.
    """

    text: str
    data: bytes = b""

    def to_records(self) -> RecordDict:
        """As Flower carries it: one array, whatever the number of tensors (Flower pays for each array)."""
        records = RecordDict({TEXT: ConfigRecord({TEXT: self.text})})
        if self.data:
            array = Array("uint8", (len(self.data),), ENCODING, self.data)
            records[DATA] = ArrayRecord({DATA: array})
        return records

    @classmethod
    def from_records(cls, records: RecordDict) -> Envelope:
        """Read what `to_records` wrote.

        Raises:
            ValueError: it is something else, or too large.
        """
        configs, arrays = records.config_records, records.array_records
        if set(records) - {TEXT, DATA} or set(configs) != {TEXT} or set(configs[TEXT]) != {TEXT}:
            raise ValueError(f"a message should hold {TEXT!r} and {DATA!r}, not {sorted(records)[:5]}")
        text = configs[TEXT][TEXT]
        data = b""
        if DATA in arrays:
            block = arrays[DATA]
            if set(block) != {DATA} or block[DATA].stype != ENCODING:
                raise ValueError(f"a message's block should be {ENCODING}")
            data = block[DATA].data
        if not isinstance(text, str) or len(text) > MOST_TEXT or len(data) > MOST_DATA:
            raise ValueError(f"a message should hold at most {MOST_TEXT} characters and {MOST_DATA} bytes")
        return cls(text, data)
