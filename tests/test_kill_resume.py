"""A real process, killed for real: what goes on from its folder ends where an undisturbed run ends, bit for bit."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import train
from fedseg.algorithms import ALGORITHMS
from fedseg.federation.checkpoint import Checkpoint, Snapshot
from fedseg.federation.engine import Federation
from fedseg.reporting.folder import AUDIT, RunFolder
from fedseg.reporting.reporter import Reporter
from tests.tiers import every
from tests.tiny_run import TINY
from tests.world import assert_same

ROOT = Path(__file__).parent.parent
ROUNDS = 4
SETTINGS = [
    "algorithm=ditto",
    "data.n_sites=2",
    "data.cases_per_site=8",
    "data.amount=0",
    "data.size=32",
    "data.resolution=32",
    "data.batch_size=2",
    "model.decoder_channels=[16, 8, 8, 8]",
    "federation.local_steps=2",
    "federation.work_spread=0.5",
    "federation.dropout=0.2",
    "training.optimizer_state=keep",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "evaluation.overlays=false",
    "evaluation.metrics=[dice]",
]


def finish(folder: Path, *arguments: str) -> None:
    """Run to the end, in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([f"output={folder}", *arguments])
    assert code == 0, err.getvalue()


def kill_when(folder: Path, sign: Callable[[], bool], *arguments: str) -> None:
    """Start a process of its own, and kill it without warning at the sign."""
    line = [sys.executable, str(ROOT / "train.py"), f"output={folder}", *arguments]
    with (folder.parent / "stderr.txt").open("w") as err:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=err, env={**os.environ}, cwd=ROOT)
        deadline = time.monotonic() + 240
        while not sign():
            assert process.poll() is None, (folder.parent / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def rows(folder: Path, name: str) -> int:
    path = folder / name
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last(folder: Path) -> Snapshot:
    snapshot = Checkpoint(folder / "checkpoints").load()
    assert snapshot is not None
    return snapshot


def tables(folder: Path) -> dict[str, list[str]]:
    """Every table and text of a run, row by row; wall times, and what tells of processes, are left out."""
    found = {}
    for path in sorted({*folder.glob("*.csv"), *folder.glob("*.md"), folder / "inputs.json"}):
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.name == "rounds.csv":
            place = lines[0].split(",").index("seconds")
            lines = [",".join(cells[:place] + cells[place + 1 :]) for cells in (line.split(",") for line in lines)]
        found[path.name] = lines
    return found


def assert_same_tables(folder: Path, other: Path) -> None:
    one, two = tables(folder), tables(other)
    assert one.keys() == two.keys()
    assert {"audit.csv", "audit_summary.csv", "metrics.csv", "rounds.csv", "splits.csv"} <= one.keys()
    for name, lines in one.items():
        assert lines == two[name], name


def assert_same_run(folder: Path, other: Path) -> None:
    one, two = last(folder), last(other)
    assert one.round == two.round == ROUNDS
    assert_same(one.server, two.server)
    assert one.kept.keys() == two.kept.keys()
    for site in one.kept:
        assert_same(one.kept[site], two.kept[site])
    checkpoints = [Checkpoint(path / "checkpoints") for path in (folder, other)]
    assert checkpoints[0].best() == checkpoints[1].best()
    assert_same_tables(folder, other)
    named = {"index.json", *checkpoints[0].index["kept"].values(), checkpoints[0].index["server"]}
    named |= {file for best in checkpoints[0].best().values() for file in (best.server, best.kept) if file}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == named


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder, *SETTINGS, f"federation.rounds={ROUNDS}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kills", every([1, 3], [1]))
def test_killed_again_and_again_and_resumed_ends_where_an_undisturbed_run_ends(
    kills: int, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*SETTINGS, f"federation.rounds={ROUNDS}"]
    checkpoints = folder / "checkpoints"

    if kills > 1:  # before anything was saved: the first scores of round 1 are being written
        kill_when(folder, lambda: rows(folder, "metrics.csv") > 0, *words)
        words = ["resume=true"]
    # in the middle of writing the second checkpoint or a later one: a part of a file lies there, the index is older
    kill_when(folder, lambda: Checkpoint(checkpoints).round > 0 and any(checkpoints.glob(".s*.part")), *words)
    done = Checkpoint(checkpoints).round
    assert 1 <= done < ROUNDS
    if kills > 1:  # as soon as the next round is saved
        kill_when(folder, lambda: Checkpoint(checkpoints).round > done, "resume=true")

    finish(folder, "resume=true")
    assert_same_run(folder, undisturbed)


