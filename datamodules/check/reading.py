"""Decodes a case for a check: each file once, and as much as can be read of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, Pixels, Sample
from datamodules.errors import DataError
from datamodules.findings import Finding
from datamodules.readers import (
    GRID_CURE,
    PLACE_CURE,
    Spacing,
    Stored,
    cutting,
    ids_by_colour,
    load_file,
    map_labels,
    misplaced,
    scale,
    seen,
    sides,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """What one image file of a case holds; a case is one part, or the slices of a stack.

    Attributes:
        case: The case, or the slice.
        image: (D, H, W, C) as stored.
        labels: (D, H, W) label ids; None without a readable mask.
        spacing: Millimetres per voxel, or None.
        colours: Label ids and their colours, of an indexed mask.
        plane: Of a volume's slices in the patient; empty where unknown.
    """

    case: Case
    image: Array
    labels: NDArray[np.uint8] | None
    spacing: Spacing | None
    colours: tuple[tuple[int, str], ...] = ()
    plane: str = ""


@dataclass(frozen=True)
class Opened:
    """A decoded case.

    Attributes:
        case: The case.
        parts: What could be read, in order.
        image: (D, H, W, C) as a network would get it: uint8, or float32 in [0, 1]; None when the parts do not fit.
        labels: (D, H, W) label ids; None unless every part has them.
    """

    case: Case
    parts: tuple[Part, ...]
    image: Pixels | None
    labels: NDArray[np.uint8] | None


def open_case(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Opened:
    """Decodes a case and reports what is wrong with it."""
    if type(data).read is not MultiCenterDataModule.read:
        return _by_module(data, case, findings)
    parts = tuple(part for place in case.slices or (case,) if (part := _part(data, place, findings)) is not None)
    kinds = sorted({f"{sides(part.image.shape[1:])} {part.image.dtype}" for part in parts})
    if len(kinds) > 1:
        what, cure = f"slices of {', '.join(kinds)}", "export them alike, or set data.stack_slices=false"
        findings.append(Finding("slices differ", what, cure, case.site, case.case))
        return Opened(case, parts, None, None)
    if not parts:
        return Opened(case, parts, None, None)
    try:
        image = scale(
            np.concatenate([part.image for part in parts]),
            data.reading_of(case.site),
            channelwise=bool(parts[0].plane),
        )
    except DataError as error:
        findings.append(Finding.of_error("image values", error, site=case.site, case=case.case, file=case.image))
        return Opened(case, parts, None, None)
    return Opened(case, parts, image, _joined(parts))


def _by_module(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Opened:
    """For data sets that decode in their own way: all of a case or nothing."""
    try:
        sample = data.read(case)
    except DataError as error:
        findings.append(Finding.of_error("unreadable file", error, site=case.site, case=case.case, file=case.image))
        return Opened(case, (), None, None)
    findings.extend(sample.notes)
    return Opened(case, _sliced(case, sample), sample.image, sample.labels)


def _sliced(case: Case, sample: Sample) -> tuple[Part, ...]:
    if not case.slices:
        return (Part(case, sample.image, sample.labels, sample.spacing, plane=sample.plane),)
    labels = sample.labels
    return tuple(
        Part(place, sample.image[k : k + 1], None if labels is None else labels[k : k + 1], sample.spacing)
        for k, place in enumerate(case.slices)
    )


def _part(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Part | None:
    opened = _open(data, case, "image", findings)
    image = None if opened is None else seen(opened)
    if opened is not None:
        findings.extend(cutting(case, opened, data.reading_of(case.site)))
    labels, colours = _labels(data, case, image, findings)
    return (
        None
        if opened is None or image is None
        else Part(case, image, labels, data.reading_of(case.site).spacing_of(opened.spacing), colours, opened.plane)
    )


def _open(
    data: MultiCenterDataModule, case: Case, role: Literal["image", "mask"], findings: list[Finding]
) -> Stored | None:
    file = case.image if role == "image" else case.mask or ""
    try:
        return load_file(case, file, data.reading_of(case.site), role)
    except DataError as error:
        findings.append(Finding.of_error("unreadable file", error, site=case.site, case=case.case, file=file))
        return None


def _labels(
    data: MultiCenterDataModule, case: Case, image: Array | None, findings: list[Finding]
) -> tuple[NDArray[np.uint8] | None, tuple[tuple[int, str], ...]]:
    if not case.mask or (stored := _open(data, case, "mask", findings)) is None:
        return None, ()
    where = {"site": case.site, "case": case.case, "file": case.mask}
    if image is not None and stored.values.shape[:3] != image.shape[:3]:
        what = f"the mask is {_sides(stored.values)}, its image {Path(case.image).name} {_sides(image)}"
        findings.append(Finding("size mismatch", what, GRID_CURE, **where))
        return None, ()
    if image is not None and (told := misplaced(case, data.reading_of(case.site))):
        findings.append(Finding("geometry mismatch", f"the mask {told}", PLACE_CURE, **where))
    try:
        labels, notes = map_labels(stored, data.reading_of(case.site))
    except DataError as error:
        findings.append(Finding.of_error("mask values", error, **where))
        return None, ()
    findings.extend(replace(note, **where) for note in notes)
    return labels, ids_by_colour(stored, data.reading_of(case.site))


def _joined(parts: tuple[Part, ...]) -> NDArray[np.uint8] | None:
    labels = [part.labels for part in parts if part.labels is not None]
    return np.concatenate(labels) if len(labels) == len(parts) else None


def _sides(array: Array) -> str:
    """Slices (if any), height, width."""
    sides = array.shape[:3] if array.shape[0] > 1 else array.shape[1:3]
    return " x ".join(str(side) for side in sides)
