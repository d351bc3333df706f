"""Checkpoints that survive a kill at any instant.

State files are immutable and carry the round in their name; ``index.json`` alone says which of them count and is
replaced atomically, after they are on disk. What the index does not name is swept away after that. The index is there
before the first state file, and holds checksums of these and of itself: what was changed or lost since is an error, and
never a run that starts again or goes on with other numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from fedseg.common.files import PART, write_atomic
from fedseg.federation.state import State, from_bytes, to_bytes

STATE_FILE = re.compile(r"(server|site-[^/\\]*)-(\d{5,})\.safetensors")
"""Names that this module gives, and the parts of files that a killed process leaves: nothing else is swept away."""
INDEX = "index.json"
EMPTY: dict[str, Any] = {"round": 0, "server": "", "kept": {}, "best": {}, "checksums": {}}
BRANCHES = "branches"
"""Of an index: where the run stood before a site came, as smaller indices; not there where none came."""
CURE = "restore the folder from a copy, or start the run anew with another output="


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what to do."""


@dataclass
class Best:
    """The best model by validation score, and where its state lies.

    Attributes:
        score: mean validation score; NaN when nothing could be scored.
        round: the round after which it was reached.
        server: file of the server's state.
        kept: file of what the site kept, for personal models.
    """

    score: float = math.nan
    round: int = 0
    server: str = ""
    kept: str = ""


@dataclass
class Snapshot:
    """Everything a run needs to go on.

    Attributes:
        round: rounds done.
        server: the server's state.
        kept: what each site keeps.
    """

    round: int
    server: State
    kept: dict[str, State] = field(default_factory=dict)


