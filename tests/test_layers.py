"""Imports go down the stairs: what each package may know of the others; and a method's file says only what is new."""

import ast
import inspect
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from fedseg.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent
WINDOW = 6
"""Lines in a row that say the same in two files."""
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
    "api",
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


def code_lines(source: str, *, imports: bool = True) -> list[str]:
    """Lines that are neither blank nor comments nor a docstring, without their indentation."""
    lines = [line.strip() for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not imports:
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            said = node.body[0]
            lines[said.lineno - 1 : said.end_lineno] = [""] * ((said.end_lineno or said.lineno) - said.lineno + 1)
    return [line for line in lines if line and not line.startswith("#")]


def repeated(files: list[list[str]]) -> list[tuple[str, ...]]:
    """Windows of lines that stand in more than one file."""
    windows = [{tuple(lines[i : i + WINDOW]) for i in range(len(lines) - WINDOW + 1)} for lines in files]
    return [window for window, count in Counter(window for found in windows for window in found).items() if count > 1]


def test_methods_are_short_and_say_nothing_twice() -> None:
    """What two methods would both write belongs into a class that both derive from, as `algorithms/own.py`."""
    paths = sorted({inspect.getfile(method) for method in ALGORITHMS.values()})
    sources = [Path(path).read_text(encoding="utf-8") for path in paths]
    assert len(sources) > 40
    assert median(len(code_lines(source)) for source in sources) < 60
    assert repeated([code_lines(source, imports=False) for source in sources]) == []  # ruff orders imports


def test_a_repeated_window_is_seen() -> None:
    alike = code_lines(
        '"""A file."""\n\n# why\nclass A:\n    """An A."""\n\n' + "".join(f"    {c} = 1\n" for c in "abcdef")
    )
    assert alike == ["class A:", *(f"{c} = 1" for c in "abcdef")]
    assert len(repeated([alike, alike[1:]])) == 1
    assert repeated([alike, alike[2:]]) == []
    with_imports = "import a\nfrom b import (\n    c,\n    d,\n)\ne = 1\n"
    assert len(code_lines(with_imports)) == 6
    assert code_lines(with_imports, imports=False) == ["e = 1"]
