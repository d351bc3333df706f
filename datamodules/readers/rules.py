"""The keys of ``data.label_values``: a value, a threshold or a colour."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Array

COLOUR = 1 << 40  # in the code of a colour that is not grey: above all numbers that masks hold
OF_COLOUR = re.compile(r"(\d+),(\d+),(\d+)")


def is_colour(key: int | str) -> bool:
    """Whether a key names a colour."""
    return OF_COLOUR.fullmatch(str(key).replace(" ", "")) is not None


def rule(key: int | str) -> Callable[[Array], NDArray[np.bool_]]:
    """The test that a key of ``label_values`` stands for."""
    text = str(key).replace(" ", "")
    if colour := OF_COLOUR.fullmatch(text):
        red, green, blue = (int(part) for part in colour.groups())
        code = red if red == green == blue else COLOUR | red << 16 | green << 8 | blue
        return lambda values: values == code
    found = re.fullmatch(r"(>=|<=|>|<)?(-?\d+(?:\.\d+)?)", text)
    if not found:
        raise DataError(f"data.label_values: key {key!r} is neither a value (255), a threshold ('>=128') nor 'R,G,B'")
    limit = float(found.group(2))
    compare = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less, None: np.equal}
    return lambda values: compare[found.group(1)](values, limit)
