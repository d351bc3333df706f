"""How far two sites are apart, from what was counted and measured at each: pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

LEVELS = 256
FLOOR = 1e-6
"""Least amplitude that is told from none, relative to a constant image of value 1."""

Counts = NDArray[np.int64]
Numbers = NDArray[np.floating[Any]]


def grey_levels(images: NDArray[np.float32]) -> Counts:
    """(B, C, H, W) values in [0, 1] -> (C, LEVELS) pixels per value."""
    levels = np.rint(np.clip(images, 0, 1) * (LEVELS - 1)).astype(np.uint8)
    return np.stack([np.bincount(channel.ravel(), minlength=LEVELS) for channel in levels.swapaxes(0, 1)])


def intensity_distance(a: Counts, b: Counts) -> float:
    """Wasserstein-1 distance of two distributions of values: how far a pixel's value must move, on average.

    Args:
        a: (C, LEVELS) counts.
        b: likewise; the numbers of pixels may differ.

    Returns:
        The mean over channels, in [0, 1]: 1 is from black to white.
    """
    values = np.linspace(0, 1, LEVELS)
    return float(np.mean([wasserstein_distance(values, values, x, y) for x, y in zip(a, b, strict=True)]))


def size_distance(a: Numbers, b: Numbers) -> float:
    """Wasserstein-1 distance of two distributions of log2 area: 1 where structures are twice as large.

    Args:
        a: areas of the structures that there are, > 0.
        b: likewise, in the same unit.

    Returns:
        Doublings, >= 0; NaN if one of the sites shows no structure.
    """
    if not len(a) or not len(b):
        return float("nan")
    return float(wasserstein_distance(np.log2(a), np.log2(b)))


def spectrum_distance(a: Numbers, b: Numbers) -> float:
    """Root mean square difference of two mean log-amplitude spectra.

    Args:
        a: (C, n, n), from `log_amplitudes`.
        b: likewise.

    Returns:
        >= 0; ln 2 = 0.69 where all amplitudes differ by the factor 2.
    """
    return float(np.sqrt(np.mean((a - b) ** 2)))


def log_amplitudes(amplitudes: Numbers, pixels: int) -> Numbers:
    """(B, C, n, n) amplitudes of an unnormalised transform of so many pixels -> (C, n, n) mean logarithms."""
    logarithms: Numbers = np.log(amplitudes / pixels + FLOOR).mean(axis=0)
    return logarithms


def update_differences(updates: pd.DataFrame) -> pd.DataFrame:
    """How far the sites' updates were apart, as a mean over the rounds of a run.

    * ``update direction``: 1 - cosine to the weighted mean of the other sites' updates: 0 along them, 1 across.
    * ``update length``: distance of the norm to the round's mean norm, as a share of that mean.

    Args:
        updates: updates.csv of a run (`RunFolder.updates`).

    Returns:
        Columns site, other (always ""), measure, value; empty where a run noted no updates.
    """
    rounds = updates.groupby("round")["norm"].transform("mean")
    measured = {
        "update direction": 1 - updates["cosine_others"],
        "update length": (updates["norm"] - rounds).abs() / rounds.where(rounds > 0),
    }
    tables = [
        values.groupby(updates["site"]).mean().rename("value").reset_index().assign(other="", measure=measure)
        for measure, values in measured.items()
    ]
    return pd.concat(tables, ignore_index=True)[["site", "other", "measure", "value"]]
