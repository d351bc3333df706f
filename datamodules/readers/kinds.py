"""Names of files, kinds of files, and what all readers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Spacing = tuple[float, float, float]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".seg.nrrd", ".nhdr", ".mha", ".mhd")  # read through SimpleITK
VOLUMES = (*NIFTI, *ITK)
DOUBLE = (".nii.gz", ".seg.nrrd")
FLAT = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".bmp", ".npy")


def suffix_of(path: Path) -> str:
    """The file's type in lower case; ``.nii.gz`` is one suffix, and so is ``.seg.nrrd`` of 3D Slicer."""
    name = path.name.lower()
    return next((double for double in DOUBLE if name.endswith(double)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """The file's name without its type."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def sides(shape: Sequence[int]) -> str:
    """A shape as a reader likes it: 480 x 640."""
    return " x ".join(str(side) for side in shape)