@pytest.mark.exhaustive
def test_more_rounds_on_resume_equal_a_longer_run_from_the_start(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(folder, *SETTINGS, "federation.rounds=2")
    assert last(folder).round == 2
    finish(folder, "resume=true", f"federation.rounds={ROUNDS}")
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(undisturbed: Path) -> None:
    before = tables(undisturbed)
    finish(undisturbed, "resume=true")
    assert tables(undisturbed) == before


# ----------------------------------------------------------------------------------- every method, every point of a run


class Killed(BaseException):
    """The process is gone here."""


@contextlib.contextmanager
def killed(
    owner: Any, name: str, call: int = 1, when: Callable[..., bool] = lambda *_: True, half: bool = False
) -> Any:
    """A process that is killed in a call of a function: at once, or with half of a file's data written."""
    real, seen = getattr(owner, name), [0]

    def until(*arguments: Any, **options: Any) -> Any:
        seen[0] += when(*arguments)
        if seen[0] < call:
            return real(*arguments, **options)
        if half:  # as `write_atomic` leaves it
            folder, file, data = arguments[0].folder, arguments[1], arguments[2]
            (folder / f".{file}.part").write_bytes(data[: len(data) // 2])
        raise Killed

    with mock.patch.object(owner, name, until), pytest.raises(Killed):
        yield


def in_table(name: str) -> Callable[..., bool]:
    return lambda _folder, table, *_: bool(table == name)


POINTS = (
    lambda: killed(Federation, "evaluate"),  # between training and validation of round 1
    lambda: killed(Checkpoint, "_write", call=3, half=True),  # in the first checkpoint, which has no index yet
    lambda: killed(Checkpoint, "_sweep"),  # after the first checkpoint, before older states are removed
    lambda: killed(RunFolder, "_append", when=in_table(AUDIT)),  # in the tables of round 2
    lambda: killed(Checkpoint, "_write_index"),  # the states of round 2 are there, its index is not
    lambda: killed(RunFolder, "_append", call=2, when=in_table(AUDIT)),  # in the final scoring
    lambda: killed(Reporter, "finish"),  # before the summary
    lambda: killed(RunFolder, "write_audit_summary"),  # after the summary
)
SMALL = [*TINY[1:], "data.cases_per_site=6", "data.n_sites=3", "data.unseen=[site_03]", "evaluation.metrics=[dice]"]
SMALL += ["federation.rounds=2", "federation.dropout=0.2"]
SETTINGS_OF = {"contrastive": ["algorithm.pairing=instance"], "lcfed": ["data.n_sites=2", "data.unseen=[]"]}


EVERYWHERE = "ditto"  # which has all that a method can have at a site


@pytest.mark.slow
@pytest.mark.parametrize("method", every(ALGORITHMS, [EVERYWHERE, "lcfed"]))
def test_a_method_killed_on_the_way_leaves_the_tables_of_an_undisturbed_run(method: str, tmp_path: Path) -> None:
    """One method is killed at every point, each other one at one, in turn: every point meets several methods."""
    turn = list(ALGORITHMS).index(method) % len(POINTS)
    points = POINTS if method == EVERYWHERE else POINTS[turn : turn + 1]
    settings = [f"algorithm={method}", *SMALL, *SETTINGS_OF.get(method, [])]
    whole, folder = tmp_path / "whole", tmp_path / "parts"
    finish(whole, *settings)
    arguments = settings
    for point in points:
        with point():
            finish(folder, *arguments)
        arguments = ["resume=true"]
    finish(folder, *arguments)
    assert_same_tables(folder, whole)
    if method == EVERYWHERE:  # it is finished: once more changes nothing
        finish(folder, *arguments)
        assert_same_tables(folder, whole)
    assert {path.name for path in folder.rglob("*")} == {path.name for path in whole.rglob("*")}


@pytest.mark.exhaustive
def test_tables_of_a_private_and_compressed_run_are_those_of_an_undisturbed_one(tmp_path: Path) -> None:
    private = ["privacy.mechanism=site", "privacy.noise=0.5", "compression.top_k=0.5", "federation.sampling=poisson"]
    settings = ["algorithm=fedavg", *SMALL, *private, "federation.fraction=0.9", "model.norm=group"]
    finish(tmp_path / "whole", *settings)
    for arguments, point in ((settings, POINTS[2]), (["resume=true"], POINTS[5])):
        with point():
            finish(tmp_path / "parts", *arguments)
    finish(tmp_path / "parts", "resume=true")
    assert_same_tables(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "parts" / "privacy.csv").is_file()
