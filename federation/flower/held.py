"""What a site holds already does not travel again: groups of tensors of its last message, known by their digests.

With validation in every round the same state is sent to be scored and, a moment later, to be trained from. So a site
keeps the tensors of the last such message in memory, and says with each answer which digests these have
(`federation.ledger.digests`). Of groups that it holds the next message names the digest only. A site that holds them no
more, as after a restart, says so, and is sent everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedseg.federation.contract import EvaluateTask, MessageError, Task, TrainTask
from fedseg.federation.flower.records import Question
from fedseg.federation.ledger import digests
from fedseg.federation.state import State, Tensors


def spared(message: State, shown: Mapping[str, str], holds: Collection[str]) -> dict[str, str]:
    """Groups of a message that need not travel, and their digests.

    Args:
        message: what a site is to be shown.
        shown: its digests.
        holds: digests of what the site holds.
    """
    return {group: shown[group] for group, tensors in message.tensors.items() if tensors and shown[group] in holds}


def without(message: State, groups: Collection[str]) -> State:
    """A message with these groups empty, each in its place."""
    return State({g: {} if g in groups else tensors for g, tensors in message.tensors.items()}, message.scalars)


def broadcasts(task: Task | None) -> bool:
    """Whether a task comes with what a site is to hold: what it trains from, or what is scored."""
    return isinstance(task, TrainTask | EvaluateTask)


class Held:
    """The tensors of the last message to a site that was to be trained from or scored, of one run.

    Args:
        holds: whether anything is held at all.

    Attributes:
        known: digests of these tensors, by identity.
    """

    def __init__(self, holds: bool = True) -> None:
        self.known: dict[int, str] = {}
        self._holds = holds
        self._run = ""
        self._groups: dict[str, Tensors] = {}

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the groups that are held."""
        return tuple(sorted(self._groups))

    def take(self, question: Question, came: State) -> tuple[State, tuple[str, ...]]:
        """A message with all its tensors, which are held from now on; or which groups of it are lacking.

        What was held is hashed anew, so that nobody trains from tensors that something changed in memory.

        Args:
            question: names what did not come along.
            came: what did.

        Raises:
            MessageError: the question names groups that came along, or that have no place in the message.
        """
        if odd := [group for group in question.held if came.tensors.get(group) != {}]:
            raise MessageError(f"the question cannot be read (held: {len(odd)} groups came along, or have no place)")
        groups = self._groups if question.run == self._run else {}
        found = {group: groups[digest] for group, digest in question.held.items() if digest in groups}
        known: dict[int, str] = {}
        now = digests(State(found), known)
        if lacks := tuple(sorted(group for group, digest in question.held.items() if now.get(group) != digest)):
            return State(), lacks
        message = State({group: dict(found.get(group, ts)) for group, ts in came.tensors.items()}, came.scalars)
        if self._holds and broadcasts(question.task) and message.tensors:
            shown = digests(message, known)
            self._run = question.run
            self._groups = {shown[group]: dict(tensors) for group, tensors in message.tensors.items() if tensors}
            kept = {id(tensor) for tensors in self._groups.values() for tensor in tensors.values()}
            self.known = {identity: digest for identity, digest in known.items() if identity in kept}
        return message, ()
