"""One importable name: from a wheel in somebody's folder, and from a checkout by the folders' own names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(link.name for link in (ROOT / "fedseg").iterdir() if link.is_dir() and link.is_symlink())
SMALL = [
    *("data.n_sites=2", "data.cases_per_site=8", "data.amount=0", "data.size=32", "data.resolution=32"),
    *("data.batch_size=2", "federation.rounds=1", "federation.local_steps=1", "trainer.threads=1"),
    *("evaluation.overlays=false", "evaluation.metrics=[dice]", "algorithm=fedbn"),
]


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_of_code_has_its_link() -> None:
    """What has no link is neither in the wheel nor seen by mypy."""
    inside = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"fedseg", "tests", "benchmarks", "scripts"}
    assert set(ROOMS) == inside
    commands = {path.name for path in ROOT.glob("*.py")}
    assert {link.name for link in (ROOT / "fedseg").glob("*.py")} == commands | {"__init__.py"}


@pytest.mark.exhaustive
def test_in_a_checkout_a_folders_own_name_is_the_same_module() -> None:
    inner = [f"{room}.{next(path.stem for path in sorted((ROOT / room).glob('[!_]*.py')))}" for room in ROOMS]
    code = """
import importlib, sys
from importlib.util import find_spec
for name in sys.argv[1:]:
    short, full = importlib.import_module(name), importlib.import_module(f"fedseg.{name}")
    room = name.partition(".")[0]
    assert short is full and sys.modules[room] is sys.modules[f"fedseg.{room}"], name
    assert full.__spec__.name == full.__name__ == f"fedseg.{name}", full.__spec__
    assert find_spec(f"{room}.nothing") is None
"""
    python("-c", code, *inner, cwd=ROOT)


@pytest.mark.exhaustive
def test_another_package_of_such_a_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "models" / "select.py").write_text("mine = True\n")
    code = "import fedseg.models.select, models.select; assert models.mine and models.select.mine"
    python("-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files beside the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*ROOMS, "fedseg"]:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(file, source)
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source), cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_everything_under_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {file for room in ROOMS for kind in ("py", "yaml", "j2") for file in (ROOT / room).rglob(f"*.{kind}")}
    expected = {f"fedseg/{file.relative_to(ROOT).as_posix()}" for file in {*files, *ROOT.glob("*.py")}}
    assert names == expected | {"fedseg/__init__.py"}


@pytest.mark.waits(45)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_wheel_works_beside_folders_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    for name in [*ROOMS, "train"]:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(f"raise RuntimeError('the wrong {name}')\n")
    where = python("-c", "import fedseg; print(fedseg.__file__)", cwd=here, PYTHONPATH=str(site))
    assert Path(where.strip()).parent == site / "fedseg"
    python(str(site / "bin" / "fedseg-train"), "output=run", *SMALL, cwd=here, PYTHONPATH=str(site))
    assert "fedbn" in python(str(site / "bin" / "fedseg-compare"), "run", cwd=here, PYTHONPATH=str(site)).lower()
    assert "KEY=VALUE" in python(str(site / "bin" / "fedseg-check"), "--help", cwd=here, PYTHONPATH=str(site))
    assert sorted(path.name for path in here.iterdir() if path.name not in {*ROOMS, "train"}) == ["comparison", "run"]
