"""Where the settings of a method are searched: the learning rate of every method, and its own by their ranges."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf
from pydantic.fields import FieldInfo

from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.fedavg import FedAvg
from fedseg.configs.knobs import Knob, knobs
from fedseg.federation.ranges import NotSearched, Searched
from fedseg.launch.settings import METHODS

SHARED = "training.lr"
"""What every method tunes, also one without settings of its own."""
DECADE, FOURFOLD = 10.0, 4
"""How far a strength without an upper bound, and a count, are searched to both sides of their default."""
EDGE = 0.01
"""How far from an end that is excluded, as a share of the range."""


@dataclass(frozen=True)
class Axis:
    """One setting and where it is searched.

    Attributes:
        key: as on the command line.
        default: where the search begins: the method as it is without tuning.
        low: smallest value.
        high: largest value.
        log: whether equal factors count as equal steps.
        whole: whether it is a count.
    """

    key: str
    default: float
    low: float
    high: float
    log: bool
    whole: bool = False

    @property
    def told(self) -> str:
        """The axis in words."""
        kind = "whole numbers, " if self.whole else ""
        return f"{self.key}: {self.low:g} to {self.high:g}, {kind}{'log-' if self.log else ''}uniform"


def search_space(config: DictConfig, by_hand: typing.Collection[str] = ()) -> list[Axis]:
    """All that is searched for a method.

    Args:
        config: of the method as it is without tuning, on the job at hand.
        by_hand: settings that the user gives, which are not searched.
    """
    name = str(config.algorithm.name)
    read_by = cast(type[Algorithm], METHODS[name]).read_by
    idle = {key for key, (owner, choices) in read_by.items() if config.algorithm[owner] not in choices}
    own = {key: knob for key, knob in own_settings(name).items() if key not in idle}
    known = {SHARED: Knob(Annotated[float, Searched(*_around(config.training.lr))], None, "")}
    known |= {f"algorithm.{key}": knob for key, knob in own.items()}
    found = (axis(key, knob, OmegaConf.select(config, key)) for key, knob in known.items() if key not in by_hand)
    return [one for one in found if one is not None]


def own_settings(name: str) -> Mapping[str, Knob]:
    """The settings that a method has beside FedAvg's."""
    return {key: knob for key, knob in knobs(METHODS[name]).items() if key not in knobs(FedAvg)}


def axis(key: str, knob: Knob, default: Any) -> Axis | None:
    """Where a setting is searched; None for a switch, a variant or nothing, and for what is marked as fixed.

    A share is searched over its range. A strength without an upper bound is searched over a decade to both sides of its
    default, a count over a factor of four, in equal factors, as far as the range allows; from 0 there are none.
    """
    told = FieldInfo.from_annotation(knob.type).metadata
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if not number or any(isinstance(mark, NotSearched) for mark in told):
        return None
    whole = isinstance(default, int) and int in _types(knob.type)
    for mark in told:
        if isinstance(mark, Searched):
            return Axis(key, default, mark.low, mark.high, mark.log, whole)
    low, high = _bounds(knob.type)
    if low > -math.inf and high < math.inf and not whole:
        return Axis(key, default, low, high, log=False)
    if default <= 0:
        return None
    around = _around(default, FOURFOLD if whole else DECADE)
    if whole:
        return Axis(key, default, max(1, low, around[0] // 1), min(high, around[1]), log=True, whole=True)
    return Axis(key, default, max(low, around[0]), min(high, around[1]), log=True)


def _around(value: float, factor: float = DECADE) -> tuple[float, float]:
    return value / factor, value * factor


def _types(annotation: Any) -> set[Any]:
    """The plain types of an annotation."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _types(members[0])
    return set().union(*map(_types, members)) if members else {annotation}


def _bounds(annotation: Any) -> tuple[float, float]:
    """The range that an annotation states; an end that is excluded is moved inwards."""
    found = {word: float(getattr(bound, word)) for bound in _marks(annotation) for word in ("gt", "ge", "lt", "le")
             if getattr(bound, word, None) is not None}  # fmt: skip
    low, high = found.get("ge", found.get("gt", -math.inf)), found.get("le", found.get("lt", math.inf))
    inset = EDGE * (high - low) if high - low < math.inf else 0.0
    return low + inset * ("gt" in found), high - inset * ("lt" in found)


def _marks(annotation: Any) -> list[Any]:
    """What stands beside an annotation's types, whichever of several it stands beside."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return [*FieldInfo.from_annotation(annotation).metadata, *_marks(members[0])]
    return [mark for member in members if member is not annotation for mark in _marks(member)]
