"""Words of a command line or a YAML file, and what they mean to the setting that they are for.

YAML decides what a word is before anybody knows its setting: a folder 2024_01_02 becomes a number, a region no becomes
false, a seed 010 becomes 8. Here a word stays as it was written until the type of its setting reads it.
"""

from __future__ import annotations

import ast
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import yaml

from fedseg.common.names import SLIP, near
from fedseg.common.parts import OwnPart, is_path
from fedseg.common.text import written as written_with

NULLS = ("null", "Null", "NULL", "~", "", "None")  # None: as Python, and so `wandb agent`, writes it
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
WHOLE = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.?inf", re.IGNORECASE)
LARGEST = 2**63
LONGEST_SHOWN = 100
NOTHING, SOMETHING = ("none", "disabled", "never"), ("online",)  # choices that stand for off, and for on


class MisreadError(ValueError):
    """A word that its setting cannot take.

    Attributes:
        word: which one.
        right: how it is written rightly; empty where nobody knows what was meant.
        why: what is wrong with it, where its type does not say it all.
    """

    def __init__(self, word: Any, right: str = "", why: str = "") -> None:
        super().__init__(shown(word))
        self.word = word
        self.right = right
        self.why = why


class Word(str):
    """A scalar as it was written.

    Attributes:
        kind: shell: a whole value of the command line; plain or quoted: in YAML.
        source: file and line; empty on the command line.
    """

    kind: Literal["shell", "plain", "quoted"]
    source: str

    def __new__(cls, text: str, kind: Literal["shell", "plain", "quoted"] = "shell", source: str = "") -> Word:
        """A word."""
        word = super().__new__(cls, text)
        word.kind, word.source = kind, source
        return word


def tree(text: str, source: str = "") -> Any:
    """Mappings and lists of words.

    Args:
        text: YAML.
        source: the file's name.

    Raises:
        ValueError: no YAML; or it refers to something: to this machine's environment, to Python, to another part.
    """
    try:
        node = _composed(text)
        return None if node is None else _built(node, source)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from error


def flow(word: str) -> Any:
    """A list or mapping in brackets, as a command line or `wandb agent` writes it.

    Raises:
        ValueError: it is none, or its quotes mean one thing in YAML and another in Python.
    """
    found = tree(word)
    node = _composed(word)
    if node is None or node.end_mark.index != len(word.rstrip()):
        raise ValueError("a '#' begins a comment in YAML; put the entry in quotes")
    try:
        python = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return found
    if any(entry.kind == "quoted" and entry != other for entry, other in _pairs(found, python)):
        raise ValueError('a backslash or quote in single quotes can be read in two ways; write "..." with \\\\ and \\"')
    return found


def unfit(text: str) -> str:
    """Why a text can be no setting; empty if it can."""
    if "${" in text:
        return "refers to something (${...}), which is never looked up; write the value itself"
    if text == "???":
        return "is the sign of a missing value"
    if "\0" in text:
        return "holds a zero byte"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "is not Unicode; rename the file or folder"
    return ""


def shown(value: Any) -> str:
    """As a user writes it, cut where it is long."""
    text = written(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def source_of(value: Any) -> str:
    """File and line of the first word; empty on the command line."""
    return next((word.source for word in _words(value) if word.source), "")


def meant(value: Any, kind: Any) -> Any:
    """What words mean to a setting.

    Args:
        value: a word, or lists and mappings of words; anything else is returned as it is.
        kind: the setting's annotation.

    Raises:
        MisreadError: the setting cannot take it.
    """
    if not isinstance(value, Word | list | Mapping):
        return value
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if kind == OwnPart:
        return _path(value)
    if origin is typing.Annotated:
        return meant(value, members[0])
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, members)
    if origin is Literal:
        return _choice(value, members)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(value, *members)
    if origin is not None and issubclass(origin, Sequence):
        return _list(value, members[0])
    return READERS.get(kind, _anything)(value)


# --- one word ---------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, Word):
        raise MisreadError(value)
    if value.kind == "plain" and value in NULLS:
        raise MisreadError(value, f"'{value}'")
    return str(value)


def _path(value: Any) -> str:
    if not is_path(value):
        raise MisreadError(value)
    return str(value)


def _whole(value: Any) -> int:
    text = _unquoted(value, NUMBER)
    if not NUMBER.fullmatch(text):
        raise MisreadError(value, _decimal(text))
    number = Decimal(text)
    if number and number.adjusted() > 19:
        raise MisreadError(value)
    if number != int(number) or not -LARGEST <= number < LARGEST:
        raise MisreadError(value)
    return int(number)