class Checkpoint:
    """The checkpoint folder of one run.

    Args:
        folder: made when the first state is saved.

    Raises:
        CheckpointError: the folder's index is unreadable, or gone although there are states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = deepcopy(EMPTY)
        self._saved_kept: dict[str, ReferenceType[State]] = {}  # weak: what a site keeps no more must not stay
        path = folder / INDEX
        states = [file.name for file in folder.iterdir() if STATE_FILE.fullmatch(file.name)] if folder.is_dir() else []
        if path.exists():
            try:
                self.index = _read_index(path, states)
            except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); {CURE}") from error
        elif states:
            raise CheckpointError(f"{path} is missing, although {folder} holds {min(states)}; {CURE}")

    @property
    def round(self) -> int:
        """Rounds done when the checkpoint was written; 0 when there is none."""
        return int(self.index["round"])

    def best(self) -> dict[str, Best]:
        """``global`` and ``personal/<site>`` -> best model so far."""
        return {name: Best(**entry) for name, entry in self.index["best"].items()}

    def last(self, name: str) -> Best:
        """The last model of that name, scored or not."""
        kept = self.index["kept"].get(name.removeprefix("personal/"), "")
        return Best(round=self.round, server=self.index["server"], kept=kept)

    def chosen(self, name: str) -> Best:
        """The best model of that name; the last one where none was chosen."""
        return self.best().get(name) or self.last(name)

    def save(
        self,
        round: int,
        server: State,
        kept: Mapping[str, State],
        scores: Mapping[str, float],
        *,
        since: int = 1,
        branch: bool = False,
    ) -> None:
        """Write the state after a round, and note the models whose validation score is the best so far.

        Args:
            round: rounds done.
            server: the server's state.
            kept: what each site keeps; a site whose state is the same object as last time is not written again.
            scores: ``global`` and ``personal/<site>`` -> validation score after this round; NaN never wins.
            since: first round whose ``global`` score is a mean over the sites of this one: earlier ones do not compare.
            branch: whether this state stays, as a site comes after it that was never asked before.
        """
        if not (self.folder / INDEX).exists():  # from now on states without an index are a loss
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_index(deepcopy(EMPTY))
        checksums = dict(self.index["checksums"])
        server_file = f"server-{round:05d}.safetensors"
        checksums[server_file] = self._write(server_file, to_bytes(server))
        files = dict(self.index["kept"])
        for site, state in kept.items():
            saved = self._saved_kept.get(site)
            if saved is None or saved() is not state:
                files[site] = f"{_file_name(site)}-{round:05d}.safetensors"
                checksums[files[site]] = self._write(files[site], to_bytes(state))
                self._saved_kept[site] = ref(state)
        best = {k: v for k, v in self.index["best"].items() if k != "global" or v["round"] >= since}
        for name, score in scores.items():
            before = best.get(name)
            if before is None or score > before["score"] or (math.isnan(before["score"]) and not math.isnan(score)):
                site_file = files.get(name.removeprefix("personal/"), "") if name.startswith("personal/") else ""
                best[name] = vars(Best(score, round, server_file, site_file))
        index = {"round": round, "server": server_file, "kept": files, "best": best}
        branches = [*self.index.get(BRANCHES, ()), *([index] if branch else ())]
        index = {**index, **({BRANCHES: branches} if branches else {})}
        known = {name: checksums.get(name) or checksum(self._bytes(name)) for name in sorted(_named(index))}
        self._write_index({**index, "checksums": known})
        self._sweep()

    def branches(self) -> list[int]:
        """Rounds after which a site came that was never asked before, and whose states stay."""
        return [int(branch["round"]) for branch in self.index.get(BRANCHES, ())]

    def copied(self, round: int, folder: Path) -> Checkpoint:
        """A checkpoint that stands where this one stood after a round of `branches`.

        Args:
            round: of them.
            folder: where the copy comes to lie; it holds nothing.

        Raises:
            CheckpointError: a file is gone or damaged.
        """
        branches = self.index[BRANCHES]
        found = next(branch for branch in branches if branch["round"] == round)
        earlier = [branch for branch in branches if branch["round"] < round]
        index = {**found, **({BRANCHES: earlier} if earlier else {})}
        copy = Checkpoint(folder)
        folder.mkdir(parents=True, exist_ok=True)
        copy._write_index(deepcopy(EMPTY))
        checksums = {}
        for file in sorted(_named(index)):
            self.read(file)  # whole, and as it was saved
            checksums[file] = copy._write(file, self._bytes(file))
        copy._write_index({**index, "checksums": checksums})
        return copy

    def load(self) -> Snapshot | None:
        """The state to go on from, or None when nothing was saved yet."""
        if not self.round:
            return None
        kept = {site: self.read(file) for site, file in self.index["kept"].items()}
        self._saved_kept = {site: ref(state) for site, state in kept.items()}
        return Snapshot(self.round, self.read(self.index["server"]), kept)

    def verify(self) -> None:
        """Read every file that the index names, and change nothing.

        Raises:
            CheckpointError: one is gone or damaged.
        """
        for file in sorted(_named(self.index)):
            self.read(file)

    def read(self, file: str) -> State:
        """Read one state file of this folder.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        data = self._bytes(file)
        expected = self.index["checksums"].get(file)  # none where an earlier version wrote it
        path = self.folder / file
        if expected is not None and checksum(data) != expected:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were saved; {CURE}")
        try:
            return from_bytes(data)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}; {CURE}") from error

    def _bytes(self, file: str) -> bytes:
        path = self.folder / file
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CheckpointError(f"{path} is missing, although {self.folder / INDEX} names it; {CURE}") from error

    def _write(self, name: str, data: bytes) -> str:
        write_atomic(self.folder / name, data)
        return checksum(data)

    def _write_index(self, index: dict[str, Any]) -> None:
        self._write(INDEX, json.dumps({**index, "checksum": _own_checksum(index)}, indent=1).encode())
        self.index = index

    def _sweep(self) -> None:
        named = _named(self.index)
        for path in self.folder.iterdir():
            if PART.fullmatch(path.name) or (STATE_FILE.fullmatch(path.name) and path.name not in named):
                path.unlink()


