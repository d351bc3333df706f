"""What there is to choose, read from the sources: ``--help`` answers before any library is imported."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable
from pathlib import Path

from fedseg.configs.sources import definitions, first_line

FOLDER = Path(__file__).parent
TABLES = {"algorithm": ("fedseg.algorithms", "ALGORITHMS"), "data": ("fedseg.datamodules", "DATASETS")}
SETTINGS = ("fedseg.launch.settings", "SCHEMA")
WIDTH = 110
NAME = 14


def outline(usage: str) -> str:
    """A screen of help: how to call it, methods, and the names of all the rest.

    Args:
        usage: how to call the command.
    """
    methods = owners("algorithm")
    lines = [usage.partition("\n\nText is taken")[0], "", "methods (algorithm=NAME; --help NAME explains one):"]
    lines += [
        f"  {name:<{NAME}}{textwrap.shorten(text, WIDTH - NAME, placeholder=' ...')}" for name, text in methods.items()
    ]
    lines += ["", "algorithm=METHOD+STEP: a method with another one's server step, as in fedprox+fedadam", ""]
    lines += _names("presets of methods", presets("algorithm") - methods.keys())
    lines += _names("data=NAME", [*owners("data"), *sorted(presets("data") - owners("data").keys())])
    lines += _names("model=NAME", sorted(presets("model")))
    lines += _names("sections of settings", sections())
    lines += [
        "",
        "--help NAME explains a method, a data set, a network, a section or a setting; --help all, everything.",
    ]
    return "\n".join(lines)


def owners(group: str) -> dict[str, str]:
    """Names of the suite's own methods or data sets, and the first line of what they say of themselves.

    Args:
        group: algorithm or data.
    """
    package, table = TABLES[group]
    node = definitions(package)[table]
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)):
        raise LookupError(f"{package}.{table} is no table")
    pairs = zip(node.value.keys, node.value.values, strict=True)
    found = {str(ast.literal_eval(k)): v.id for k, v in pairs if k is not None and isinstance(v, ast.Name)}
    return {name: first_line(package, owner) for name, owner in found.items()}


def presets(group: str) -> set[str]:
    """Names of a group's files."""
    return {path.stem for path in (FOLDER / group).glob("*.yaml")}


def sections() -> list[str]:
    """Names of the sections that are no choice."""
    module, name = SETTINGS
    for node in ast.walk(definitions(module)[name]):
        if isinstance(node, ast.keyword) and node.arg == "sections" and isinstance(node.value, ast.Dict):
            return [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
    raise LookupError(f"{module}.{name} names no sections")


def _names(title: str, names: Iterable[str]) -> list[str]:
    told = ", ".join(sorted(names) if isinstance(names, set) else names)
    return textwrap.wrap(f"{title}: {told}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
