"""Parts that people bring along: `package.module:Name`, in the current folder or installed."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
OwnPart = Annotated[str, Field(pattern=f"^{PATH.pattern}$")]
"""A setting's type: beside the suite's own choices it takes somebody's own."""

JOIN = "+"
"""Between two parts that make one."""


class PartError(ValueError):
    """A part that cannot be imported, or is none of its kind; the message names the cure."""


def is_path(name: object) -> bool:
    """Whether a choice is one of somebody's own, `package.module:Name`."""
    return isinstance(name, str) and PATH.fullmatch(name) is not None


def own_parts(choice: object) -> list[str]:
    """The parts of somebody's own in a choice."""
    return [name for name in str(choice).split(JOIN) if is_path(name)]


def imported(path: str, setting: str, kind: type | None = None) -> Callable[..., Any]:
    """What lies at `package.module:Name`.

    Args:
        path: where.
        setting: that names it, for messages.
        kind: class that it must derive from; None takes any function or class.

    Raises:
        PartError: it cannot be imported, or is none of its kind.
    """
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        part = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise PartError(
                f"{setting}={path}: there is no module {error.name}, neither in {here} nor installed"
            ) from error
        raise
    except AttributeError as error:
        raise PartError(f"{setting}={path}: the module {module} has no {name}") from error
    wanted = f"a subclass of {kind.__name__}" if kind else "a function or a class"
    fits = isinstance(part, type) and issubclass(part, kind) if kind else callable(part)
    if not fits:
        raise PartError(f"{setting}={path}: {name} is not {wanted}")
    found: Callable[..., Any] = part
    return found


def called(path: str, setting: str, /, *arguments: Any, **settings: Any) -> Any:
    """What a part answers.

    Args:
        path: `package.module:Name`.
        setting: that names it.
        arguments: of the suite.
        settings: of the user.

    Raises:
        PartError: it cannot be imported, or takes other arguments.
    """
    part = imported(path, setting)
    try:
        signature = inspect.signature(part)
    except ValueError:  # of some that are written in C
        return part(*arguments, **settings)
    try:
        signature.bind(*arguments, **settings)
    except TypeError as error:
        raise PartError(f"{setting}={path} cannot be called as it should: {error}") from error
    return part(*arguments, **settings)
