"""From stored mask values to label ids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.readers.kinds import Array
from datamodules.readers.rules import rule
from datamodules.readers.settings import Reading


def map_labels(stored: Array, reading: Reading) -> NDArray[np.uint8]:
    """Label ids of a mask.

    ``label_values`` maps stored values to ids: the key is a grey value (``255``), a threshold (``">=128"``) or a colour
    (``"255,0,0"``); the first rule that fits a pixel wins and other pixels keep their value. Without rules, values are
    ids, with one exception: where the label 1 is the only one there is, a mask of nothing but 0 and 255 means 0 and 1.

    Args:
        stored: (D, H, W, C), one channel or a picture of a mask in several.
        reading: Holds the rules.

    Returns:
        (D, H, W) label ids.

    Raises:
        DataError: A colour without a rule, a value that is not whole or does not fit an id.
    """
    values = _one_channel(stored)
    if reading.label_values:
        stored = values
        for key, label in reversed(
            list(reading.label_values.items())
        ):  # the first rule is applied last, over all others
            values = np.where(rule(key)(stored), np.int64(label), values)
    elif reading.binary and values.max() == 255 and set(np.unique(values).tolist()) <= {0, 255}:
        values = values == 255
    if values.dtype in (np.uint8, np.bool_):
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("has values that are not finite; replace them by label ids")
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise DataError(
            "has values between the label ids (a soft map?); give thresholds, data.label_values={'>=0.5': 1, '<0.5': 0}"
        )
    if whole.min() < 0 or whole.max() > 255:
        raise DataError(
            f"has values {_few(whole)}, which are no label ids (0 to 255); map them with "
            "data.label_values={VALUE: ID}, a colour as {'R,G,B': ID}"
        )
    return whole.astype(np.uint8)


def unknown_labels(found: set[int]) -> str:
    """The end of an error about label ids that no region knows."""
    hint = " (a compressed 0/255 mask? then data.label_values={'>=128': 1, '<128': 0})" if len(found) > 8 else ""
    few = ", ".join(str(value) for value in sorted(found)[:8])
    return (
        f"{few}{', ...' if len(found) > 8 else ''}, not in any of data.regions{hint}; add them to a region, map them "
        "with data.label_values={VALUE: ID}, or list them in data.ignore_labels to count as background"
    )


def _one_channel(stored: Array) -> Array:
    """Grey values as they are; a colour (r, g, b) as r * 65536 + g * 256 + b when it is not grey."""
    if stored.dtype.kind not in "iufb":
        raise DataError(f"has values of type {stored.dtype}; store label ids")
    if stored.shape[-1] == 1:
        return stored[..., 0]
    red = stored[..., 0]
    if all(np.array_equal(red, stored[..., i]) for i in range(1, stored.shape[-1])):
        return red
    if stored.shape[-1] != 3 or stored.dtype != np.uint8:
        raise DataError(f"is not 2-D: it has {stored.shape[-1]} different channels; store label ids in one channel")
    wide = stored.astype(np.int64)
    grey = (wide[..., 0] == wide[..., 1]) & (wide[..., 1] == wide[..., 2])
    return np.where(grey, wide[..., 0], wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2])


def _few(values: Array) -> str:
    found = np.unique(values).tolist()
    return ", ".join(str(value) for value in found[:8]) + (", ..." if len(found) > 8 else "")
