"""Images that came after training: prepared as a data set's own were, and predictions brought back to their grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cache import Entry, Store
from fedseg.datamodules.cases import Case, Sample, check_cases
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import refuse
from fedseg.datamodules.fitting import Box, on_own_grid
from fedseg.datamodules.folder import FolderDataModule
from fedseg.datamodules.pairing import MissingModalities, by_modality, present
from fedseg.datamodules.readers import (
    OF_CASE,
    VOLUMES,
    Maker,
    Reading,
    Segment,
    check_source,
    segments_back,
    stem_of,
    suffix_of,
    write_back,
)
from fedseg.datamodules.readers.kinds import DICOM, is_case_file
from fedseg.datamodules.sampling import Pick, Plan
from fedseg.datamodules.site import SliceSet
from fedseg.datamodules.site_folders import files_by_folder
from fedseg.datamodules.transforms import load_augmentation


def stacks(data: MultiCenterDataModule) -> bool:
    """Whether a case is made of all 2-D images of a patient: intensities are then those of the stack."""
    return isinstance(data, FolderDataModule) and data.stack_slices


@dataclass(frozen=True)
class NewImage:
    """One image or volume.

    Attributes:
        case: Its name and file.
        shape: Slices, rows and columns as read.
        spacing: Millimetres per voxel (slice, row, column), or None when unknown.
        values: Type of its values once read: "uint8" of 8-bit files, else "float32".
        box: To which it is cut for the network; None where it stays whole.
    """

    case: Case
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    values: str
    box: Box | None = None


class NewImages:
    """All images of a folder, read once to check them; they are decoded again when needed, one at a time.

    Args:
        data: The data module of the run; its own data need not be there.
        path: A folder of images, or one of them.
        channels: Of the network's input, neighbouring slices included.
        site: Where the images come from, for messages and seeds.

    Raises:
        DataError: No image, or one that cannot be read or has other channels than the network takes; names it.
    """

    def __init__(self, data: MultiCenterDataModule, path: Path, channels: int, site: str) -> None:
        self.data = data
        self.name = site
        self.channels = channels // (2 * data.neighbours + 1)
        self._augmentation = load_augmentation("none")
        cases = [
            Case(site, name, name, first, channels=tuple(more), absent=absent)
            for name, ((first, *more), absent) in _files(path, data, site).items()
        ]
        self.images = [self._checked(case) for case in check_cases(cases)]

    def _checked(self, case: Case) -> NewImage:
        sample = self.read(case)
        depth, height, width, found = sample.image.shape
        intensity = self.data.reading_of(case.site).intensity
        flat = suffix_of(Path(case.image)) not in VOLUMES
        if flat and stacks(self.data) and sample.image.dtype != np.uint8 and intensity in OF_CASE:
            raise DataError(
                f"{case}: the values of {case.image} are scaled, which the run did over all slices of a patient "
                f"(data.stack_slices, data.intensity={intensity}), of which this file is one; give the patient's "
                "slices as one NIfTI volume (docs/prediction.md says how)"
            )
        if self.data.neighbours and depth == 1:
            raise DataError(
                f"{case}: {case.image} is a single slice, but the network also takes its neighbours "
                f"(data.neighbours={self.data.neighbours}); give whole volumes"
            )
        grey = self.data.channels == 1 and found == 3  # it will be
        if not grey and found != self.channels and (found, self.channels) != (1, 3):
            raise DataError(
                f"{case}: {case.image} has {found} channel(s), the network takes {self.channels}; export images as "
                "those that it was trained on"
            )
        return NewImage(case, (depth, height, width), sample.spacing, sample.image.dtype.name, sample.box)

    def read(self, case: Case) -> Sample:
        """One image at its own size."""
        return self.data.fitting.boxed(self.data.read_new(case))

    def batches(self, number: int) -> Iterator[Tensor]:
        """Batches (B, C, h, w) in [0, 1] of one image, slices in order; in 3 dimensions one, (1, C, d, h, w)."""
        return self._batched(self._pieces(number, whole=True))

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of all images in the network's size: slices of one after the other, or patches that cover them."""
        return self._batched(one for number in range(len(self.images)) for one in self._pieces(number, whole=False))

    def of(self, number: int) -> list[Tensor]:
        """Batches of one image in the network's size, as of all images."""
        return list(self._batched(self._pieces(number, whole=False)))

    def _batched(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        while batch := list(islice(pieces, self.data.batch_size)):
            yield torch.cat(batch)

    def _pieces(self, number: int, *, whole: bool) -> Iterator[Tensor]:
        """(1, C, ...) for every slice of one image, or for every patch of it."""
        case = self.images[number].case
        fitted = self.data.fitted(case, self.read(case))
        entry = Entry(0, 0, len(fitted.image), -1, (), fitted.spacing)
        store = Store([case], [entry], [fitted.image], [np.empty((0, *fitted.image.shape[1:3]), np.uint8)])
        data, patches = self.data, self.data.patches
        slices = SliceSet(
            [store], data.regions, self.channels, data.neighbours, self._augmentation,
            dimensions=data.dimensions, patches=patches,
        )  # fmt: skip
        for place in range(entry.depth if data.dimensions == 2 else 1):
            pick = Pick(0, 0, place)
            corners = [None] if whole or patches is None else patches.corners(slices.shape(pick))
            for corner in corners:
                yield slices[Plan((pick._replace(corner=corner),), masks=False)]["image"]

    def at_own_size(self, number: int, found: NDArray[np.float32]) -> NDArray[np.float32]:
        """Brings what was predicted on the network's grid back to the image's.

        Args:
            number: Of the image.
            found: (D, R, h, w) probabilities; of volumes in 3 dimensions (1, R, d, h, w).

        Returns:
            (D, R, H, W), interpolated as images are.
        """
        slices = found[0].swapaxes(0, 1) if found.ndim == 5 else found
        image = self.images[number]
        return np.stack(list(on_own_grid(slices, len(slices), image.shape, image.box)))

    def write(self, number: int, array: NDArray[Any], folder: Path, name: str) -> Path:
        """Writes one map of an image in its own geometry.

        Args:
            number: Of the image.
            array: (D, H, W): bool for a mask, float32 for probabilities.
            folder: Created when missing.
            name: Of the file, without type.

        Returns:
            The file: of a volume one of its format (0 and 1, or probabilities) with its geometry; else a PNG (0 and
            255) for a mask and an (H, W) NPY for probabilities.
        """
        case = self.images[number].case
        return write_map(array, case.image, self.data.reading_of(case.site), folder, name)

    def is_series(self, number: int) -> bool:
        """Whether an image is a DICOM series or one file of it, of which a segmentation can be written."""
        return suffix_of(Path(self.images[number].case.image)) in DICOM

    def check_segmentable(self) -> None:
        """Refuses DICOM series of which no segmentation can be written.

        Raises:
            DataError: Names the image.
        """
        for number, image in enumerate(self.images):
            if self.is_series(number):
                try:
                    check_source(Path(image.case.image))
                except DataError as error:
                    raise DataError(f"{image.case}: image {image.case.image}: {error}") from None

    def write_segmentation(
        self, number: int, masks: NDArray[np.bool_], file: Path, segments: Sequence[Segment], maker: Maker
    ) -> Path:
        """Writes the masks (D, R, H, W) of a DICOM series as a segmentation in DICOM."""
        case = self.images[number].case
        return segments_back(masks, Path(case.image), self.data.reading_of(case.site), file, segments, maker)


def write_map(array: NDArray[Any], image: str, reading: Reading, folder: Path, name: str) -> Path:
    """Writes one map in an image's own geometry; see `NewImages.write`.

    Args:
        array: (D, H, W): bool for a mask, float32 for probabilities.
        image: The image's file; empty where a data module makes it itself.
        reading: How it is read.
        folder: Created when missing.
        name: Of the file, without type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = array.astype(np.uint8) if array.dtype == np.bool_ else array
    if suffix_of(Path(image)) in VOLUMES:
        return write_back(values, Path(image), reading, folder, name)
    if array.dtype == np.bool_ and len(values) == 1:
        path = folder / f"{name}.png"
        Image.fromarray(values[0] * np.uint8(255)).save(path)
    else:
        path = folder / f"{name}.npy"
        np.save(path, values[0] if len(values) == 1 else values)
    return path


def missing_modalities(data: MultiCenterDataModule) -> MissingModalities:
    """What it means that a case lacks one: a model that learnt to do without takes it."""
    if data.modality_dropout:
        return "zeros"
    return data.missing_modalities if isinstance(data, FolderDataModule) else "error"


def _files(path: Path, data: MultiCenterDataModule, site: str) -> Mapping[str, tuple[list[str], tuple[int, ...]]]:
    """The images of every case, one for each modality, and the places of those that it lacks."""
    names = data.modalities_of(site)
    if is_case_file(path) and not names:
        return {stem_of(path): ([str(path)], ())}
    if not path.is_dir():
        each = f" with a file for each of {', '.join(names)}" if names else ", or an image"
        what = "is a file" if path.is_file() else "does not exist"
        raise DataError(f"images: {path} {what}; give a folder of images{each}")
    files = files_by_folder(path, "images", names, site=site)
    if not any(files.values()):
        raise DataError(f"images: {path} holds no image")
    found = by_modality(files, names, site, refuse, missing_modalities(data), data.lacking_here(site))
    return {name: present(own) for name, own in found.items()}
