"""Which of many alike the suite tries; the others are tried by CI, and by `make exhaustive`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

STANDING = {"fedavg", "fedbn", "fedrep", "ditto", "scaffold", "lcfed", "feddg", "iopfl", "contrastive"}
"""Methods that between them have about all that a method can have."""


def every(values: Iterable[Any], standing: Collection[Any] = STANDING, at: int | None = None) -> list[Any]:
    """All values, for `pytest.mark.parametrize`: those that stand for their kind, and the exhaustive part's.

    With `at`, for several parameters at once: rows, of which that entry says it.
    """
    values = list(values)
    stand = [(value if at is None else value[at]) in standing for value in values]
    assert any(stand), "nothing would be left in the suite"
    rows = [(value,) if at is None else value for value in values]
    return [value if kept else _exhaustive(*row) for value, row, kept in zip(values, rows, stand, strict=True)]


def firsts(rows: Iterable[tuple[Any, ...]], count: int) -> list[Any]:
    """All rows, for several parameters at once: the first that stand for all, and the exhaustive part's."""
    return [row if place < count else _exhaustive(*row) for place, row in enumerate(rows)]


def _exhaustive(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive)
