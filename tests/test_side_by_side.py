"""Sites answered by several processes: the same results, errors with the site's name, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import train
from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import Compute
from fedseg.federation.contract import EvaluateTask, Scored, Task
from fedseg.federation.state import State
from fedseg.federation.transport import InProcess
from fedseg.federation.workers import SideBySide, WorkersError
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import TINY
from tests.world import CPU, assert_same, build, toy_sites

CLOCKS = ["seconds", "fit_seconds"]


def run(folder: Path, *settings: str) -> RunFolder:
    words = ["data=phantom", "data.n_sites=4", "data.unseen=[site_04]", "federation.rounds=2", *TINY, *settings]
    assert train.main([*words, f"output={folder}"]) == 0
    return RunFolder(folder)


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm=ditto", "evaluation.predictions=true"),
        pytest.param(("algorithm=scaffold", "training.optimizer=sgd"), marks=pytest.mark.exhaustive),
        pytest.param(("algorithm=iopfl", "federation.fraction=0.7"), marks=pytest.mark.exhaustive),
        pytest.param(("algorithm=fedavg", "privacy.mechanism=site"), marks=pytest.mark.exhaustive),
    ],
)
def test_any_number_of_processes_gives_the_same_run(settings: tuple[str, ...], tmp_path: Path) -> None:
    one = run(tmp_path / "one", *settings)
    for count in (2, 3):
        other = run(tmp_path / str(count), *settings, f"trainer.workers={count}")
        for name in {"metrics.csv", "updates.csv"} & {path.name for path in one.path.iterdir()}:
            assert (other.path / name).read_bytes() == (one.path / name).read_bytes()
        rounds = [folder.rounds().drop(columns=CLOCKS, errors="ignore") for folder in (one, other)]
        pd.testing.assert_frame_equal(*rounds)
        (server, kept), (same, also) = (whole(folder) for folder in (one, other))
        assert_same(server, same)
        assert kept.keys() == also.keys()
        for site in kept:
            assert_same(kept[site], also[site])
        masks = [sorted(path.name for path in folder.predictions.rglob("*.p*")) for folder in (one, other)]
        assert masks[0] == masks[1]


def whole(folder: RunFolder) -> tuple[State, Mapping[str, State]]:
    found = Checkpoint(folder.checkpoints).load()
    assert found is not None
    return found.server, found.kept


class Rows:
    """A scorer of nothing, which fails or ends its process at one site."""

    def __init__(self, deed: Any = None) -> None:
        self.deed = deed

    def __call__(self, algorithm: Any, site: Any, task: EvaluateTask) -> Scored:
        if self.deed is not None and site.name == "s1":
            self.deed()
        return Scored(rows=[{"site": site.name, "process": os.getpid()}])


def side_by_side(deed: Any = None) -> SideBySide:
    return SideBySide(InProcess(build("fedavg"), toy_sites(3), CPU, Rows(deed)), 2, 1)


def questions() -> tuple[Mapping[str, Task], Mapping[str, State]]:
    server = build("fedavg").init_server({})
    sites = toy_sites(3)
    return {name: EvaluateTask(1, 0, splits=("val",)) for name in sites}, dict.fromkeys(sites, server)


@pytest.mark.slow
def test_answers_come_in_the_order_of_tasks_from_processes_of_their_own() -> None:
    way = side_by_side()
    tasks, messages = questions()
    updates = list(way.ask(tasks, messages))
    assert [update.site for update in updates] == list(tasks)
    rows = [row for update in updates for row in update.rows]
    assert [row["site"] for row in rows] == list(tasks)
    processes = {row["process"] for row in rows}
    assert len(processes) == 2
    assert os.getpid() not in processes
    way.close()
    assert not any(alive(process) for process in processes)


def fail() -> None:
    raise ValueError("no such thing")


@pytest.mark.slow
def test_an_error_names_the_site_and_ends_the_processes() -> None:
    way = side_by_side(fail)
    with pytest.raises(ValueError, match=r"\[site 's1', task evaluate, round 1\] no such thing"):
        list(way.ask(*questions()))
    assert not way._processes


def test_a_process_that_is_killed_is_told_with_a_cure() -> None:
    way = side_by_side(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkersError, match=r"ended on its own, perhaps for want of memory; take fewer"):
        list(way.ask(*questions()))
    assert not way._processes


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import time; from tests.test_side_by_side import *; way = side_by_side(); list(way.ask(*questions()));"
        "print(*(p.pid for p, _ in way._processes), flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while any(alive(child) for child in children) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(alive(child) for child in children)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["data=phantom", *TINY, "trainer.workers=2", "data.workers=1"]
    with pytest.raises(ConfigError, match=r"trainer.workers=2 prepare their batches themselves; leave data.workers=0"):
        Experiment(compose(settings, SCHEMA)).check()
    Experiment(compose([*settings, "data.workers=0"], SCHEMA)).check()
    masked = ["data=phantom", *TINY, "privacy.aggregation=masked", "trainer.workers=2"]
    with pytest.raises(ConfigError, match=r"serve a site by several; take trainer.workers=1"):
        Experiment(compose(masked, SCHEMA)).check()
    Experiment(compose([*masked, "trainer.workers=1"], SCHEMA)).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"is for the CPU; take trainer.accelerator=cpu"):
        Compute(workers=2)
    Compute(workers=2, accelerator="cpu")
