"""Fuzz `from_bytes` for long: ``python -m tests.fuzz_bytes 200000``; CI tries a few thousand in test_hardening.py."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

from tests.test_hardening import HEADER, VALID, WORDS, assemble, header, read_or_refuse

VALUES: list[Any] = [0, 1, -1, 2**31, 2**32, 2**62, 2**64, 10**30, 0.5, None, True, "", "F32", "F64", "I4", [], {}]
VALUES += [
    [0, 24],
    [24, 32],
    [0, 0],
    [3, 2],
    [2**40, 2**40],
    [0] * 20,
    ["model"],
    {"loss": 1},
    "[0]",
    '["a", "a"]',
    "{}",
]


def bytes_of(rng: random.Random) -> bytes:
    """One input: random, cut, changed in some bytes, or with a header that lies."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return VALID[: rng.randrange(len(VALID))] + rng.randbytes(rng.randrange(4))
    if kind == 2:
        data = bytearray(VALID)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    changed: Any = header()
    for _ in range(rng.randrange(1, 4)):
        node = rng.choice([changed, *(entry for entry in changed.values() if isinstance(entry, dict))])
        node[rng.choice([*node, *WORDS])] = deepcopy(rng.choice(VALUES))
    text = json.dumps(changed)
    return assemble(text.replace('"0:b"', '"0:w"') if rng.random() < 0.1 else text, VALID[8 + HEADER :])


def main() -> None:
    """Try so many; an input that does anything but be read or be refused ends the run with a trace."""
    rng, outcomes = random.Random(0), Counter[str]()
    for _ in range(int(sys.argv[1])):
        outcomes[read_or_refuse(bytes_of(rng))] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main()
