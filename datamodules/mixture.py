"""A mixture of Gaussians of sites' intensities, by EM from sums alone.

Federated EM where sites hold different samples: in every step a site tells, for each component, the sums of
responsibilities, of values and of squared values under them; added up over sites they are those of all pixels together,
and so is the mixture. Values lie on 256 levels, so that a site's counts of these tell all such sums: they are told
once, and every step follows from their sum. (Cheng et al., 2020, have parties with different features of one sample.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.told import from_file, from_sum

Numbers = NDArray[np.float64]
LEVELS = 256
VALUES = np.linspace(0, 1, LEVELS)
SMALLEST = VALUES[1] ** 2 / 12
"""Variance of what was rounded to one level: a component is not narrower."""
GAIN, STEPS = 1e-9, 2000
"""EM ends with a step that gains less, in nats per pixel, or with so many."""


@dataclass(frozen=True)
class Levels:
    """What a site, or several together, tell of their intensities: numbers that add up.

    Attributes:
        cases: how many.
        counts: (channels, 256) pixels of each level, from 0 to 1.
    """

    cases: int
    counts: NDArray[np.int64]

    def __add__(self, other: Levels) -> Levels:
        if self.counts.shape != other.counts.shape:
            raise DataError(
                f"sites told of {len(self.counts)} and {len(other.counts)} channels; give all one data.channels"
            )
        return Levels(self.cases + other.cases, self.counts + other.counts)

    def save(self, path: Path) -> None:
        """Writes them as JSON, for whoever fits the mixture."""
        path.write_text(json.dumps({"cases": self.cases, "counts": self.counts.tolist()}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Levels:
        """Reads what `save` wrote.

        Raises:
            DataError: The file does not hold it.
        """
        return from_file(path, "levels", lambda told: cls(int(told["cases"]), np.array(told["counts"], np.int64)))

    def adds_up(self, least: int) -> bool:
        """Whether these can be the levels of so many cases or more: every channel has the same pixels."""
        whole = self.counts.ndim == 2 and self.counts.shape[1] == LEVELS and len(self.counts) > 0
        sums = self.counts.sum(axis=1) if whole else np.zeros(1)
        return bool(whole and self.cases >= least and self.counts.min() >= 0 and (sums == sums[0]).all() and sums[0])

    def words(self, sites: int) -> NDArray[np.uint64]:
        """As whole numbers whose sum modulo 2^64 is that of the levels.

        Args:
            sites: How many add theirs up.

        Raises:
            DataError: Their sum might not fit.
        """
        if self.counts.max() >= 2**63 // sites:
            raise DataError("has more pixels than masked sums of so many sites hold; tell it unmasked")
        return np.concatenate([[self.cases], self.counts.ravel()]).astype(np.uint64)

    @classmethod
    def of_words(cls, words: NDArray[np.uint64], sites: int) -> Levels:
        """Back from the sum of what sites made.

        Raises:
            DataError: It is none.
        """
        whole = len(words) % LEVELS == 1 and len(words) > 1
        return from_sum(cls(int(words[0]), words[1:].astype(np.int64).reshape(-1, LEVELS)) if whole else None, sites)


@dataclass(frozen=True)
class Mixture:
    """Gaussians, the darkest first.

    Attributes:
        shares: (K,) of all pixels; they sum to one.
        means: (K,) in [0, 1].
        deviations: (K,).
    """

    shares: Numbers
    means: Numbers
    deviations: Numbers

    @classmethod
    def start(cls, counts: NDArray[np.int64], components: int) -> Mixture:
        """Equal shares, means at quantiles, and the spread of all values: a function of the sum over sites.

        Args:
            counts: (256,) pixels of each level.
            components: K.
        """
        weights = counts / counts.sum()
        places = np.searchsorted(weights.cumsum(), (np.arange(components) + 0.5) / components)
        mean = weights @ VALUES
        spread = np.sqrt(max(weights @ (VALUES - mean) ** 2, SMALLEST))
        return cls(np.full(components, 1 / components), VALUES[places], np.full(components, spread))

    def sums(self, counts: NDArray[np.int64]) -> Numbers:
        """The E-step of a site, (3, K): responsibilities, and values and squared values under them, over its pixels."""
        logs = self._logs()
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
        sums: Numbers = np.stack([shares @ (counts * VALUES**power) for power in range(3)])
        return sums

    @classmethod
    def of(cls, sums: Numbers) -> Mixture:
        """The M-step, from the sum over sites."""
        held = np.maximum(sums[0], np.finfo(float).tiny)
        means = sums[1] / held
        variances = np.maximum(sums[2] / held - means**2, SMALLEST)
        return cls(sums[0] / sums[0].sum(), means, np.sqrt(variances))

    @classmethod
    def fit(cls, sites: Sequence[NDArray[np.int64]], components: int, steps: int = STEPS) -> Mixture:
        """EM over all pixels of all sites.

        Args:
            sites: (256,) counts of each site, or their sum alone, which gives the same.
            components: K.
            steps: of EM, at most.
        """
        counts = reduce(add, sites)
        found, before = cls.start(counts, components), -np.inf
        for _ in range(steps):
            now = found.likelihood(counts)
            if now - before < GAIN:
                break
            found, before = cls.of(reduce(add, (found.sums(own) for own in sites))), now
        order = np.argsort(found.means, kind="stable")
        return cls(found.shares[order], found.means[order], found.deviations[order])

    @classmethod
    def of_channels(cls, sites: Sequence[NDArray[np.int64]], components: int) -> list[Mixture]:
        """One for each channel.

        Args:
            sites: (channels, 256) counts of each site.
            components: K.
        """
        return [cls.fit([own[channel] for own in sites], components) for channel in range(len(sites[0]))]

    def likelihood(self, counts: NDArray[np.int64]) -> float:
        """Mean log density of pixels, in nats."""
        return float(counts @ np.logaddexp.reduce(self._logs(), axis=0) / counts.sum())

    def shares_of(self, counts: NDArray[np.int64]) -> Numbers:
        """(K,) what part of a site's pixels each component answers for."""
        held = self.sums(counts)[0]
        shares: Numbers = held / held.sum()
        return shares

    def bits_beside(self, counts: NDArray[np.int64]) -> float:
        """By how many bits per pixel a site's own mixture, of as many components, tells its pixels better than this."""
        own = Mixture.fit([counts], len(self.shares))
        return float((own.likelihood(counts) - self.likelihood(counts)) / np.log(2))

    def _logs(self) -> Numbers:
        """(K, 256) log of share times density at every level."""
        away = (VALUES - self.means[:, None]) / self.deviations[:, None]
        shares = np.maximum(self.shares, np.finfo(float).tiny)
        logs: Numbers = np.log(shares / self.deviations)[:, None] - 0.5 * (away**2 + np.log(2 * np.pi))
        return logs
