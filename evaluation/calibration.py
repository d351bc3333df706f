"""Calibration: whether regions are there as often as their probabilities say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of equal width in [0, 1], as in Guo et al. (ICML 2017)."""


class Reliability:
    """Tallies of one case: pixels by probability, slice after slice, so that no volume of probabilities is kept.

    Args:
        regions: How many there are.
    """

    def __init__(self, regions: int) -> None:
        self._pixels = np.zeros((regions, BINS))
        self._sure = np.zeros((regions, BINS))  # sums of probabilities
        self._true = np.zeros((regions, BINS))
        self._squares = np.zeros(regions)

    def add(
        self, probabilities: NDArray[np.float32], truth: NDArray[np.bool_], known: NDArray[np.bool_] | None = None
    ) -> None:
        """Takes a slice.

        Args:
            probabilities: (R, H, W) in [0, 1].
            truth: (R, H, W).
            known: (R, H, W), where labels count; None: everywhere.
        """
        for region, own in enumerate(probabilities):
            counts = np.ones(own.shape, bool) if known is None else known[region]
            chance, true = own[counts].astype(np.float64), truth[region][counts].astype(np.float64)
            bins = np.minimum((chance * BINS).astype(np.int64), BINS - 1)
            self._pixels[region] += np.bincount(bins, minlength=BINS)
            self._sure[region] += np.bincount(bins, chance, BINS)
            self._true[region] += np.bincount(bins, true, BINS)
            self._squares[region] += float(((chance - true) ** 2).sum())

    def scores(self, region: int) -> dict[str, float]:
        """Expected calibration error and Brier score of a region; NaN where no pixel counts."""
        pixels = float(self._pixels[region].sum())
        if not pixels:
            return {"ece": float("nan"), "brier": float("nan")}
        apart = float(np.abs(self._sure[region] - self._true[region]).sum())
        return {"ece": apart / pixels, "brier": float(self._squares[region]) / pixels}
