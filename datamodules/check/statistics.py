"""What is counted and measured at a site, one case at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Pixels
from fedseg.datamodules.check.reading import Opened, Part
from fedseg.datamodules.consistency import (
    blank_image,
    channels_differ,
    empty_mask,
    mixed_depths,
    palettes_differ,
    planes_differ,
    segments_differ,
)
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.mixture import LEVELS
from fedseg.datamodules.readers import unknown_labels
from fedseg.datamodules.regions import Regions

LEAST_VALUE = 1 / 255  # sd of brightness
LEAST_SHARE = 0.01  # sd of a region's share of the image
FAR = 2.0  # sds between images: beyond this, sites hardly overlap


@dataclass
class RegionCounts:
    """Where a region occurs, and how large it is.

    Attributes:
        shares: Of each labelled case that shows it: its part of all pixels.
        slices: Slices that show it.
    """

    shares: list[float] = field(default_factory=list)
    slices: int = 0


@dataclass
class SiteStatistics:
    """Numbers of one site; they do not grow with the size of its images.

    Attributes:
        site: Its name.
        cases: All cases that were listed.
        official: How many have an official split.
        planned: Split to number of cases, as a run would split them.
        read: Cases whose image could be read.
        with_labels: Cases whose mask could be read.
        slices: Slices of labelled cases.
        sizes: (height, width) of images.
        depths: Slices of cases.
        channels: Channels of images.
        types: Stored types of values.
        scaled: Types of images as a network would get them: "uint8" or "float32".
        colours: Cases with the colours of their label ids, of indexed masks.
        spacings: Millimetres (slice, row, column), rounded.
        labels: Label id to pixels.
        planes: Of slices of volumes, empty where unknown.
        lowest: Smallest stored value.
        highest: Largest stored value.
        regions: Per region.
        agreement: Region to the mean Dice of pairs of raters, of each case with several masks.
        histograms: Channels of an image to (channels, 256) pixels per value, 0 to 1; none of a modality that lacks.
        means: Channels of an image to the mean values of each image; NaN of a modality that lacks.
    """

    site: str
    cases: Sequence[Case]
    planned: Mapping[str, int]
    read: int = 0
    with_labels: int = 0
    slices: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    scaled: Counter[str] = field(default_factory=Counter)
    colours: list[tuple[Case, tuple[tuple[int, str], ...]]] = field(default_factory=list)
    spacings: Counter[tuple[float, ...]] = field(default_factory=Counter)
    planes: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    lowest: float = np.inf
    highest: float = -np.inf
    regions: dict[str, RegionCounts] = field(default_factory=lambda: defaultdict(RegionCounts))
    agreement: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    histograms: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    means: dict[int, list[NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def official(self) -> int:
        """Cases with an official split."""
        return sum(case.split is not None for case in self.cases)

    def add(self, opened: Opened, regions: Regions, known: frozenset[int]) -> Iterator[Finding]:
        """Takes a decoded case; ``known`` are the label ids that may occur."""
        for part in opened.parts:
            yield from self._add_part(part, known, regions)
        if opened.image is not None:
            self.read += 1
            self.scaled[opened.image.dtype.name] += 1
            self.depths[len(opened.image)] += 1
            self.channels[opened.image.shape[-1]] += 1
            self._add_values(opened.image, opened.case.absent)
        for region, dice in opened.agreement:
            self.agreement[region].append(dice)
        if opened.labels is not None:
            self.with_labels += 1
            self.slices += len(opened.labels)
            self._add_regions(opened.labels, regions)
            yield from empty_mask(opened.case, opened.labels)

    def _add_part(self, part: Part, known: frozenset[int], regions: Regions) -> Iterator[Finding]:
        case, image = part.case, part.image
        where = {"site": case.site, "case": case.case}
        self.sizes[image.shape[1], image.shape[2]] += 1
        self.types[_type_name(image.dtype)] += 1
        if part.spacing is not None:
            self.spacings[tuple(round(side, 3) for side in part.spacing)] += 1
        self.planes[part.plane] += 1
        low, high = float(image.min()), float(image.max())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        yield from blank_image(case, image)
        if part.labels is None:
            return
        if part.colours:
            self.colours.append((case, part.colours))
        found = {int(i): int(n) for i, n in enumerate(np.bincount(part.labels.ravel(), minlength=LEVELS)) if n}
        self.labels.update(found)
        if unknown := found.keys() - known:
            what, _, cure = unknown_labels(unknown, regions.ids).partition("; ")
            pixels = sum(found[label] for label in unknown)
            yield Finding("unknown label ids", f"{what} ({pixels} pixels)", cure, file=case.mask or "", **where)

    def _add_values(self, image: Pixels, absent: Sequence[int]) -> None:
        channels, found = image.shape[-1], level_counts(image)
        means = found @ np.linspace(0, 1, LEVELS) / found.sum(axis=1)
        found[[*absent]], means[[*absent]] = 0, np.nan
        self.histograms[channels] = self.histograms.get(channels, np.zeros_like(found)) + found
        self.means[channels].append(means)

    def _add_regions(self, labels: NDArray[np.uint8], regions: Regions) -> None:
        for name, ids in regions.labels.items():
            inside = np.isin(labels, ids)
            counted = self.regions[name]
            if inside.any():
                counted.shares.append(float(inside.mean()))
                counted.slices += int(inside.any(axis=(1, 2)).sum())


def level_counts(image: Pixels) -> NDArray[np.int64]:
    """(channels, 256) pixels of each level of an image as a network gets it, (..., channels)."""
    levels = image if image.dtype == np.uint8 else np.round(image * (LEVELS - 1)).astype(np.uint8)
    return np.stack([np.bincount(levels[..., c].ravel(), minlength=LEVELS) for c in range(image.shape[-1])])


def _type_name(dtype: np.dtype[Any]) -> str:
    kinds = {"u": "unsigned", "i": "signed", "f": "float", "b": "1 bit"}
    return kinds["b"] if dtype.kind == "b" else f"{8 * dtype.itemsize} bit {kinds.get(dtype.kind, dtype.kind)}"


def moments(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and sd of values in [0, 1] from their 256 counts."""
    values = np.linspace(0, 1, LEVELS)
    weights = histogram / histogram.sum()
    mean = float(weights @ values)
    return mean, float(np.sqrt(weights @ (values - mean) ** 2))


