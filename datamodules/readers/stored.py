"""What a file holds, before its values get a meaning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.readers.kinds import Array, Spacing


@dataclass(frozen=True)
class Stored:
    """A decoded file.

    Attributes:
        values: (D, H, W, C) as stored: indices of a palette, few bits not spread, without transparency.
        spacing: Millimetres per voxel (slice, row, column), or None.
        white: The largest value of the file's depth (1, 3, 15, 255, 65535), or None where depth has no meaning.
        palette: (N, 3) colours of the indices, or None.
        alpha: (D, H, W) opacity from 0 to 255 or 65535, or None.
        lossy: Whether the format changes values, as JPEG does.
        turned: Whether it was stored with white as zero; ``values`` have black as zero.
        axis: Along which a volume was cut; None of a picture.
        step: Between neighbouring values of a volume stored with a scale factor; 0 without.
        plane: Of a volume's slices in the patient: "sagittal", "coronal" or "axial"; empty where unknown.
        segments: Label ids and names of the segments of a segmentation, where the file tells them.
    """

    values: Array
    spacing: Spacing | None = None
    white: int | None = None
    palette: NDArray[np.uint8] | None = None
    alpha: Array | None = None
    lossy: bool = False
    turned: bool = False
    step: float = 0.0
    axis: int | None = None
    plane: str = ""
    segments: tuple[tuple[int, str], ...] = ()


def seen(stored: Stored) -> Array:
    """An image as viewers show it: the palette's colours, few bits spread over 0 to 255, without transparency."""
    values = stored.values
    if stored.palette is not None:
        return stored.palette[values[..., 0]]
    if values.dtype == np.bool_:
        return np.where(values, 255, 0).astype(np.uint8)
    if stored.white is not None and stored.white < 255:
        return np.rint(values / stored.white * 255).astype(np.uint8)
    return values
