"""From the values of a mask to label ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.readers.drawing import Tell, by_colour, distinct, drawing, named
from fedseg.datamodules.readers.kinds import Array
from fedseg.datamodules.readers.rules import COLOUR, rule
from fedseg.datamodules.readers.settings import Reading
from fedseg.datamodules.readers.stored import Stored

NOTHING = 1e-6  # below, values are an error of computing 0
NEAR = 0.01  # of a label id: a rounding error
FARTHEST = 0.1  # however coarse the steps of a scaled volume are
FEW = 8  # values: more than so many are no list of ids
HALF = "data.label_values={'>=128': 1, '<128': 0}"


def map_labels(stored: Stored, reading: Reading) -> tuple[NDArray[np.uint8], tuple[Finding, ...]]:
    """Label ids of a mask, and what should be told about them.

    ``label_values`` maps stored values to ids: the key is a grey value (``255``), a threshold (``">=128"``) or a colour
    (``"255,0,0"``); the first rule that fits a pixel wins and other pixels keep their value. Without rules, values are
    ids, with exceptions where the label 1 is the only one there is; docs/data.md has the table.

    Returns:
        (D, H, W) label ids, and findings without a place.

    Raises:
        DataError: Values that are no label ids, or that may mean different ids.
    """
    notes: list[Finding] = []
    values, white = drawing(stored, reading, notes.append)
    if stored.turned:
        _check_turned(values, white, reading)
        what = "is stored with white as zero; what is seen white is what counts as high"
        notes.append(Finding("white is zero", what, "none needed if this is so; else store it with black as zero"))
    values = _whole(values, stored, reading, notes.append)
    if reading.label_values:
        ids = _by_rules(values, white, reading)
    elif reading.binary:
        ids = _foreground(values, white, notes.append)
    else:
        ids = values
    if stored.lossy and not reading.label_values and ids is values and values.any():
        what = "JPEG changes label ids at outlines, and its values are taken as ids"
        notes.append(Finding("lossy mask", what, "store masks as PNG"))
    return _checked(ids), tuple(notes)


def _check_turned(values: Array, white: int | None, reading: Reading) -> None:
    """Label ids that a program filed with white as zero count down from white: whether it meant them is not certain."""
    found, ids = distinct(values), {0, *reading.ids}
    if reading.label_values or not reading.ids or white is None or set(found) <= {*ids, white}:
        return
    if {white - value for value in found} <= ids:
        pairs = ", ".join(f"{value}: {white - value}" for value in found)
        raise DataError(
            f"is stored with white as zero, so that it shows {named(found)}; if {named(white - v for v in found)} are "
            f"meant, set data.label_values={{{pairs}}}, or store it with black as zero"
        )


def _whole(values: Array, stored: Stored, reading: Reading, tell: Tell) -> Array:
    """Numbers that are label ids but for an error of rounding, as a scale factor leaves, made whole."""
    if values.dtype.kind != "f":
        return values
    if not np.isfinite(values).all():
        raise DataError("has values that are not finite; replace them by label ids")
    whole = np.rint(values)
    off = float(np.abs(values - whole).max())
    lowest, highest = float(values.min()), float(values.max())
    faint = NOTHING < highest < 0.5 and lowest >= 0  # ids divided by 255 are no rounding errors of 0
    if off <= min(max(NEAR, 0.51 * stored.step), FARTHEST) and not faint and not _fractions(reading):
        if off:
            what = f"values up to {off:.2g} beside a label id were rounded to it"
            cure = "none needed; label ids stored as integers without scaling stay exact"
            tell(Finding("labels rounded", what, cure))
        return whole.astype(np.int32) if max(-lowest, highest) < 2**31 else whole
    if not reading.label_values:
        raise DataError(f"has values between the label ids (a soft map?); {_thresholds(reading.ids, highest)}")
    return values


def _fractions(reading: Reading) -> bool:
    """Whether a rule parts values that rounding would make equal."""
    return any(number % 0.5 for number in _numbers(reading))


def _numbers(reading: Reading) -> list[float]:
    """All numbers in the keys of the rules."""
    return [float(number) for key in reading.label_values or {} for number in re.findall(r"\d+(?:\.\d+)?", str(key))]


def _thresholds(ids: Sequence[int], highest: float) -> str:
    """The cure of a soft map: one that keeps every id of the regions."""
    if highest < 0.5:
        return f"its highest value is {highest:.3g}, so no threshold is certain; store label ids"
    if len(ids) == 1:
        half = 0.5 if highest <= 1 else ids[0] / 2
        return f"give thresholds, data.label_values={{'>={half:g}': {ids[0]}, '<{half:g}': 0}}"
    known = sorted({0, *ids})
    if not ids or highest <= (known[-1] + known[-2]) / 2:
        return "store label ids (of one map per label, np.argmax makes them)"
    edges = [(low + high) / 2 for low, high in pairwise(known)]
    rules = [f"'>={edge:g}': {label}" for edge, label in zip(edges, known[1:], strict=True)][::-1]
    return f"round them, or give thresholds, data.label_values={{{', '.join(rules)}, '<{edges[0]:g}': 0}}"


def _by_rules(values: Array, white: int | None, reading: Reading) -> Array:
    """Values that the rules of ``label_values`` name become ids; rules for 8 bits serve for fewer bits, too."""
    mapped = _ruled(values, reading)
    if white is not None and white < 255:
        spread = _ruled(np.rint(values.astype(np.float64) * 255 / white), reading)
        for ids in (mapped, spread):
            if ids.any() and set(distinct(ids)) <= {0, *reading.ids}:
                return ids
    found, labels = distinct(values), distinct(mapped)
    soft = values.dtype.kind == "f" and min(_numbers(reading), default=0) <= max(reading.ids, default=0)
    of_ids = reading.ids and not soft and found[0] == 0 and found[-1] <= reading.ids[-1]
    if of_ids and len(labels) == 1 < len(found):
        raise DataError(
            f"holds {named(found)}, as label ids do, and data.label_values turns all of them into {labels[0]}; leave "
            "it out (masks near 0 and 255 only are read without it), or write it into the site.yaml of the sites that "
            "need it"
        )
    return mapped


def _ruled(values: Array, reading: Reading) -> Array:
    mapped = values
    for key, label in reversed(list((reading.label_values or {}).items())):  # the first rule is applied last
        mapped = np.where(rule(key)(values), np.int64(label), mapped)
    return mapped


def _foreground(values: Array, white: int | None, tell: Tell) -> Array:
    """0 and 1 where 1 is the only id and what is drawn can mean nothing else."""
    found = distinct(values)
    for top in {255, white or 255}:
        if found[-1] == top and set(found) <= {0, top}:
            return np.equal(values, top)
    if len(found) == 2 and found[0] == 0 and found[1] >= COLOUR:
        return np.equal(values, found[1])
    if values.dtype.kind in "iu" and white in (255, 65535) and _only_outlines_between(values, found, white):
        what = f"holds {len(found)} values, those between 0 and {white} at outlines only; half of {white} parts them"
        tell(Finding("lossy mask", what, "none needed; masks stored as PNG without smoothing stay exact"))
        return values > white // 2
    return values


def _only_outlines_between(values: Array, found: Sequence[int], white: int) -> bool:
    """Whether a mask is black and white, but for smooth or compressed outlines.

    A third class would fill a square of three pixels somewhere; outlines are thinner.
    """
    if len(found) <= FEW or not 7 * white // 8 <= found[-1] <= white or found[0] < 0:
        return False
    between = ((values >= white // 4) & (values < white - white // 4)).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    return not any(cv2.erode(plane, kernel, borderValue=0).any() for plane in between)


def _checked(values: Array) -> NDArray[np.uint8]:
    if values.dtype in (np.uint8, np.bool_):
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and (np.rint(values) != values).any():
        raise DataError("has values between the label ids that no rule of data.label_values names; add thresholds")
    found = distinct(values)
    if found[0] >= 0 and found[-1] <= 255:
        return values.astype(np.uint8)
    colours = [value for value in found if value >= COLOUR]
    if colours:
        many = "store it with one colour per label, without smoothing, and not as JPEG"
        cure = many if len(colours) > FEW else f"map them with {by_colour(colours)}"
        raise DataError(f"has the colours {named(found)}, which are no label ids; {cure}")
    raise DataError(
        f"has values {named(found)}, which are no label ids (0 to 255); map them with data.label_values={{VALUE: ID}}"
    )


def unknown_labels(found: Collection[int], ids: Collection[int] = ()) -> str:
    """The end of an error about label ids that no region knows.

    Args:
        found: They.
        ids: Those of the regions.
    """
    hint = ""
    if len(found) > FEW:
        cure = f"then {HALF}" if set(ids) == {1} else "store it without loss, as PNG"
        hint = f" (a compressed or smoothed mask? {cure})"
    return (
        f"{named(sorted(found))}, not in any of data.regions{hint}; add them to a region, map them "
        "with data.label_values={VALUE: ID}, or list them in data.ignore_labels (not annotated: they do not count) "
        "or in data.background_labels (they count as background)"
    )