def percentiles(histogram: NDArray[np.int64], wanted: Sequence[float]) -> list[float]:
    """Percentiles of values in [0, 1] from their 256 counts."""
    cumulative = np.cumsum(histogram) / histogram.sum()
    return [float(np.searchsorted(cumulative, percent / 100)) / (LEVELS - 1) for percent in wanted]


@dataclass(frozen=True)
class Distances:
    """How far sites lie apart in one respect.

    Attributes:
        of: What is compared, in words.
        names: Sites that have it.
        centres: (S, K) mean over a site's images.
        matrix: (S, S) differences in units of the sd between images of one site; 1 means that sites differ as much as
            images of one site do.
    """

    of: str
    names: list[str]
    centres: NDArray[np.float64]
    matrix: NDArray[np.float64]

    @property
    def farthest(self) -> tuple[int, int]:
        """The two sites that differ most."""
        i, j = np.unravel_index(int(self.matrix.argmax()), self.matrix.shape)
        return int(i), int(j)


def apart(of: str, values: Mapping[str, NDArray[np.float64]], least: float) -> Distances | None:
    """Distances between sites, of the column where they are largest.

    Args:
        of: What is compared.
        values: Site to (N, K) numbers, a row for each image.
        least: The smallest sd that means something: where images of a site are all alike, rounding is not a unit.

    Returns:
        None where it says nothing: fewer than two sites, or one image of each.
    """
    freedom = sum(len(rows) - 1 for rows in values.values())
    if len(values) < 2 or freedom < 1:
        return None
    spread = sum(((rows - rows.mean(axis=0)) ** 2).sum(axis=0) for rows in values.values())
    pooled = np.maximum(np.sqrt(spread / freedom), least)
    centres = np.stack([rows.mean(axis=0) for rows in values.values()])
    matrix = (np.abs(centres[:, None] - centres[None]) / pooled).max(axis=-1)
    return Distances(of, list(values), centres, matrix)


def brightness(sites: Sequence[SiteStatistics]) -> Distances | None:
    """Of mean values, over the sites with the most frequent number of channels, of those that no image lacks."""
    frequent = Counter(c for site in sites for c, means in site.means.items() for _ in means).most_common(1)
    means = {site.site: np.stack(site.means[n]) for site in sites for n, _ in frequent if site.means.get(n)}
    there = [~np.isnan(rows).any(axis=0) for rows in means.values()]
    shared = np.logical_and.reduce(there) if there else np.zeros(0, bool)
    return apart("brightness", {site: rows[:, shared] for site, rows in means.items()}, LEAST_VALUE)


def sizes(sites: Sequence[SiteStatistics], region: str) -> Distances | None:
    """Of a region's share of the image, over the cases that show it."""
    shares = {
        site.site: np.array(site.regions[region].shares)[:, None] for site in sites if site.regions[region].shares
    }
    return apart(f"size of {region!r}", shares, LEAST_SHARE)


def site_findings(sites: Sequence[SiteStatistics], data: MultiCenterDataModule) -> Iterator[Finding]:
    """What can be told only after all cases were read."""
    yield from channels_differ({site.site: site.channels for site in sites}, data.channels)
    yield from mixed_depths({site.site: site.scaled for site in sites}, data.reading)
    yield from planes_differ({site.site: site.planes for site in sites})
    for one in sites:
        yield from palettes_differ(one.colours, data.reading_of(one.site))
        yield from segments_differ(one.colours)
    yield from _sites_differ(sites, data.regions)


def _sites_differ(sites: Sequence[SiteStatistics], regions: Regions) -> Iterator[Finding]:
    """In which respects sites lie far apart, the largest first."""
    found = [brightness(sites), *(sizes(sites, region) for region in regions.names)]
    far = [one for one in found if one is not None and one.matrix.max() > FAR]
    far.sort(key=lambda one: -one.matrix.max())
    told = []
    for one in far:
        i, j = one.farthest
        values = ""
        if one.of != "brightness":
            values = f" ({one.centres[i, 0]:.0%} and {one.centres[j, 0]:.0%} of the image)"
        told.append(f"{one.of} of {one.names[i]} and {one.names[j]}{values} lies {one.matrix.max():.1f} sd apart")
    if told:
        what = f"most in {far[0].of}: {'; '.join(told)}"
        yield Finding("sites differ", what, "none needed: this is what federated methods are compared on")
