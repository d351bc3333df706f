"""From channels, palette and transparency of a mask to one value per pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.readers.kinds import Array
from fedseg.datamodules.readers.rules import COLOUR, is_colour, rule
from fedseg.datamodules.readers.settings import Reading
from fedseg.datamodules.readers.stored import Stored

Tell = Callable[[Finding], None]
MOST_NAMED = 6
SEGMENT = "segment "  # before a name, where a label has one rather than a colour


def drawing(stored: Stored, reading: Reading, tell: Tell) -> tuple[Array, int | None]:
    """What is drawn: (D, H, W) values, grey or colour codes, and the value of white."""
    if stored.palette is not None:
        return _indexed(stored, stored.palette, reading, tell)
    codes = _one_channel(stored.values)
    if stored.alpha is None:
        return codes, stored.white
    return _with_alpha(codes, stored.alpha, stored.white, reading, tell)


def distinct(values: Array) -> list[int]:
    """Different values, rising; counting them, or hashing, is far faster than sorting."""
    if values.size and values.dtype == np.uint8:
        counted = cv2.calcHist([np.ascontiguousarray(values).reshape(len(values), -1)], [0], None, [256], [0, 256])
        return [int(value) for value in np.flatnonzero(counted)]
    if values.size and values.dtype.kind in "iub":
        low, high = int(values.min()), int(values.max())
        if high - low < 2**16:
            counts = np.bincount(values.ravel().astype(np.int64) - low if low else values.ravel())
            return [low + int(step) for step in np.flatnonzero(counts)]
    found: list[int] = sorted(pd.unique(values.ravel()).tolist())
    return found


def named(values: Iterable[float]) -> str:
    """The first few values or colours, as keys of ``data.label_values`` spell them."""
    names = [_name(value) for value in values]
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def by_colour(values: Iterable[float]) -> str:
    """The setting that maps colours, ids left open."""
    names = [_rgb(value) for value in values if value]
    more = ", ..." if len(names) > MOST_NAMED else ""
    return "data.label_values={" + ", ".join(f"'{name}': ID" for name in names[:MOST_NAMED]) + more + "}"


def _name(value: float) -> str:
    return f"{value:g}" if value < COLOUR else _rgb(value)


def _rgb(value: float) -> str:
    """The colour of a code: red, green, blue."""
    code = int(value)
    return f"{code >> 16 & 255},{code >> 8 & 255},{code & 255}" if code >= COLOUR else f"{code},{code},{code}"


# --- channels ---------------------------------------------------------------------------------------------------------


def _one_channel(stored: Array) -> Array:
    """Grey values as they are; a colour as its code."""
    if stored.dtype.kind not in "iufb":
        raise DataError(f"has values of type {stored.dtype}; store label ids")
    red = stored[..., 0]
    if all(np.array_equal(red, stored[..., i]) for i in range(1, stored.shape[-1])):
        return red
    if stored.shape[-1] != 3:
        raise DataError(
            f"is not 2-D: it has {stored.shape[-1]} different channels; store label ids in one channel (of one map per "
            "label, np.argmax makes them)"
        )
    return codes_of(_eight_bits(stored))


def _eight_bits(colours: Array) -> Array:
    """Colours of more bits, where eight hold them."""
    if colours.dtype == np.uint8:
        return colours
    if colours.dtype == np.uint16 and not (colours % 257).any():
        return (colours // 257).astype(np.uint8)
    if colours.dtype.kind in "iu" and colours.min() >= 0 and colours.max() <= 255:
        return colours.astype(np.uint8)
    raise DataError(f"has colours of type {colours.dtype}; store label ids in one channel, or colours of 8 bits")


def codes_of(colours: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(..., 3) colours to grey levels where they are grey, else to codes above every grey."""
    red, green, blue = (colours[..., i].astype(np.int64) for i in range(3))
    codes: NDArray[np.int64] = np.where((red == green) & (green == blue), red, COLOUR | red << 16 | green << 8 | blue)
    return codes


# --- transparency -----------------------------------------------------------------------------------------------------


