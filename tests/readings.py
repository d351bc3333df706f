"""A volume of known values, and cases read or refused as the data modules do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers import Reading, read_case

SHAPE = (6, 7, 8)


def volume(shape: tuple[int, ...] = SHAPE, kind: Any = np.int16) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) % 251).astype(kind)


def read(image: Path, mask: Path | None = None, **knobs: Any) -> Sample:
    case = Case("north", "p1", "p1", str(image), None if mask is None else str(mask))
    return read_case(case, Reading(**{"intensity": "minmax", "ids": (1,)} | knobs))


def labels_of(sample: Sample) -> np.ndarray:
    """Of a labelled one."""
    assert sample.labels is not None
    return sample.labels


def refused(path: Path, *told: str, mask: Path | None = None) -> str:
    """The one line that refuses a case: it names the file and a cure."""
    with pytest.raises(DataError) as error:
        read(path, mask)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 900
    for word in (str(mask or path), "; ", *told):
        assert word in message, message
    return message
