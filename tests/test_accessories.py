"""Accessories never stop the work: the console, the pipe, the disk, W&B, plots; and what is said when one fails."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import train
from fedseg.common.files import write_atomic
from fedseg.common.files import write_atomic as write_state
from fedseg.console import Steady, steady_output
from fedseg.datamodules import DataError
from fedseg.launch.command import guarded
from fedseg.reporting import ReportingError, letters
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.letters import legible
from fedseg.reporting.wandb import WandbRun
from tests.data_files import folder, make_sites
from tests.tiers import every
from tests.tiny_run import TINY

ROOT = Path(__file__).parent.parent
PLAIN = (*TINY, "data.n_sites=2", "federation.rounds=1", "evaluation.metrics=[dice]")


# --------------------------------------------------------------------------------------------------------- the console

SAYS = r"""
import sys
from fedseg.launch.command import guarded
def work(_):
    for _ in range(3000):
        print("S\u00e3o Paulo \u5317\u4eac")
        print("warned \u5317", file=sys.stderr)
    sys.stdout.isatty(), sys.stderr.isatty()
    open(sys.argv[1], "w").write("done")
    return 5
sys.exit(guarded(work, []))
"""


def says(done: Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command that prints much, and then does its work; ``shell`` is what stands behind it."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("TERM", "PYTHONIOENCODING", "PYTHONUTF8")
    }
    command = ["bash", "-c", f'"$0" -c "$1" "$2" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable, SAYS, str(done)]
    return subprocess.run(command, env={**clean, **environment}, cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_a_console_without_the_letters_shows_them_escaped(tmp_path: Path, encoding: str) -> None:
    found = says(tmp_path / "done", PYTHONIOENCODING=encoding)
    assert found.returncode == 5
    lines = {line.decode(encoding) for line in (found.stdout + found.stderr).splitlines()}
    paulo, peking = {
        "ascii": (r"S\xe3o", r"\u5317\u4eac"),
        "cp1252": ("São", r"\u5317\u4eac"),
        "gbk": (r"S\xe3o", "北京"),
        "utf-8": ("São", "北京"),
    }[encoding]
    assert lines == {f"{paulo} Paulo {peking}", f"warned {peking[: len(peking) // 2]}"}


@pytest.mark.parametrize(
    "shell",
    ["| head -1", "2>&1 | head -1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1"],
)
def test_what_cannot_be_printed_does_not_stop_the_work(tmp_path: Path, shell: str) -> None:
    done = tmp_path / "done"
    found = says(done, shell)
    assert found.returncode == 5, found.stderr
    assert done.read_text() == "done"  # and nothing that was printed went into the file
    assert b"Error" not in found.stderr


def test_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with suppress(KeyError), steady_output():
        assert isinstance(sys.stdout, Steady)
        raise KeyError
    assert (sys.stdout, sys.stderr) == before
    assert guarded(lambda _: print("shown"), []) == 0
    assert capsys.readouterr().out == "shown\n"


# ------------------------------------------------------------------------------------------- interruptions and refusals


def run_train(capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str]:
    code = train.main(settings)
    return code, capsys.readouterr().err


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_an_interruption_tells_the_folder_that_nobody_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("fedseg.launch.run.score_checkpoints", interrupt)
        code, told = run_train(capsys, *PLAIN, "algorithm=fedavg")
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 130
    cure = told.rpartition("go on with: python train.py ")[2].split()
    assert cure == [f"output=runs/{folder.name}", "resume=true"]
    assert run_train(capsys, *cure)[0] == 0  # the cure works
    assert (folder / "summary.csv").exists()


def test_interrupted_before_it_began_there_is_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedseg.launch.experiment.Experiment.check_sites", interrupt)
    code, told = run_train(capsys, *PLAIN, "algorithm=fedavg")
    assert (code, told.strip()) == (130, "stopped")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_refused_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = ("data.unlabelled=[site_01,site_02]", "data.size=32")
    assert run_train(capsys, *PLAIN, "algorithm=fedavg", *refused)[0] == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    assert run_train(capsys, *PLAIN, "algorithm=fedavg", *refused, "output=there/deep/run")[0] == 2
    assert [str(path) for path in Path().rglob("*")] == ["there"]  # it stood there before
    assert run_train(capsys, *PLAIN, "algorithm=fedavg", "output=there")[0] == 0  # and serves the next try


def test_a_folder_that_holds_a_run_keeps_all_of_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", resume=False)
    folder.write_config("seed: 0\n")
    before = sorted(path.name for path in folder.path.iterdir())
    with pytest.raises(ReportingError), folder.beginning():
        raise ReportingError
    assert sorted(path.name for path in folder.path.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------ the disk


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Longer files cannot be written, as on a full disk: the error names no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], None]] = {
    "whole": lambda path: write_atomic(path, "x" * 10_000),
    "state": lambda path: write_state(path, b"x" * 10_000),
    "table": lambda path: RunFolder(path.parent)._append(
        "events.csv", [{"round": 1, "site": "s", "event": "e", "detail": "d" * 10_000}]
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], writer: str) -> None:
    path = tmp_path / "events.csv"

    def write(_: object) -> None:
        with files_up_to(4096):
            WRITERS[writer](path)

    assert guarded(write, []) == 2
    assert capsys.readouterr().err == f"error: {os.strerror(errno.EFBIG)}: {path}\n"
    assert {found.name for found in tmp_path.iterdir()} <= {"events.csv"}


# --------------------------------------------------------------------------------------------------------- the workers


def test_workers_without_shared_memory_are_left_out_openly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(make_sites(tmp_path, "north", "south"), workers=2)
    plain = folder(tmp_path)
    monkeypatch.setattr("fedseg.datamodules.sampling.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    batches = list(data.site("north").train_batches(0, 2))
    told = capsys.readouterr().err
    assert "data.workers=2 needs about" in told
    assert "without workers" in told
    for one, other in zip(batches, plain.site("north").train_batches(0, 2), strict=True):
        assert torch.equal(one["image"], other["image"])
    list(data.site("south").train_batches(0, 1))
    assert not capsys.readouterr().err  # told once


def test_a_worker_that_ends_is_named_with_the_cure(tmp_path: Path) -> None:
    data = folder(make_sites(tmp_path, "north"), workers=1)
    batches = iter(data.site("north").train_batches(0, 400))
    next(batches)
    loaders = data.site("north")._shared.loaders
    (worker,) = [child for child in multiprocessing.active_children() if child.pid]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data.workers=1: a process .* ended .*set data.workers=0"):
        list(batches)
    assert not loaders._idle


# ------------------------------------------------------------------------------------------------------- a batch of one


@pytest.mark.slow
@pytest.mark.parametrize("cure", ["data.batch_size=2", "model.norm=group"])
def test_a_batch_that_normalisation_cannot_take_is_refused_with_a_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cure: str
) -> None:
    settings = [*PLAIN, "algorithm=fedavg", "data.batch_size=1", f"output={tmp_path / 'run'}"]
    settings += ["model=deeplabv3plus", "model.encoder_depth=null", "model.decoder_channels=null"]
    code, told = run_train(capsys, *settings)
    assert code == 2
    assert "data.batch_size=1: Expected more than 1 value per channel" in told
    assert cure.replace("=2", "=2 or more") in told
    assert "Traceback" not in told
    assert run_train(capsys, *settings, cure)[0] == 0


# ------------------------------------------------------------------------------------------------------------------ W&B


@pytest.mark.slow
@pytest.mark.parametrize("moment", every(["log_round", "summarise", "log_cases", "finish"], ["log_round", "finish"]))
def test_a_run_goes_on_without_a_dead_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """The client's own service, killed before a call."""
    own = getattr(WandbRun, moment)

    def kill_first(self: WandbRun, *arguments: object, **settings: object) -> None:
        for pid in services():
            os.kill(pid, signal.SIGKILL)
        own(self, *arguments, **settings)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(WandbRun, moment, kill_first)
    code, told = run_train(capsys, *PLAIN, "algorithm=fedavg", "wandb.mode=offline", f"output={tmp_path / 'run'}")
    assert code == 0
    assert told.count("warning: W&B stopped") <= 1
    assert "Traceback" not in told
    if moment == "log_round":
        assert "its folder holds every number" in told
    assert len(RunFolder(tmp_path / "run").rounds()) == 2
    assert WandbRun.current is None


