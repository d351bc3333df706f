"""Knobs are read where they live: in signatures. Names, types, defaults and descriptions have no second home."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from fedseg.common.names import SLIP, similar
from fedseg.common.parts import OwnPart
from fedseg.configs.words import MisreadError, Word, meant, shown, source_of

REQUIRED = inspect.Parameter.empty
WORDS = {
    "collections.abc.Sequence": "list",
    "collections.abc.Mapping": "dict",
    "tuple[": "list[",
    ", ...]": "]",
    "typing.": "",
    "NoneType": "null",
}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Knob:
    """One setting.

    Attributes:
        type: its annotation.
        default: its default; `REQUIRED` when it has none.
        description: its line in the docstring.
    """

    type: Any
    default: Any
    description: str

    @property
    def type_name(self) -> str:
        """The annotation as a user would write it, with its range."""
        if typing.get_origin(self.type) is typing.Literal:
            return "|".join(str(value) for value in typing.get_args(self.type))
        if self.type == OwnPart:
            return "package.module:Name"
        members = typing.get_args(self.type)
        if typing.get_origin(self.type) is typing.Annotated:
            range_ = FieldInfo.from_annotation(self.type).metadata
            limits = [(word, getattr(bound, word)) for bound in range_ for word in SIGNS if hasattr(bound, word)]
            bounds = [f"{SIGNS[word]} {limit:g}" for word, limit in limits]
            return " ".join(filter(None, (Knob(members[0], None, "").type_name, " and ".join(bounds))))
        if members and OwnPart in typing.get_args(members[0]):
            return f"list[{Knob(members[0], None, '').type_name}]"
        mapping = typing.get_origin(self.type) in (dict, Mapping)
        if mapping and any(typing.get_origin(member) is typing.Annotated for member in members):
            return f"dict[{', '.join(Knob(member, None, '').type_name for member in members)}]"
        if type(None) in members or OwnPart in members:
            return " or ".join(Knob(m, None, "").type_name for m in members)
        name = self.type.__name__ if isinstance(self.type, type) and not members else str(self.type)
        for written, read in WORDS.items():
            name = name.replace(written, read)
        return name


@cache
def knobs(owner: Callable[..., Any]) -> Mapping[str, Knob]:
    """The keyword settings of a function, a dataclass, or a class whose constructors pass ``**kwargs`` to their parent.

    A subclass's own definition wins. Positional parameters of functions and constructors are not settings.
    """
    found: dict[str, Knob] = {}
    for function, documentation in _layers(owner):
        types = typing.get_type_hints(function, include_extras=True)
        descriptions = described(documentation)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in found or not _is_setting(parameter, owner):
                continue
            found[name] = Knob(types.get(name, Any), parameter.default, descriptions.get(name, ""))
    return found


def validated(
    owner: Callable[..., Any], values: Mapping[str, Any], prefix: str, beside: typing.Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Check values against an owner's knobs and fill in defaults.

    Args:
        owner: of the knobs.
        values: name -> value.
        prefix: of the names, as the user writes them.
        beside: other names that the user may have meant.

    Returns:
        All settings with their values, and a line for each thing that is wrong.
    """
    settings = knobs(owner)
    known = [*(prefix + name for name in settings), *beside]
    errors = [unknown(f"{prefix}{key}", known) for key in values if key not in settings]
    given: dict[str, Any] = {}
    misread: dict[str, str] = {}
    for name, value in values.items():
        if name in settings:
            try:
                given[str(name)] = _plain(_taken(value, settings[name]))
            except MisreadError as refusal:
                misread[str(name)] = _refused(prefix + name, value, settings[name], refusal)
    try:
        # as JSON: a list may fill a tuple, yet neither words nor booleans pass for numbers
        whole = _model(owner).model_validate_json(json.dumps(given)).model_dump(by_alias=True)
    except ValidationError as error:
        misread = _lines(error, settings, prefix, values) | misread
        whole = given
    # lists as YAML reads them
    return {name: list(v) if isinstance(v, tuple) else v for name, v in whole.items()}, errors + list(misread.values())


