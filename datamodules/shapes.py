"""One shape model of the masks of several sites, from exact sums alone (after Fed-Sim: Li et al., MICCAI 2020).

A mask is told by signed distances to the outlines of its regions, on a small grid and as whole numbers. Sums over masks
of these and of their products are exact in whatever order they are added up, so that the model is that of all masks
together, bit for bit. It is a Gaussian of few principal directions, from which masks can be drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.regions import Regions
from fedseg.datamodules.told import from_file, from_sum

Whole = NDArray[np.int64]
Numbers = NDArray[np.float64]
Labels = NDArray[np.uint8]
GRID = 16
"""Cells along either side of an image."""
FINE = 2**15
"""Whole numbers from 0 to the farthest distance that is told, which is half an image's side."""
EXPLAINED = 0.98
"""Share of the variance that a model's directions have at least."""
HEADER = 2
"""Words before the sums: cases, and the mark of the regions."""
MARKS = 2**20
"""Numbers that regions are told apart by."""
MOST_REGIONS = 32
TRIES = 100
"""Draws after which no mask can be expected to come any more."""


def distances(shown: NDArray[np.bool_]) -> Whole:
    """How far every cell is from the outline of every region: negative inside.

    Args:
        shown: (R, h, w) where each region is.

    Returns:
        (R, GRID, GRID) whole numbers from -FINE to FINE, in units of half an image's side over FINE; FINE everywhere
        for a region that is not there.
    """
    steps = [2 / side for side in shown.shape[1:]]
    signed = np.ones(shown.shape)
    for place, region in enumerate(shown):
        if region.all():
            signed[place] = -1
        elif region.any():
            signed[place] = distance_transform_edt(~region, steps) - distance_transform_edt(region, steps)
    small = [cv2.resize(plane, (GRID, GRID), interpolation=cv2.INTER_AREA) for plane in signed.clip(-1, 1)]
    told: Whole = np.rint(np.stack(small) * FINE).astype(np.int64)
    return told


def mark(regions: Regions) -> int:
    """A number that tells these regions from others, by their names and labels in order."""
    text = json.dumps([[name, sorted(ids)] for name, ids in regions.labels.items()])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % MARKS


