"""PNG, JPEG, TIFF, GIF, BMP, PPM and NPY: images of two dimensions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Array, sides
from fedseg.datamodules.readers.stored import Stored

MOST_CHANNELS = 16
MOST_PIXELS = 2**30
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # entries of EXIF and TIFF
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
PLAIN_COLOURS = ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE")
NETPBM = re.compile(rb"P([2356])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" * 3 + rb"\s")  # kind, width, height, largest value
Image.MAX_IMAGE_PIXELS = None  # slides and their masks are large; `_check_size` sets the limit


def picture(path: Path) -> Stored:
    """Whatever Pillow reads, at the depth of the file."""
    with Image.open(path) as file:
        _check_size(file.width, file.height)
        _check_upright(file.getexif().get(ORIENTATION, 1))
        if (frames := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
            raise DataError(f"holds {frames} frames or pages; store one picture per file")
        file.load()
        if file.mode == "P":
            return _indexed(file)
        white = _white(file, path)
        if white > 255 and file.mode in ("RGB", "RGBA", "LA"):
            array = _deep_colours(path)
            if array.ndim == 3 and array.shape[2] == 4 and file.format == "PNG" and _png_head(path)[1] == 4:
                array = array[..., [0, 3]]
        elif file.mode in ("1", "L", "I", "F", "RGB", "LA", "RGBA") or file.mode.startswith("I;16"):
            array = np.asarray(file)
        else:
            array = np.asarray(file.convert("RGBA" if file.mode in ("PA", "La", "RGBa") else "RGB"))
        lossy = file.format in LOSSY or file.info.get("compression") == "jpeg"
        whitened = isinstance(file, TiffImageFile) and file.tag_v2.get(PHOTOMETRIC) == 0
    if file.format in ("PNG", "TIFF") and 1 < white < 255:
        array = array // (255 // white)  # Pillow spreads few bits over 0 to 255
    if whitened and white > 255:  # Pillow turns fewer bits only
        array = _turn(array, white)
    stored = _split_alpha(array, array.ndim == 3 and array.shape[2] in (2, 4), white)
    return replace(stored, lossy=lossy, turned=whitened)


def _indexed(file: Image.Image) -> Stored:
    """A picture of palette indices."""
    colours = np.array(file.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    indices = np.asarray(file)
    transparent = file.info.get("transparency")
    alpha = None
    if transparent is not None:
        opacity = np.full(256, 255, np.uint8)
        if isinstance(transparent, bytes):
            opacity[: len(transparent)] = np.frombuffer(transparent, np.uint8)
        else:
            opacity[transparent] = 0
        alpha = opacity[indices][None]
    return Stored(flat(indices), palette=palette, alpha=alpha)


def _split_alpha(array: Array, has_alpha: bool, white: int | None) -> Stored:
    """(H, W) or (H, W, C), whose last channel may be opacity."""
    if has_alpha:
        return Stored(flat(array[..., :-1]), white=white, alpha=array[None, ..., -1])
    return Stored(flat(array), white=white)


def _white(file: Image.Image, path: Path) -> int:
    """The largest value that the depth of a file can hold."""
    if file.mode == "1":
        return 1
    bits = 16 if file.mode.startswith("I") else 8
    if file.format == "PNG":
        bits = _png_head(path)[0]
    elif isinstance(file, TiffImageFile):
        bits = int(file.tag_v2.get(BITS, (bits,))[0])
    return int(2**bits - 1)


def _png_head(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[24], head[25]


def netpbm(path: Path) -> Stored:
    """PPM and PGM, whose largest value is written in their head: Pillow would spread or cut others than 255."""
    stored = picture(path)  # refuses what is cut short
    content = path.read_bytes()
    head = NETPBM.match(content)
    if head is None or head.group(4) == b"255":
        return stored  # an ordinary one, a bitmap, or another format by this name
    kind, width, height, white = (int(group) for group in head.groups())
    body = content[head.end() :]
    if kind < 5:
        numbers = np.array(re.sub(rb"#[^\r\n]*", b"", body).split(), np.uint16)
    else:
        numbers = np.frombuffer(body, ">u2" if white > 255 else np.uint8)
    channels = 3 if kind in (3, 6) else 1
    values = numbers[: height * width * channels].reshape(height, width, channels)
    return Stored(flat(values.astype(np.uint8 if white < 256 else np.uint16)), white=white)


def _deep_colours(path: Path) -> Array:
    """Values that Pillow would cut to 8 bits, as OpenCV reads them: red, green, blue, opacity."""
    array: Array | None = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise DataError(
            "has 16 bits in a compression that is not read; store it as PNG, or as TIFF without compression"
        )
    if array.ndim == 3:
        array = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] > 2 else array
    return array


def tiff(path: Path) -> Stored:
    """A TIFF of one picture; at most four pages are its channels."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page: Any = file.pages.first
            _check_size(page.imagewidth, page.imagelength)
            _check_upright(page.tags.valueof(ORIENTATION, default=1))
            known = page.photometric.name in PLAIN_COLOURS and _known_to_tifffile(page)
            if known:
                array, axes = series.asarray(), series.axes
                palette = _colormap(page) if page.photometric.name == "PALETTE" else None
    except DataError:
        raise
    except (ValueError, KeyError, NotImplementedError):  # what tifffile leaves to packages that are not there
        known = False
    if not known:
        return picture(path)  # Pillow decodes it, or refuses the file
    bits, kind = int(page.bitspersample), page.photometric.name
    white = 2**bits - 1 if array.dtype.kind in "ub" else None
    turned = kind == "MINISWHITE"
    if turned:
        array = _turn(array, 2**bits - 1)
    if array.ndim == 3 and axes[-1] != "S":
        if array.shape[0] > 4:
            raise DataError(f"{array.shape[0]} pages: store a stack as NIfTI, or as one file per slice")
        array = np.moveaxis(array, 0, -1)
    samples = 3 if kind == "RGB" else 1
    extra = array.ndim == 3 and "S" in axes and array.shape[-1] == samples + 1
    is_alpha = extra and (kind == "RGB" or any(int(sample) in (1, 2) for sample in page.extrasamples))
    stored = replace(_split_alpha(array, is_alpha, white), turned=turned)
    return stored if palette is None else replace(stored, palette=palette, white=None)


