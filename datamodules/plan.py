"""One plan for volumes of several sites, from sums alone (after nnU-Net: Isensee et al., Nature Methods 2021).

Every site tallies the spacing and the extent of its volumes in fixed bins, and the values of its foreground. Tallies
add up, so that the plan is that of all volumes together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.told import FEWEST, from_file, from_sum

Numbers = NDArray[np.float64]
Modality = Literal["mr", "ct"]
PER_OCTAVE, OCTAVES = 32, 20
SMALLEST = 2.0**-6  # mm; bins of lengths reach to 16 m
FINEST = 2.0**36  # parts of a millimetre in masked sums, which are of whole numbers
COLDEST, BIN, BINS = -1024, 4, 1024  # Hounsfield units: from -1024 to 3071
ANISOTROPIC = 3.0  # times as thick as the next axis
SMALLEST_MAP, DEEPEST, COARSER = 4, 6, 2.0
TAILS = (0.005, 0.995)
SMALLEST_BATCH, SEEN_AT_ONCE = 2, 0.05
"""Patches of a step at least; and the share of all voxels that a step sees at most, unless it were fewer patches."""


@dataclass(frozen=True)
class Tallies:
    """What a site, or several together, tell of their volumes: numbers that add up.

    Attributes:
        cases: how many.
        lengths: (6, bins, 2): spacing along slice, row and column, then extent along them, in mm; of each bin how many
            cases there are, and the sum of their lengths.
        values: (bins,) voxels of the foreground by Hounsfield unit.
    """

    cases: int
    lengths: Numbers
    values: Numbers

    @classmethod
    def nothing(cls) -> Tallies:
        """Of no case."""
        return cls(0, np.zeros((6, PER_OCTAVE * OCTAVES, 2)), np.zeros(BINS))

    def with_case(self, shape: Sequence[int], spacing: Sequence[float], foreground: NDArray[Any]) -> Tallies:
        """And one more.

        Args:
            shape: slices, rows, columns.
            spacing: millimetres along them.
            foreground: values as stored, of all voxels of any region.
        """
        lengths = self.lengths.copy()
        for number, length in enumerate([*spacing, *(n * step for n, step in zip(shape, spacing, strict=True))]):
            place = int(np.clip(np.floor(PER_OCTAVE * np.log2(length / SMALLEST)), 0, PER_OCTAVE * OCTAVES - 1))
            lengths[number, place] += (1, length)
        places = np.clip((np.asarray(foreground, float).ravel() - COLDEST) // BIN, 0, BINS - 1).astype(int)
        return Tallies(self.cases + 1, lengths, self.values + np.bincount(places, minlength=BINS))

    def __add__(self, other: Tallies) -> Tallies:
        return Tallies(self.cases + other.cases, self.lengths + other.lengths, self.values + other.values)

    def length(self, number: int, share: float) -> float:
        """A quantile of one of the six lengths: the mean of the bin in which it lies."""
        counts, sums = self.lengths[number].T
        place = int(np.searchsorted(counts.cumsum(), max(share * self.cases, 0.5)))
        return float(sums[place] / counts[place])

    def value(self, share: float) -> float:
        """A quantile of the foreground's values, in Hounsfield units: the middle of its bin."""
        place = int(np.searchsorted(self.values.cumsum(), share * self.values.sum()))
        return float(COLDEST + BIN * (place + 0.5))

    def save(self, path: Path) -> None:
        """Writes them as JSON, for whoever makes the plan."""
        told = {"cases": self.cases, "lengths": _sparse(self.lengths), "values": _sparse(self.values)}
        path.write_text(json.dumps(told), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tallies:
        """Reads what `save` wrote.

        Raises:
            DataError: The file does not hold tallies.
        """
        empty = cls.nothing()
        return from_file(
            path,
            "tallies",
            lambda told: cls(
                int(told["cases"]), _dense(told["lengths"], empty.lengths), _dense(told["values"], empty.values)
            ),
        )

    def adds_up(self, least: int) -> bool:
        """Whether these can be the tallies of so many cases or more."""
        counts = self.lengths[..., 0].sum(axis=1)
        whole = (counts == self.cases).all() and min(self.lengths.min(), self.values.min()) >= 0
        return bool(self.cases >= least and whole)

    def words(self, sites: int) -> NDArray[np.uint64]:
        """As whole numbers whose sum modulo 2^64 is that of the tallies: (1 + 12 * bins of lengths + bins of values,).

        Args:
            sites: How many add theirs up.

        Raises:
            DataError: Their sum might not fit.
        """
        row = np.concatenate(
            [[self.cases], self.lengths[..., 0].ravel(), self.lengths[..., 1].ravel() * FINEST, self.values]
        )
        if row.max() >= 2.0**63 / sites:
            raise DataError("has more voxels or millimetres than masked sums of so many sites hold; tell it unmasked")
        words: NDArray[np.uint64] = np.rint(row).astype(np.uint64)
        return words

    @classmethod
    def of_words(cls, words: NDArray[np.uint64], sites: int) -> Tallies:
        """Back from the sum of what sites made.

        Raises:
            DataError: It is none.
        """
        empty = cls.nothing()
        bins = empty.lengths[..., 0].size
        if len(words) == 1 + 2 * bins + BINS:
            row = words.astype(np.float64)
            lengths = np.stack([row[1 : 1 + bins], row[1 + bins : 1 + 2 * bins] / FINEST], axis=-1)
            return from_sum(cls(int(words[0]), lengths.reshape(empty.lengths.shape), row[1 + 2 * bins :]), sites)
        return from_sum(None, sites)


def _sparse(array: Numbers) -> dict[str, float]:
    flat = array.ravel()
    return {str(place): float(flat[place]) for place in np.flatnonzero(flat)}


def _dense(told: Mapping[str, float], empty: Numbers) -> Numbers:
    flat = empty.ravel().copy()
    for place, value in told.items():
        if not np.isfinite(float(value)):
            raise ValueError(f"{value} is no number")
        flat[int(place)] = float(value)
    return flat.reshape(empty.shape)


@dataclass(frozen=True)
class Plan:
    """Settings that serve all sites.

    Attributes:
        resample: millimetres per voxel (slice, row, column).
        size: of a patch.
        strides: of a DynUNet, by level.
        batch: patches of a step.
        window: Hounsfield units that become 0 and 1; None but for computed tomography.
    """

    resample: tuple[float, float, float]
    size: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    batch: int = SMALLEST_BATCH
    window: tuple[float, float] | None = None

    @classmethod
    def of(cls, tallies: Tallies, voxels: int, modality: Modality) -> Plan:
        """The plan for what sites told together.

        Spacing is the median; where one axis is more than three times as thick as the next and has less than a third of
        its voxels, the thinnest tenth of it. A patch is a cube in millimetres, no larger than the median volume, of so
        many voxels at most. A level of the network halves the axes that are not coarser than twice the finest one, down
        to maps of four. A step sees two patches; more where volumes are smaller than a patch may be, but no more than
        5 % of all voxels.

        Args:
            tallies: the sum over sites.
            voxels: of a patch, at most; a step's are twice as many.
            modality: mr scales every volume by its own values; ct by a window of the foreground's.

        Raises:
            DataError: nothing was told, or too few voxels for a network of three levels.
        """
        if not tallies.cases:
            raise DataError("no site told anything; a plan needs volumes")
        spacing = [tallies.length(axis, 0.5) for axis in range(3)]
        extent = [tallies.length(3 + axis, 0.5) for axis in range(3)]
        thick = int(np.argmax(spacing))
        others = [axis for axis in range(3) if axis != thick]
        counts = [length / step for length, step in zip(extent, spacing, strict=True)]
        if spacing[thick] > ANISOTROPIC * max(spacing[axis] for axis in others) and counts[thick] * ANISOTROPIC < min(
            counts[axis] for axis in others
        ):
            spacing[thick] = max(tallies.length(thick, 0.1), *(spacing[axis] for axis in others))
        shape = [length / step for length, step in zip(extent, spacing, strict=True)]
        sides = _patch(spacing, shape, voxels)
        strides = _strides(spacing, sides)
        if len(strides) < 3:
            raise DataError(
                f"patches of {' x '.join(map(str, sides))} voxels are too small for a network of three levels; raise "
                f"voxels={voxels}"
            )
        whole = np.prod(strides, axis=0)
        size = [int(max(side // step, 1) * step) for side, step in zip(sides, whole, strict=True)]
        window = (tallies.value(TAILS[0]), tallies.value(TAILS[1])) if modality == "ct" else None
        return cls(
            cast("tuple[float, float, float]", tuple(float(f"{step:.4g}") for step in spacing)),
            (size[0], size[1], size[2]),
            tuple((int(a), int(b), int(c)) for a, b, c in strides),
            _batch(float(np.prod(size)), voxels, tallies.cases * float(np.prod(shape))),
            window,
        )

    def settings(self, name: str = "folder") -> dict[str, Any]:
        """As an experiment's file holds them; the name is that of the data set."""
        data: dict[str, Any] = {"name": name, "dimensions": 3, "resample": list(self.resample), "size": list(self.size)}
        data["batch_size"] = self.batch
        if self.window is not None:
            data |= {"intensity": "window", "window": list(self.window)}
        strides = [list(steps) for steps in self.strides]
        return {"data": data, "model": {"name": "unet3d", "architecture": "dynunet", "strides": strides}}


def _patch(spacing: Sequence[float], shape: Sequence[float], voxels: int) -> list[int]:
    """Sides of a cube in millimetres of so many voxels, where the median volume is larger; else of that."""
    sides = np.zeros(3)
    free = [0, 1, 2]
    while free:  # what a short axis leaves over goes to the others
        left = voxels / np.prod([sides[axis] for axis in range(3) if axis not in free])
        edge = (left * np.prod([spacing[axis] for axis in free])) ** (1 / len(free))
        short = [axis for axis in free if shape[axis] <= edge / spacing[axis]]
        for axis in short or free:
            sides[axis] = shape[axis] if short else edge / spacing[axis]
        free = [axis for axis in free if axis not in short] if short else []
    return [max(int(side + 1e-6), 1) for side in sides]


def _batch(patch: float, voxels: int, everything: float) -> int:
    """How many patches a step sees; all three are voxels: of a patch, of one at most, of all volumes."""
    affordable = round(SMALLEST_BATCH * voxels / patch)
    return max(SMALLEST_BATCH, min(affordable, round(SEEN_AT_ONCE * everything / patch)))


def _strides(spacing: Sequence[float], sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Steps of every level; the first one is at full size."""
    steps: list[tuple[int, ...]] = [(1, 1, 1)]
    step, left = list(spacing), list(sides)
    while len(steps) < DEEPEST:
        halved = tuple(
            2 if left[axis] >= 2 * SMALLEST_MAP and step[axis] < COARSER * min(step) else 1 for axis in range(3)
        )
        if halved == (1, 1, 1):
            break
        steps.append(halved)
        step = [length * factor for length, factor in zip(step, halved, strict=True)]
        left = [side // factor for side, factor in zip(left, halved, strict=True)]
    return steps


def tally(site: str, cases: Iterable[tuple[Sequence[int], Sequence[float], NDArray[Any]]]) -> Tallies:
    """What a site tells of its cases: shape, spacing, and the foreground's values of each.

    Raises:
        DataError: They are too few to be told of.
    """
    found = Tallies.nothing()
    for shape, spacing, foreground in cases:
        found = found.with_case(shape, spacing, foreground)
    if found.cases < FEWEST:
        raise DataError(
            f"site {site!r}: {found.cases} labelled volumes are too few to tell sums of, which would be their own; "
            f"{FEWEST} are needed"
        )
    return found
