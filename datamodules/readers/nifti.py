"""NIfTI: what its header says, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Array
from fedseg.datamodules.readers.placed import Affine, Volume, check_affine, check_shape, directions, voxel_sizes

MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
SECONDS = ("sec", "msec", "usec")
CURE = "write it anew, for instance with nibabel.Nifti1Image(array, numpy.diag([X, Y, Z, 1])) and voxel sizes in mm"


def open_nifti(path: Path, frame: int | None = None) -> Volume:
    """A NIfTI file, not decoded yet.

    Args:
        path: The file.
        frame: Of a time series, which frame is the volume.

    Raises:
        DataError: Other dimensions, a time series, or a header that does not say where the voxels lie.
    """
    image = _checked(path, frame)
    slope = getattr(image.dataobj, "slope", 1.0)
    return Volume(
        tuple(image.shape[: 4 if frame is None else 3]),
        image.affine,
        lambda: np.asanyarray(image.dataobj if frame is None else image.dataobj[..., frame]),
        MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0),
        0.0 if slope == 1 else abs(float(slope)),
    )


def nifti_like(path: Path, array: Array, frame: int | None = None) -> Any:
    """A nibabel image with the affine and header of a file, or of a frame, but for the type and range of values."""
    original = _checked(path, frame)
    header = original.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    return type(original)(np.ascontiguousarray(array), original.affine, header)


def nifti_at(affine: Affine, array: Array) -> Any:
    """A nibabel image whose voxels lie as an affine in millimetres says."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header.set_xyzt_units("mm")
    return image


def _checked(path: Path, frame: int | None) -> Any:
    import nibabel

    image: Any = nibabel.load(path)
    if frame is not None:
        _check_frame(image.shape, frame)
    elif len(image.shape) == 4 and image.shape[3] == 1:
        image = image.slicer[..., 0]
    elif len(image.shape) == 4 and image.header.get_xyzt_units()[1] in SECONDS and float(image.header["pixdim"][4]) > 0:
        raise DataError(
            f"is a time series of {image.shape[3]} frames by its header; write one 3-D file per frame, or, if its "
            "fourth axis holds channels, set the unit of time to none (nibabel: header.set_xyzt_units('mm'))"
        )
    check_shape(image.shape if frame is None else image.shape[:3])
    check_affine(np.asarray(image.affine, np.float64), CURE)
    forms = [getattr(image, f"get_{form}", lambda **_: (None, 0))(coded=True)[0] for form in ("sform", "qform")]
    whole = [form for form in forms if form is not None and np.isfinite(form).all() and voxel_sizes(form).min() > 0]
    if len(whole) == 2:
        _check_forms(whole[0], whole[1])
    return image


def _check_frame(shape: Sequence[int], frame: int) -> None:
    """Refuses a frame that is not there."""
    where = "correct its number in the data set's table, or replace the file"
    if len(shape) != 4:
        raise DataError(f"has {len(shape)} dimensions and no frames, but frame {frame} is asked for; {where}")
    if not 0 <= frame < shape[3]:
        raise DataError(f"has {shape[3]} frames, numbered from 0, and none of number {frame}; {where}")


def _check_forms(sform: Affine, qform: Affine) -> None:
    """Refuses headers that say twice and differently where voxels lie."""
    sizes = [voxel_sizes(form) for form in (sform, qform)]
    if not np.allclose(sizes[0], sizes[1], rtol=0.05) or not np.array_equal(directions(sform), directions(qform)):
        told = [", ".join(f"{size:.3g}" for size in own) for own in sizes]
        raise DataError(
            f"has a sform and a qform that contradict each other (voxels of {told[0]} and of {told[1]}, directions "
            f"{_letters(sform)} and {_letters(qform)}); keep the right one, for instance with "
            f"volume.set_qform(volume.get_sform()) in nibabel, or {CURE}"
        )


def _letters(affine: Affine) -> str:
    import nibabel

    return "".join(nibabel.aff2axcodes(affine))
