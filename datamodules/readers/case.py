"""From the files of a case to arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.findings import Finding
from datamodules.readers.drawing import ids_by_colour
from datamodules.readers.intensity import scale
from datamodules.readers.kinds import FLAT, VOLUMES, Array, Spacing, sides, suffix_of
from datamodules.readers.labels import map_labels
from datamodules.readers.pictures import netpbm, numpy_array, picture, tiff
from datamodules.readers.settings import Reading
from datamodules.readers.stored import Stored, seen
from datamodules.readers.volumes import AXIAL, apart, as_image, geometry, nifti

GRID_CURE = "export both on one grid, or correct the pairing"
PLACE_CURE = f"{GRID_CURE}; where voxels correspond all the same, set data.mask_geometry=image"


def _flat(decode: Callable[[Path], Stored]) -> Callable[[Path, Reading], Stored]:
    return lambda path, _: decode(path)


DECODERS: dict[str, Callable[[Path, Reading], Stored]] = {
    **dict.fromkeys(FLAT, _flat(picture)),
    **dict.fromkeys((".ppm", ".pgm"), _flat(netpbm)),
    **dict.fromkeys((".tif", ".tiff"), _flat(tiff)),
    ".npy": _flat(numpy_array),
    **dict.fromkeys(VOLUMES, nifti),
}


def read_case(case: Case, reading: Reading) -> Sample:
    """Decodes a case: an image, a volume, or a stack of images.

    Raises:
        DataError: A file is missing, unreadable, of an unknown type, or image and mask do not belong together.
    """
    parts = [_read_files(part, reading) for part in (case.slices or (case,))]
    kinds = sorted({f"{sides(part.image.shape[1:])} {part.image.dtype}" for part in parts})
    if len(kinds) > 1:
        raise DataError(f"{case}: its slices differ ({', '.join(kinds)}); export them alike, or set stack_slices=false")
    try:
        image = scale(np.concatenate([part.image for part in parts]), reading, channelwise=bool(parts[0].plane))
    except DataError as error:
        raise DataError(f"{case}: {error}") from None
    masks = [part.labels for part in parts if part.labels is not None]
    labels = np.concatenate(masks) if masks else None
    notes = tuple(note for part in parts for note in part.notes)
    colours = sorted({pair for part in parts for pair in part.colours})
    return Sample(image, labels, reading.spacing_of(parts[0].spacing), notes, tuple(colours), plane=parts[0].plane)


@dataclass(frozen=True)
class Files:
    """Image and mask of one file each, before the image's values are scaled."""

    image: Array
    labels: NDArray[np.uint8] | None
    spacing: Spacing | None
    notes: tuple[Finding, ...] = ()
    colours: tuple[tuple[int, str], ...] = ()
    plane: str = ""


def _read_files(case: Case, reading: Reading) -> Files:
    stored = load_file(case, case.image, reading, "image")
    image, told = seen(stored), cutting(case, stored, reading)
    if case.mask is None:
        return Files(image, None, stored.spacing, told, plane=stored.plane)
    mask = load_file(case, case.mask, reading, "mask")
    if mask.values.shape[:3] != image.shape[:3]:
        raise DataError(
            f"{case}: mask {case.mask} is {sides(mask.values.shape)} but the image is {sides(image.shape)}; {GRID_CURE}"
        )
    if elsewhere := misplaced(case, reading):
        raise DataError(f"{case}: mask {case.mask} {elsewhere}; {PLACE_CURE}")
    try:
        labels, notes = map_labels(mask, reading)
    except DataError as error:
        raise DataError(f"{case}: mask {case.mask}: {error}") from None
    placed = (replace(note, site=case.site, case=case.case, file=case.mask) for note in notes)
    return Files(image, labels, stored.spacing, (*told, *placed), ids_by_colour(mask, reading), stored.plane)


def misplaced(case: Case, reading: Reading) -> str:
    """By how much a NIfTI mask lies elsewhere than its image, as both are read; empty where their corners agree.

    Equal shapes alone do not make voxels correspond: an axis that runs the other way would mirror the mask.
    """
    if case.mask is None or not {suffix_of(Path(case.image)), suffix_of(Path(case.mask))} <= {*VOLUMES}:
        return ""
    if reading.mask_geometry == "image":
        return ""
    far, voxel = apart(geometry(Path(case.mask), reading), geometry(Path(case.image), reading))
    return f"lies up to {far:.3g} (in its header's unit) from its image" if far > voxel / 2 else ""


def cutting(case: Case, stored: Stored, reading: Reading) -> tuple[Finding, ...]:
    """What reading a volume had to decide: along which axis it is cut, and what a fourth axis holds."""
    notes = []
    if reading.axis == "auto" and stored.axis not in (None, AXIAL):
        what = f"is cut along axis {stored.axis}, whose voxels are the thickest"
        notes.append(Finding("slice axis", what, "none needed; data.axis says another one"))
    if stored.axis is not None and stored.values.shape[-1] > 1:
        what = f"its fourth axis counts as {stored.values.shape[-1]} channels"
        notes.append(Finding("fourth axis", what, "none needed if so; frames of a time series belong in files of 3-D"))
    return tuple(replace(note, site=case.site, case=case.case, file=case.image) for note in notes)


def load_file(case: Case, name: str, reading: Reading, role: Literal["image", "mask"]) -> Stored:
    """Decodes one file."""
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{case}: {role} {path} does not exist; correct the path, or leave the case out")
    decode = DECODERS.get(suffix_of(path))
    if decode is None:
        raise DataError(f"{case}: {role} {path} has an unknown type; convert it to one of {', '.join(DECODERS)}")
    image = Path(case.image)
    both = role == "mask" and {suffix_of(path), suffix_of(image)} <= {*VOLUMES}
    try:
        if both:
            reading = as_image(reading, image)
            stored = nifti(path, reading, image if reading.mask_geometry == "image" else None)
        else:
            stored = decode(path, reading)
    except DataError as error:
        raise DataError(f"{case}: {role} {path}: {error}") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{case}: {role} {path} cannot be read ({told}); replace the file or leave it out") from error
    if 0 in stored.values.shape:
        raise DataError(f"{case}: {role} {path} has no pixels; replace the file or leave it out")
    return stored
