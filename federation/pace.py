"""How long sites may train: as all did on average in the round before, and less where scores rise no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor
from statistics import fmean

from fedseg.federation.selection import History
from fedseg.federation.state import State

BEST, SINCE, HALVED, MODELS = "pace/best", "pace/since", "pace/halved", "pace/models"
"""Scalars of the server's state: the best mean validation score, validations since then, how often work was halved, and
of how many models that mean is."""


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


def counted(scores: Mapping[str, float], shared: bool, scored: Iterable[str], sites: Iterable[str]) -> dict[str, float]:
    """Scores of a validation by which the work goes; none where a site is missing: means over others are no match.

    Args:
        scores: by which the best models are chosen.
        shared: whether the method has a shared model: then its score counts alone, else the sites' own.
        scored: sites that could be scored, with validation cases or without.
        sites: that were to be.
    """
    if set(sites) - set(scored):
        return {}
    return {model: score for model, score in scores.items() if (model == "global") == shared}


def validated(server: State, scores: Mapping[str, float], patience: int) -> State:
    """The server's state after a validation: work is halved where the mean score has risen no more for a while.

    Args:
        server: before it.
        scores: of the models that count. Without any, or with fewer models than the best mean is of, the validation
            does not; with more, as sites train for the first time, the count begins anew.
        patience: validations in a row without a better score.
    """
    now = dict(server.scalars)
    if len(scores) < max(1, now.get(MODELS, 0)):
        return server
    score = fmean(scores.values())
    if len(scores) > now.get(MODELS, 0) or score > now[BEST]:
        now |= {BEST: score, SINCE: 0.0, MODELS: float(len(scores))}
    else:
        now[SINCE] += 1.0
    if now[SINCE] >= patience:
        now |= {SINCE: 0.0, HALVED: now.get(HALVED, 0.0) + 1.0}
    return State(server.tensors, now)


def left(server: State) -> float:
    """Share of the local work that is left after all halvings."""
    return float(0.5 ** server.scalars.get(HALVED, 0.0))
