"""How long sites may train: as all did on average in the round before, and less where scores rise no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor, inf
from statistics import fmean

from fedseg.federation.selection import History
from fedseg.federation.state import State

BEST, SINCE, HALVED = "pace/best", "pace/since", "pace/halved"
"""Scalars of the server's state: the best mean validation score, validations since then, how often work was halved."""


def mean_limit(
    history: History, step_seconds: Mapping[str, float], sites: Iterable[str], models_per_step: int = 1
) -> dict[str, int]:
    """Steps of each site in a round: those up to the first that ends later than the mean of the round before.

    Seconds of a step are declared, not measured: a run is repeated with the same numbers, and resumed.

    Args:
        history: what sites told with their latest updates.
        step_seconds: of a site's local step; one that is not named needs 1.
        sites: that train.
        models_per_step: how many steps of models a site tells for a local step.

    Returns:
        Site -> steps, at least one; nothing before the second round.
    """
    latest = max((past.round for past in history.values() if past.steps), default=None)
    taken = [
        past.steps / models_per_step * step_seconds.get(site, 1.0)
        for site, past in history.items()
        if past.steps and past.round == latest
    ]
    return {site: floor(fmean(taken) / step_seconds.get(site, 1.0)) + 1 for site in sites} if taken else {}


def validated(server: State, scores: Mapping[str, float], patience: int) -> State:
    """The server's state after a validation that counts: work is halved where scores have risen no more for a while.

    Args:
        server: before it.
        scores: of the models by which the best are chosen; the shared one's, or the mean of the sites' own. Without any
            the validation does not count.
        patience: validations in a row without a better score.
    """
    if not scores:
        return server
    score = scores["global"] if "global" in scores else fmean(scores.values())
    now = dict(server.scalars)
    if score > now.get(BEST, -inf):
        now |= {BEST: score, SINCE: 0.0}
    else:
        now[SINCE] += 1.0
    if now[SINCE] >= patience:
        now |= {SINCE: 0.0, HALVED: now.get(HALVED, 0.0) + 1.0}
    return State(server.tensors, now)


def left(server: State) -> float:
    """Share of the local work that is left after all halvings."""
    return float(0.5 ** server.scalars.get(HALVED, 0.0))
