"""Volumes of any format: their orientation, how they are cut, and the way back to their file's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.readers.coded import Maker, Segment, write_segmentation
from fedseg.datamodules.readers.dicom import open_dicom
from fedseg.datamodules.readers.itk import itk_like, open_itk, save_itk
from fedseg.datamodules.readers.kinds import DICOM, ITK, VOLUMES, Array, Spacing, suffix_of
from fedseg.datamodules.readers.nifti import nifti_at, nifti_like, open_nifti
from fedseg.datamodules.readers.placed import Affine, Volume, directions, turn_between, voxel_sizes
from fedseg.datamodules.readers.segmentation import open_segmentation, segmentation_in
from fedseg.datamodules.readers.settings import Reading
from fedseg.datamodules.readers.stored import Stored

COARSER = 1.5  # times as thick as the others are the voxels along an axis that is clearly that of the slices
ROUNDING = 1e-4  # of a voxel's size: a header of few digits must not decide how a volume is cut
AXIAL = 2
PLANES = ("sagittal", "coronal", "axial")
COMMON = "LPS"  # the common orientation: to the patient's left, back and head


def read_volume(path: Path, reading: Reading, like: Path | None = None, of: Path | None = None) -> Stored:
    """A volume, cut into slices, with its spacing; a fourth axis holds channels.

    Args:
        path: The file.
        reading: How to cut it.
        like: A file on whose voxels its own lie, whatever its header says.
        of: The first image of the case; see `open_volume`.
    """
    volume = open_volume(path, of, reading.frame)
    if like is not None:
        volume = volume.on_voxels_of(open_volume(like, frame=reading.frame))
    if reading.canonical:
        volume = volume.turned(COMMON)
    zooms = [float(size) * volume.unit for size in voxel_sizes(volume.affine)]  # a header's may contradict it
    axis = slice_axis(volume.shape, zooms, reading)
    plane = PLANES[int(directions(volume.affine)[axis, 0])]
    slices, spacing = _cut(volume.load(), zooms, axis, canonical=reading.canonical)
    return Stored(slices, spacing, step=volume.step, axis=axis, plane=plane, segments=volume.segments)


def open_volume(path: Path, of: Path | None = None, frame: int | None = None) -> Volume:
    """A volume of three dimensions, or of four with few channels, not decoded yet.

    Args:
        path: The file, or the folder of a DICOM series.
        of: The image that a mask belongs to, on whose slices those of a segmentation in DICOM are laid.
        frame: Of a NIfTI file in time, which frame.

    Raises:
        DataError: Other dimensions, a time series, or a header that does not say where the voxels lie.
    """
    suffix = suffix_of(path)
    if suffix in DICOM:
        segmentation = segmentation_in(path)
        image = None if of is None or segmentation is None else open_volume(of)
        return open_dicom(path) if segmentation is None else open_segmentation(segmentation, image)
    return open_itk(path) if suffix in ITK else open_nifti(path, frame)


def slice_axis(shape: Sequence[int], zooms: Sequence[float], reading: Reading) -> int:
    """Along which axis a volume is cut: as asked for, else a single voxel's or the thickest voxels', else axial."""
    if reading.axis != "auto":
        return reading.axis
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if len(thin) == 1:
        return thin[0]
    coarsest = max(range(3), key=lambda axis: zooms[axis])
    others = max(zoom for axis, zoom in enumerate(zooms) if axis != coarsest)
    return coarsest if zooms[coarsest] >= COARSER * (1 - ROUNDING) * others else AXIAL


def as_image(reading: Reading, image: Path) -> Reading:
    """The same with the axis along which an image is cut, for its mask and for the way back."""
    if reading.axis != "auto" or suffix_of(image) not in VOLUMES:
        return reading
    affine, shape = geometry(image, reading)
    return replace(reading, axis=slice_axis(shape, voxel_sizes(affine).tolist(), reading))


def geometry(path: Path, reading: Reading, of: Path | None = None) -> tuple[Affine, Sequence[int]]:
    """Affine and shape of a volume as it is read, from its header; see `open_volume`."""
    volume = open_volume(path, of, reading.frame)
    if reading.canonical:
        volume = volume.turned(COMMON)
    return volume.affine, volume.shape[:3]


def apart(one: tuple[Affine, Sequence[int]], other: tuple[Affine, Sequence[int]]) -> tuple[float, float]:
    """How far the corners of two grids lie apart at most, and the smallest voxel of the second one."""
    places = []
    for affine, shape in (one, other):
        corners = np.array(list(product((0, 1), repeat=3))) * (np.array(shape) - 1)
        places.append(corners @ affine[:3, :3].T + affine[:3, 3])
    return float(np.linalg.norm(places[0] - places[1], axis=1).max()), float(voxel_sizes(other[0]).min())


def put_back(slices: Array, path: Path, reading: Reading) -> Any:
    """Slices put together again on the grid of the volume that they were read from: the inverse of reading.

    Args:
        slices: (D, H, W), as `read_case` cuts the file.
        path: The file; its geometry is kept.
        reading: As it was read.

    Returns:
        An image of three dimensions: nibabel's for NIfTI and DICOM, else SimpleITK's.
    """
    array = _uncut(slices, path, reading)
    if suffix_of(path) in DICOM:
        return nifti_at(open_volume(path).affine, array)
    return itk_like(path, array) if suffix_of(path) in ITK else nifti_like(path, array, reading.frame)


def _uncut(slices: Array, path: Path, reading: Reading) -> Array:
    """Slices as voxels in the order of the volume's own axes."""
    axis = as_image(reading, path).axis
    assert axis != "auto"  # as_image has chosen
    if reading.canonical and axis != AXIAL:
        slices = slices[:, ::-1]
    array: Array = slices.transpose(np.argsort(_order(axis, canonical=reading.canonical)))
    if reading.canonical:
        from nibabel.orientations import apply_orientation

        array = apply_orientation(array, turn_between(open_volume(path, frame=reading.frame).affine, COMMON, back=True))
    return array


def segments_back(
    masks: NDArray[np.bool_], path: Path, reading: Reading, file: Path, segments: Sequence[Segment], maker: Maker
) -> Path:
    """Writes the masks of a DICOM series as one segmentation in DICOM; see `write_segmentation`.

    Args:
        masks: (D, R, H, W), as `read_case` cuts the series.
        path: Its folder.
        reading: As it was read.
        file: To write.
        segments: Of each mask.
        maker: What made them.
    """
    planes = [_uncut(masks[:, place], path, reading).transpose(2, 1, 0) for place in range(masks.shape[1])]
    return write_segmentation(file, path, np.stack(planes), segments, maker)


def write_back(slices: Array, path: Path, reading: Reading, folder: Path, name: str) -> Path:
    """Writes what :func:`put_back` gives, in the format of the volume that it came from and as one file.

    Of a DICOM series it is NIfTI, which holds nothing of the patient's.
    """
    image = put_back(slices, path, reading)
    if suffix_of(path) in ITK:
        return save_itk(image, path, folder, name)
    import nibabel

    nibabel.save(image, folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


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