def _with_alpha(
    codes: Array, alpha: Array, white: int | None, reading: Reading, tell: Tell
) -> tuple[Array, int | None]:
    """The drawing of a mask with transparency, where it is certain which channel holds it."""
    top = 65535 if alpha.dtype == np.uint16 else 255
    levels = distinct(alpha)
    if len(levels) == 1 and levels[0] > 0:
        return codes, white
    cut = len(levels) == 2 and levels[0] == 0  # there or not, nothing between
    hidden, drawn = distinct(codes[alpha == 0]), distinct(codes[alpha > 0])
    one_colour = len({*hidden, *drawn}) == 1 or (reading.transparency == "auto" and len(hidden) == len(drawn) == 1)
    if (one_colour and not (cut and hidden == [0] != drawn)) or reading.transparency == "drawing":
        what = "its transparency holds the drawing: what is opaque counts as drawn"
        tell(Finding("drawing in transparency", what, "none needed if this is so; else store it without transparency"))
        return (np.where(alpha > 0, top, 0) if cut else alpha), top
    apart = cut and len(hidden) == 1 and hidden[0] not in drawn
    if reading.transparency == "ignore" or (apart and hidden == [0]):
        return codes, white
    if apart and 0 not in drawn:
        what = "what is transparent counts as background"
        tell(Finding("drawing in transparency", what, "none needed if this is so; else store it without transparency"))
        return np.where(alpha > 0, codes, 0), white
    raise DataError(
        "has colours and transparency that both vary, so that either may be the drawing; say which with "
        "data.transparency=ignore (colours count) or data.transparency=drawing (what is opaque counts), or store it "
        "without transparency"
    )


# --- palette ----------------------------------------------------------------------------------------------------------


def _indexed(stored: Stored, palette: NDArray[np.uint8], reading: Reading, tell: Tell) -> tuple[Array, int | None]:
    """Indices where they are the label ids, colours where those are what was drawn."""
    indices, codes = stored.values[..., 0], codes_of(palette)
    used = distinct(indices)
    if used[-1] >= len(palette):
        raise DataError(f"has the index {used[-1]}, its palette {len(palette)} colours; store it anew")
    meaning = _meaning(stored, codes, used, reading)
    if meaning == "indices":
        return indices, None
    seen = codes[used].tolist()
    if meaning == "colours":
        drawn = codes[indices] if max(seen) >= COLOUR else codes.astype(np.uint8)[indices]
        return (drawn, 255) if stored.alpha is None else _with_alpha(drawn, stored.alpha, 255, reading, tell)
    pairs = ", ".join(f"{index} is {_name(code)}" for index, code in zip(used[:MOST_NAMED], seen, strict=False))
    raise DataError(
        f"has a palette ({pairs}), and whether indices or colours are the labels is not certain; say so by colour, "
        f"{by_colour(seen)}"
    )


def _meaning(
    stored: Stored, codes: NDArray[np.int64], used: list[int], reading: Reading
) -> Literal["indices", "colours", "uncertain"]:
    """What a palette is for.

    Black and white mean themselves, in whatever order a program files them, and so do greys. Other colours are how
    viewers tell label ids apart, if black comes first and once. Where several greys are labels, either may be meant.
    """
    seen = codes[used].tolist()
    alike = stored.alpha is None or len(distinct(stored.alpha)) == 1
    if seen == used or (len(used) > 1 and len(set(seen)) == 1 and alike and not _by_colour(reading)):
        return "indices"
    black_white, all_grey = set(seen) <= {0, 255}, codes.max() < COLOUR
    if _by_colour(reading) or (black_white and (reading.binary or reading.label_values)):
        return "colours"
    if reading.label_values and max(seen) < COLOUR and (all_grey or _ruled(seen, reading)):
        return "colours"
    if all_grey:
        ordered = used == [0, 1] and seen[0] == 0  # both meanings agree
        return "uncertain" if not reading.binary else "indices" if ordered else "colours"
    black_first = codes[0] == 0 and 0 not in [code for index, code in zip(used, seen, strict=True) if index]
    return "indices" if black_first else "uncertain"


def _ruled(greys: list[int], reading: Reading) -> bool:
    """Whether the rules name every grey but black."""
    values = np.array([grey for grey in greys if grey])
    return bool(np.any([rule(key)(values) for key in reading.label_values or {}], axis=0).all())


def ids_by_colour(stored: Stored, reading: Reading) -> tuple[tuple[int, str], ...]:
    """Label ids with their colours, of a mask whose palette's indices are the ids; of a segmentation with names."""
    if stored.palette is None:
        return tuple((label, f"{SEGMENT}{name}") for label, name in stored.segments)
    codes, used = codes_of(stored.palette), distinct(stored.values[..., 0])
    seen = codes[used].tolist()
    if seen == used or len(set(seen)) == 1 or _meaning(stored, codes, used, reading) != "indices":
        return ()
    return tuple((index, _rgb(code)) for index, code in zip(used, seen, strict=True))


def _by_colour(reading: Reading) -> bool:
    return any(is_colour(key) for key in reading.label_values or {})
