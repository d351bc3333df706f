"""Checkpoints that survive a kill at any instant.

State files are immutable and carry the round in their name; ``index.json`` alone says which of them count and is
replaced atomically, after they are on disk. What the index does not name is swept away after that.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from federation.state import State, from_bytes, to_bytes

STATE_FILE = re.compile(r"(server|site-[^/\\]*)-\d{5,}\.safetensors|\.[^/\\]*\.part")
"""Names that this module gives: nothing else in the folder is ever swept away."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file."""


@dataclass
class Best:
    """The best model by validation score, and where its state lies.

    Attributes:
        score: mean validation Dice; NaN when nothing could be scored.
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
        folder: created when missing.

    Raises:
        CheckpointError: the folder's index is unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, Any] = {"round": 0, "server": "", "kept": {}, "best": {}}
        self._saved_kept: dict[str, ReferenceType[State]] = {}  # weak: what a site keeps no more must not stay
        path = folder / "index.json"
        if path.exists():
            try:
                self.index = _read_index(path)
            except (ValueError, TypeError) as error:
                cure = "start the run anew in another folder"
                raise CheckpointError(f"{path} is damaged ({error}); {cure}") from error

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

    def save(self, round: int, server: State, kept: Mapping[str, State], scores: Mapping[str, float]) -> None:
        """Write the state after a round, and note the models whose validation score is the best so far.

        Args:
            round: rounds done.
            server: the server's state.
            kept: what each site keeps; a site whose state is the same object as last time is not written again.
            scores: ``global`` and ``personal/<site>`` -> validation score after this round; NaN never wins.
        """
        server_file = f"server-{round:05d}.safetensors"
        self._write(server_file, to_bytes(server))
        files = dict(self.index["kept"])
        for site, state in kept.items():
            saved = self._saved_kept.get(site)
            if saved is None or saved() is not state:
                files[site] = f"{_file_name(site)}-{round:05d}.safetensors"
                self._write(files[site], to_bytes(state))
                self._saved_kept[site] = ref(state)
        best = dict(self.index["best"])
        for name, score in scores.items():
            before = best.get(name)
            if before is None or score > before["score"] or (math.isnan(before["score"]) and not math.isnan(score)):
                site_file = files.get(name.removeprefix("personal/"), "") if name.startswith("personal/") else ""
                best[name] = vars(Best(score, round, server_file, site_file))
        self.index = {"round": round, "server": server_file, "kept": files, "best": best}
        self._write("index.json", json.dumps(self.index, indent=1).encode())
        self._sweep()

    def load(self) -> Snapshot | None:
        """The state to go on from, or None when nothing was saved yet."""
        if not self.round:
            return None
        kept = {site: self.read(file) for site, file in self.index["kept"].items()}
        self._saved_kept = {site: ref(state) for site, state in kept.items()}
        return Snapshot(self.round, self.read(self.index["server"]), kept)

    def read(self, file: str) -> State:
        """Read one state file of this folder.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        path = self.folder / file
        try:
            return from_bytes(path.read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing, although {self.folder / 'index.json'} names it") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data)

    def _sweep(self) -> None:
        named = {"index.json", self.index["server"], *self.index["kept"].values()}
        for entry in self.index["best"].values():
            named |= {entry["server"], entry["kept"]}
        for path in self.folder.iterdir():
            if STATE_FILE.fullmatch(path.name) and path.name not in named:
                path.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file by these bytes: a kill at any instant, or a full disk, leaves the old file or the new one.

    Raises:
        OSError: the disk is full, or will not be written to.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_index(path: Path) -> dict[str, Any]:
    index = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"round": int, "server": str, "kept": dict, "best": dict}
    if not isinstance(index, dict) or any(not isinstance(index.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"it should hold {', '.join(kinds)}")
    files = [index["server"], *index["kept"].values()]
    for entry in index["best"].values():
        best = Best(**entry)
        files += [best.server, best.kept]
    if odd := [file for file in files if file and not (isinstance(file, str) and STATE_FILE.fullmatch(file))]:
        raise ValueError(f"it names {odd[0]!a}, which is no state file")
    return index


def _file_name(site: str) -> str:
    """A site's name as part of a file name: readable, harmless, and different for different sites."""
    harmless = re.sub(r"[^A-Za-z0-9._-]", "_", site).lstrip(".")[:60]
    return f"site-{harmless}-{sha256(site.encode()).hexdigest()[:8]}"
