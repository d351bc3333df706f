"""Tables of parts that people may add to from outside: `package.module:Name` stands for what lies there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fedseg.common.parts import imported, is_path


class OpenTable(dict[str, Callable[..., Any]]):
    """A table of owners by name, which also finds `package.module:Name`, in the current folder or installed.

    Args:
        known: the suite's own.
        group: what the settings call it, for messages.
        kind: class that a part must derive from; None takes any function or class.
        given: how many arguments the suite gives to a class; None: its settings are its keyword-only arguments, as the
            suite's own have them. A number makes all further arguments settings, as libraries have them.
    """

    def __init__(
        self,
        known: Mapping[str, Callable[..., Any]],
        group: str,
        kind: type | None = None,
        given: int | None = None,
    ) -> None:
        super().__init__(known)
        self.group, self.kind, self.given = group, kind, given

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_path(name)

    def __missing__(self, name: str) -> Callable[..., Any]:
        if not is_path(name):
            raise KeyError(name)
        part = imported(name, self.group, self.kind)
        return part if self.given is None or not isinstance(part, type) else _foreign(part, self.given)


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
