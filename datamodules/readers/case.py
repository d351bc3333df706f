"""From the files of a case to arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.cases import Case, Pixels, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding, few
from fedseg.datamodules.readers.drawing import ids_by_colour
from fedseg.datamodules.readers.intensity import scale_together
from fedseg.datamodules.readers.kinds import FLAT, NIFTI, VOLUMES, Array, Spacing, is_case_file, sides, suffix_of
from fedseg.datamodules.readers.labels import map_labels
from fedseg.datamodules.readers.layers import Layer, check_region, combine, of_region
from fedseg.datamodules.readers.pictures import netpbm, numpy_array, picture, tiff
from fedseg.datamodules.readers.raters import settled
from fedseg.datamodules.readers.settings import Reading
from fedseg.datamodules.readers.stored import Stored, seen
from fedseg.datamodules.readers.volumes import AXIAL, apart, as_image, geometry, read_volume

Role = Literal["image", "mask"]
GRID_CURE = "export both on one grid, or correct the pairing"
PLACE_CURE = f"{GRID_CURE}; where voxels correspond all the same, set data.mask_geometry=image"


def _flat(decode: Callable[[Path], Stored]) -> Callable[[Path, Reading], Stored]:
    return lambda path, _: decode(path)


DECODERS: dict[str, Callable[[Path, Reading], Stored]] = {
    **dict.fromkeys(FLAT, _flat(picture)),
    **dict.fromkeys((".ppm", ".pgm"), _flat(netpbm)),
    **dict.fromkeys((".tif", ".tiff"), _flat(tiff)),
    ".npy": _flat(numpy_array),
    **dict.fromkeys(VOLUMES, read_volume),
}


def kind(images: Sequence[Array]) -> str:
    """Size and type of a slice's images, as slices of a stack must share them."""
    return " and ".join(f"{sides(image.shape[1:])} {image.dtype}" for image in images)


def join(parts: Sequence[Sequence[Array]], reading: Reading, *, channelwise: bool) -> Pixels:
    """One image of the slices of a stack, each a list of the images of its modalities; see `scale_together`."""
    return scale_together(
        [np.concatenate(slices) for slices in zip(*parts, strict=True)], reading, channelwise=channelwise
    )


def read_case(case: Case, reading: Reading) -> Sample:
    """Decodes a case: an image, a volume, or a stack of images.

    Raises:
        DataError: A file is missing, unreadable, of an unknown type, or image and mask do not belong together.
    """
    parts = [_read_files(part, reading) for part in (case.slices or (case,))]
    kinds = sorted({kind(part.images) for part in parts})
    if len(kinds) > 1:
        raise DataError(f"{case}: its slices differ ({', '.join(kinds)}); export them alike, or set stack_slices=false")
    try:
        image = join([part.images for part in parts], reading, channelwise=bool(parts[0].plane))
    except DataError as error:
        raise DataError(f"{case}: {error}") from None
    image = with_absent(image, case)
    masks = [part.labels for part in parts if part.labels is not None]
    labels = np.concatenate(masks) if masks else None
    notes = tuple(note for part in parts for note in part.notes)
    colours = sorted({pair for part in parts for pair in part.colours})
    spacing = reading.spacing_of(parts[0].spacing)
    sample = Sample(image, labels, spacing, notes, tuple(colours), plane=parts[0].plane)
    if not parts[0].raters:
        return sample
    raters = {rater: np.concatenate([part.raters[rater] for part in parts]) for rater in parts[0].raters}
    try:
        return settled(sample, raters, reading)
    except DataError as error:
        raise DataError(f"{case}: {error}") from None


def with_absent(image: Pixels, case: Case) -> Pixels:
    """The channels of the modalities that a case has, with zeros for those that it lacks."""
    for place in case.absent:
        image = np.insert(image, place, 0, axis=-1)
    return image


@dataclass(frozen=True)
class Files:
    """Image and mask of a case or slice, before the image's values are scaled; an image for each modality.

    Where there are several raters, their masks are in ``raters``, and ``labels`` is one of them.
    """

    images: tuple[Array, ...]
    labels: NDArray[np.uint8] | None
    spacing: Spacing | None
    notes: tuple[Finding, ...] = ()
    colours: tuple[tuple[int, str], ...] = ()
    plane: str = ""
    raters: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def _read_files(case: Case, reading: Reading) -> Files:
    stored = [load_file(case, name, reading, "image") for name in case.image_files]
    images, first = tuple(seen(one) for one in stored), stored[0]
    for name, image in zip(case.channels, images[1:], strict=True):
        _check_grid(case, "image", name, image, images[0], reading)
    notes = [
        note for name, one in zip(case.image_files, stored, strict=True) for note in cutting(case, name, one, reading)
    ]
    if case.mask is None:
        return Files(images, None, first.spacing, tuple(notes), plane=first.plane)
    colours = set[tuple[int, str]]()
    masks = []
    for one in case.by_rater() or (case,):
        labels, told, used = _read_labels(one, images[0], reading)
        masks.append(labels)
        notes += told
        colours |= used
    raters = dict(zip((rater for rater, _ in case.raters), masks, strict=False))
    return Files(images, masks[0], first.spacing, tuple(notes), tuple(sorted(colours)), first.plane, raters)


