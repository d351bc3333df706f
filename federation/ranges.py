"""Ranges of settings: an annotation states them, and `configs` and whoever holds the setting read them there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from inspect import signature
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from fedseg.common.text import written

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
HalfShare = Annotated[float, Field(ge=0, le=0.5)]
ProperShare = Annotated[float, Field(ge=0, lt=1)]
FinitePositive = Annotated[float, Field(gt=0, lt=math.inf)]


@dataclass(frozen=True)
class Searched:
    """Where a setting is searched when its method is tuned, said beside its range; without it the range tells.

    Attributes:
        low: smallest value.
        high: largest value.
        log: whether equal factors count as equal steps.
    """

    low: float
    high: float
    log: bool = True


class NotSearched:
    """Says beside a range that tuning leaves the setting as it is."""


ReadBy = Mapping[str, tuple[str, tuple[Any, ...]]]
"""Setting -> another one of its section, and those of its choices that read it, the one to advise first."""
T = TypeVar("T")
Fixed = Annotated[T, NotSearched()]
"""A setting that tuning leaves as it is: a matter of numerics or cost, or nothing that validation can judge."""


def check_ranges(owner: Any, values: Mapping[str, Any], section: str) -> None:
    """Refuse values outside their ranges, for what is built in Python and not from a composed config.

    Args:
        owner: the class or constructor with the annotations.
        values: name -> value; those without a range pass.
        section: of the settings, such as federation.

    Raises:
        ValueError: a value is outside its range.
    """
    for name, adapter in _adapters(owner).items():
        if name in values:
            try:
                adapter.validate_python(values[name])
            except ValidationError as error:
                told = error.errors()[0]["msg"].removeprefix("Input ")
                raise ValueError(f"{section}.{name}={values[name]} {told}") from error


def check_read(settings: Any, section: str, read_by: ReadBy, *, leave_first: bool = False) -> None:
    """Refuse a setting that nobody reads.

    Args:
        settings: an object with the attributes; its dataclass or constructor has their defaults.
        section: of the settings, such as federation.
        read_by: who reads which.
        leave_first: whether to advise first to leave the setting, since another choice would change more than itself.

    Raises:
        ValueError: naming the setting and what reads it.
    """
    for name, owner in _unread(settings, read_by):
        cures = [
            f"take {section}.{owner}={written(read_by[name][1][0])}",
            f"leave {section}.{name} at {written(_defaults(settings)[name])}",
        ]
        raise ValueError(
            f"{section}.{name} has no effect with {section}.{owner}={written(getattr(settings, owner))}; "
            + ", or ".join(reversed(cures) if leave_first else cures)
        )


def without_reader(settings: Any, section: str, read_by: ReadBy) -> list[str]:
    """What `check_read` would refuse, to be said: comparisons set the same for all choices of the other setting."""
    return [
        f"{section}.{name}={written(getattr(settings, name))} with "
        f"{section}.{owner}={written(getattr(settings, owner))}"
        for name, owner in _unread(settings, read_by)
    ]


def _unread(settings: Any, read_by: ReadBy) -> Iterator[tuple[str, str]]:
    """Settings that were set and are not read, each with the one whose choice does not read it."""
    for name, (owner, readers) in read_by.items():
        usual, value = _defaults(settings)[name], getattr(settings, name)
        value = tuple(value) if isinstance(usual, tuple) else value
        if value != usual and getattr(settings, owner) not in readers:
            yield name, owner


def _defaults(settings: Any) -> dict[str, Any]:
    if is_dataclass(settings):
        return {one.name: one.default for one in fields(settings)}
    return {name: parameter.default for name, parameter in signature(type(settings)).parameters.items()}


@cache
def _adapters(owner: Any) -> dict[str, TypeAdapter[Any]]:
    """Of the annotations that state a range; workers are built often."""
    plain = get_type_hints(owner)
    hints = get_type_hints(owner, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if hint != plain[name]}
