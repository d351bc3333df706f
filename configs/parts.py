"""Tables of parts that people may add to from outside: `package.module:Name` stands for what lies there."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PartError(ValueError):
    """A part that cannot be imported, or is none of its kind; the message names the cure."""


class OpenTable(dict[str, Callable[..., Any]]):
    """A table of owners by name, which also finds `package.module:Name`, in the current folder or installed.

    Args:
        known: the suite's own.
        group: what the settings call it, for messages.
        kind: class that a part must derive from; None takes any function or class.
    """

    def __init__(self, known: Mapping[str, Callable[..., Any]], group: str, kind: type | None = None) -> None:
        super().__init__(known)
        self.group, self.kind = group, kind

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_path(name)

    def __missing__(self, name: str) -> Callable[..., Any]:
        if not is_path(name):
            raise KeyError(name)
        return self._imported(name)

    def _imported(self, path: str) -> Callable[..., Any]:
        module, _, name = path.partition(":")
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            part = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name and module.startswith(error.name):
                raise PartError(
                    f"{self.group}={path}: there is no module {error.name}, neither in {here} nor installed"
                ) from error
            raise
        except AttributeError as error:
            raise PartError(f"{self.group}={path}: the module {module} has no {name}") from error
        wanted = f"a subclass of {self.kind.__name__}" if self.kind else "a function or a class"
        fits = inspect.isclass(part) and issubclass(part, self.kind) if self.kind else callable(part)
        if not fits:
            raise PartError(f"{self.group}={path}: {name} is not {wanted}")
        found: Callable[..., Any] = part
        return found


def is_path(name: object) -> bool:
    """Whether a choice is one of somebody's own, `package.module:Name`."""
    return isinstance(name, str) and PATH.fullmatch(name) is not None
