"""NIfTI: volumes, their orientation, and the way back to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.readers.kinds import VOLUMES, Array, Spacing, sides, suffix_of
from datamodules.readers.pictures import MOST_CHANNELS
from datamodules.readers.settings import Reading
from datamodules.readers.stored import Stored

Affine = NDArray[np.float64]
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
SECONDS = ("sec", "msec", "usec")
COARSER = 1.5  # times as thick as the others are the voxels along an axis that is clearly that of the slices
AXIAL = 2
PLANES = ("sagittal", "coronal", "axial")


def nifti(path: Path, reading: Reading, like: Path | None = None) -> Stored:
    """A volume, cut into slices, with its spacing; a fourth axis holds channels.

    Args:
        path: The file.
        reading: How to cut it.
        like: A file on whose voxels its own lie, whatever its header says.
    """
    volume = open_volume(path)
    slope = getattr(volume.dataobj, "slope", 1.0)
    if like is not None:
        volume = _on_voxels_of(open_volume(like), volume)
    if reading.canonical:
        volume = volume.as_reoriented(_turn(volume.affine, _lps()))
    array = np.asanyarray(volume.dataobj)
    unit = MILLIMETRES.get(volume.header.get_xyzt_units()[0], 1.0)
    zooms = [float(size) * unit for size in _voxel_sizes(volume.affine)]  # a header's may contradict it
    axis = slice_axis(array.shape, zooms, reading)
    plane = PLANES[int(_directions(volume.affine)[axis, 0])]
    slices, spacing = _cut(array, zooms, axis, canonical=reading.canonical)
    return Stored(slices, spacing, step=0.0 if slope == 1 else abs(float(slope)), axis=axis, plane=plane)


def slice_axis(shape: Sequence[int], zooms: Sequence[float], reading: Reading) -> int:
    """Along which axis a volume is cut: as asked for, else a single voxel's or the thickest voxels', else axial."""
    if reading.axis != "auto":
        return reading.axis
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if len(thin) == 1:
        return thin[0]
    coarsest = max(range(3), key=lambda axis: zooms[axis])
    others = max(zoom for axis, zoom in enumerate(zooms) if axis != coarsest)
    return coarsest if zooms[coarsest] >= COARSER * others else AXIAL


def as_image(reading: Reading, image: Path) -> Reading:
    """The same with the axis along which an image is cut, for its mask and for the way back."""
    if reading.axis != "auto" or suffix_of(image) not in VOLUMES:
        return reading
    affine, shape = geometry(image, reading)
    return replace(reading, axis=slice_axis(shape, _voxel_sizes(affine).tolist(), reading))


def open_volume(path: Path) -> Any:
    """A NIfTI image of three dimensions, or of four with few channels, not decoded yet.

    Raises:
        DataError: Other dimensions, a time series, or a header that does not say where the voxels lie.
    """
    import nibabel

    volume: Any = nibabel.load(path)
    if len(volume.shape) == 4 and volume.shape[3] == 1:
        volume = volume.slicer[..., 0]
    _check_dimensions(volume)
    _check_affine(volume)
    return volume


def _check_dimensions(volume: Any) -> None:
    if len(volume.shape) not in (3, 4):
        raise DataError(f"has {len(volume.shape)} dimensions; write one 3-D file per frame or modality")
    if len(volume.shape) == 4:
        if volume.header.get_xyzt_units()[1] in SECONDS and float(volume.header["pixdim"][4]) > 0:
            raise DataError(
                f"is a time series of {volume.shape[3]} frames by its header; write one 3-D file per frame, or, if its "
                "fourth axis holds channels, set the unit of time to none (nibabel: header.set_xyzt_units('mm'))"
            )
        if volume.shape[3] > MOST_CHANNELS:
            raise DataError(
                f"is {sides(volume.shape)}: a fourth axis holds channels, at most {MOST_CHANNELS}; write one 3-D file "
                "per frame or modality"
            )


def _check_affine(volume: Any) -> None:
    """Refuses headers that do not say where voxels lie, or say it twice and differently."""
    affine = np.asarray(volume.affine, np.float64)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    cure = "write it anew, for instance with nibabel.Nifti1Image(array, numpy.diag([X, Y, Z, 1])) and voxel sizes in mm"
    if not np.isfinite(affine).all() or not sizes.min() > 0:
        told = ", ".join(f"{size:.3g}" for size in sizes)
        raise DataError(f"has no voxel size along an axis (its affine says {told}); {cure}")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-3 * sizes.prod():
        raise DataError(f"has two axes that run the same way (its affine is singular); {cure}")
    forms = [getattr(volume, f"get_{form}", lambda **_: (None, 0))(coded=True)[0] for form in ("sform", "qform")]
    whole = [form for form in forms if form is not None and np.isfinite(form).all() and _voxel_sizes(form).min() > 0]
    if len(whole) == 2:
        _check_forms(whole[0], whole[1], cure)


def _check_forms(sform: Affine, qform: Affine, cure: str) -> None:
    sizes = [_voxel_sizes(form) for form in (sform, qform)]
    if not np.allclose(sizes[0], sizes[1], rtol=0.05) or not np.array_equal(_directions(sform), _directions(qform)):
        told = [", ".join(f"{size:.3g}" for size in own) for own in sizes]
        raise DataError(
            f"has a sform and a qform that contradict each other (voxels of {told[0]} and of {told[1]}, directions "
            f"{_letters(sform)} and {_letters(qform)}); keep the right one, for instance with "
            f"volume.set_qform(volume.get_sform()) in nibabel, or {cure}"
        )


def _directions(affine: Affine) -> Array:
    import nibabel

    found: Array = nibabel.io_orientation(affine)
    return found


def _letters(affine: Affine) -> str:
    import nibabel

    return "".join(nibabel.aff2axcodes(affine))


def _voxel_sizes(affine: Affine) -> NDArray[np.float64]:
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sizes


def _on_voxels_of(image: Any, mask: Any) -> Any:
    """A mask with the geometry of its image."""
    if mask.shape[:3] != image.shape[:3]:
        raise DataError(
            f"is {sides(mask.shape)} but its image {sides(image.shape)}: data.mask_geometry=image needs equal shapes"
        )
    return type(image)(np.asanyarray(mask.dataobj), image.affine, image.header)


def _lps() -> Array:
    """The common orientation: to the patient's left, back and head."""
    import nibabel

    orientation: Array = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    return orientation


