"""What a site keeps between its turns, on its own disk.

Every state is filed under the round and the kind of turn that left it, and older ones stay while the server may come
back to them. So a turn that is asked again, because the site or the server was restarted, starts from what the site
kept *before* it, and the best personal model is found again by its round.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from fedseg.common.files import sweep_parts, write_atomic
from fedseg.federation.checkpoint import CheckpointError, checksum
from fedseg.federation.contract import EvaluateTask, Task, TrainTask
from fedseg.federation.state import State, from_bytes, to_bytes

AFTER = 2
"""Where turns stand that change nothing: they see what the round left."""
NAME = re.compile(r"kept-(\d{5,})-([01])(?:-([0-9a-f]{32}))?\.safetensors")
"""Round, stage, and the checksum of the bytes, which states of earlier versions lack."""
Turn = tuple[int, int]


def stage(task: Task) -> int:
    """Where a turn stands in its round: training, validation, and all that changes nothing, as scoring at the end."""
    if isinstance(task, TrainTask):
        return 0
    return 1 if isinstance(task, EvaluateTask) and task.checkpoint == "round" else AFTER


class Kept:
    """The states that a site kept in one run.

    Args:
        folder: created when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def before(self, task: Task, base: int = -1) -> State:
        """What the site kept before a turn; nothing before its first.

        Args:
            task: of the turn.
            base: the round whose end counts; -1 lets the task's round decide.

        Raises:
            CheckpointError: a file is damaged.
        """
        first = (base, AFTER) if base >= 0 else (task.round, stage(task))
        earlier = [place for place in self._places() if place < first]
        return self._read(max(earlier)) if earlier else State()

    def keep(self, task: Task, state: State) -> None:
        """File what a training turn, or a validation that fits a personal model, left; asked again, it is replaced.

        Raises:
            OSError: the disk is full, or will not be written to; what was there before is still there.
        """
        place, data = (task.round, stage(task)), to_bytes(state)
        path = self.folder / f"kept-{place[0]:05d}-{place[1]}-{checksum(data)}.safetensors"
        sweep_parts(self.folder)
        write_atomic(path, data)
        self._remove(place, but=path)

    def forget(self, needed: Collection[int]) -> None:
        """Remove states that the server will not come back to.

        Args:
            needed: rounds whose end it may come back to; whatever is younger than the latest of them stays, too.
        """
        places = self._places()
        latest = max(needed, default=0)
        stays = {place for place in places if place[0] > latest}
        for round in needed:
            stays |= set(sorted(place for place in places if place[0] <= round)[-1:])
        for place in places:
            if place not in stays:
                self._remove(place)

    def _places(self) -> list[Turn]:
        return sorted(self._files())

    def _files(self) -> dict[Turn, list[Path]]:
        """What is filed under each place; of two files, which a kill between writing and removing leaves, both."""
        files: dict[Turn, list[Path]] = {}
        for path in sorted(self.folder.iterdir()):
            if match := NAME.fullmatch(path.name):
                files.setdefault((int(match[1]), int(match[2])), []).append(path)
        return files

    def _remove(self, place: Turn, but: Path | None = None) -> None:
        for path in self._files().get(place, []):
            if path != but:
                path.unlink(missing_ok=True)

    def _read(self, place: Turn) -> State:
        path = max(self._files()[place], key=lambda file: file.stat().st_mtime_ns)
        data, match = path.read_bytes(), NAME.fullmatch(path.name)
        cure = "restore it from a copy, or start the run anew"
        if match and match[3] and checksum(data) != match[3]:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were kept; {cure}")
        try:
            return from_bytes(data)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}; {cure}") from error
