"""Decodes a case for a check: each file once, and as much as can be read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Pixels, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding, few
from fedseg.datamodules.readers import (
    GRID_CURE,
    PLACE_CURE,
    Layer,
    Reading,
    Role,
    Spacing,
    Stored,
    as_layer,
    combine,
    cutting,
    ids_by_colour,
    join,
    kind,
    load_file,
    misplaced,
    nothing,
    seen,
    settled,
    with_absent,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """What one image file of a case holds; a case is one part, or the slices of a stack.

    Attributes:
        case: The case, or the slice.
        images: (D, H, W, C) as stored, one for each modality.
        labels: (D, H, W) label ids; None without a readable mask.
        spacing: Millimetres per voxel, or None.
        colours: Label ids and their colours, of an indexed mask.
        plane: Of a volume's slices in the patient; empty where unknown.
        raters: Label ids of each of several raters; ``labels`` are of the first.
    """

    case: Case
    images: tuple[Array, ...]
    labels: NDArray[np.uint8] | None
    spacing: Spacing | None
    colours: tuple[tuple[int, str], ...] = ()
    plane: str = ""
    raters: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def image(self) -> Array:
        """(D, H, W, C) as stored, the modalities as channels."""
        return self.images[0] if len(self.images) == 1 else np.concatenate(self.images, axis=-1)


@dataclass(frozen=True)
class Opened:
    """A decoded case.

    Attributes:
        case: The case.
        parts: What could be read, in order.
        image: (D, H, W, C) as a network would get it: uint8, or float32 in [0, 1]; None when the parts do not fit.
        labels: (D, H, W) label ids; None unless every part has them.
        agreement: Regions and the mean Dice of pairs of raters, where there are several.
    """

    case: Case
    parts: tuple[Part, ...]
    image: Pixels | None
    labels: NDArray[np.uint8] | None
    agreement: tuple[tuple[str, float], ...] = ()


def open_case(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Opened:
    """Decodes a case and reports what is wrong with it."""
    if type(data).read is not MultiCenterDataModule.read:
        return _by_module(data, case, findings)
    parts = tuple(part for place in case.slices or (case,) if (part := _part(data, place, findings)) is not None)
    kinds = sorted({kind(part.images) for part in parts})
    if len(kinds) > 1:
        what, cure = f"slices of {', '.join(kinds)}", "export them alike, or set data.stack_slices=false"
        findings.append(Finding("slices differ", what, cure, case.site, case.case))
        return Opened(case, parts, None, None)
    if not parts:
        return Opened(case, parts, None, None)
    try:
        stored = [part.images for part in parts]
        image = join(stored, data.reading_of(case.site), channelwise=bool(parts[0].plane))
    except DataError as error:
        findings.append(Finding.of_error("image values", error, site=case.site, case=case.case, file=case.image))
        return Opened(case, parts, None, None)
    opened = Opened(case, parts, with_absent(image, case), _joined(parts))
    return _agreed(opened, image, data.reading_of(case.site), findings) if parts[0].raters else opened


def _agreed(opened: Opened, image: Pixels, reading: Reading, findings: list[Finding]) -> Opened:
    """A case of several raters with the truth that is made of their masks."""
    case, parts = opened.case, opened.parts
    if opened.labels is None:
        return opened
    masks = {rater: np.concatenate([part.raters[rater] for part in parts]) for rater in parts[0].raters}
    try:
        sample = settled(Sample(image, None), masks, reading)
    except DataError as error:
        findings.append(Finding.of_error("mask values", error, site=case.site, case=case.case, file=case.mask or ""))
        return replace(opened, labels=None)
    return replace(opened, labels=sample.labels, agreement=sample.agreement)


def _by_module(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Opened:
    """For data sets that decode in their own way: all of a case or nothing."""
    try:
        sample = data.read(case)
    except DataError as error:
        findings.append(Finding.of_error("unreadable file", error, site=case.site, case=case.case, file=case.image))
        return Opened(case, (), None, None)
    findings.extend(sample.notes)
    return Opened(case, _sliced(case, sample), sample.image, sample.labels, sample.agreement)


def _sliced(case: Case, sample: Sample) -> tuple[Part, ...]:
    if not case.slices:
        return (Part(case, (sample.image,), sample.labels, sample.spacing, plane=sample.plane),)
    labels = sample.labels
    return tuple(
        Part(place, (sample.image[k : k + 1],), None if labels is None else labels[k : k + 1], sample.spacing)
        for k, place in enumerate(case.slices)
    )


def _part(data: MultiCenterDataModule, case: Case, findings: list[Finding]) -> Part | None:
    reading = data.reading_of(case.site)
    opened = [(name, stored) for name in case.image_files if (stored := _open(case, name, reading, "image", findings))]
    findings.extend(note for name, stored in opened for note in cutting(case, name, stored, reading))
    images = tuple(seen(stored) for _, stored in opened)
    fit = [
        _fits(case, name, one, images[0], reading, "image", findings)
        for (name, _), one in zip(opened[1:], images[1:], strict=True)
    ]
    whole = len(opened) == len(case.image_files) and all(fit)
    several = case.by_rater()
    masks = [_labels(one, images[0] if images else None, reading, findings) for one in several or (case,)]
    if not whole:
        return None
    readable = [labels for labels, _ in masks if labels is not None]
    labels = readable[0] if len(readable) == len(masks) else None
    raters = (
        dict(zip((rater for rater, _ in case.raters), readable, strict=True)) if several and labels is not None else {}
    )
    colours = tuple(sorted({pair for _, of_mask in masks for pair in of_mask}))
    return Part(case, images, labels, reading.spacing_of(opened[0][1].spacing), colours, opened[0][1].plane, raters)


def _open(case: Case, name: str, reading: Reading, role: Role, findings: list[Finding]) -> Stored | None:
    try:
        return load_file(case, name, reading, role)
    except DataError as error:
        findings.append(Finding.of_error("unreadable file", error, site=case.site, case=case.case, file=name))
        return None


def _fits(
    case: Case, name: str, values: Array, image: Array, reading: Reading, role: Role, findings: list[Finding]
) -> bool:
    """Whether a file has the size of the case's (first) image; tells that, and where it lies elsewhere."""
    where = {"site": case.site, "case": case.case, "file": name}
    if values.shape[:3] != image.shape[:3]:
        what = f"the {role} is {_sides(values)}, its image {Path(case.image).name} {_sides(image)}"
        findings.append(Finding("size mismatch", what, GRID_CURE, **where))
        return False
    if told := misplaced(case, name, role, reading):
        cure = PLACE_CURE if role == "mask" else GRID_CURE
        findings.append(Finding("geometry mismatch", f"the {role} {told}", cure, **where))
    return True