def _read_labels(
    case: Case, image: Array, reading: Reading
) -> tuple[NDArray[np.uint8], list[Finding], set[tuple[int, str]]]:
    """The label ids of all files of a mask, what was told of them, and label ids by colour."""
    layers, notes, colours = [], list[Finding](), set[tuple[int, str]]()
    for region, name in case.mask_layers:
        layer, told, used = _read_mask(case, region, name, image, reading)
        layers.append(layer)
        notes += told
        colours |= used
    try:
        labels = combine(layers, reading) if case.masks else layers[0].labels
    except DataError as error:
        raise DataError(f"{case}: masks {few([*case.mask_files])}: {error}") from None
    return labels, notes, colours


def _read_mask(
    case: Case, region: str, name: str, image: Array, reading: Reading
) -> tuple[Layer, list[Finding], set[tuple[int, str]]]:
    """One file of a mask, what was told of it, and its label ids by colour."""
    if case.masks and not name:
        return nothing(region, image), [], set()
    stored = load_file(case, name, reading, "mask")
    _check_grid(case, "mask", name, stored.values, image, reading)
    try:
        layer, notes = as_layer(region, stored, reading)
    except DataError as error:
        raise DataError(f"{case}: mask {name}: {error}") from None
    placed = [replace(note, site=case.site, case=case.case, file=name) for note in notes]
    return layer, placed, set() if region else set(ids_by_colour(stored, reading))


def nothing(region: str, image: Array) -> Layer:
    """The layer of a file that is left out where it would show nothing."""
    return Layer(region, np.zeros(image.shape[:3], np.uint8))


def as_layer(region: str, stored: Stored, reading: Reading) -> tuple[Layer, tuple[Finding, ...]]:
    """What a mask's file shows: label ids, or where the region is that it shows alone.

    Raises:
        DataError: Values that are no label ids, or several labels for one region.
    """
    labels, notes = map_labels(stored, of_region(reading) if region else reading)
    layer = Layer(region, labels)
    check_region(layer, reading)
    return layer, notes


def _check_grid(case: Case, role: Role, name: str, values: Array, image: Array, reading: Reading) -> None:
    """Refuses a file whose pixels do not correspond to those of the case's (first) image."""
    if values.shape[:3] != image.shape[:3]:
        raise DataError(
            f"{case}: {role} {name} is {sides(values.shape)} but the image is {sides(image.shape)}; {GRID_CURE}"
        )
    if elsewhere := misplaced(case, name, role, reading):
        raise DataError(f"{case}: {role} {name} {elsewhere}; {PLACE_CURE if role == 'mask' else GRID_CURE}")


def misplaced(case: Case, name: str, role: Role, reading: Reading) -> str:
    """By how much a volume lies elsewhere than the case's image, as both are read; empty where their corners agree.

    Equal shapes alone do not make voxels correspond: an axis that runs the other way would mirror the mask.
    """
    if not {suffix_of(Path(case.image)), suffix_of(Path(name))} <= {*VOLUMES}:
        return ""
    if role == "mask" and reading.mask_geometry == "image":
        return ""
    reading = reading.at(case.frame)
    far, voxel = apart(geometry(Path(name), reading, Path(case.image)), geometry(Path(case.image), reading))
    return f"lies up to {far:.3g} (in its header's unit) from its image" if far > voxel / 2 else ""


def cutting(case: Case, name: str, stored: Stored, reading: Reading) -> tuple[Finding, ...]:
    """What reading a volume had to decide: along which axis it is cut, and what a fourth axis holds."""
    notes = []
    if reading.axis == "auto" and stored.axis not in (None, AXIAL):
        what = f"is cut along axis {stored.axis}, whose voxels are the thickest"
        notes.append(Finding("slice axis", what, "none needed; data.axis says another one"))
    if stored.axis is not None and stored.values.shape[-1] > 1:
        what = f"its fourth axis counts as {stored.values.shape[-1]} channels"
        notes.append(Finding("fourth axis", what, "none needed if so; frames of a time series belong in files of 3-D"))
    return tuple(replace(note, site=case.site, case=case.case, file=name) for note in notes)


def load_file(case: Case, name: str, reading: Reading, role: Role) -> Stored:
    """Decodes one file; a volume is cut along the same axis as the case's (first) image."""
    path, reading = Path(name), reading.at(case.frame)
    if not is_case_file(path):
        raise DataError(f"{case}: {role} {path} does not exist; correct the path, or leave the case out")
    decode = DECODERS.get(suffix_of(path))
    if decode is None:
        raise DataError(f"{case}: {role} {path} has an unknown type; convert it to one of {', '.join(DECODERS)}")
    if case.frame is not None and suffix_of(path) not in NIFTI:
        raise DataError(
            f"{case}: {role} {path} has no frames that are read; write frame {case.frame} as a NIfTI volume"
        )
    image = Path(case.image)
    both = name != case.image and {suffix_of(path), suffix_of(image)} <= {*VOLUMES}
    try:
        if both:
            reading = as_image(reading, image)
            like = image if role == "mask" and reading.mask_geometry == "image" else None
            stored = read_volume(path, reading, like, image)
        else:
            stored = decode(path, reading)
    except DataError as error:
        raise DataError(f"{case}: {role} {path}: {error}") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{case}: {role} {path} cannot be read ({told}); replace the file or leave it out") from error
    if role == "image" and stored.segments:
        raise DataError(f"{case}: image {path} is a segmentation; move it to the masks, or leave the case out")
    if 0 in stored.values.shape:
        raise DataError(f"{case}: {role} {path} has no pixels; replace the file or leave it out")
    return stored
