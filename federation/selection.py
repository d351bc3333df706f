"""Which sites a round asks, and how much each does: a function of the round and of what sites told before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from random import Random

from fedseg.federation.state import State

PREFIX = "history/"


@dataclass(frozen=True)
class Past:
    """What a site told when its latest update was used.

    Attributes:
        round: of that update.
        steps: local steps behind it.
        loss: their mean loss; None where the method tells none.
    """

    round: int
    steps: float
    loss: float | None


History = Mapping[str, Past]
"""By site; those of which no update was used yet are missing."""
Select = Callable[[int, History, Random], Mapping[str, float]]
"""(round, history, the round's random numbers) -> site -> share of a round's local steps that it is to do. It keeps
nothing between rounds, so that a resumed run asks the same sites."""


@dataclass(frozen=True)
class PowerOfChoice:
    """Power of choice (Cho, Wang and Joshi, AISTATS 2022): of some sites drawn by chance, those with the highest loss.

    The variant that costs nothing (rpow-d): a site's loss is the one that it told with its latest update, and a site
    that told none yet comes first. With as many candidates as are asked it is uniform sampling, bit for bit.

    Attributes:
        sites: all that can be asked.
        asked: how many are.
        candidates: how many are drawn, with the same probability.
    """

    sites: Sequence[str]
    asked: int
    candidates: int

    def __call__(self, round: int, history: History, random: Random) -> dict[str, float]:
        """All of the work for each site."""
        drawn = random.sample(list(self.sites), self.candidates)

        def loss(site: str) -> float:
            past = history.get(site)
            return inf if past is None or past.loss is None else past.loss

        return dict.fromkeys(sorted(drawn, key=loss, reverse=True)[: self.asked], 1.0)


def checked(chosen: Mapping[str, float], sites: Sequence[str]) -> dict[str, float]:
    """What a selection answered.

    Raises:
        ValueError: it asks a site that there is not, or for no share of the work.
    """
    for site, work in chosen.items():
        if site not in sites:
            raise ValueError(f"the selection asks site {site!r}; there are {', '.join(sites)}")
        if not 0 < work <= 1:
            raise ValueError(f"the selection gives site {site!r} {work:g} of its steps, not more than 0 and at most 1")
    return dict(chosen)


def history_of(server: State) -> dict[str, Past]:
    """What the server's state remembers of sites' earlier updates."""
    told: dict[str, dict[str, float]] = {}
    for name, value in server.scalars.items():
        if name.startswith(PREFIX):
            what, _, site = name.removeprefix(PREFIX).partition("/")
            told.setdefault(site, {})[what] = value
    return {site: Past(int(one["round"]), one["steps"], one.get("loss")) for site, one in told.items()}


def remembering(server: State, history: History) -> State:
    """A server's state that also remembers what sites told, and goes into checkpoints with it."""
    scalars = {k: v for k, v in server.scalars.items() if not k.startswith(PREFIX)}
    for site, past in history.items():
        known = {"round": float(past.round), "steps": past.steps, "loss": past.loss}
        scalars |= {f"{PREFIX}{what}/{site}": value for what, value in known.items() if value is not None}
    return State(server.tensors, scalars)
