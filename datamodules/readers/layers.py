"""Several mask files of one image, made one map of label ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.drawing import distinct, named
from fedseg.datamodules.readers.settings import Reading

MOST_REGIONS = 62  # bits of a signed integer


class Layer(NamedTuple):
    """What one file shows.

    Attributes:
        region: The only region that it shows; empty where it holds label ids.
        labels: (D, H, W) label ids; of a single region, any but those of ``Reading`` that no region has.
    """

    region: str
    labels: NDArray[np.uint8]


def of_region(reading: Reading) -> Reading:
    """How the mask of a single region is read: what is drawn becomes 1 where it can mean nothing else."""
    return replace(reading, ids=tuple(sorted({1, *_aside(reading)})))


def check_region(layer: Layer, reading: Reading) -> None:
    """Refuses a file of one region that holds several labels.

    Raises:
        DataError: It does.
    """
    found = [label for label in distinct(layer.labels) if label and label not in _aside(reading)]
    if layer.region and len(found) > 1:
        rules = ", ".join(f"{label}: 1" for label in found)
        raise DataError(
            f"holds the labels {named(found)}, yet it is the mask of {layer.region!r} alone; where all of them are "
            f"{layer.region!r}, set data.label_values={{{rules}}}"
        )


def combine(layers: Sequence[Layer], reading: Reading) -> NDArray[np.uint8]:
    """One label id per pixel: the smallest whose regions are exactly those that the files show there.

    A label id that the files agree on stays; where one file says that a pixel does not count, it does not.

    Args:
        layers: Of one image, at least one.
        reading: Names the regions and their ids.

    Raises:
        DataError: Files show regions together that no label id has; the message names an id that would.
    """
    if len(reading.regions) > MOST_REGIONS:
        raise DataError(f"several masks of an image can show at most {MOST_REGIONS} regions; store label ids instead")
    bit = {name: np.int64(1) << number for number, name in enumerate(reading.regions)}
    shown = np.zeros(layers[0].labels.shape, np.int64)
    ids = np.zeros(shown.shape, np.uint8)
    agreed = np.ones(shown.shape, np.bool_)
    foremost = np.zeros(shown.shape, np.uint8)
    for region, labels in layers:
        apart = _apart(Layer(region, labels), reading)
        foremost = np.where(apart, labels, foremost)
        drawn = (labels != 0) & ~apart
        if region:
            shown |= np.where(drawn & ~np.isin(labels, list(_aside(reading))), bit[region], 0)
            agreed &= ~drawn
        else:
            shown |= _bits(reading, bit)[labels]
            agreed &= ~drawn | (ids == 0) | (ids == labels)
            ids = np.where(drawn & (ids == 0), labels, ids)
    for together in np.unique(shown[~agreed]).tolist():
        names = tuple(name for name in bit if bit[name] & together)
        where = ~agreed & (shown == together)
        ids[where] = _id_of(names, reading, int(where.sum()))
    return np.where(foremost > 0, foremost, ids)


def _aside(reading: Reading) -> set[int]:
    """Label ids that no region has: they count as background, or not at all."""
    return set(reading.ids).difference(*reading.regions.values())


def _apart(layer: Layer, reading: Reading) -> NDArray[np.bool_]:
    """Where pixels do not count, and where there are unknown ids, which are refused later."""
    if layer.region:
        return np.isin(layer.labels, reading.ignored)
    return ~np.isin(layer.labels, list({0, *reading.ids}.difference(reading.ignored)))


def _bits(reading: Reading, bit: Mapping[str, np.int64]) -> NDArray[np.int64]:
    """Label id to its regions, as a sum of bits."""
    of = [[bit[name] for name, ids in reading.regions.items() if label in ids] for label in range(256)]
    return np.array([reduce(or_, bits, np.int64(0)) for bits in of])


def _id_of(names: Sequence[str], reading: Reading, pixels: int) -> int:
    """The smallest label id of exactly these regions; 0 of none."""
    for label in (0, *reading.ids):
        if label not in reading.ignored and {n for n, ids in reading.regions.items() if label in ids} == set(names):
            return label
    free = next(label for label in range(1, 256) if label not in reading.ids)
    regions = {name: [*ids, free] if name in names else [*ids] for name, ids in reading.regions.items()}
    setting = ", ".join(f"{name}: {ids}" for name, ids in regions.items())
    if len(names) == 1:
        what, cure = f"show {names[0]} alone", f"give it one, data.regions={{{setting}}}"
    else:
        what = f"show {' and '.join(names)}"
        cure = (
            f"give them one, data.regions={{{setting}}}, or correct the masks (under data.exclusive=true regions "
            "cannot overlap)"
        )
    raise DataError(f"{pixels} pixels {what}, which no label id of data.regions means; {cure}")