@dataclass(frozen=True)
class Shapes:
    """What a site, or several together, tell of the shapes of their masks: sums.

    Attributes:
        cases: how many masks are behind it.
        mark: of the regions.
        shown: (R,) how many masks show each region.
        first: (R * GRID * GRID,) the sum of their distances.
        second: (R * GRID * GRID, the same) the sum of products of these.
    """

    cases: int
    mark: int
    shown: Whole
    first: Whole
    second: Whole

    @classmethod
    def of(cls, masks: Iterable[Labels], regions: Regions) -> Shapes:
        """Of masks of (h, w) label ids.

        Raises:
            DataError: there are more regions than shapes are told of.
        """
        if len(regions.names) > MOST_REGIONS:
            raise DataError(f"shapes of {len(regions.names)} regions are too many; {MOST_REGIONS} at most")
        maps = [np.stack([np.isin(mask, ids) for ids in regions.labels.values()]) for mask in masks]
        rows = np.array([distances(each).ravel() for each in maps], np.int64).reshape(len(maps), _width(regions.names))
        shown = np.array([each.any(axis=(1, 2)) for each in maps], np.int64).reshape(len(maps), -1)
        return cls(len(maps), mark(regions), shown.sum(axis=0), rows.sum(axis=0), rows.T @ rows)

    def __add__(self, other: Shapes) -> Shapes:
        """Of both together.

        Raises:
            DataError: they are of different regions.
        """
        if self.mark != other.mark or len(self.first) != len(other.first):
            raise DataError("sites tell shapes of different regions; give all of them the same data.regions")
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("cases", "shown", "first", "second")}
        return Shapes(mark=self.mark, **sums)

    def save(self, path: Path) -> None:
        """Writes them as JSON, for whoever makes the model."""
        words = [int(word) for word in self._row()]
        path.write_text(json.dumps({"shapes": words}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Shapes:
        """Reads what `save` wrote.

        Raises:
            DataError: The file does not hold shapes.
        """
        return from_file(path, "shapes", lambda told: cls._of_row(np.array(told["shapes"], np.int64)))

    def adds_up(self, least: int) -> bool:
        """Whether these can be the sums of so many masks or more."""
        squares = self.second.diagonal()
        most = self.cases * FINE
        possible = self.cases >= least and (np.abs(self.first) <= most).all() and (squares <= most * FINE).all()
        counted = self.shown.min() >= 0 and self.shown.max() <= self.cases and 0 <= self.mark < MARKS
        # a sum of n numbers has a square of at most n times the sum of their squares
        spread = (self.first.astype(float) ** 2 <= self.cases * squares.astype(float) * (1 + 1e-9)).all()
        return bool(possible and counted and spread)

    def words(self, sites: int) -> NDArray[np.uint64]:
        """As whole numbers whose sum modulo 2^64 is that of the shapes.

        Args:
            sites: How many add theirs up.

        Raises:
            DataError: Their sum might not fit.
        """
        if self.cases * FINE**2 >= 2**62 // sites:
            raise DataError("has more masks than masked sums of so many sites hold; tell it unmasked")
        words: NDArray[np.uint64] = self._row().view(np.uint64)  # negative ones as their complements: sums are the same
        return words

    @classmethod
    def of_words(cls, words: NDArray[np.uint64], sites: int) -> Shapes:
        """Back from the sum of what sites made.

        Raises:
            DataError: It is none, or sites told of different regions.
        """
        row: Whole = words.view(np.int64).copy()
        if not _regions_of(len(row)):
            return from_sum(None, sites)
        marks = int(row[1])
        if marks % sites or not 0 <= marks // sites < MARKS:
            raise DataError(
                "the sites told shapes of different regions, or a file was changed on its way; give all of them the "
                "same data.regions, and begin anew, with new keys"
            )
        row[1] = marks // sites
        return from_sum(cls._of_row(row), sites)

    def _row(self) -> Whole:
        corner = self.second[np.triu_indices(len(self.first))]
        return np.concatenate([[self.cases, self.mark], self.shown, self.first, corner]).astype(np.int64)

    @classmethod
    def _of_row(cls, row: Whole) -> Shapes:
        regions = _regions_of(len(row))
        if not regions:
            raise ValueError(f"{len(row)} numbers are no sums over masks")
        width = _width(range(regions))
        shown, first, corner = np.split(row[HEADER:], np.cumsum([regions, width]))
        second = np.zeros((width, width), np.int64)
        second[np.triu_indices(width)] = corner
        return cls(int(row[0]), int(row[1]), shown, first, np.asarray(second + np.triu(second, 1).T))


def _width(regions: Sequence[object]) -> int:
    return len(regions) * GRID * GRID


def _regions_of(count: int) -> int:
    """Of how many regions so many words are; 0 where they are none."""
    for regions in range(1, MOST_REGIONS + 1):
        width = _width(range(regions))
        if HEADER + regions + width + width * (width + 1) // 2 == count:
            return regions
    return 0


@dataclass(frozen=True)
class ShapeModel:
    """A Gaussian of masks' distances, in units of half an image's side.

    Attributes:
        cases: masks that it was made of.
        mark: of their regions.
        shown: (R,) how many of them show each region.
        mean: (R, GRID, GRID).
        directions: (K, R, GRID, GRID) orthonormal, from the one of the largest deviation to that of the least.
        deviations: (K,) of masks along them.
    """

    cases: int
    mark: int
    shown: Numbers
    mean: Numbers
    directions: Numbers
    deviations: Numbers

    @classmethod
    def of(cls, shapes: Shapes, explained: float = EXPLAINED) -> ShapeModel:
        """The model of all masks whose sums these are: mean and principal directions.

        Args:
            shapes: sums, of all sites.
            explained: share of the variance that the directions have at least, in (0, 1].

        Raises:
            DataError: they are of fewer than two masks.
        """
        count = shapes.cases
        if count < 2:
            raise DataError(f"a model of shapes needs two masks or more, these are sums of {count}")
        mean = shapes.first / count
        covariance = (shapes.second - np.outer(mean, shapes.first)) / (count - 1) / FINE**2
        found, vectors = np.linalg.eigh(covariance)
        variances = found[::-1].clip(min=0)
        share = np.cumsum(variances) / max(variances.sum(), np.finfo(float).tiny)
        kept = min(int(np.searchsorted(share, explained - 1e-12)) + 1, count - 1, len(share))
        directions = vectors[:, ::-1][:, :kept].T
        strongest = directions[np.arange(kept), np.abs(directions).argmax(axis=1)]
        directions = directions * np.where(strongest < 0, -1, 1)[:, None]  # a direction has two signs; this is one
        shape = (-1, GRID, GRID)
        return cls(
            count,
            shapes.mark,
            shapes.shown.astype(float),
            (mean / FINE).reshape(shape),
            directions.reshape(kept, *shape),
            np.sqrt(variances[:kept]),
        )

    def drawn(self, count: int, random: np.random.Generator) -> Numbers:
        """So many new masks' distances, (N, R, GRID, GRID)."""
        amounts = random.normal(size=(count, len(self.deviations))) * self.deviations
        found: Numbers = self.mean + np.tensordot(amounts, self.directions, axes=1)
        return found

    def check(self, regions: Regions) -> None:
        """Before anything is made of the model.

        Raises:
            DataError: it is of other regions.
        """
        if self.mark != mark(regions):
            raise DataError(
                f"the shapes are not those of {', '.join(regions.names)}; give the data.regions by which they were told"
            )

    def masks(self, count: int, regions: Regions, sides: Sequence[int], random: np.random.Generator) -> list[Labels]:
        """So many new masks of (h, w) label ids; each shows the regions that every mask showed.

        Args:
            count: of masks.
            regions: what the model's masks showed.
            sides: height and width.
            random: draws them.

        Raises:
            DataError: the model is of other regions, or draws next to no mask that shows them.
        """
        self.check(regions)
        always = [ids for ids, shown in zip(regions.labels.values(), self.shown, strict=True) if shown == self.cases]
        found: list[Labels] = []
        for _ in range(TRIES):
            drawn = (labels_of(signed, regions, sides) for signed in self.drawn(count, random))
            found += [mask for mask in drawn if all(np.isin(mask, ids).any() for ids in always)]
            if len(found) >= count:
                return found[:count]
        raise DataError(
            f"of {TRIES * count} masks that were drawn {len(found)} show all regions; the shapes are too few"
        )

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        told = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        path.write_text(json.dumps(told), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ShapeModel:
        """Reads what `save` wrote.

        Raises:
            DataError: The file does not hold a model.
        """
        return from_file(path, "model of shapes", _model)

    def adds_up(self, least: int) -> bool:
        """Whether this can be a model of so many masks or more."""
        finite = all(np.isfinite(part).all() for part in (self.mean, self.directions, self.deviations))
        return bool(self.cases >= least and finite and (self.deviations >= 0).all())


def _model(told: Any) -> ShapeModel:
    numbers = {name: np.array(told[name], float) for name in ("shown", "mean", "directions", "deviations")}
    mean, directions = numbers["mean"], numbers["directions"]
    fits = mean.shape[1:] == (GRID, GRID) and numbers["shown"].shape == (len(mean),)
    if not fits or directions.shape != (len(numbers["deviations"]), *mean.shape):
        raise ValueError(f"a mean of {mean.shape} and directions of {directions.shape} do not go together")
    return ShapeModel(int(told["cases"]), int(told["mark"]), **numbers)


def labels_of(signed: Numbers, regions: Regions, sides: Sequence[int]) -> Labels:
    """The mask that distances tell of.

    A pixel takes the label, or the background, for which the distances have to be moved the least: regions that
    contradict each other make a mask all the same.

    Args:
        signed: (R, GRID, GRID) in units of half an image's side.
        regions: what they are of.
        sides: height and width of the mask.
    """
    height, width = sides
    fine = np.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in signed])
    ids = (0, *sorted(regions.ids))
    inside = np.array([[label in own for own in regions.labels.values()] for label in ids])
    moved = np.where(inside[:, :, None, None], fine.clip(min=0), (-fine).clip(min=0)).sum(axis=1)
    found: Labels = np.array(ids, np.uint8)[moved.argmin(axis=0)]
    return found
