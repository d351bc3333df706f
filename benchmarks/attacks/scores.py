"""How well an attack tells members from non-members."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Probability that a member's score exceeds a non-member's, ties counted half; 0.5 is chance.

    Raises:
        ValueError: one side is empty.
    """
    inside, outside = np.asarray(members, dtype=float), np.asarray(others, dtype=float)
    if not inside.size or not outside.size:
        raise ValueError("an AUC needs at least one member and one non-member")
    ranks = rankdata(np.concatenate([inside, outside]))[: inside.size]
    return float((ranks.sum() - inside.size * (inside.size + 1) / 2) / (inside.size * outside.size))


def mean_auc(pairs: list[tuple[Floats, Floats]], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean AUC over strata (sites, seeds), and its 95 % bootstrap interval; members and others are redrawn within each.

    Args:
        pairs: scores of members and of non-members, per stratum.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Mean, lower and upper bound.
    """
    rng = np.random.default_rng(seed)

    def again(scores: Floats) -> Floats:
        return rng.choice(scores, size=len(scores))

    drawn = [np.mean([auc(again(inside), again(outside)) for inside, outside in pairs]) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.mean([auc(*pair) for pair in pairs])), float(low), float(high)
