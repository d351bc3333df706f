"""How long sites may train: no longer than all did on average in the round before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor
from statistics import fmean

from fedseg.federation.selection import History


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