def _taken(value: Any, knob: Knob) -> Any:
    """What a word means to a knob; nothing at all is an accident, such as a variable of the shell that is not set."""
    if isinstance(value, Word) and value.kind == "shell" and not value and knob.default != "":
        null = type(None) in typing.get_args(knob.type)
        raise MisreadError(value, "null" if null else "", "" if null else "it is empty; leave it out for the default")
    return meant(value, knob.type)


def _refused(key: str, value: Any, knob: Knob, refusal: MisreadError) -> str:
    """The line for a word that a knob cannot take, with the right spelling where it is known."""
    source = source_of(value)
    parts = [f"{key}={shown(value)} should be {knob.type_name}"]
    if refusal.word is not value:
        parts.append(f"{shown(refusal.word)!r} is not")
    if refusal.why:
        parts.append(refusal.why)
    if refusal.right:
        parts.append(f"write {key}={refusal.right}")
    return "; ".join(parts) + (f" ({source})" if source else "")


def unknown(name: str, known: typing.Iterable[str], kind: str = "key") -> str:
    """The line for a name that nobody knows, with the nearest one that is known."""
    options = sorted(known)
    section, _, leaf = name.rpartition(".")
    inside = {o.rpartition(".")[2]: o for o in options if o.rpartition(".")[0] == section}
    close = similar(leaf, inside, 1, SLIP)
    namesakes = [o for o in options if o.rpartition(".")[2] == leaf]
    elsewhere = [
        o for o in options if not section or o.rpartition(".")[0] != section
    ]  # a shared section is no nearness
    whole = similar(name, elsewhere, 1, SLIP)
    hint = next(iter([*(inside[n] for n in close), *namesakes, *whole]), "")
    if hint:
        return f"unknown {kind} {name!r}; did you mean {hint!r}?"
    place = f"known in {section}" if section and inside else "known"
    return f"unknown {kind} {name!r}; {place}: {', '.join(inside or options)}"


def described(documentation: str) -> dict[str, str]:
    """Name -> text of the entries under ``Args:`` and ``Attributes:`` of a Google docstring."""
    found: dict[str, str] = {}
    for block in re.findall(
        r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(documentation) + "\n", re.M
    ):
        for entry in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.M):
            found[entry[1]] = " ".join(entry[2].split())
    return found


@cache
def _model(owner: Callable[..., Any]) -> type[BaseModel]:
    fields: Any = {
        f"knob_{name}": (knob.type, Field(... if knob.default is REQUIRED else knob.default, alias=name))
        for name, knob in knobs(owner).items()
    }
    return create_model("Settings", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)


def _layers(owner: Callable[..., Any]) -> list[tuple[Callable[..., Any], str]]:
    if not isinstance(owner, type):
        return [(owner, owner.__doc__ or "")]
    if is_dataclass(owner):
        return [(owner.__init__, owner.__doc__ or "")]
    layers: list[tuple[Callable[..., Any], str]] = []
    for cls in owner.__mro__:
        constructor = cls.__dict__.get("__init__")
        if constructor is None:
            continue
        layers.append(
            (constructor, f"{inspect.getdoc(constructor) or ''}\n\n{cls.__doc__ and inspect.cleandoc(cls.__doc__)}")
        )
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            break
    return layers


def _is_setting(parameter: inspect.Parameter, owner: Callable[..., Any]) -> bool:
    if is_dataclass(owner):
        return parameter.name != "self"
    return parameter.kind is parameter.KEYWORD_ONLY


def _plain(value: Any) -> Any:
    """A whole number may be told as 5.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lines(
    error: ValidationError, settings: Mapping[str, Knob], prefix: str, values: Mapping[str, Any]
) -> dict[str, str]:
    lines: dict[str, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0]).removeprefix("knob_")
        knob = settings[name]
        if problem["type"] == "missing":
            lines[name] = f"{prefix}{name} is needed ({knob.type_name}): {knob.description}"
        else:
            lines.setdefault(name, _refused(prefix + name, values[name], knob, MisreadError(values[name])))
    return lines
