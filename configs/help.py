"""The text of ``--help``: methods, data sets, models and every knob with its default, read from where they live."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from fedseg.common.parts import PartError
from fedseg.common.text import written
from fedseg.configs.compose import FOLDER, ConfigError, Schema, choices, options
from fedseg.configs.knobs import REQUIRED, Knob, knobs, unknown
from fedseg.configs.words import tree

WIDTH = 110


def help_text(schema: Schema, usage: str) -> str:
    """Everything a user can set."""
    told = tree((FOLDER / "default.yaml").read_text(encoding="utf-8"))
    chosen = " ".join(_departures(told))
    parts = [
        usage,
        heading("without other choices (configs/default.yaml; below: each part's own defaults)"),
        f"  {chosen}",
    ]
    parts += [heading("settings without a section"), *lines(knobs(schema.top), "")]
    for group, owners in schema.groups.items():
        parts += [heading(f"{group}=NAME"), *_choices(group, owners)]
        for title, settings in _shared_knobs(owners).items():
            parts += ["", f"  {title}:", *lines(settings, f"{group}.")]
    for section, owner in schema.sections.items():
        parts += [heading(f"{section}: {first_line(owner)}"), *lines(knobs(owner), f"{section}.")]
    return "\n".join(parts)


def explained(schema: Schema, name: str) -> str:
    """What one method, data set, network, section or setting is, and its settings.

    Args:
        schema: who owns which settings.
        name: as on the command line: ``ditto``, ``algorithm=ditto``, ``training``, ``data.size``,
            ``training.loss=tversky``.

    Raises:
        ConfigError: there is nothing of that name, or it cannot be imported.
    """
    group, _, choice = name.rpartition("=")
    for own, owners in schema.groups.items():
        if group in ("", own) and (choice in choices(own, owners) or choice in owners):
            return _explained_choice(own, choice, owners)
    if group in schema.parts and choice in schema.parts[group]:
        return _explained_part(group, choice, schema.parts[group])
    if name in schema.sections:
        owner = schema.sections[name]
        return "\n".join([heading(f"{name}: {first_line(owner)}"), *lines(knobs(owner), f"{name}.")])
    settings = _every_setting(schema)
    if name in settings:
        return "\n".join(lines({name: settings[name]}, ""))
    known = [
        *schema.sections,
        *settings,
        *(f"{setting}={choice}" for setting, owners in schema.parts.items() for choice in owners),
        *(choice for g, owners in schema.groups.items() for choice in choices(g, owners)),
    ]
    raise ConfigError(unknown(name, known))


def _explained_choice(group: str, name: str, owners: Mapping[str, Callable[..., Any]]) -> str:
    path = FOLDER / group / f"{name}.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    only = next(iter(owners)) if len(owners) == 1 else name
    try:
        owner = owners[str((tree(text) or {}).get("name", name if name in owners else only))]
    except PartError as error:
        raise ConfigError(str(error)) from error
    said = [f"configs/{group}/{name}.yaml:", *(f"  {line}" for line in text.splitlines()), ""] if text else []
    told = (inspect.getdoc(owner) or "").partition("\n\nArgs:")[0]
    return "\n".join([heading(f"{group}={name}"), told, "", *said, *lines(knobs(owner), f"{group}.")])


def _explained_part(setting: str, name: str, owners: Mapping[str, Callable[..., Any]]) -> str:
    try:
        owner = owners[name]
    except PartError as error:
        raise ConfigError(str(error)) from error
    told = (inspect.getdoc(owner) or "").partition("\n\nArgs:")[0]
    return "\n".join([heading(f"{setting}={name}"), told, "", *lines(knobs(owner), f"{options(setting)}.")])


def _every_setting(schema: Schema) -> dict[str, Knob]:
    found = dict(knobs(schema.top))
    for section, owner in schema.sections.items():
        found |= {f"{section}.{name}": knob for name, knob in knobs(owner).items()}
    for group, owners in schema.groups.items():
        for owner in owners.values():
            found |= {f"{group}.{name}": knob for name, knob in knobs(owner).items() if f"{group}.{name}" not in found}
    return found


def _departures(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """As on the command line; a section's `name` chooses it."""
    told = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            told += _departures(value, f"{prefix}{key}.")
        else:
            told.append(f"{prefix.rstrip('.') if key == 'name' else prefix + key}={value}")
    return told


def heading(text: str) -> str:
    """A section's title."""
    return f"\n{text}\n{'-' * len(text)}"


def lines(settings: Mapping[str, Knob], prefix: str) -> list[str]:
    """One entry a knob: name, default, type, description."""
    entries = []
    for name, knob in settings.items():
        default = "(needed)" if knob.default is REQUIRED else f"= {written(knob.default, _quoted)}"
        line, kind = f"  {prefix}{name} {default}", f"[{knob.type_name}]"
        fits = len(line) + len(kind) < WIDTH
        entries += [f"{line}   {kind}"] if fits else [line, f"      {kind}"]
        entries += textwrap.wrap(
            knob.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return entries


def first_line(owner: Callable[..., Any]) -> str:
    """The first line of an owner's docstring, without its full stop."""
    return (inspect.getdoc(owner) or "").partition("\n")[0].rstrip(".")


def _choices(group: str, owners: Mapping[str, Callable[..., Any]]) -> list[str]:
    entries = []
    for name in choices(group, owners):
        if name in owners:
            text = first_line(owners[name])
        else:
            first = (FOLDER / group / f"{name}.yaml").read_text().partition("\n")[0]
            text = first.lstrip("# ").rstrip(".") if first.startswith("#") else ""
        wrapped = textwrap.wrap(
            f"{name:<14} {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 17, break_on_hyphens=False
        )
        entries += wrapped
    return entries


def _shared_knobs(owners: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Knob]]:
    """Knobs under the names of all who have them, so that each is explained once; the most common come first."""
    users: dict[tuple[str, str], list[str]] = {}
    found: dict[tuple[str, str], tuple[str, Knob]] = {}
    for owner_name, owner in owners.items():
        for name, knob in knobs(owner).items():
            users.setdefault((name, repr(knob)), []).append(owner_name)
            found[name, repr(knob)] = (name, knob)
    titled: dict[str, dict[str, Knob]] = {}
    for key in sorted(users, key=lambda key: -len(users[key])):
        name, knob = found[key]
        titled.setdefault(_title(users[key], list(owners)), {})[name] = knob
    return titled


def _title(users: list[str], everyone: list[str]) -> str:
    others = [name for name in everyone if name not in users]
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < len(users) else ", ".join(users)


def _quoted(value: object) -> str:
    """With the quotes that an entry of a list or a mapping needs."""
    return f"'{value}'" if str(value).startswith((">", "*", "&", "!", "%", "@")) else str(value)
