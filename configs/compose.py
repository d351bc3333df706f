"""One config from files and dotted overrides, checked before anything loads.

Layers, later ones win: the files of the chosen groups (``data/NAME.yaml`` ...), ``default.yaml``, what these files say
of other parts (``training:`` in ``algorithm/NAME.yaml``), ``experiment/NAME.yaml``, the command line. A layer that
chooses another name for a group drops what earlier layers said about that group. Files state departures only; defaults
live in signatures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import Event, ScalarEvent, YAMLError

from fedseg.common.parts import JOIN, PartError
from fedseg.configs.knobs import knobs, unknown, validated
from fedseg.configs.words import MisreadError, Word, flow, meant, shown, tree, unfit

FOLDER = Path(__file__).parent
Owner = Callable[..., Any]
FILES = (".yaml", ".yml")
OWNER = "(owner)"
"""In a layer made from a saved config: whose settings a group holds, whatever became of the file that chose it."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names all of them and their cures."""


@dataclass(frozen=True)
class Schema:
    """Who owns which settings.

    Attributes:
        groups: group -> name -> owner; chosen by ``group=NAME``, which may also be a file ``configs/group/NAME.yaml``
            whose ``name`` says which owner it departs from (not needed where there is one).
        sections: section -> owner.
        top: owner of the settings without a section.
        own: settings of one run only: they are not taken over from another run's config.
        foreign: names of settings that other tools have -> what to do here.
        parts: setting ``section.name`` that chooses a part -> its owners; the part's own settings are in the mapping
            ``section.name_options``.
    """

    groups: Mapping[str, Mapping[str, Owner]]
    sections: Mapping[str, Owner]
    top: Owner
    own: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Owner]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """What one place says.

    Attributes:
        source: the file, or the command line.
        values: settings, by section.
    """

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A group's choice.

    Attributes:
        name: the last that a layer names; of a file that is given by its path, the file's own name.
        first: what the first layer says of it; nothing where a later one chose anew.
        later: what the layers after it say of it.
        file: the file of the choice.
        owner: who owns its settings, where a saved config tells it: the file may be gone.
    """

    name: str
    first: Layer
    later: list[Layer]
    file: Layer
    owner: str = ""


def compose(arguments: Sequence[str], schema: Schema, base: DictConfig | None = None) -> DictConfig:
    """The resolved, read-only config.

    Args:
        arguments: ``key=value`` with dotted keys, as a shell or ``wandb agent`` (``${args_no_hyphens}``) gives them.
        schema: who owns which settings.
        base: a config resolved earlier, to depart from instead of ``default.yaml``.

    Raises:
        ConfigError: an unknown key or name, or a value of the wrong type; every problem is named.
    """
    return traced(arguments, schema, base)[0]


def traced(
    arguments: Sequence[str], schema: Schema, base: DictConfig | None = None
) -> tuple[DictConfig, dict[str, str]]:
    """The config as `compose` resolves it, and who said what: dotted key -> file or command line; others are defaults.

    Raises:
        ConfigError: as `compose`.
    """
    command_line = parsed(arguments, schema)
    named = asked(command_line, "experiment", str | None)
    layers = [
        Layer("configs/default.yaml", read_mapping(FOLDER / "default.yaml"))
        if base is None
        else Layer("the saved config", _as_layer(base, schema)),
        Layer(f"experiment={named}", _experiment(named, schema)),
        Layer("the command line", command_line),
    ]
    parts = {*schema.groups, *schema.sections}
    chosen = {group: _chosen(group, owners, layers) for group, owners in schema.groups.items()}
    beside = [_beside(group, found, schema) for group, found in chosen.items()] if base is None else []
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    errors: list[str] = []
    for group, owners in schema.groups.items():
        merged[group], said, problems = _group(group, owners, chosen[group], beside, parts)
        sources |= {f"{group}.{name}": source for name, source in said.items()}
        errors += problems
    for section, owner in schema.sections.items():
        values, said, problems = _section(section, owner, [layers[0], *beside, *layers[1:]], schema)
        merged[section], more = validated(owner, values, f"{section}.") if not problems else ({}, [])
        more = more or _check_options(section, merged[section], schema)
        sources |= {f"{section}.{name}": source for name, source in said.items()}
        errors += problems + more
    loose = [Layer(layer.source, {k: v for k, v in layer.values.items() if k not in parts}) for layer in layers]
    values, said = _merge(*loose)
    top, problems = validated(schema.top, values, "", parts)
    errors += problems
    if errors:
        raise ConfigError("\n".join(_at_home(error, schema.foreign) for error in errors))
    config = OmegaConf.create({**top, **merged})
    OmegaConf.set_readonly(config, True)
    return config, {**said, **sources}


CURE = "restore it from a copy, or start another run"


def load(text: str, schema: Schema | None = None, source: str = "the saved config") -> DictConfig:
    """A config that `compose` resolved earlier, read-only again.

    It may come from another machine: references, which could read this machine's environment or grow without end, are
    refused.

    Args:
        text: YAML.
        schema: what it must hold; None does not look.
        source: where the text is from.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        referring = any(map(_refers, yaml.parse(text, yaml.SafeLoader)))
        config = OmegaConf.create("" if referring else text)
    except (OmegaConfBaseException, YAMLError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(f"{source} is damaged ({' '.join(str(error).split())[:200]}); {CURE}") from error
    if referring:
        raise ConfigError(
            f"{source} refers to other values or types (${{...}}, &anchor, *alias, !tag); it should hold plain values"
        )
    if not isinstance(config, DictConfig) or (schema is not None and not _resolved(config, schema)):
        raise ConfigError(f"{source} is damaged (it does not hold all settings of a run); {CURE}")
    _as_meant_then(config, source)
    OmegaConf.set_readonly(config, True)
    return config


def read_mapping(path: Path, example: str = "key: value") -> dict[str, Any]:
    """What a file says, as words; nothing where it is empty.

    Args:
        path: of a YAML file.
        example: a line that it could hold.

    Raises:
        ConfigError: it cannot be read, or holds something else than keys and values.
    """
    cure = f"write lines such as '{example}'"
    try:
        found = tree(path.read_text(encoding="utf-8-sig"), path.name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {cure}") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings ({shown(found)}); {cure}")
    return found or {}


def _refers(event: Event) -> bool:
    """Whether a part of a YAML text stands for something else than what is written there."""
    named = getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None
    return named or (isinstance(event, ScalarEvent) and "${" in event.value)


def _as_meant_then(config: dict[Any, Any] | DictConfig, source: str) -> None:
    """Give a setting that meant something else when the config was saved its name of today."""
    data = config.get("data")
    if isinstance(data, Mapping) and data.get("ignore_labels") and "background_labels" not in data:
        print(
            f"note: {source} is of an older version, in which data.ignore_labels counted as background; it is read as "
            f"data.background_labels={list(data['ignore_labels'])}",
            file=sys.stderr,
        )
        config["data"]["background_labels"] = data["ignore_labels"]
        config["data"]["ignore_labels"] = []


def as_yaml(config: DictConfig) -> str:
    """A config as text, which `load` reads as the same config."""
    return yaml.dump(
        OmegaConf.to_container(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


def told_by(sources: Mapping[str, str]) -> str:
    """Comments for a config's text: who said which settings; all others are defaults."""
    said: dict[str, list[str]] = {}
    for key, source in sources.items():
        said.setdefault(source, []).append(key)
    return "".join(f"# {source}: {', '.join(keys)}\n" for source, keys in said.items())


def departing(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """The same settings but for some, read-only too.

    Args:
        config: as `compose` resolved it; it stays as it is.
        values: dotted key -> value; used as they are.
    """
    changed: DictConfig = config.copy()
    OmegaConf.set_readonly(changed, False)
    for key, value in values.items():
        OmegaConf.update(changed, key, value, merge=False)
    OmegaConf.set_readonly(changed, True)
    return changed


def choices(group: str, owners: Mapping[str, Owner]) -> list[str]:
    """Names that ``group=NAME`` accepts."""
    files = {path.stem for path in (FOLDER / group).glob("*.yaml")}
    return [*owners, *sorted(files - owners.keys())]


def parsed(arguments: Sequence[str], schema: Schema) -> dict[str, Any]:
    """What the command line says: words, which the types of their settings read later.

    Raises:
        ConfigError: an argument that is not of the form key=value, or cannot be read.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"{shown(Word(argument))!r} is not of the form key=value; see --help")
        if why := unfit(value):
            raise ConfigError(f"{key}={shown(Word(value))} {why}")
        _put(found, key, Word(value), schema)
    return found


def asked(given: Mapping[str, Any], key: str, kind: Any) -> Any:
    """What `parsed` found for a setting without a section; None if nothing, or what `compose` will refuse."""
    try:
        return meant(given.get(key), kind)
    except MisreadError:
        return None


def _put(found: dict[str, Any], key: str, value: Word, schema: Schema) -> None:
    """File a word of the command line under its dotted key; the last of equal keys counts."""
    path = key.split(".")
    parts = {*schema.groups, *schema.sections}
    bracketed = len(path) == 1 and key in parts and value.startswith("{")
    if key in schema.groups and not bracketed:
        path = [key, "name"]
    place = found
    for depth, part in enumerate(path[:-1], 1):
        before = place.get(part, {})
        if isinstance(before, Word) and before.startswith("{"):  # told whole, and now a part of it
            before = _opened(".".join(path[:depth]), before)
        place[part] = place = before if isinstance(before, dict) else {}
    if bracketed:
        before = found.get(key)
        found[key] = (before if isinstance(before, dict) else {}) | _opened(key, value)
    else:
        place[path[-1]] = value


def _opened(key: str, value: Word) -> dict[str, Any]:
    try:
        inside = flow(value)
    except ValueError as error:
        raise ConfigError(f"{key}={shown(value)}: {error}") from error
    if not isinstance(inside, dict):
        raise ConfigError(f"{key}={shown(value)} should look like {{KEY: VALUE}}")
    return inside


def _at_home(error: str, foreign: Mapping[str, str]) -> str:
    """An error, with what to do about a setting of another tool."""
    found = re.match(r"(unknown key '(?:\w+\.)*(\w+)'); ", error)
    return f"{found[1]}; {foreign[found[2]]}" if found and found[2] in foreign else error


def _resolved(config: Mapping[Any, Any], schema: Schema) -> bool:
    """Whether this is a config as `compose` makes it, and no file of departures."""
    sections = all(isinstance(config.get(part), Mapping) for part in (*schema.groups, *schema.sections))
    return sections and all({"name", "preset"} <= set(config[group]) for group in schema.groups)


def _as_layer(base: Mapping[Any, Any], schema: Schema) -> dict[str, Any]:
    """A resolved config as a layer: groups go by the choice that was asked for."""
    layer = _plain(base)
    for group in schema.groups:
        layer[group] = {**layer[group], "name": layer[group]["preset"], OWNER: layer[group]["name"]}
        del layer[group]["preset"]
    return layer


def _experiment(name: Any, schema: Schema) -> dict[str, Any]:
    if not isinstance(name, str) or not name:
        return {}
    path = Path(name) if name.endswith(FILES) else FOLDER / "experiment" / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in (FOLDER / "experiment").glob("*.yaml")]
        if (Path(name) / "config.yaml").is_file():
            raise ConfigError(f"experiment={name} is a run's folder; its settings are {name}/config.yaml")
        raise ConfigError(unknown(name, known, "experiment") + " (or give the path of a YAML file)")
    layer = read_mapping(path)
    if not _resolved(layer, schema):
        return layer
    _as_meant_then(layer, str(path))
    return {key: value for key, value in _as_layer(layer, schema).items() if key not in schema.own}


def _chosen(group: str, owners: Mapping[str, Owner], layers: Sequence[Layer]) -> Chosen:
    """The last layer that names a choice decides, and drops what was said for another choice."""
    choice, owner, said = "", "", [Layer("", {})]
    for layer in layers:
        values = layer.values.get(group, {})
        values = {"name": values} if isinstance(values, str) else _mapping(values)
        named = str(values.pop("name", choice))
        owner = str(values.pop(OWNER, owner if named == choice else ""))
        said = [*said, Layer(layer.source, values)] if named == choice else [Layer(layer.source, values)]
        choice = named
    kept = {layer.source: layer for layer in said}
    first = kept.pop(layers[0].source, Layer(layers[0].source, {}))
    name = Path(choice).stem if choice.endswith(FILES) else choice
    return Chosen(name, first, list(kept.values()), file_of(group, choice, owners), owner)


def file_of(group: str, choice: str, owners: Mapping[str, Owner]) -> Layer:
    """What the file of a choice says; of two parts that make one, the first one's, with both as the name.

    Raises:
        ConfigError: it is given by a path that cannot be used.
    """
    if choice.endswith(FILES):
        return Layer(choice, read_mapping(_preset_file(group, choice, owners)))
    known = choices(group, owners)
    named, _, further = (choice, "", "") if choice in known else choice.partition(JOIN)
    path = FOLDER / group / f"{named}.yaml"
    said = read_mapping(path) if named in known and path.is_file() else {}
    if further and said:
        said = said | {"name": f"{said.get('name', named)}{JOIN}{further}"}
        said = said if said["name"] in owners else {}
    return Layer(f"configs/{group}/{named}.yaml", said)


def _preset_file(group: str, choice: str, owners: Mapping[str, Owner]) -> Path:
    """A preset that is given by its path.

    Raises:
        ConfigError: there is no such file, or it is called like a choice of the suite's.
    """
    path = Path(choice).expanduser()
    if not path.is_file():
        raise ConfigError(f"{group}={choice}: there is no such file; give the path of a YAML file, or a name")
    if path.stem in choices(group, owners):
        raise ConfigError(
            f"{group}={choice}: {path.stem!r} names one of the suite's own, and runs would not tell the two apart; "
            "rename the file"
        )
    return path


def _beside(group: str, chosen: Chosen, schema: Schema) -> Layer:
    """What the file of a choice says of other parts than its own group."""
    others = {*schema.groups, *schema.sections} - {group}
    return Layer(chosen.file.source, {part: said for part, said in chosen.file.values.items() if part in others})


def _section(
    section: str, owner: Owner, layers: Sequence[Layer], schema: Schema
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A section's settings, who said them, and what is wrong."""
    said = [Layer(layer.source, layer.values.get(section, {})) for layer in layers]
    if odd := [layer.values for layer in said if not isinstance(layer.values, Mapping)]:
        first = next(iter(knobs(owner)))
        told = f"{section}={shown(odd[0])} names no setting; write {section}.KEY=VALUE, such as {section}.{first}=..."
        return {}, {}, [told]
    for name in _choosing(section, schema):
        said = _choosing_anew(name, said)
    return *_merge(*said), []


def _choosing(section: str, schema: Schema) -> dict[str, Mapping[str, Owner]]:
    """A section's settings that choose a part, with the owners."""
    return {key.rpartition(".")[2]: owners for key, owners in schema.parts.items() if key.startswith(f"{section}.")}


def _choosing_anew(name: str, said: Sequence[Layer]) -> list[Layer]:
    """A layer that chooses another part drops what earlier ones said of the options of theirs."""
    kept: list[Layer] = []
    choice = None
    for layer in said:
        if (chosen := layer.values.get(name, choice)) != choice:
            earlier = [(one.source, {k: v for k, v in one.values.items() if k != options(name)}) for one in kept]
            kept, choice = [Layer(*one) for one in earlier], chosen
        kept.append(layer)
    return kept


def options(name: str) -> str:
    """The setting that holds the own settings of the part that a setting chooses."""
    return f"{name}_options"


def _check_options(section: str, values: dict[str, Any], schema: Schema) -> list[str]:
    """Read the options of parts by the signatures of these; what is wrong with them."""
    errors = []
    for name, owners in _choosing(section, schema).items():
        key, choice, given = f"{section}.{options(name)}", values.get(name), values.get(options(name))
        if choice not in owners:
            if given:
                errors.append(f"{section}.{name}={choice} has no settings of its own; leave out {key}={shown(given)}")
            continue
        try:
            whole, wrong = validated(owners[str(choice)], given or {}, f"{key}.")
        except PartError as error:
            errors.append(str(error))
            continue
        errors += wrong
        if given:
            values[options(name)] = {option: whole[option] for option in given if option in whole}
    return errors


def _group(
    group: str, owners: Mapping[str, Owner], chosen: Chosen, beside: Sequence[Layer], parts: Collection[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A group's settings, who said them, and what is wrong."""
    from_file = bool(chosen.owner or chosen.file.values)
    if chosen.name not in (known := choices(group, owners)) and chosen.name not in owners and not from_file:
        own_part = f" (or a part of your own: {group}=package.module:Name)"
        first, *further = chosen.name.split(JOIN)
        asked = [(first, known), *((part, list(owners)) for part in further)]
        odd = [(part, there) for part, there in asked if part not in there and part not in owners]
        return {}, {}, [unknown(*(odd or [(chosen.name, known)])[0], group) + own_part]
    own = {name: value for name, value in chosen.file.values.items() if name not in parts}
    only = next(iter(owners)) if len(owners) == 1 else chosen.name
    owner = str(own.pop("name", chosen.owner or (chosen.name if chosen.name in owners else only)))
    if owner not in owners:
        return {}, {}, [f"{chosen.name}.yaml: " + unknown(owner, owners, f"{group}.name")]
    try:
        taken = knobs(owners[owner])
    except PartError as error:
        return {}, {}, [str(error)]
    of_others = [Layer(layer.source, layer.values.get(group, {})) for layer in beside]
    told, said = _merge(Layer(chosen.file.source, own), chosen.first, *of_others, *chosen.later)
    fitting = {name: key for name, key in told.items() if name in taken or not _elsewhere(name, owners)}
    foreign = [
        f"{group}.{name} is a setting of {group}={', '.join(_elsewhere(name, owners))}, not of {group}={chosen.name}"
        for name in told
        if name not in fitting
    ]
    values, errors = validated(owners[owner], fitting, f"{group}.")
    return {"name": owner, "preset": chosen.name, **values}, said, foreign + errors


def _elsewhere(name: str, owners: Mapping[str, Owner]) -> list[str]:
    """Who of a group has a setting of that name."""
    return [owner for owner, signature in owners.items() if name in knobs(signature)]


def _merge(*layers: Layer) -> tuple[dict[str, Any], dict[str, str]]:
    """Later layers win key by key. Values are replaced whole: a mapping such as data.regions is one value.

    Returns:
        The values, and who said each.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        values = _mapping(layer.values)
        merged |= values
        sources |= dict.fromkeys(values, layer.source)
    return merged, sources


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected settings of the form key: value, got {values!r}")
    return dict(values)


def _plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else deepcopy(config)
    assert isinstance(container, dict)  # `load` lets nothing else pass
    return {str(key): value for key, value in container.items()}


class _Dumper(yaml.SafeDumper):
    """Puts every text in quotes that some reader of YAML could take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Unusual ends of lines are escaped."""
        style = '"' if any(sign in data for sign in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.0-9][-+.0-9eE_]*$"), list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)
