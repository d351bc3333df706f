"""A command without the installation, or under a Python of long ago, ends in one line."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedseg.launch.command import MISTAKE, guarded, not_installed

ROOT = Path(__file__).parent.parent
COMMANDS = ("train.py", "evaluate.py", "compare.py", "predict.py", "export.py", "sweep.py")
GIVEN = {
    "train.py": ["seed=1"],
    "predict.py": ["run", "--images", "x"],
    "export.py": ["run", "--out", "x"],
}


@pytest.mark.parametrize("script", [*COMMANDS, "-m fedseg.datamodules.check"])
def test_without_libraries_a_command_names_the_cure(script: str, tmp_path: Path) -> None:
    """As after `git clone` alone: a Python that has nothing but its own library (-S leaves out what is installed)."""
    command = [sys.executable, "-S", *script.split(), *GIVEN.get(script, ["fine"])]
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == MISTAKE
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"is not installed in {sys.executable}; activate" in line
    assert line.endswith(f"pip install -e {ROOT}")


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert guarded(lambda _: 0, []) == MISTAKE
    assert "3.10 or newer is needed" in capsys.readouterr().err


def test_a_missing_part_of_the_suite_is_no_matter_of_the_installation() -> None:
    assert not not_installed(ModuleNotFoundError("no", name="launch.nothing"))
    assert not not_installed(ImportError("no"))


def test_help_is_printed_where_it_is_asked_for_or_no_word_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    def command(words: Sequence[str]) -> int:
        print("done", *words)
        return 0

    for words, code in (([], MISTAKE), (["site=a", "-h"], 0), (["--help"], 0)):
        assert guarded(command, words, help="how to") == code
        assert capsys.readouterr().out == "how to\n"
    assert guarded(command, ["site=a"], help="how to") == 0
    assert guarded(command, []) == 0
    assert capsys.readouterr().out == "done site=a\ndone\n"
