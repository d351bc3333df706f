"""Names of files, kinds of files, and what all readers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Spacing = tuple[float, float, float]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".seg.nrrd", ".nhdr", ".mha", ".mhd")  # read through SimpleITK
SERIES = "a folder of DICOM files"  # stands for the type of one
DICOM = (".dcm", SERIES)  # read through pydicom
VOLUMES = (*NIFTI, *ITK, *DICOM)
DOUBLE = (".nii.gz", ".seg.nrrd")
FLAT = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".bmp", ".npy")
BY_NAME = {*FLAT, *NIFTI, *ITK}
NO_CASES = {"thumbs.db", "desktop.ini", "dicomdir"}
PREAMBLE, MAGIC = 128, b"DICM"  # bytes that a DICOM file starts with, and those that follow
LIBRARIES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(ITK, ("SimpleITK", "itk")),
    **dict.fromkeys(DICOM, ("pydicom", "dicom")),
}
"""The package that a type of file needs beyond those that are always there, and the extra that has it."""


def suffix_of(path: Path) -> str:
    """The file's type in lower case; ``.nii.gz`` is one suffix, and so is ``.seg.nrrd`` of 3D Slicer.

    That of a folder that holds DICOM files, however it is called, is ``SERIES``.
    """
    name = path.name.lower()
    suffix = next((double for double in DOUBLE if name.endswith(double)), path.suffix.lower())
    return SERIES if suffix not in BY_NAME and _holds_dicom(path) else suffix


def stem_of(path: Path) -> str:
    """The file's name without its type."""
    suffix = suffix_of(path)
    return path.name if suffix == SERIES else path.name[: len(path.name) - len(suffix)]


def there(look: Callable[[], bool]) -> bool:
    """What ``path.is_file`` or ``path.is_dir`` says; names that no file can have raise there: too long, a zero byte."""
    try:
        return look()
    except (ValueError, OSError):
        return False


def is_case_file(path: Path) -> bool:
    """Whether a path is a file, or the folder of a series."""
    return there(path.is_file) or suffix_of(path) == SERIES


def hidden(path: Path) -> bool:
    """Whether a system or a viewer left a file."""
    return path.name.startswith(".") or path.name.lower() in NO_CASES


def in_series(folder: Path) -> list[Path]:
    """What lies in the folder of a series, but for what systems and viewers leave."""
    return [path for path in sorted(folder.iterdir()) if not hidden(path)]


def is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM files do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(PREAMBLE + len(MAGIC))[PREAMBLE:] == MAGIC


def _holds_dicom(folder: Path) -> bool:
    """Files of other types are not opened."""
    if not there(folder.is_dir):
        return False
    may_be = (path for path in in_series(folder) if path.suffix.lower() not in BY_NAME)
    return any(path.suffix.lower() == ".dcm" or is_dicom(path) for path in may_be)


def lacks(suffix: str) -> tuple[str, str] | None:
    """The package that a type of file needs and that is not installed, and the command that installs it."""
    package, extra = LIBRARIES.get(suffix, ("", ""))
    return (package, install(extra)) if package and find_spec(package) is None else None


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install -e ".[{extra}]"'


def sides(shape: Sequence[int]) -> str:
    """A shape as a reader likes it: 480 x 640."""
    return " x ".join(str(side) for side in shape)
