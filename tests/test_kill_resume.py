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

import pandas as pd
import pytest

import train
from federation.checkpoint import Checkpoint, Snapshot
from reporting.folder import RunFolder
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


def table(folder: Path, name: str) -> pd.DataFrame:
    frame = {"metrics": RunFolder.scores, "rounds": RunFolder.rounds, "traffic": RunFolder.traffic}.get(
        name, RunFolder.events
    )(RunFolder(folder))
    frame = frame.drop(columns=[column for column in ("seconds",) if column in frame])
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


def assert_same_run(folder: Path, other: Path) -> None:
    one, two = last(folder), last(other)
    assert one.round == two.round == ROUNDS
    assert_same(one.server, two.server)
    assert one.kept.keys() == two.kept.keys()
    for site in one.kept:
        assert_same(one.kept[site], two.kept[site])
    checkpoints = [Checkpoint(path / "checkpoints") for path in (folder, other)]
    assert checkpoints[0].best() == checkpoints[1].best()
    for name in ("metrics", "rounds", "traffic", "events"):
        pd.testing.assert_frame_equal(table(folder, name), table(other, name), check_exact=True)
    assert (folder / "summary.csv").read_bytes() == (other / "summary.csv").read_bytes()
    named = {"index.json", *checkpoints[0].index["kept"].values(), checkpoints[0].index["server"]}
    named |= {file for best in checkpoints[0].best().values() for file in (best.server, best.kept) if file}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == named


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder, *SETTINGS, f"federation.rounds={ROUNDS}")
    return folder


@pytest.mark.slow
def test_killed_again_and_again_and_resumed_ends_where_an_undisturbed_run_ends(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = [*SETTINGS, f"federation.rounds={ROUNDS}"]
    checkpoints = folder / "checkpoints"

    # before anything was saved: the first scores of round 1 are being written
    kill_when(folder, lambda: rows(folder, "metrics.csv") > 0, *settings)
    # in the middle of writing the second checkpoint or a later one: a part of a file lies there, the index is older
    kill_when(
        folder,
        lambda: Checkpoint(checkpoints).round > 0 and any(checkpoints.glob(".s*.part")),
        "resume=true",
    )
    done = Checkpoint(checkpoints).round
    assert 1 <= done < ROUNDS
    # as soon as the next round is saved
    kill_when(folder, lambda: Checkpoint(checkpoints).round > done, "resume=true")

    finish(folder, "resume=true")
    assert_same_run(folder, undisturbed)


def test_more_rounds_on_resume_equal_a_longer_run_from_the_start(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(folder, *SETTINGS, "federation.rounds=2")
    assert last(folder).round == 2
    finish(folder, "resume=true", f"federation.rounds={ROUNDS}")
    assert_same_run(folder, undisturbed)


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path) -> None:
    before = {name: table(undisturbed, name) for name in ("metrics", "rounds", "traffic", "events")}
    finish(undisturbed, "resume=true")
    for name, frame in before.items():
        pd.testing.assert_frame_equal(table(undisturbed, name), frame, check_exact=True)