def _turn(affine: Affine, to: Array) -> Array:
    import nibabel

    turn: Array = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), to)
    return turn


def geometry(path: Path, reading: Reading) -> tuple[Affine, Sequence[int]]:
    """Affine and shape of a NIfTI file as it is read, from its header."""
    from nibabel.orientations import inv_ornt_aff

    volume = open_volume(path)
    if not reading.canonical:
        return volume.affine, volume.shape[:3]
    turn = _turn(volume.affine, _lps())
    shape = [0, 0, 0]
    for axis, size in zip(turn[:, 0].astype(int), volume.shape[:3], strict=True):
        shape[axis] = size
    return volume.affine @ inv_ornt_aff(turn, volume.shape[:3]), shape


def apart(one: tuple[Affine, Sequence[int]], other: tuple[Affine, Sequence[int]]) -> tuple[float, float]:
    """How far the corners of two grids lie apart at most, and the smallest voxel of the second one."""
    places = []
    for affine, shape in (one, other):
        corners = np.array(list(product((0, 1), repeat=3))) * (np.array(shape) - 1)
        places.append(corners @ affine[:3, :3].T + affine[:3, 3])
    return float(np.linalg.norm(places[0] - places[1], axis=1).max()), float(_voxel_sizes(other[0]).min())


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
    axis = as_image(reading, path).axis
    assert axis != "auto"  # as_image has chosen
    if reading.canonical and axis != AXIAL:
        slices = slices[:, ::-1]
    array = slices.transpose(np.argsort(_order(axis, canonical=reading.canonical)))
    if reading.canonical:
        back = nibabel.orientations.ornt_transform(_lps(), nibabel.io_orientation(original.affine))
        array = nibabel.apply_orientation(array, back)
    header = original.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    return type(original)(np.ascontiguousarray(array), original.affine, header)


def _order(axis: int, *, canonical: bool) -> list[int]:
    """Axes of a volume (x, y, z) as slice, row, column."""
    rest = [other for other in (2, 1, 0) if other != axis]  # rows: the later axis, columns: the earlier one
    return [axis, *rest] if canonical else [axis, *reversed(rest)]


def _cut(volume: Array, zooms: Sequence[float], axis: int, *, canonical: bool) -> tuple[Array, Spacing]:
    """Slices (D, H, W, C) of a volume whose axes are x, y, z and, where there is one, the channel.

    In the common orientation x runs to the patient's left, y to the back, z to the head. Rows and columns are as a
    radiologist sees them: axial rows run front to back, others head to foot; slices keep their order along the axis.
    """
    order = _order(axis, canonical=canonical)
    array = volume.transpose([*order, *range(3, volume.ndim)])
    if canonical and axis != AXIAL:
        array = array[:, ::-1]
    spacing = (zooms[order[0]], zooms[order[1]], zooms[order[2]])
    array = np.ascontiguousarray(array)
    return (array if array.ndim == 4 else array[..., None]), spacing
