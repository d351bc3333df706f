"""Imports go down the stairs: what each package may know of the others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "federation": {"federation"},
    "datamodules": {"datamodules"},
    "models": {"models"},
    "configs": {"configs"},
    "privacy": {
        "privacy",
        "federation.state",
        "federation.contract",
        "federation.ranges",
        "federation.seeds",
        "federation.transforms",
    },
    "algorithms": {
        "algorithms",
        "federation.state",
        "federation.contract",
        "federation.ranges",
        "federation.seeds",
        "models",
    },
    "evaluation": {"evaluation", "models", "datamodules"},
    "reporting": {"reporting", "evaluation", "models", "datamodules", "console"},
}
COMMANDS = {"datamodules/check/__main__.py": {"launch.check.main"}}  # a command's name, which hands over to launch
OURS = {
    *MAY_IMPORT,
    "console",
    "launch",
    "train",
    "evaluate",
    "predict",
    "export",
    "sweep",
    "compare",
    "scripts",
    "benchmarks",
}


def imported_names(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that the stairs can be read"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("fedseg.") for name in names}
    return {name for name in names if name.split(".")[0] in OURS}


def forbidden(package: str, names: set[str]) -> list[str]:
    allowed = {*MAY_IMPORT[package], "common"}
    return sorted(name for name in names if not any(name == a or name.startswith(a + ".") for a in allowed))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_down_the_stairs(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    paths = {file.relative_to(ROOT).as_posix(): imported_names(file.read_text()) for file in files}
    wrong = {path: forbidden(package, names - COMMANDS.get(path, set())) for path, names in paths.items()}
    assert not {file: names for file, names in wrong.items() if names}


def test_a_climbing_import_is_seen() -> None:
    climbing = imported_names("from fedseg.algorithms.base import Algorithm")
    assert forbidden("models", climbing) == ["algorithms.base.Algorithm"]
    climbing = imported_names("from fedseg.federation.engine import run")
    assert forbidden("algorithms", climbing) == ["federation.engine.run"]
    assert forbidden("algorithms", imported_names("from fedseg.federation.state import State")) == []


@pytest.mark.slow
def test_ours_is_imported_under_one_name() -> None:
    """A second name would be a second copy of a module in a wheel beside somebody's own `models`."""
    for file in sorted(ROOT.glob("[!.]*/**/*.py")):
        tree = ast.parse(file.read_text())
        froms = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not {name for name in froms | plain if name.split(".")[0] in {*MAY_IMPORT, "launch", "console"}}, file
