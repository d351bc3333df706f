"""Tables of parts that people may add to from outside: `package.module:Name` stands for what lies there.

Where two parts make one, `A+B` stands for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fedseg.common.parts import JOIN, PartError, imported, is_path


class OpenTable(dict[str, Callable[..., Any]]):
    """A table of owners by name, which also finds `package.module:Name`, in the current folder or installed.

    Args:
        known: the suite's own.
        group: what the settings call it, for messages.
        kind: class that a part must derive from; None takes any function or class.
        given: how many arguments the suite gives to a class; None: its settings are its keyword-only arguments, as the
            suite's own have them. A number makes all further arguments settings, as libraries have them.
        join: makes one part of two, for `A+B`; raises ValueError where they do not go together. None: none do.
    """

    def __init__(
        self,
        known: Mapping[str, Callable[..., Any]],
        group: str,
        kind: type | None = None,
        given: int | None = None,
        join: Callable[[Any, Any], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__(known)
        self.group, self.kind, self.given, self.join = group, kind, given, join

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_path(name) or self._joins(name)

    def __missing__(self, name: str) -> Callable[..., Any]:
        if self.join is not None and self._joins(name):
            first, _, second = name.rpartition(JOIN)
            try:
                return self.join(self[first], self[second])
            except PartError:
                raise
            except ValueError as error:
                raise PartError(f"{self.group}={name}: {error}") from error
        if not is_path(name):
            raise KeyError(name)
        part = imported(name, self.group, self.kind)
        return part if self.given is None or not isinstance(part, type) else _foreign(part, self.given)

    def _joins(self, name: object) -> bool:
        """Whether this stands for two parts that are there."""
        first, joined, second = name.rpartition(JOIN) if isinstance(name, str) else ("", "", "")
        return bool(joined) and self.join is not None and first in self and second in self


class _Foreign:
    """A class of a library, whose arguments are settings but for the first ones; documented as the class."""

    def __init__(self, part: type, given: int) -> None:
        self._part = part
        takes = list(inspect.signature(part, eval_str=True).parameters.values())
        named = [one for one in takes[given:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        settings = [one.replace(kind=one.KEYWORD_ONLY) for one in named]
        self.__signature__ = inspect.Signature([*takes[:given], *settings])
        self.__annotations__ = {one.name: one.annotation for one in settings if one.annotation is not one.empty}
        told = "\n\n".join(inspect.getdoc(one) or "" for one in (part, vars(part).get("__init__"))).strip()
        self.__doc__ = told.partition("\n\n")[0] + "".join(told.partition("\n\nArgs:")[1:])

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._part(*arguments, **settings)


_foreign = cache(_Foreign)  # knobs are remembered by owner
