"""Segmentations in DICOM (SEG): a segment's number is its label id; frames that show nothing may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.dicom import (
    AGAIN,
    OFF_GRID,
    SEGMENTATIONS,
    TO_RAS,
    TURNED,
    pixels_of,
    quiet,
    read_header,
)
from fedseg.datamodules.readers.kinds import Array, in_series, is_dicom
from fedseg.datamodules.readers.placed import Affine, Volume, voxel_sizes

OF_FILE = (
    *("SOPClassUID", "SegmentationType", "SegmentSequence", "FrameOfReferenceUID", "Rows", "Columns"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
OF_PIXELS = (
    *("SOPClassUID", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
)
CURE = "export it from the image's own grid, or write it as NIfTI on that grid"


@dataclass(frozen=True)
class Frames:
    """Where the frames of a segmentation lie, and whose they are.

    Attributes:
        plane: (3, 2) steps from column to column and from row to row, to the left, back and head.
        places: (F, 3) where the first pixel of each frame lies.
        numbers: The segment of each frame; 0 where pixels themselves hold numbers.
    """

    plane: NDArray[np.float64]
    places: NDArray[np.float64]
    numbers: tuple[int, ...]

    @property
    def normal(self) -> NDArray[np.float64]:
        """The direction in which slices follow each other."""
        found = np.cross(self.plane[:, 0], self.plane[:, 1])
        upright: NDArray[np.float64] = found / np.linalg.norm(found)
        return upright


def segmentation_in(path: Path) -> Path | None:
    """The file of a segmentation, which may lie in a folder of its own; None where there is something else."""
    files = in_series(path) if path.is_dir() else [path]
    if len(files) != 1 or not is_dicom(files[0]):
        return None
    return files[0] if read_header(files[0], ("SOPClassUID",)).get("SOPClassUID") in SEGMENTATIONS else None


def open_segmentation(file: Path, image: Volume | None) -> Volume:
    """A segmentation on the slices of its image, not decoded yet.

    Args:
        file: Of the segmentation.
        image: Tells how thick slices are and which ones there are: a segmentation may lack those that show nothing.

    Raises:
        DataError: It has no volume as its image, lies elsewhere, or holds probabilities.
    """
    if image is None:
        raise DataError("is a segmentation; move it to the masks of a volume, or leave the case out")
    head = read_header(file, OF_FILE)
    if head.get("SegmentationType") == "FRACTIONAL":
        raise DataError("holds probabilities (FRACTIONAL); export it as BINARY, or as label map")
    own = str(head.get("FrameOfReferenceUID", ""))
    if image.frame and own and own != image.frame:
        raise DataError(f"is measured in another frame of reference than its image; {CURE}")
    frames = _frames(head)
    affine, count, slices = _on_slices(frames, image)
    listed = head.get("SegmentSequence") or ()
    named = ((int(item.SegmentNumber), str(item.get("SegmentLabel", ""))) for item in listed)
    segments = tuple((number, name) for number, name in named if number)  # a label map may name its background
    shape = (int(head.Columns), int(head.Rows), count)
    return Volume(shape, affine, lambda: _load(file, shape, slices, frames.numbers), segments=segments, frame=own)


def _frames(head: Any) -> Frames:
    with quiet():
        try:
            shared = head.get("SharedFunctionalGroupsSequence") or [{}]
            items = [(item, shared[0]) for item in head.PerFrameFunctionalGroupsSequence]
            cosines = np.array([_of(item, "PlaneOrientationSequence").ImageOrientationPatient for item in items], float)
            sizes = np.array([_of(item, "PixelMeasuresSequence").PixelSpacing for item in items], float)
            places = np.array([_of(item, "PlanePositionSequence").ImagePositionPatient for item in items], float)
            named = head.SegmentationType == "BINARY"
            numbers = [
                int(_of(item, "SegmentIdentificationSequence").ReferencedSegmentNumber) if named else 0
                for item in items
            ]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise DataError(f"does not say where its frames lie, or whose they are; {CURE}") from None
    across = np.linalg.norm(np.cross(cosines[0, :3], cosines[0, 3:]))
    placed = places.shape[1:] == (3,) and bool(np.isfinite(places).all())
    if not (placed and abs(across - 1) < 3 * TURNED and sizes.min() > 0):
        raise DataError(f"does not say where its frames lie, or whose they are; {CURE}")
    if not np.allclose(cosines, cosines[0], atol=TURNED) or not np.allclose(sizes, sizes[0], atol=TURNED):
        raise DataError(f"has frames of several orientations or sizes of pixels; {CURE}")
    return Frames(cosines[0].reshape(2, 3).T * sizes[0][::-1], places, tuple(numbers))


def _of(item: tuple[Any, Any], name: str) -> Any:
    """What a frame says, or all frames together."""
    own, shared = item
    return (own if name in own else shared)[name][0]


def _on_slices(frames: Frames, image: Volume) -> tuple[Affine, int, list[int]]:
    """Affine and number of the slices that the image has along the frames' normal, and the slice of every frame.

    Raises:
        DataError: Frames between the image's slices, beside each other, or beyond the image.
    """
    lps = TO_RAS[:3, :3] @ image.affine[:3, :3] * image.unit
    axis = int(np.argmax(np.abs(frames.normal @ lps) / voxel_sizes(lps)))
    step = frames.normal * voxel_sizes(lps)[axis]
    affine = np.eye(4)
    affine[:3] = np.column_stack([frames.plane, step, frames.places[0]])
    corners = np.array(list(product((0, 1), repeat=3))) * (np.array(image.shape[:3]) - 1)
    origin = TO_RAS[:3, :3] @ image.affine[:3, 3] * image.unit
    within = np.linalg.solve(affine[:3, :3], (corners @ lps.T + origin - frames.places[0]).T)
    own = np.linalg.solve(affine[:3, :3], (frames.places - frames.places[0]).T)
    if np.abs(own - np.rint(own) * [[0], [0], [1]]).max() > OFF_GRID:
        raise DataError(f"has frames that lie on none of its image's slices; {CURE}")
    low, high = int(np.rint(within[2].min())), int(np.rint(within[2].max()))
    slices = np.rint(own[2]).astype(int) - low
    if slices.min() < 0 or slices.max() > high - low:
        raise DataError(f"reaches beyond its image; {CURE}")
    affine[:3, 3] += low * step
    found: Affine = TO_RAS @ affine
    return found, high - low + 1, slices.tolist()


def _load(file: Path, shape: tuple[int, int, int], slices: Sequence[int], numbers: Sequence[int]) -> Array:
    """Label ids (column, row, slice)."""
    columns, rows, count = shape
    planes = pixels_of(file, OF_PIXELS)
    planes = planes[None] if planes.ndim == 2 else planes
    if planes.shape != (len(slices), rows, columns):
        raise DataError(f"has other pixels than its header says; {AGAIN}")
    labels = np.zeros((count, rows, columns), np.uint16)
    for plane, place, number in zip(planes, slices, numbers, strict=True):
        new = plane.astype(np.uint16) * (number or 1)
        if (new.astype(bool) & (labels[place] > 0) & (labels[place] != new)).any():
            raise DataError(
                "has segments that overlap: a voxel has one label; store every segment as a file of its own "
                "(data.mask_suffix=_{region}), or join them"
            )
        labels[place] = np.maximum(labels[place], new)
    return labels.transpose(2, 1, 0)
