"""From the files of a case to arrays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.readers.intensity import scale
from datamodules.readers.kinds import FLAT, VOLUMES, Array, Spacing, sides, suffix_of
from datamodules.readers.labels import map_labels
from datamodules.readers.pictures import numpy_array, picture, tiff
from datamodules.readers.settings import Reading
from datamodules.readers.volumes import geometry, nifti

GRID_CURE = "export both on one grid, or correct the pairing"

DECODERS: dict[str, Callable[[Path, Reading, str], tuple[Array, Spacing | None]]] = {
    **dict.fromkeys(FLAT, picture),
    ".tif": tiff,
    ".tiff": tiff,
    ".npy": numpy_array,
    **dict.fromkeys(VOLUMES, nifti),
}


def read_case(case: Case, reading: Reading) -> Sample:
    """Decodes a case: an image, a volume, or a stack of images.

    Raises:
        DataError: A file is missing, unreadable, of an unknown type, or image and mask do not belong together.
    """
    parts = [_read_files(part, reading) for part in (case.slices or (case,))]
    kinds = sorted({f"{sides(part[0].shape[1:])} {part[0].dtype}" for part in parts})
    if len(kinds) > 1:
        raise DataError(f"{case}: its slices differ ({', '.join(kinds)}); export them alike, or set stack_slices=false")
    try:
        image = scale(np.concatenate([part[0] for part in parts]), reading)
    except DataError as error:
        raise DataError(f"{case}: {error}") from None
    masks = [part[1] for part in parts if part[1] is not None]
    labels = np.concatenate(masks) if masks else None
    return Sample(image, labels, parts[0][2])


def _read_files(case: Case, reading: Reading) -> tuple[Array, NDArray[np.uint8] | None, Spacing | None]:
    image, spacing = load_file(case, case.image, reading, "image")
    if case.mask is None:
        return image, None, spacing
    stored, _ = load_file(case, case.mask, reading, "mask")
    if stored.shape[:3] != image.shape[:3]:
        raise DataError(
            f"{case}: mask {case.mask} is {sides(stored.shape)} but the image is {sides(image.shape)}; {GRID_CURE}"
        )
    if told := misplaced(case, reading):
        raise DataError(f"{case}: mask {case.mask} {told}; {GRID_CURE}")
    try:
        return image, map_labels(stored, reading), spacing
    except DataError as error:
        raise DataError(f"{case}: mask {case.mask}: {error}") from None


def misplaced(case: Case, reading: Reading) -> str:
    """By how much a NIfTI mask lies elsewhere than its image, as both are read; empty where their corners agree.

    Equal shapes alone do not make voxels correspond: an axis that runs the other way would mirror the mask.
    """
    if case.mask is None or {suffix_of(Path(case.image)), suffix_of(Path(case.mask))} - {".nii", ".nii.gz"}:
        return ""
    places, voxel = [], 0.0
    for name in (case.mask, case.image):
        affine, shape = geometry(Path(name), reading)
        corners = np.array(list(product((0, 1), repeat=3))) * (np.array(shape) - 1)
        places.append(corners @ affine[:3, :3].T + affine[:3, 3])
        voxel = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    apart = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    return f"lies up to {apart:.3g} (in its header's unit) from its image" if apart > voxel / 2 else ""


def load_file(case: Case, name: str, reading: Reading, role: Literal["image", "mask"]) -> tuple[Array, Spacing | None]:
    """Decodes one file into (D, H, W, C) as stored."""
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{case}: {role} {path} does not exist; correct the path, or leave the case out")
    decode = DECODERS.get(suffix_of(path))
    if decode is None:
        raise DataError(f"{case}: {role} {path} has an unknown type; convert it to one of {', '.join(DECODERS)}")
    try:
        array, spacing = decode(path, reading, role)
    except DataError as error:
        raise DataError(f"{case}: {role} {path}: {error}") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        raise DataError(f"{case}: {role} {path} cannot be read ({error}); replace the file or leave it out") from error
    if 0 in array.shape:
        raise DataError(f"{case}: {role} {path} has no pixels; replace the file or leave it out")
    return array, spacing
