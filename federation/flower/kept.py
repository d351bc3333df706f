"""What a site keeps between its turns, on its own disk.

Every state is filed under the round and the kind of turn that left it, and older ones stay while the server may come
back to them. So a turn that is asked again, because the site or the server was restarted, starts from what the site
kept *before* it, and the best personal model is found again by its round.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from federation.checkpoint import CheckpointError, write_atomic
from federation.contract import Task
from federation.state import State, from_bytes, to_bytes

STAGES = {"train": 0, "evaluate": 1}
"""Turns of one round that can change what is kept, in their order."""
AFTER = 2
"""Where turns stand that change nothing: they see what the round left."""
NAME = re.compile(r"kept-(\d{5,})-([01])\.safetensors")
Place = tuple[int, int]


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
        first = (base, AFTER) if base >= 0 else self._place(task)
        earlier = [place for place in self._places() if place < first]
        return self._read(max(earlier)) if earlier else State()

    def keep(self, task: Task, state: State) -> None:
        """File what a training turn, or a validation that fits a personal model, left; asked again, it is replaced.

        Raises:
            OSError: the disk is full, or will not be written to; what was there before is still there.
        """
        write_atomic(self._path(self._place(task)), to_bytes(state))

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
                self._path(place).unlink(missing_ok=True)

    def _place(self, task: Task) -> Place:
        """Where a turn stands in the order of turns; scoring a checkpoint comes after all that changes its round."""
        return (task.round, STAGES.get(task.kind, AFTER)) if task.checkpoint == "round" else (task.round, AFTER)

    def _places(self) -> list[Place]:
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def _path(self, place: Place) -> Path:
        return self.folder / f"kept-{place[0]:05d}-{place[1]}.safetensors"

    def _read(self, place: Place) -> State:
        path = self._path(place)
        try:
            return from_bytes(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
