"""A log that cannot be rewritten unseen: every exchange of a run, each entry bound to the one before by its hash.

An entry tells what each site was shown and what came from it, as SHA-256 of every group of tensors. Sites on machines
of their own sign it together with the hash of the entry before, so that nobody can write another history in their name;
and each keeps the hashes that it was shown, so that a history which was rewritten as a whole, or shown differently to
two sites, does not fit what they hold. `fedseg.launch.verify` compares all that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedseg.common.files import ends_a_line, last_line
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.contract import Row, Task, TrainTask
from fedseg.federation.state import State, Update

LEDGER = "ledger.jsonl"
START = "0" * 64
"""What the first entry follows."""
NUMBERS = "(numbers)"
HASH = "hash"
BEGUN, SAVED = "begun", "checkpoint"
"""What entries tell of that are no questions to sites."""


class Ledger:
    """The entries of one file; new ones are added at its end only.

    Args:
        path: of the file; made with the first entry.
        whole: whether to look at all entries that are there, or only at the last one.

    Raises:
        CheckpointError: its entries do not follow one another.
    """

    def __init__(self, path: Path, whole: bool = True) -> None:
        self.path = path
        self.known: dict[int, str] = {}  # digests of the messages that are under way, by identity of their tensors
        entries = read(path) if whole else last(path)
        if whole and (found := broken(entries)):
            raise CheckpointError(f"{path} is damaged: {found[0]}; restore it from a copy, or start the run anew")
        self.length: int = entries[-1]["entry"] if entries else 0
        self.head: str = entries[-1][HASH] if entries else START

    def append(self, entry: Row) -> None:
        """Add an entry; it is on the disk when this returns."""
        whole = {"entry": self.length + 1, "previous": self.head, **entry}
        whole[HASH] = hashed(whole)
        _cut(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(canonical(whole) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.length, self.head = self.length + 1, whole[HASH]

    def begun(self, round: int, run: str, alike: bool) -> None:
        """A process begins, or goes on from a round; what an earlier one noted after that round is done again.

        Args:
            round: rounds done.
            run: name of the run at its sites; empty in one process.
            alike: whether all sites are shown the same model.
        """
        self.append({"what": BEGUN, "round": round, "run": run, "alike": alike})

    def saved(self, round: int, server: State) -> None:
        """The server's state after a round is about to be saved."""
        self.append({"what": SAVED, "round": round, "state": digests(server)})

    def noted(
        self, tasks: Mapping[str, Task], messages: Mapping[str, State], answers: Iterator[Update]
    ) -> Iterator[Update]:
        """The answers as they come; with the last one, or when nobody waits for more, they are an entry."""
        self.known = {}
        shown = {site: digests(messages[site], self.known) for site in tasks}
        sites: dict[str, Row] = {}
        try:
            for update in answers:
                sent = {} if "sent" in update.seal else {"sent": digests(update)}  # known where it was sealed
                told = {"examples": update.examples, "refusal": update.refusal[:200], **update.seal}
                sites[update.site] = {"shown": shown[update.site], **sent, **told}
                yield update
        finally:
            self.known = {}
            if tasks:
                self.append({**about(next(iter(tasks.values()))), "sites": sites})


def about(task: Task) -> Row:
    """What an entry and a receipt tell of a task."""
    topic, checkpoint = ("", "round") if isinstance(task, TrainTask) else (task.topic, task.checkpoint)
    return {"what": task.kind, "round": task.round, "topic": topic, "checkpoint": checkpoint}


def receipt(
    run: str,
    site: str,
    task: Row,
    head: str,
    shown: Mapping[str, str],
    sent: Mapping[str, str],
    seal: Mapping[str, Any],
) -> Row:
    """What a site signs of a turn.

    Args:
        run: name of the run at the sites.
        site: who answers.
        task: see `about`.
        head: hash of the ledger's last entry, as the question told it.
        shown: digests of the message.
        sent: digests of the answer.
        seal: digests of the texts of question and answer, and the number of images behind the answer.
    """
    words = {name: seal[name] for name in ("question", "answer", "examples")}
    return {"run": run, "site": site, **task, "head": head, "shown": dict(shown), "sent": dict(sent), **words}


def _written(value: object) -> str:
    """A number, whole or not, as one text; what a site may send instead, as it is: whoever reads it refuses it."""
    return repr(float(value)) if isinstance(value, int | float) else repr(value)


def digests(state: State, known: dict[int, str] | None = None) -> dict[str, str]:
    """SHA-256 of every group of a state and of its numbers; the same wherever it is computed.

    Args:
        state: the state.
        known: digests of tensors by identity, for states that share some.
    """
    known = {} if known is None else known
    found = {}
    for group, tensors in state.tensors.items():
        for tensor in tensors.values():
            if id(tensor) not in known:
                known[id(tensor)] = _digest(tensor)
        found[group] = text_digest(canonical({name: known[id(tensor)] for name, tensor in tensors.items()}))
    if state.scalars:
        found[NUMBERS] = text_digest(canonical({name: _written(value) for name, value in state.scalars.items()}))
    return found


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(content: Any) -> str:
    """One text for one content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def hashed(entry: Row) -> str:
    """The hash of an entry, over all that it says."""
    return text_digest(canonical({key: value for key, value in entry.items() if key != HASH}))


def read(path: Path) -> list[Row]:
    """The entries of a file; none if there is no file.

    Raises:
        CheckpointError: a line is no entry.
    """
    if not path.is_file():
        return []
    return [_entry(path, str(number), line) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)]


def last(path: Path) -> list[Row]:
    """The last entry of a file; none if there is none.

    Raises:
        CheckpointError: that line is no entry.
    """
    line = last_line(path) if path.is_file() else b""
    return [_entry(path, "at the end", line)] if line else []


def broken(entries: list[Row]) -> list[str]:
    """Where entries were changed, dropped or put in another order."""
    found, before = [], START
    for number, entry in enumerate(entries, 1):
        if hashed(entry) != entry[HASH]:
            found.append(f"entry {number} is not as it was written")
        elif entry.get("previous") != before or entry.get("entry") != number:
            found.append(f"entry {number} does not follow the one before it")
        before = entry[HASH]
    return found


def _entry(path: Path, where: str, line: bytes) -> Row:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or HASH not in entry or "entry" not in entry:
        raise CheckpointError(f"{path}: line {where} is no entry of a ledger; restore the file from a copy")
    return entry


def _cut(path: Path) -> None:
    """Take away a last line that a killed process did not finish."""
    if path.is_file() and path.stat().st_size and not ends_a_line(path):
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