def services() -> list[int]:
    """Processes of W&B's service that this process started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


# ----------------------------------------------------------------------------------------------------------- the plots


def test_letters_that_no_font_has_are_escaped_wherever_they_stand() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_yticks([0, 1], labels=["São Paulo", "北京"])
    axes.set_title("北京 Köln")
    figure.suptitle("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that it does not find
        legible(figure).savefig(io.BytesIO(), format="png")
    shown = "北京" if set("北京") <= {chr(code) for code in letters._known()} else r"\u5317\u4eac"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["São Paulo", shown]
    assert axes.get_title() == f"{shown} Köln"
    assert figure.get_suptitle() == "plain"


def test_an_installed_font_lends_its_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.families.cache_clear()
    monkeypatch.setattr(letters.font_manager, "get_font_names", lambda: ["DejaVu Sans", "Noto Sans CJK JP"])
    try:
        assert letters.families() == ("DejaVu Sans", "Noto Sans CJK JP")
    finally:
        letters.families.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["draw_curves", "save_curves", "draw_overlays", "save_overlays"])
def test_a_picture_that_fails_is_told_and_nothing_else_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"reporting.reporter.{broken}", fail)
    settings = (*PLAIN, "algorithm=fedavg", "evaluation.overlays=true", f"output={tmp_path / 'run'}")
    code, told = run_train(capsys, *settings)
    assert code == 0
    assert "was not drawn (OSError: [Errno 28] No space left on device); the tables are complete" in told
    assert (tmp_path / "run" / "summary.csv").exists()