def checksum(data: bytes) -> str:
    """What tells bytes from others."""
    return blake2b(data, digest_size=16).hexdigest()


def _read_index(path: Path, states: Sequence[str]) -> dict[str, Any]:
    """What an index says, if it can be true.

    Args:
        path: the file.
        states: names of the state files beside it.
    """
    index = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"round": int, "server": str, "kept": dict, "best": dict}
    if not isinstance(index, dict) or any(type(index.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(f"it should hold {', '.join(kinds)}")
    own = index.pop("checksum", None)
    if odd := sorted(index.keys() - EMPTY.keys() - {BRANCHES}):
        raise ValueError(f"it holds {odd[0]!a}, which this version does not know")
    old = own is None and "checksums" not in index
    index.setdefault("checksums", {})
    branches = index.get(BRANCHES, [])
    if not isinstance(branches, list) or any(type(branch) is not dict for branch in branches):
        raise ValueError(f"its {BRANCHES} are no list of indices")
    for one in (index, *branches):
        _check_files(one)
    if not old and own != _own_checksum(index):
        raise ValueError("it is not as it was saved")
    for one in (index, *branches):
        _check_rounds(one)
    if not old and (bare := sorted(_named(index) - index["checksums"].keys())):
        raise ValueError(f"it has no checksum of {bare[0]}")
    known = {match[1] for file in index["kept"].values() if (match := STATE_FILE.fullmatch(file))}
    for match in filter(None, map(STATE_FILE.fullmatch, states)):
        if match[1] != "server" and match[1] not in known and int(match[2]) <= index["round"]:
            raise ValueError(f"it does not name the site of {match[0]}")
    return index


def _check_files(index: Mapping[str, Any]) -> None:
    """Whether an index names files of its own folder."""
    files = [index["server"], *index["kept"].values()]
    for entry in index["best"].values():
        best = Best(**entry)
        files += [best.server, best.kept]
    if odd := [file for file in files if file != "" and not (isinstance(file, str) and STATE_FILE.fullmatch(file))]:
        raise ValueError(f"it names {odd[0]!a}, which is no state file")


def _check_rounds(index: Mapping[str, Any]) -> None:
    """Whether the rounds of an index go together with its files."""
    round, best = index["round"], [Best(**entry) for entry in index["best"].values()]
    if round < 0 or (round == 0 and _named(index)):
        raise ValueError(f"it stands at round {round}")
    if round > 0 and _round_of(index["server"]) != round:
        raise ValueError(f"it stands at round {round}, but names {index['server'] or 'no state'} of the server")
    for one in best:
        if type(one.round) is not int or type(one.score) not in (float, int) or not 0 < one.round <= round:
            raise ValueError(f"a best model has the score {one.score!a} after round {one.round!a}")
        if _round_of(one.server) != one.round:
            raise ValueError(f"the best model after round {one.round} is {one.server!a}")
    if late := [file for file in _named(index) if not 0 < _round_of(file) <= round]:
        raise ValueError(f"it stands at round {round}, but names {late[0]}")


def _round_of(file: str) -> int:
    match = STATE_FILE.fullmatch(file)
    return int(match[2]) if match else -1


def _named(index: Mapping[str, Any]) -> set[str]:
    """All state files that an index names."""
    files = {index["server"], *index["kept"].values()}
    for entry in index["best"].values():
        files |= {entry["server"], entry["kept"]}
    for branch in index.get(BRANCHES, ()):
        files |= _named(branch)
    return files - {""}


def _own_checksum(index: Mapping[str, Any]) -> str:
    return checksum(json.dumps(index, sort_keys=True).encode())


def _file_name(site: str) -> str:
    """A site's name as part of a file name: readable, harmless, and different for different sites."""
    harmless = re.sub(r"[^A-Za-z0-9._-]", "_", site).lstrip(".")[:60]
    return f"site-{harmless}-{sha256(site.encode()).hexdigest()[:8]}"
