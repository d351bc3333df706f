"""Which sites a round asks, and how much each does: a function of the round and of what sites told before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from random import Random
from statistics import median
from typing import Protocol, runtime_checkable

from fedseg.federation.state import State, Update

PREFIX = "history/"


@dataclass(frozen=True)
class Past:
    """What a site told when its latest update was used.

    Attributes:
        round: of that update.
        steps: local steps behind it.
        loss: their mean loss; None where the method tells none.
        examples: training images behind it.
        distance: of its labels from all sites', where it was asked for them before round 1.
        strength: that a selection counts for it.
    """

    round: int
    steps: float
    loss: float | None
    examples: float = 0.0
    distance: float | None = None
    strength: float | None = None


History = Mapping[str, Past]
"""By site; those of which no update was used yet are missing, or of round 0 where they introduced themselves."""


@runtime_checkable
class Remembering(Protocol):
    """A selection that makes more of what sites told than their latest updates."""

    def __call__(self, round: int, history: History, random: Random) -> Mapping[str, float]:
        """As any selection."""

    @property
    def topic(self) -> str:
        """What sites are asked for when they introduce themselves, and the group of their answer; empty for nothing."""

    def probabilities(self, history: History) -> dict[str, float]:
        """Of each site, to be in a round."""

    def introduced(self, introductions: Mapping[str, Update]) -> dict[str, Past]:
        """What is known of sites before round 1.

        Raises:
            ValueError: an answer cannot be used.
        """

    def remembered(self, history: History, told: History) -> dict[str, Past]:
        """What is known after a round, from what was known before it and what sites told in it."""


Select = Callable[[int, History, Random], Mapping[str, float]] | Remembering
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


@dataclass(frozen=True)
class Pruning:
    """The fastest sites that hold a share of the images, as slow ones are pruned by Yin et al. (BrainLes 2021).

    Sites as fast as the last one that is needed come along, so that their order plays no part. In every `every`-th
    round all sites are asked, and one that has told nothing yet is asked in every round.

    Attributes:
        sites: all that can be asked.
        step_seconds: of a site's local step; one that is not named needs 1.
        images: share of all images that the sites of a round hold at least, as far as the factor lets them.
        factor: how many times the median time a site may need.
        every: so many rounds apart all take part.
    """

    sites: Sequence[str]
    step_seconds: Mapping[str, float]
    images: float
    factor: float
    every: int

    def __call__(self, round: int, history: History, random: Random) -> dict[str, float]:
        """All of the work for each site."""
        times = {s: history[s].steps * self.step_seconds.get(s, 1.0) for s in self.sites if s in history}
        if round % self.every == 0 or not times:
            return dict.fromkeys(self.sites, 1.0)
        enough = self.images * sum(history[site].examples for site in times)
        slowest, held = 0.0, 0.0
        for site in sorted(times, key=times.__getitem__):
            if held >= enough and times[site] > slowest:
                break
            slowest, held = times[site], held + history[site].examples
        slowest = min(slowest, self.factor * median(times.values()))
        return {site: 1.0 for site in self.sites if times.get(site, 0.0) <= slowest}


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
    return {
        site: Past(
            int(one["round"]),
            one["steps"],
            one.get("loss"),
            one.get("examples", 0.0),
            one.get("distance"),
            one.get("strength"),
        )
        for site, one in told.items()
    }


def remembering(server: State, history: History) -> State:
    """A server's state that also remembers what sites told, and goes into checkpoints with it."""
    scalars = {k: v for k, v in server.scalars.items() if not k.startswith(PREFIX)}
    for site, past in history.items():
        scalars |= {f"{PREFIX}{what}/{site}": float(value) for what, value in asdict(past).items() if value is not None}
    return State(server.tensors, scalars)
