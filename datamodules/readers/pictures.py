"""PNG, JPEG, TIFF, GIF, BMP, PPM and NPY: images of two dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.errors import DataError
from datamodules.readers.kinds import Array, sides
from datamodules.readers.settings import Reading

MOST_CHANNELS = 16
ORIENTATION = 0x0112  # entry of EXIF and TIFF


def picture(path: Path, reading: Reading, role: str) -> tuple[Array, None]:  # noqa: ARG001
    """Whatever Pillow reads."""
    with Image.open(path) as file:
        shown: Image.Image = file
        _check_upright(file.getexif().get(ORIENTATION, 1))
        if shown.mode == "P" and (role == "image" or path.suffix.lower() == ".gif"):
            shown = shown.convert("RGB")  # a mask in PNG keeps its palette indices: they are the label ids
        elif shown.mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA"):
            shown = shown.convert("RGB")
        array = np.asarray(shown)
        if shown.mode in ("RGBA", "LA"):
            array = array[..., :-1]  # transparency is no measurement
        if shown.mode == "1" and role == "image":
            array = array.astype(np.uint8) * 255
    return flat(array), None


def tiff(path: Path, reading: Reading, role: str) -> tuple[Array, None]:
    """A TIFF of one picture; at most four pages are its channels."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            array, axes = series.asarray(), series.axes
            page = file.pages.first
            colours, bits = page.photometric.name, int(page.bitspersample)
            _check_upright(page.tags.valueof(ORIENTATION, default=1))
    except (ValueError, KeyError):  # a compression that tifffile leaves to another package; Pillow knows most
        return picture(path, reading, role)
    if colours == "MINISWHITE" and bits > 8:  # Pillow turns fewer bits only
        if array.dtype.kind != "u":
            raise DataError(f"holds {array.dtype} with white as zero (MINISWHITE); store it with black as zero")
        array = array.dtype.type(2**bits - 1) - array
    elif colours in ("PALETTE", "MINISWHITE"):
        return picture(path, reading, role)  # turns them into what is seen
    if colours == "RGB" and axes == "YXS":
        array = array[..., :3]  # without transparency
    if array.ndim == 3 and axes[-1] != "S":
        if array.shape[0] > 4:
            raise DataError(f"{array.shape[0]} pages: store a stack as NIfTI, or as one file per slice")
        array = np.moveaxis(array, 0, -1)
    return flat(array), None


def _check_upright(orientation: object) -> None:
    """Viewers turn such a picture, programs that draw masks may not: which way image and mask lie would be a guess."""
    if orientation in range(2, 9):
        raise DataError(
            f"its EXIF orientation is {orientation}: viewers turn it, its pixels lie otherwise; store it upright "
            "without that entry (Pillow: ImageOps.exif_transpose), and check that its mask lies as the image"
        )


def numpy_array(path: Path, reading: Reading, role: str) -> tuple[Array, None]:  # noqa: ARG001
    """An array (H, W) or (H, W, C)."""
    return flat(np.load(path, allow_pickle=False)), None


def flat(array: Array) -> Array:
    """(H, W) or (H, W, C) to (1, H, W, C)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"is {sides(array.shape)}: a 2-D image is (H, W) or (H, W, C)")
    if array.shape[2] > MOST_CHANNELS:
        raise DataError(
            f"is {sides(array.shape)}: more than {MOST_CHANNELS} channels; channels come last, and volumes are NIfTI"
        )
    return array[None]
