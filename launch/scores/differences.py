"""How different the sites of an experiment are: what their images and masks show, and how their training went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from fedseg.algorithms.functional.fourier import low_frequency_amplitude
from fedseg.datamodules import Regions, SiteData
from fedseg.evaluation.heterogeneity import (
    Counts,
    Numbers,
    grey_levels,
    intensity_distance,
    log_amplitudes,
    size_distance,
    spectrum_distance,
)
from fedseg.launch.experiment import Experiment

COLUMNS = ("site", "other", "measure", "value")
CYCLES = 4
"""Highest frequency of the spectra that are compared, in cycles per image."""


def _slices(images: Tensor) -> Tensor:
    """(N, C, h, w) of images or volumes."""
    return images.movedim(2, 1).flatten(0, 1) if images.ndim == 5 else images


@dataclass(frozen=True)
class Traits:
    """What the training cases of a site, or of several together, look like on the network's grid.

    Attributes:
        images: training images (slices of volumes), labelled or not.
        levels: (C, 256) pixels per value, over all images.
        amplitudes: (C, n, n) mean log amplitude of low frequencies, over all images.
        slices: labelled training slices.
        areas: region -> pixels of the region, one number for each slice that shows it.
    """

    images: int
    levels: Counts
    amplitudes: Numbers
    slices: int
    areas: dict[str, Numbers]

    @classmethod
    def of(cls, site: SiteData, regions: Regions) -> Traits:
        """Look at one site."""
        levels: list[Counts] = []
        spectra: list[Numbers] = []
        counts: list[int] = []
        for batch in site.plain_batches():
            images = _slices(batch["image"])
            height, width = images.shape[-2:]
            amplitudes = low_frequency_amplitude(images, min(CYCLES, min(height, width) // 2))
            levels.append(grey_levels(images.numpy()))
            spectra.append(log_amplitudes(amplitudes.numpy(), height * width))
            counts.append(len(images))
        areas: dict[str, list[Numbers]] = {name: [] for name in regions.labels}
        slices = 0
        for case in site.cases("train"):
            truth = site.truth(case)
            slices += len(truth)
            for name, ids in regions.labels.items():
                shown = np.isin(truth, ids).sum(axis=(1, 2)).astype(np.float64)
                areas[name].append(shown[shown > 0])
        flat = {name: np.concatenate([np.empty(0), *found]) for name, found in areas.items()}
        mean = np.average(np.stack(spectra), axis=0, weights=counts)
        return cls(sum(counts), np.sum(levels, axis=0), mean, slices, flat)

    @classmethod
    def together(cls, sites: Sequence[Traits]) -> Traits:
        """Several sites as one; a site counts by its images."""
        amplitudes = np.average([site.amplitudes for site in sites], axis=0, weights=[site.images for site in sites])
        areas = {name: np.concatenate([site.areas[name] for site in sites]) for name in sites[0].areas}
        levels = np.sum([site.levels for site in sites], axis=0)
        return cls(sum(s.images for s in sites), levels, amplitudes, sum(s.slices for s in sites), areas)

    def differences(self, other: Traits) -> dict[str, float]:
        """Every measure of the distance to another site; NaN where one has no labels or never shows a region."""
        found = {
            "intensity": intensity_distance(self.levels, other.levels),
            "spectrum": spectrum_distance(self.amplitudes, other.amplitudes),
        }
        for name in self.areas:
            found[f"size/{name}"] = size_distance(self.areas[name], other.areas[name])
            found[f"presence/{name}"] = abs(self._presence(name) - other._presence(name))
        return found

    def _presence(self, region: str) -> float:
        return len(self.areas[region]) / self.slices if self.slices else float("nan")


def site_differences(experiment: Experiment) -> pd.DataFrame:
    """How far sites that train are apart, by their training cases on the network's grid; no other case counts.

    * ``intensity``: Wasserstein distance of the distributions of values, mean over channels, in [0, 1].
    * ``spectrum``: root mean square difference of mean log amplitudes up to `CYCLES` cycles per image.
    * ``size/REGION``: Wasserstein distance of log2 area over slices that show the region: 1 where twice as large.
    * ``presence/REGION``: difference of the shares of slices that show the region, in [0, 1].

    Args:
        experiment: its data is read if that was not done yet.

    Returns:
        Columns site, other, measure, value; ``other`` is "" for all other sites together. Empty with one site.

    Raises:
        DataError: the data cannot be read.
    """
    experiment.data.setup()
    data = experiment.data
    traits = {name: Traits.of(data.site(name), data.regions) for name in data.sites}
    rows = [(a, b, measure, value) for a, b, found in _compared(traits) for measure, value in found.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _compared(traits: dict[str, Traits]) -> Iterator[tuple[str, str, dict[str, float]]]:
    known: dict[frozenset[str], dict[str, float]] = {}
    for name, own in traits.items():
        others = {other: theirs for other, theirs in traits.items() if other != name}
        for other, theirs in others.items():
            pair = frozenset((name, other))
            if pair not in known:
                known[pair] = own.differences(theirs)
            yield name, other, known[pair]
        if others:
            yield name, "", own.differences(Traits.together(list(others.values())))
