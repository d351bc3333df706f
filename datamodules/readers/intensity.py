"""From stored values of an image to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Array
from fedseg.datamodules.readers.settings import Reading

REACH = 4  # standard deviations from the mean, of zscore


def scale(image: Array, reading: Reading, *, channelwise: bool = False) -> NDArray[np.uint8] | NDArray[np.float32]:
    """8-bit values stay as they are (255 becomes 1 when a batch is made); all others become float32 in [0, 1].

    With ``scale_8bit`` 8-bit values are treated as all others, so that files of several depths become alike.

    * "percentile": the case's percentiles become 0 and 1, the rest is clipped (its full range where they coincide).
    * "minmax": the case's smallest and largest value become 0 and 1.
    * "window": two fixed values become 0 and 1, the rest is clipped; for CT, or to keep the sites' differences.
    * "zscore": the mean of the values that are not 0 becomes 1/2, and 4 of their standard deviations below and above it
      become 0 and 1; the rest is clipped, and 0 stays 0. For magnetic resonance images of the brain alone.
    * "unit": values are in [0, 1] already.

    A constant image becomes 0 under those of a case. ``channelwise``, each channel has limits of its own, as
    modalities of a volume need.

    Raises:
        DataError: Values that are not finite, complex or, for "unit", outside [0, 1].
    """
    if image.dtype == np.bool_:
        image = np.where(image, 255, 0).astype(np.uint8)
    if image.dtype == np.uint8 and (not reading.scale_8bit or reading.intensity == "unit"):
        return image
    if image.dtype.kind not in "iuf":
        raise DataError(f"the image has values of type {image.dtype}; store numbers")
    values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("the image has values that are not finite; replace them, for instance with np.nan_to_num")
    if reading.intensity == "unit":
        if values.min() < 0 or values.max() > 1:
            raise DataError(
                f"the image runs from {values.min():g} to {values.max():g}, but data.intensity=unit expects [0, 1]; "
                "choose percentile, minmax, window or zscore"
            )
        return values
    if channelwise and values.shape[-1] > 1:
        return np.concatenate(
            [_scaled(values[..., [channel]], reading) for channel in range(values.shape[-1])], axis=-1
        )
    return _scaled(values, reading)


def scale_together(
    images: Sequence[Array], reading: Reading, *, channelwise: bool = False
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Images of several files on one grid, each scaled by itself, as channels of one; see :func:`scale`."""
    scaled = [scale(image, reading, channelwise=channelwise) for image in images]
    if len(scaled) == 1:
        return scaled[0]
    if all(image.dtype == np.uint8 for image in scaled):
        return np.concatenate(scaled, axis=-1, dtype=np.uint8)
    floats = [image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1) for image in scaled]
    return np.concatenate(floats, axis=-1, dtype=np.float32)


def _scaled(values: NDArray[np.float32], reading: Reading) -> NDArray[np.float32]:
    low, high = _limits(values, reading)
    if high <= low:
        return np.zeros_like(values)
    unit: NDArray[np.float32] = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.where(values == 0, np.float32(0), unit) if reading.intensity == "zscore" else unit


def _limits(values: NDArray[np.float32], reading: Reading) -> tuple[float, float]:
    if reading.intensity == "window" and reading.window is not None:
        return reading.window
    if reading.intensity == "percentile":
        low, high = (float(value) for value in np.percentile(values, reading.percentiles))
        if low < high:
            return low, high
    if reading.intensity == "zscore" and (inside := values[values != 0]).size:
        mean, deviation = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        return mean - REACH * deviation, mean + REACH * deviation
    return float(values.min()), float(values.max())