def _known_to_tifffile(page: Any) -> bool:
    """Whether tifffile alone unpacks the bits of a page."""
    bits = int(page.bitspersample)
    return bits >= 8 or (bits == 1 and page.photometric.name != "PALETTE")


def _turn(array: Array, white: int) -> Array:
    """Black as zero."""
    if array.dtype == np.bool_:
        return ~array
    if array.dtype.kind != "u":
        raise DataError(f"holds {array.dtype} with white as zero (MINISWHITE); store it with black as zero")
    return np.array(array.dtype.type(white) - array)


def _colormap(page: Any) -> NDArray[np.uint8]:
    """The palette of a TIFF: 16 bits per colour, or 8 bits by mistake."""
    colours = np.asarray(page.colormap).T
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def numpy_array(path: Path) -> Stored:
    """An array (H, W) or (H, W, C)."""
    array = np.load(path, allow_pickle=False)
    whites = {"b": 1, "u": 256**array.dtype.itemsize - 1}
    return Stored(flat(array), white=whites.get(array.dtype.kind))


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise DataError(
            f"is {height} x {width}, more than {MOST_PIXELS >> 20} million pixels; cut it into tiles, or export image "
            "and mask smaller"
        )


def _check_upright(orientation: object) -> None:
    """Viewers turn such a picture, programs that draw masks may not: which way image and mask lie would be a guess."""
    if orientation in range(2, 9):
        raise DataError(
            f"its EXIF orientation is {orientation}: viewers turn it, its pixels lie otherwise; store it upright "
            "without that entry (Pillow: ImageOps.exif_transpose), and check that its mask lies as the image"
        )


def flat(array: Array) -> Array:
    """(H, W) or (H, W, C) to (1, H, W, C)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"is {sides(array.shape)}: a 2-D image is (H, W) or (H, W, C)")
    if array.shape[2] > MOST_CHANNELS:
        raise DataError(
            f"is {sides(array.shape)}: more than {MOST_CHANNELS} channels; channels come last, and volumes are NIfTI, "
            "NRRD or MHA"
        )
    return array[None]
