"""NIfTI: volumes, their orientation, and the way back to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.readers.kinds import Array, Spacing
from datamodules.readers.settings import Reading

MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


def nifti(path: Path, reading: Reading, role: str) -> tuple[Array, Spacing]:  # noqa: ARG001
    """A volume, cut into slices, with its spacing."""
    import nibabel
    from nibabel.affines import voxel_sizes

    volume = open_volume(path)
    if reading.canonical:
        to_lps = nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), _lps())
        volume = volume.as_reoriented(to_lps)
    array = np.asanyarray(volume.dataobj)
    unit = MILLIMETRES.get(volume.header.get_xyzt_units()[0], 1.0)
    zooms = [float(size) * unit for size in voxel_sizes(volume.affine)]  # a header's may contradict it
    return _cut(array, zooms, reading)


def open_volume(path: Path) -> Any:
    """A NIfTI image of three dimensions, not decoded yet."""
    import nibabel

    volume: Any = nibabel.load(path)
    if len(volume.shape) == 4 and volume.shape[3] == 1:
        volume = volume.slicer[..., 0]
    if len(volume.shape) != 3:
        raise DataError(f"has {len(volume.shape)} dimensions; write one 3-D file per frame or modality")
    return volume


def _lps() -> Array:
    """The common orientation: to the patient's left, back and head."""
    import nibabel

    orientation: Array = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    return orientation


def geometry(path: Path, reading: Reading) -> tuple[NDArray[np.float64], Sequence[int]]:
    """Affine and shape of a NIfTI file as it is read, from its header."""
    from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform

    volume = open_volume(path)
    if not reading.canonical:
        return volume.affine, volume.shape
    turn = ornt_transform(io_orientation(volume.affine), _lps())
    shape = [0, 0, 0]
    for axis, size in zip(turn[:, 0].astype(int), volume.shape, strict=True):
        shape[axis] = size
    return volume.affine @ inv_ornt_aff(turn, volume.shape), shape


def put_back(slices: Array, path: Path, reading: Reading) -> Any:
    """Slices put together again on the grid of the NIfTI file that they were read from: the inverse of reading.

    Args:
        slices: (D, H, W), as `read_case` cuts the file.
        path: The file; its affine and header are kept, but for the type and range of values.
        reading: As it was read.

    Returns:
        A nibabel image of three dimensions.
    """
    import nibabel

    original = open_volume(path)
    if reading.canonical and reading.axis != 2:
        slices = slices[:, ::-1]
    array = slices.transpose(np.argsort(_order(reading)))
    if reading.canonical:
        back = nibabel.orientations.ornt_transform(_lps(), nibabel.io_orientation(original.affine))
        array = nibabel.apply_orientation(array, back)
    header = original.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    return type(original)(np.ascontiguousarray(array), original.affine, header)


def _order(reading: Reading) -> list[int]:
    """Axes of a volume (x, y, z) as slice, row, column."""
    rest = [axis for axis in (2, 1, 0) if axis != reading.axis]  # rows: the later axis, columns: the earlier one
    return [reading.axis, *rest] if reading.canonical else [reading.axis, *reversed(rest)]


def _cut(volume: Array, zooms: Sequence[float], reading: Reading) -> tuple[Array, Spacing]:
    """Slices (D, H, W, 1) of a volume whose axes are x, y, z.

    In the common orientation x runs to the patient's left, y to the back, z to the head. Rows and columns are as a
    radiologist sees them: axial rows run front to back, others head to foot; slices keep their order along the axis.
    """
    order = _order(reading)
    array = volume.transpose(order)
    if reading.canonical and reading.axis != 2:
        array = array[:, ::-1]
    spacing = (zooms[order[0]], zooms[order[1]], zooms[order[2]])
    return np.ascontiguousarray(array)[..., None], spacing
