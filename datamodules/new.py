"""Images that came after training: prepared as a data set's own were, and predictions brought back to their grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.base import MultiCenterDataModule
from datamodules.cache import Entry, Store
from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.folder import image_files
from datamodules.readers import VOLUMES, put_back, stem_of, suffix_of
from datamodules.sampling import Pick, Plan
from datamodules.site import SliceSet
from datamodules.transforms import load_augmentation, resize


@dataclass(frozen=True)
class NewImage:
    """One image or volume.

    Attributes:
        case: Its name and file.
        shape: Slices, rows and columns as read.
        spacing: Millimetres per voxel (slice, row, column), or None when unknown.
    """

    case: Case
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None


class NewImages:
    """All images of a folder, decoded once at the network's size; at their own size they are read again when needed.

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
        self.images: list[NewImage] = []
        stores = []
        for name, file in _files(path).items():
            image, store = self._prepare(Case(site, name, name, str(file)))
            self.images.append(image)
            stores.append(store)
        augmentation = load_augmentation("none")
        self._slices = SliceSet(stores, data.regions, self.channels, data.neighbours, augmentation)

    def _prepare(self, case: Case) -> tuple[NewImage, Store]:
        sample = self.read(case)
        depth, height, width, _ = sample.image.shape
        if self.data.neighbours and depth == 1:
            raise DataError(
                f"{case}: {case.image} is a single slice, but the network also takes its neighbours "
                f"(data.neighbours={self.data.neighbours}); give whole volumes"
            )
        fitted = self.data.fitted(sample)
        found = fitted.image.shape[-1]
        if found != self.channels and (found, self.channels) != (1, 3):
            raise DataError(
                f"{case}: {case.image} has {found} channel(s), the network takes {self.channels}; export images as "
                "those that it was trained on"
            )
        entry = Entry(0, 0, depth, -1, (), fitted.spacing)
        store = Store([case], [entry], [fitted.image], np.empty((0, *self.data.size), np.uint8))
        return NewImage(case, (depth, height, width), sample.spacing), store

    def read(self, case: Case) -> Sample:
        """One image at its own size."""
        return self.data.read_new(case)

    def batches(self, number: int) -> Iterator[Tensor]:
        """Batches (B, C, h, w) in [0, 1] of one image, slices in order."""
        return self._batches([Pick(number, 0, k) for k in range(self.images[number].shape[0])])

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of all images, one after the other; a batch may hold slices of several."""
        numbers = range(len(self.images))
        return self._batches([Pick(n, 0, k) for n in numbers for k in range(self.images[n].shape[0])])

    def _batches(self, picks: Sequence[Pick]) -> Iterator[Tensor]:
        size = self.data.batch_size
        for start in range(0, len(picks), size):
            yield self._slices[Plan(tuple(picks[start : start + size]), masks=False)]["image"]

    def at_own_size(self, number: int, planes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Brings what was predicted on the network's grid back to the image's.

        Args:
            number: Of the image.
            planes: (D, R, h, w) probabilities.

        Returns:
            (D, R, H, W), interpolated as images are.
        """
        _, height, width = self.images[number].shape
        moved = resize(Sample(planes.transpose(0, 2, 3, 1), None), (height, width)).image
        return moved.transpose(0, 3, 1, 2).astype(np.float32, copy=False)

    def write(self, number: int, array: NDArray[Any], folder: Path, name: str) -> Path:
        """Writes one map of an image in its own geometry.

        Args:
            number: Of the image.
            array: (D, H, W): bool for a mask, float32 for probabilities.
            folder: Created when missing.
            name: Of the file, without type.

        Returns:
            The file: NIfTI (0 and 1, or probabilities) with the affine and header of a NIfTI image; else a PNG (0 and
            255) for a mask and an (H, W) NPY for probabilities.
        """
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(self.images[number].case.image)
        values = array.astype(np.uint8) if array.dtype == np.bool_ else array
        if suffix_of(source) in VOLUMES:
            import nibabel

            path = folder / f"{name}.nii.gz"
            nibabel.save(put_back(values, source, self.data.reading), path)
        elif array.dtype == np.bool_:
            path = folder / f"{name}.png"
            Image.fromarray(values[0] * np.uint8(255)).save(path)
        else:
            path = folder / f"{name}.npy"
            np.save(path, values[0])
        return path


def _files(path: Path) -> Mapping[str, Path]:
    if path.is_file():
        return {stem_of(path): path}
    if not path.is_dir():
        raise DataError(f"images: {path} does not exist; give a folder of images, or an image")
    files = image_files(path)
    if not files:
        raise DataError(f"images: {path} holds no image")
    return files