def _number(value: Any) -> float:
    text = _unquoted(value, NUMBER)
    if INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not NUMBER.fullmatch(text):
        comma = text.replace(",", ".")
        raise MisreadError(value, comma if NUMBER.fullmatch(comma) else _decimal(text))
    if abs(number := float(text)) == float("inf"):
        raise MisreadError(value)
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, Word) or value.kind == "quoted":
        raise MisreadError(value, value.lower() if isinstance(value, Word) and value.lower() in (*TRUE, *FALSE) else "")
    text = value.strip()
    if text not in {form for word in (*TRUE, *FALSE) for form in (word, word.title(), word.upper())}:
        raise MisreadError(value, {"1": "true", "0": "false"}.get(text, ""))
    return text.lower() in TRUE


def _anything(value: Any) -> Any:
    """For a setting of any type; what YAML 1.1 would read otherwise than it looks is refused."""
    if isinstance(value, Word) and value.kind == "shell" and value.startswith(("[", "{")):
        value = _opened(value)
    if isinstance(value, list):
        return [_anything(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _anything(entry) for key, entry in value.items()}
    if not isinstance(value, Word):
        return value
    if value.kind == "quoted":
        return str(value)
    if value in NULLS:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if right := ambiguous(value):
        raise MisreadError(value, right)
    if WHOLE.fullmatch(value):
        return _whole(value)
    return _number(value) if NUMBER.fullmatch(value) or INFINITE.fullmatch(value) else str(value)


READERS: dict[Any, Callable[[Any], Any]] = {str: _text, int: _whole, float: _number, bool: _flag}


def ambiguous(word: str) -> str:
    """How to write a word that YAML 1.1 takes for a number or a truth value though it looks otherwise; else empty."""
    lowered = word.lower()
    if lowered in (*TRUE[1:], *FALSE[1:]):
        return f"{str(lowered in TRUE).lower()}, or '{word}' for the word"
    padded = re.fullmatch(r"[-+]?0[0-9]+", word)
    tags = [tag for tag, form in yaml.SafeLoader.yaml_implicit_resolvers.get(word[:1], ()) if form.match(word)]
    number = any(tag.endswith((":int", ":float")) for tag in tags)
    if padded or (number and not NUMBER.fullmatch(word) and not INFINITE.fullmatch(word) and lowered != ".nan"):
        decimal = str(int(word)) if padded else _decimal(word)
        return f"{decimal}, or '{word}' for the text" if decimal else f"'{word}' for the text"
    return ""


def _choice(value: Any, choices: Sequence[Any]) -> str:
    if isinstance(value, Word) and value in choices:
        return str(value)
    if not isinstance(value, Word):
        raise MisreadError(value)
    lowered = value.strip().lower()
    if lowered in choices:
        raise MisreadError(value, lowered)
    for words, names in (((*FALSE, *NULLS, "0"), NOTHING), ((*TRUE, "1"), SOMETHING)):
        if lowered in words:
            raise MisreadError(value, next((name for name in names if name in choices), ""))
    begun = [choice for choice in choices if lowered and str(choice).startswith(lowered)]
    raise MisreadError(value, begun[0] if len(begun) == 1 else near(lowered, map(str, choices), SLIP))


def _one_of(value: Any, members: Sequence[Any]) -> Any:
    if type(None) in members and isinstance(value, Word):
        if value.kind == "plain" and value in NULLS:
            return None
        if value.kind == "shell" and value in ("null", "None"):
            return None
    refusals = []
    for member in members:
        if member is type(None):
            continue
        try:
            return meant(value, member)
        except MisreadError as refusal:
            refusals.append(refusal)
    raise next((refusal for refusal in refusals if refusal.right), refusals[0])


# --- lists and mappings -----------------------------------------------------------------------------------------------


def _list(value: Any, kind: Any) -> list[Any]:
    if isinstance(value, Word) and value.kind == "shell" and value.lstrip().startswith("["):
        value = _opened(value)
    if isinstance(value, Word):
        return _single(value, kind)
    if not isinstance(value, list):
        raise MisreadError(value)
    found: list[Any] = []
    try:
        found.extend(meant(entry, kind) for entry in value)
    except MisreadError as refusal:
        right = [*value[: len(found)], Word(refusal.right), *value[len(found) + 1 :]]
        raise MisreadError(refusal.word, written(right) if refusal.right else "", refusal.why) from None
    return found


def _single(word: Word, kind: Any) -> list[Any]:
    """One word where a list is due: a list of text may have one entry."""
    if word.kind != "quoted" and word in NULLS:
        raise MisreadError(word, "[]")
    if kind is not str or ("," in word and word.kind != "quoted"):
        try:
            entries = [meant(Word(part.strip(), "plain"), kind) for part in word.split(",")]
        except MisreadError:
            raise MisreadError(word) from None
        raise MisreadError(word, written(entries))
    return [str(word)]


def _mapping(value: Any, kind: Any, of: Any) -> dict[Any, Any]:
    if isinstance(value, Word) and value.kind == "shell" and value.lstrip().startswith("{"):
        value = _opened(value)
    if not isinstance(value, Mapping):
        raise MisreadError(value)
    found: dict[Any, Any] = {}
    for key, entry in value.items():
        try:
            name, content = meant(key, kind), meant(entry, of)
        except MisreadError as refusal:
            good = Word(refusal.right)
            pair = {good: entry} if refusal.word is key else {key: good}
            right = {k: v for other in value for k, v in (pair if other is key else {other: value[other]}).items()}
            raise MisreadError(refusal.word, written(right) if refusal.right else "") from None
        if str(name) in map(str, found):
            raise MisreadError(key, why=f"{name} is there twice")
        found[name] = content
    return found


def _opened(word: Word) -> Any:
    try:
        return flow(word)
    except ValueError as error:
        raise MisreadError(word, why=str(error)) from error


# --- help -------------------------------------------------------------------------------------------------------------


def _unquoted(value: Any, form: re.Pattern[str]) -> str:
    """The text of a number; numbers have no quotes."""
    if not isinstance(value, Word):
        raise MisreadError(value)
    if value.kind == "quoted" or (value[:1] in "'\"" and value[:1] == value[-1:]):
        bare = value.strip("'\" ")
        raise MisreadError(value, bare if form.fullmatch(bare) else "")
    return value.strip()


def _decimal(text: str) -> str:
    """A number of another spelling (0x10, 1_000) in decimal; empty if it is none."""
    try:
        return str(int(text, 0))
    except ValueError:
        pass
    plain = text.replace("_", "")
    return plain if plain != text and NUMBER.fullmatch(plain) else ""


class _Loader(yaml.SafeLoader):
    """Reads nothing that refers to something."""

    def get_event(self) -> Any:
        parser: Any = super()
        event = parser.get_event()
        _check_event(event)
        return event


@functools.lru_cache(maxsize=64)  # a command reads the suite's own files several times
def _composed(text: str) -> yaml.Node | None:
    node: yaml.Node | None = yaml.compose(text, _Loader)
    return node


def _check_event(event: Any) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError(f"refers to another part (&, *) in line {_line(event)}; write the value itself")
    if getattr(event, "tag", None) is not None:
        raise ValueError(f"has a YAML tag ({event.tag}) in line {_line(event)}; write the value alone")
    if isinstance(event, yaml.ScalarEvent) and (why := unfit(event.value)):
        raise ValueError(f"line {_line(event)}: {shown(Word(event.value))} {why}")


def _built(node: yaml.Node, source: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        place = f"{source}, line {_line(node)}" if source else ""
        return Word(node.value, "plain" if node.style is None else "quoted", place)
    if isinstance(node, yaml.SequenceNode):
        return [_built(entry, source) for entry in node.value]
    found: dict[Word, Any] = {}
    for key, value in node.value:
        name = _built(key, source)
        if not isinstance(name, Word):
            raise ValueError(f"line {_line(key)}: a list or mapping cannot be a name")
        if name in found:
            raise ValueError(f"line {_line(key)}: {name} is there twice")
        found[name] = _built(value, source)
    return found


def _line(place: Any) -> int:
    """Of a node or an event in its file."""
    return int(place.start_mark.line) + 1


def _pairs(found: Any, python: Any) -> Iterator[tuple[Word, str]]:
    """Words beside the texts that Python reads in the same places."""
    if isinstance(found, Word) and isinstance(python, str):
        yield found, python
    elif isinstance(found, list) and isinstance(python, list) and len(found) == len(python):
        for pair in zip(found, python, strict=True):
            yield from _pairs(*pair)
    elif isinstance(found, dict) and isinstance(python, dict) and len(found) == len(python):
        for (key, value), (other, meaning) in zip(found.items(), python.items(), strict=True):
            yield from _pairs(key, other)
            yield from _pairs(value, meaning)


def _words(value: Any) -> Iterator[Word]:
    if isinstance(value, Word):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _words(key)
            yield from _words(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _words(entry)


def written(value: Any) -> str:
    """As a user writes it, with the quotes that stood there."""
    return written_with(value, _quoted)


def _quoted(value: object) -> str:
    if isinstance(value, Word) and value.kind == "quoted":
        return "'" + value.replace("'", "''") + "'"
    return str(value)