def _labels(
    case: Case, image: Array | None, reading: Reading, findings: list[Finding]
) -> tuple[NDArray[np.uint8] | None, tuple[tuple[int, str], ...]]:
    """Label ids of all masks of a case that can be read, and their colours."""
    layers: list[Layer] = []
    colours = set[tuple[int, str]]()
    for region, name in case.mask_layers:
        if not name:
            if case.masks and image is not None:
                layers.append(nothing(region, image))
            continue
        stored = _open(case, name, reading, "mask", findings)
        if stored is None or (
            image is not None and not _fits(case, name, stored.values, image, reading, "mask", findings)
        ):
            continue
        where = {"site": case.site, "case": case.case, "file": name}
        try:
            layer, notes = as_layer(region, stored, reading)
        except DataError as error:
            findings.append(Finding.of_error("mask values", error, **where))
            continue
        findings.extend(replace(note, **where) for note in notes)
        colours.update(() if region else ids_by_colour(stored, reading))
        layers.append(layer)
    if not layers or len(layers) < len(case.mask_layers):
        return None, ()
    return _combined(case, layers, reading, findings), tuple(sorted(colours))


def _combined(
    case: Case, layers: Sequence[Layer], reading: Reading, findings: list[Finding]
) -> NDArray[np.uint8] | None:
    if not case.masks:
        return layers[0].labels
    try:
        return combine(layers, reading)
    except DataError as error:
        where = {"site": case.site, "case": case.case, "file": few([*case.mask_files])}
        findings.append(Finding.of_error("mask values", error, **where))
        return None


def _joined(parts: tuple[Part, ...]) -> NDArray[np.uint8] | None:
    labels = [part.labels for part in parts if part.labels is not None]
    return np.concatenate(labels) if len(labels) == len(parts) else None


def _sides(array: Array) -> str:
    """Slices (if any), height, width."""
    sides = array.shape[:3] if array.shape[0] > 1 else array.shape[1:3]
    return " x ".join(str(side) for side in sides)
