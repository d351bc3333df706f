"""How a case comes to the grid on which the network sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.datamodules.cases import Case, Pixels, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.grid import fit_planes
from fedseg.datamodules.readers import Spacing
from fedseg.datamodules.transforms import brought_back, resize

Labels = NDArray[np.uint8]
Box = tuple[slice, slice, slice]  # slices, rows and columns of a volume


@dataclass(frozen=True)
class Fitting:
    """Resizes slices to the network's size; or leaves cases as they are, or brings them to a spacing, to cut patches.

    Attributes:
        size: Of the network's input: (h, w) or (d, h, w).
        patches: Whether patches of that size are cut, so that cases keep their own grid.
        spacing: Millimetres per voxel (slice, row, column) to which such cases are brought; None: their own.
        crop: Volumes are cut to what is not 0, where no voxel of these label ids may be lost; None: they stay whole.
    """

    size: tuple[int, ...]
    patches: bool = False
    spacing: tuple[float | None, float, float] | None = None
    crop: tuple[int, ...] | None = None

    def __call__(self, case: Case, sample: Sample) -> Sample:
        """The sample of a case on the network's grid; its spacing accounts for the change.

        Raises:
            DataError: It has no spacing, and must be brought to one; or cropping would cut something off.
        """
        if not self.patches:
            return resize(sample, (self.size[0], self.size[1]))
        if sample.box is not None:
            labels = self._cropped(case, sample.labels, sample.box)
            image = cast(Pixels, np.ascontiguousarray(sample.image[sample.box]))
            sample = replace(sample, image=image, labels=labels, box=None)
        shape = self._shape(case, sample.image.shape[:3], sample.spacing)
        if shape == sample.image.shape[:3] or sample.spacing is None:
            return sample
        image = to_shape(np.moveaxis(sample.image, -1, 0), shape)
        image = image.round() if sample.image.dtype == np.uint8 else image
        voxel = [own * old / new for own, old, new in zip(sample.spacing, sample.image.shape, shape, strict=False)]
        return replace(
            sample,
            image=np.ascontiguousarray(np.moveaxis(image, 0, -1).astype(sample.image.dtype)),
            labels=self.labels(case, sample.labels, sample.spacing),
            spacing=(voxel[0], voxel[1], voxel[2]),
        )

    def boxed(self, sample: Sample) -> Sample:
        """The sample with the box to which it will be cut: of the voxels that are not 0 in every channel."""
        if self.crop is None or not sample.image.any():
            return sample
        inside: NDArray[np.bool_] = (sample.image != 0).max(axis=-1)
        ends = [np.flatnonzero(inside.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        slices, rows, columns = (slice(int(own[0]), int(own[-1]) + 1) for own in ends)
        return replace(sample, box=(slices, rows, columns))

    def _cropped(self, case: Case, labels: Labels | None, box: Box) -> Labels | None:
        if labels is None:
            return None
        inside = np.ascontiguousarray(labels[box])
        if lost := int(np.isin(labels, self.crop or ()).sum() - np.isin(inside, self.crop or ()).sum()):
            raise DataError(
                f"{case}: its mask shows {lost} voxel(s) of a region where the image is 0 all around, which "
                "data.crop_background would cut off; correct the mask, or set data.crop_background=false"
            )
        return inside

    def labels(
        self, case: Case, labels: Labels | None, spacing: Spacing | None, box: Box | None = None
    ) -> Labels | None:
        """Label ids (D, H, W) on the network's grid; of a smaller one, each voxel has the label that covers most of it.

        Args:
            case: For messages.
            labels: As stored.
            spacing: Of the case.
            box: To which it is cut.

        Raises:
            DataError: As for a sample.
        """
        if labels is None:
            return None
        if not self.patches:
            return fit_planes(labels, (self.size[0], self.size[1]))
        if box is not None and (labels := self._cropped(case, labels, box)) is None:
            return None
        shape = self._shape(case, labels.shape, spacing)
        if shape == labels.shape:
            return labels
        ids = np.flatnonzero(np.bincount(labels.ravel()))
        covered = to_shape(np.stack([labels == label for label in ids]), shape)
        fitted: Labels = ids.astype(np.uint8)[covered.argmax(axis=0)]
        return fitted

    def _shape(self, case: Case, shape: Sequence[int], spacing: Spacing | None) -> tuple[int, int, int]:
        sides = list(shape)
        if self.spacing is not None:
            if spacing is None:
                cure = "give data.spacing, or leave data.resample out"
                raise DataError(f"{case}: {self.setting}, but its spacing is not known; {cure}")
            pairs = zip(shape, spacing, self.spacing, strict=True)
            sides = [max(round(side * own / wanted), 1) if wanted else side for side, own, wanted in pairs]
        return sides[0], sides[1], sides[2]

    @property
    def finer(self) -> Fitting:
        """A grid with voxels half as long."""
        if not self.patches:
            return replace(self, size=tuple(2 * side for side in self.size))
        if self.spacing is None:
            raise ValueError("cases are on their own grid")
        depth, height, width = self.spacing
        return replace(self, spacing=(depth and depth / 2, height / 2, width / 2))

    @property
    def setting(self) -> str:
        """The setting that the grid follows from, as it is written."""
        if not self.patches:
            return f"data.size={written(self.size)}"
        return "data.fit=patches" if self.spacing is None else f"data.resample=[{_numbers(self.spacing)}]"


def written(size: Sequence[int]) -> str:
    """How data.size is written."""
    return str(size[0]) if len(set(size)) == 1 else f"[{','.join(map(str, size))}]"


def _numbers(values: Sequence[float | None]) -> str:
    return ",".join(f"{value:g}" for value in values if value)


def to_shape(maps: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.float32]:
    """Brings maps (R, D, H, W) to another grid of the same extent: smaller by area, larger linearly, axis by axis."""
    found: Tensor = torch.from_numpy(np.ascontiguousarray(maps)).float()[None]
    smaller = [min(old, new) for old, new in zip(found.shape[2:], shape, strict=True)]
    if smaller != list(found.shape[2:]):
        found = nn.functional.adaptive_avg_pool3d(found, (smaller[0], smaller[1], smaller[2]))
    if smaller != list(shape):
        found = nn.functional.interpolate(found, size=tuple(shape), mode="trilinear", align_corners=False)
    result: NDArray[np.float32] = found[0].numpy()
    return result


def on_own_grid(
    slices: Iterable[NDArray[np.float32]], count: int, shape: Sequence[int], box: Box | None = None
) -> Iterator[NDArray[np.float32]]:
    """Brings maps from the network's grid back to a case's, as images were brought there.

    Args:
        slices: (R, h, w) of every slice.
        count: How many slices there are; where the case has as many, one at a time is in memory.
        shape: Slices, rows and columns of the case.
        box: To which the case was cut; outside of it maps are 0.

    Yields:
        (R, H, W) of every slice of the case.
    """
    if box is not None:
        inside = np.stack([*on_own_grid(slices, count, [own.stop - own.start for own in box])])
        whole = np.zeros((shape[0], inside.shape[1], *shape[1:]), np.float32)
        whole[box[0], :, box[1], box[2]] = inside
        yield from whole
    elif count == shape[0]:
        yield from (brought_back(maps[None], (shape[1], shape[2]))[0] for maps in slices)
    else:
        yield from to_shape(np.stack(list(slices), axis=1), shape).swapaxes(0, 1)
