"""A volume as its file tells it: voxels, and where they lie in the patient. What no header may say is refused here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Array, sides
from fedseg.datamodules.readers.pictures import MOST_CHANNELS

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """A volume of any format.

    Attributes:
        shape: Of its three axes and, where it has channels, a fourth.
        affine: From voxels to the patient: to the right, to the front, to the head.
        load: Decodes the voxels.
        unit: Millimetres per unit of the affine.
        step: Between neighbouring values stored with a scale factor; 0 without.
        segments: Label ids and names of the segments of a segmentation, where the file tells them.
        frame: Names the space in which places are measured; empty where the file does not tell.
    """

    shape: tuple[int, ...]
    affine: Affine
    load: Callable[[], Array]
    unit: float = 1.0
    step: float = 0.0
    segments: tuple[tuple[int, str], ...] = ()
    frame: str = ""

    def turned(self, to: str) -> Volume:
        """The same volume with its axes in another order and direction, such as "LPS"."""
        from nibabel.orientations import apply_orientation, inv_ornt_aff

        turn = turn_between(self.affine, to)
        shape = list(self.shape)
        for axis, size in zip(turn[:, 0].astype(int), self.shape[:3], strict=True):
            shape[axis] = size
        affine = self.affine @ inv_ornt_aff(turn, self.shape[:3])
        return replace(self, shape=tuple(shape), affine=affine, load=lambda: apply_orientation(self.load(), turn))

    def on_voxels_of(self, image: Volume) -> Volume:
        """A mask with the geometry of its image."""
        if self.shape[:3] != image.shape[:3]:
            raise DataError(
                f"is {sides(self.shape)} but its image {sides(image.shape)}: data.mask_geometry=image needs equal "
                "shapes"
            )
        return replace(self, affine=image.affine, unit=image.unit)


def turn_between(affine: Affine, to: str, *, back: bool = False) -> Array:
    """The change of axes from those of an affine to others, or back."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    own, other = io_orientation(affine), axcodes2ornt(tuple(to))
    turn: Array = ornt_transform(other, own) if back else ornt_transform(own, other)
    return turn


def directions(affine: Affine) -> Array:
    """Along which axis of the patient, and which way, each axis of a volume runs."""
    import nibabel

    found: Array = nibabel.io_orientation(affine)
    return found


def voxel_sizes(affine: Affine) -> NDArray[np.float64]:
    """Of each axis, in the affine's unit."""
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sizes


def check_shape(shape: Sequence[int]) -> None:
    """Refuses what is neither a volume nor one with few channels."""
    if len(shape) not in (3, 4):
        raise DataError(f"has {len(shape)} dimensions; write one 3-D file per frame or modality")
    if len(shape) == 4 and shape[3] > MOST_CHANNELS:
        raise DataError(
            f"is {sides(shape)}: a fourth axis holds channels, at most {MOST_CHANNELS}; write one 3-D file per frame "
            "or modality"
        )


def check_affine(affine: Affine, cure: str) -> None:
    """Refuses headers that do not say where voxels lie."""
    sizes = voxel_sizes(affine)
    if not np.isfinite(affine).all() or not sizes.min() > 0:
        told = ", ".join(f"{size:.3g}" for size in sizes)
        raise DataError(f"has no voxel size along an axis (its affine says {told}); {cure}")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-3 * sizes.prod():
        raise DataError(f"has two axes that run the same way (its affine is singular); {cure}")
