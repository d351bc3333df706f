"""What names mean in the suite's modules, read from their sources: ``--help`` answers before any library is imported.

Of classes and functions only what tells settings is made: docstrings, keyword parameters, a dataclass's fields, and the
parents that are ours. Nothing of it can be called.
"""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
AS_THEY_ARE = ("fedseg.common", "fedseg.configs")
"""Packages of ours that are imported, since they import nothing that takes time."""

Node = TypeVar("Node", bound=ast.AST)


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """The statements that define the names at the top of a module of ours; of several, the last.

    Args:
        module: its full name, such as ``fedseg.algorithms.ditto``.
    """
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= dict.fromkeys(_defined(node), node)
    return found


def first_line(module: str, name: str) -> str:
    """The first line of what a class of ours says of itself, without its full stop."""
    node = definitions(module)[name]
    if isinstance(node, ast.ImportFrom):
        return first_line(str(node.module), name)
    assert isinstance(node, ast.ClassDef)
    return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")


@cache
def meaning(module: str, name: str) -> Any:
    """What a name means in a module of ours; a name of a library that takes time to import stands for an empty class.

    Raises:
        LookupError: the module's top does not define it.
    """
    known = definitions(module)
    if name not in known:
        raise LookupError(f"{module} defines no {name} at its top")
    node = known[name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return _imported(node, name)
    told = _told(node)
    needed = {part.id for part in ast.walk(told) if isinstance(part, ast.Name)} & known.keys() - {name}
    part = ModuleType(module)
    vars(part).update({other: meaning(module, other) for other in needed})
    Definition(told).exec_module(part)
    return vars(part)[name]


class Definition(InspectLoader):
    """Imports one definition of a module instead of all of them; its annotations are evaluated at once.

    Args:
        told: the definition.
    """

    def __init__(self, told: ast.stmt) -> None:
        self._told = told

    def get_source(self, fullname: str) -> str:
        """The definition alone."""
        return ast.unparse(ast.fix_missing_locations(self._told))


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(node: ast.Import | ast.ImportFrom, name: str) -> Any:
    origin = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    place = str(node.module) if isinstance(node, ast.ImportFrom) else origin
    quick = place.split(".")[0] in {*sys.stdlib_module_names, "pydantic"}
    if quick or place.startswith(AS_THEY_ARE):
        module = importlib.import_module(place)
        return getattr(module, origin) if isinstance(node, ast.ImportFrom) else module
    return meaning(place, origin) if place.startswith("fedseg.") else type(name, (), {})


def _told(node: ast.stmt) -> ast.stmt:
    """A definition without all that has nothing to do with settings."""
    if isinstance(node, ast.ClassDef):
        return _class(node)
    if isinstance(node, ast.FunctionDef):
        return _function(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.Assign([node.target], node.value)
    return node


def _class(node: ast.ClassDef) -> ast.ClassDef:
    fields = [part for part in node.decorator_list if "dataclass" in ast.unparse(part)]
    body: list[ast.stmt] = [ast.Expr(ast.Constant(ast.get_docstring(node, clean=False)))]
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            body.append(_function(part))
        elif fields and isinstance(part, ast.AnnAssign):
            body.append(part)
    parents: list[ast.expr] = [base for base in node.bases if isinstance(base, ast.Name)]
    return _like(node, bases=parents, keywords=[], decorator_list=fields, body=body)


def _function(node: ast.FunctionDef) -> ast.FunctionDef:
    """Its signature and docstring; whoever calls it by mistake is told."""
    given = node.args
    kept = ast.arguments([], [], None, given.kwonlyargs, given.kw_defaults, _bare(given.kwarg), [])
    body = ast.parse("raise TypeError('only the signature was read')").body
    told = ast.Expr(ast.Constant(ast.get_docstring(node, clean=False)))
    return _like(node, args=kept, body=[told, *body], decorator_list=[], returns=None)


def _bare(parameter: ast.arg | None) -> ast.arg | None:
    return None if parameter is None else ast.arg(parameter.arg)


def _like(node: Node, **changes: Any) -> Node:
    """The same statement but for some of its parts."""
    return type(node)(**{name: changes.get(name, value) for name, value in ast.iter_fields(node)})
