"""A method with another one's server step, as in `algorithm=fedce+fedadam`."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.fedavg import FedAvg
from fedseg.models.select import everything

STEP = frozenset({"advance", "init_server"})
"""Hooks that a server's step may write."""
ADDING = frozenset({"init_server"})
"""Hooks in which every class adds groups of its own to what its parent makes, so that two may write one."""


@cache
def composed(method: type[Algorithm], step: type[Algorithm]) -> type[Algorithm]:
    """A method whose server moves by another one's step: the method says what the mean is, the step what becomes of it.

    Raises:
        ValueError: the two write one hook or setting, or there is no mean or no step.
    """
    if why := obstacle(method, step):
        raise ValueError(f"{step.__name__} cannot be the server's step of {method.__name__}: {why}")
    told = [(inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".") for kind in (method, step)]
    same = {"__doc__": f"{told[0]}. Server's step: {told[1]}.", "__module__": method.__module__}
    return type(f"{method.__name__}+{step.__name__}", (method, step), same)


def obstacle(method: type[Algorithm], step: type[Algorithm]) -> str:
    """Why a method cannot take another one's server step; empty if it can."""
    if issubclass(method, step) or issubclass(step, method):
        return "one of the two is the other already"
    if why := not_a_step(step):
        return why
    if why := _without_mean(method):
        return f"a step goes along a mean of updates, and the method {why}"
    if both := sorted(_own(method) & _own(step) - ADDING):
        return f"both write {', '.join([name for name in both if hasattr(FedAvg, name)] or both)}"
    if both := sorted(_settings(method) & _settings(step)):
        return f"both have a setting {', '.join(both)}"
    return ""


def not_a_step(step: type[Algorithm]) -> str:
    """Why a method is more, or less, than a server's step; empty if it is one."""
    beside = sorted(name for name in _own(step) - STEP if callable(getattr(FedAvg, name, None)))
    if not beside and "advance" in _own(step):
        return ""
    said = f"it writes {', '.join(beside)}" if beside else "it does not write advance"
    cure = "; what stays at a site is said by algorithm.personal" if beside == ["personal"] else ""
    return f"a server's step writes {' and '.join(sorted(STEP))} alone, and {said}{cure}"


def _without_mean(method: type[Algorithm]) -> str:
    """Why no shared model is moved along a mean; empty if one is."""
    reasons = {
        "trains in one place": method.trains_on == "pool",
        "exchanges answers": method.exchanges_answers,
        "answers every site with a model of its own": method.answers_singly,
        "shares nothing": method.personal is everything,
    }
    return next((why for why, so in reasons.items() if so), "")


def _kinds(method: type[Algorithm]) -> list[type[Any]]:
    """The classes that a method has beside FedAvg's."""
    return [kind for kind in method.__mro__ if kind not in FedAvg.__mro__]


def _own(method: type[Algorithm]) -> set[str]:
    """What a method's classes write, be it a hook, a flag or a tool of their own."""
    return {name for kind in _kinds(method) for name in vars(kind) if not name.startswith(("__", "_abc_"))}


def _settings(method: type[Algorithm]) -> set[str]:
    """The settings that a method has beside FedAvg's."""
    constructors = [vars(kind)["__init__"] for kind in _kinds(method) if "__init__" in vars(kind)]
    return {
        name
        for constructor in constructors
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
