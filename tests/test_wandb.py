"""The real W&B client, agent and `wandb sync`, against a server on loopback: there arrives what the folder says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import evaluate
from fedseg.federation.checkpoint import Checkpoint
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.reporter import sweep_values
from fedseg.reporting.summary import summarise
from fedseg.reporting.wandb import RunAddress
from tests.wandb_server import ENTITY, Run, WandbServer

pytest.importorskip("wandb")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.waits(60),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of an agent in /proc"),
]

ROOT = Path(__file__).parent.parent
SMALL = {
    "model": "tiny",
    "model.encoder_depth": 2,
    "model.decoder_channels": "[16, 8]",
    "data.n_sites": 2,
    "data.cases_per_site": 8,
    "data.amount": 0,
    "data.size": 32,
    "data.resolution": 32,
    "data.batch_size": 2,
    "federation.rounds": 2,
    "federation.local_steps": 1,
    "trainer.threads": 1,
    "trainer.accelerator": "cpu",
    "evaluation.metrics": ["dice"],
}
PLAIN = {**SMALL, "evaluation.overlays": False}
# the real agent, which looks more often whether its run has ended
AGENT = "from wandb import wandb_agent; wandb_agent.Agent.POLL_INTERVAL = 0.5; from wandb.cli import cli; cli.cli()"
COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


class Shell:
    """Starts commands in a folder with the server's environment; kills all of them, and their children, at the end."""

    def __init__(self, folder: Path, server: WandbServer) -> None:
        self.folder = folder
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        self.environment = {**clean, **server.environment(), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"PATH": f"{Path(sys.executable).parent}:{clean['PATH']}", "WANDB_CONSOLE": "wrap"}
        self.environment |= {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}  # seconds; the tests wait for what arrives
        self.started: list[subprocess.Popen[bytes]] = []

    def agent(self, sweep: str, count: int = 1) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-c", AGENT, "agent", "--count", str(count), sweep)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "shell.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, *command: str, code: int = 0) -> str:
        """Run to the end; returns what was printed."""
        before = len(self.printed())
        assert self.start(*command).wait(300) == code, self.printed()
        return self.printed()[before:]

    def printed(self) -> str:
        log = self.folder / "shell.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def sweep(self, parameters: dict[str, Any]) -> str:
        """Create a grid with the real command; returns the sweep's path for an agent."""
        told = {key: value if isinstance(value, dict) else {"value": value} for key, value in parameters.items()}
        content = {"program": str(ROOT / "train.py"), "method": "grid", "parameters": told, "command": COMMAND}
        content["metric"] = {"name": "val/personal/dice", "goal": "maximize"}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        printed = self.run("wandb", "sweep", "--project", "trial", "sweep.yaml")
        found = re.search(r"wandb agent (\S+)", printed)
        assert found, printed
        return found[1]

    def close(self) -> None:
        for process in self.started:
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += [*descendants(int(child)), int(child)]
    return found


def training(agent: subprocess.Popen[bytes]) -> int | None:
    """The process that the agent started."""
    for pid in descendants(agent.pid):
        with contextlib.suppress(OSError):
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def processor_time(process: subprocess.Popen[bytes]) -> int | None:
    """Ticks that its main thread has used; None unless that sleeps."""
    state, *numbers = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, numbers[10:12])) if state == "S" else None


def at_rest(process: subprocess.Popen[bytes]) -> bool:
    """Whether it slept the whole time: it waits for something. On a busy machine one with work to do is runnable."""
    looks = set()
    for _ in range(10):
        looks.add(processor_time(process))
        time.sleep(0.05)
    return len(looks) == 1 and None not in looks


def running(pids: list[int]) -> list[int]:
    """Those that have not ended; the ended ones may wait for a parent to take note of it."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def wait_for(sign: Callable[[], Any], process: subprocess.Popen[bytes] | None, shell: Shell) -> None:
    deadline = time.monotonic() + 180
    while not sign():
        assert process is None or process.poll() is None, shell.printed()
        assert time.monotonic() < deadline, shell.printed()
        time.sleep(0.02)


@pytest.fixture
def shell(tmp_path: Path, server: WandbServer) -> Iterator[Shell]:
    made = Shell(tmp_path, server)
    try:
        yield made
    finally:
        made.close()


def rounds(run: Run) -> list[int]:
    return [row["round"] for row in run.history if "train/loss" in row]


def assert_arrived(run: Run, folder: RunFolder) -> None:
    """History equals metrics.csv and rounds.csv, and the summary that of the run's folder."""
    scores = folder.scores()
    during = scores[(scores["checkpoint"] == "round") & (scores["metric"] == "dice") & (scores["split"] == "val")]
    known = {row["round"]: row for row in run.history if "train/loss" in row}
    assert sorted(known) == sorted(set(during["round"]))
    for (round, site, view), cases in during.groupby(["round", "site", "view"]):
        assert known[round][f"{site}/val/{view}/dice"] == pytest.approx(cases["value"].mean(), abs=1e-12)
    for round, means in during.groupby(["round", "view", "site"])["value"].mean().groupby("round"):
        personal = means.xs("personal", level="view") if "personal" in means.index.get_level_values("view") else means
        assert known[round]["val/worst_site/dice"] == pytest.approx(personal.min(), abs=1e-12)
    trained = folder.rounds().groupby("round")["loss"].mean()
    assert [known[round]["train/loss"] for round in sorted(known)] == pytest.approx(list(trained), abs=1e-12)
    result = summarise(scores)
    told = {**result.values, **sweep_values(result)}
    assert told
    for name, value in told.items():
        assert run.summary[name] == pytest.approx(value, abs=1e-12), name
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps)), "the parts of a run follow each other"


def test_an_agent_runs_a_sweep_and_a_refused_combination_does_not_end_it(shell: Shell, server: WandbServer) -> None:
    settings = {**SMALL, "algorithm": "ditto", "seed": 0, "training.lr": {"values": [-1, 0.001]}}
    path = shell.sweep(
        {**settings, "algorithm.lam": 0.25, "wandb.artifacts": True, "wandb.images": True, "data.regions": "None"}
    )
    assert path.startswith(f"{ENTITY}/trial/")
    assert shell.agent(path, 2).wait(300) == 0, shell.printed()
    bad, good = server.runs.values()
    assert (bad.state, good.state) == ("failed", "finished"), shell.printed()
    assert "training.lr=-1" in bad.output
    assert server.sweeps[good.sweep].given[good.name]["seed"] == 0
    assert (good.project, good.job_type) == ("trial", "train")
    told = {"algorithm": "ditto", "algorithm.lam": 0.25, "training.lr": 0.001, "model": "tiny", "model.norm": "batch"}
    assert {key: good.config[key] for key in told} == told, "as given, and whatever else the run was made of"
    assert re.fullmatch(r"phantom-ditto-[0-9a-f]{6}", good.group)

    (found,) = (shell.folder / "runs" / good.sweep).iterdir()  # the refused ones leave no folder
    assert found.name == f"phantom-ditto-seed0-{good.name}"
    folder = RunFolder(found)
    assert folder.wandb_id_path.read_text() == f"{ENTITY}/trial/{good.name}\n"
    assert good.display_name == f"phantom-ditto-seed0-{good.name}"
    assert_arrived(good, folder)
    assert len(good.history) == 3, "rounds 0 to 2, one row each"
    assert_pictures_and_table(good, server, folder)
    assert_artefact(good, server, shell)


def assert_pictures_and_table(run: Run, server: WandbServer, folder: RunFolder) -> None:
    pictures = run.history[-1]["site_01/overlays"]
    assert set(pictures["all_masks"][0]) == {"truth", "global", "personal"}
    assert all(name in run.files for name in pictures["filenames"])
    assert all(mask["path"] in run.files for masks in pictures["all_masks"] for mask in masks.values())
    (table,) = (made for made in server.artifacts if made.type == "run_table" and run.name in made.name)
    content = json.loads(table.files["cases.table.json"])
    cases = pd.DataFrame(content["data"], columns=content["columns"])
    final = folder.scores().query("checkpoint != 'round'")
    assert len(cases) == len(final)
    keys = ["checkpoint", "split", "site", "view", "case", "region"]
    both = cases.merge(final, on=keys)
    assert len(both) == len(final)
    assert (both["dice"] - both["value"]).abs().max() < 1e-12
    assert (cases["checkpoint"].iloc[0], cases["split"].iloc[0]) == ("best", "test")


def assert_artefact(run: Run, server: WandbServer, shell: Shell) -> None:
    """The uploaded models make a folder that can be scored again."""
    (models,) = (made for made in server.artifacts if made.type == "model")
    assert models.committed
    assert run.name in models.name
    copy = shell.folder / "downloaded"
    for name, content in models.files.items():
        if name != "wandb_manifest.json":
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert evaluate.main([str(copy)]) == 0
    assert "the largest difference is 0" in told.getvalue()


@pytest.mark.exhaustive
def test_under_an_agent_the_folds_are_runs_beside_the_one_that_gathers_them(shell: Shell, server: WandbServer) -> None:
    settings = {**PLAIN, "data.n_sites": 3, "federation.rounds": 1, "algorithm": "fedavg"}
    path = shell.sweep({**settings, "protocol": "leave_one_site_out"})
    assert shell.agent(path).wait(300) == 0, shell.printed()
    (whole,) = (run for run in server.runs.values() if run.sweep)
    folds = [run for run in server.runs.values() if not run.sweep]
    assert [fold.job_type for fold in folds] == ["fold"] * 3
    assert whole.job_type == "leave_one_site_out"
    assert {run.group for run in folds} == {whole.group}
    assert {run.state for run in server.runs.values()} == {"finished"}
    assert {run.project for run in server.runs.values()} == {"trial"}, "where the sweep is"
    (found,) = (shell.folder / "runs" / whole.sweep).iterdir()
    table = pd.read_csv(found / "summary.csv").query("split == 'test' and checkpoint == 'best' and metric == 'dice'")
    mean = table[(table["region"] == "mean") & (table["view"] == "global")]["mean"].mean()
    assert whole.summary["best/test/global/dice"] == pytest.approx(mean)
    for fold, site in zip(folds, ("site_01", "site_02", "site_03"), strict=True):
        assert fold.config["data.unseen"] == [site]
        assert RunAddress.of(RunFolder(found / site)).id == fold.name
        assert_arrived(fold, RunFolder(found / site))


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["killed", "agent interrupted"])
def test_what_was_stopped_under_an_agent_goes_on_as_the_same_run(shell: Shell, server: WandbServer, how: str) -> None:
    settings = {**PLAIN, "algorithm": "fedavg", "seed": 5, "federation.rounds": 5000}
    agent = shell.agent(shell.sweep(settings))
    wait_for(lambda: any(len(rounds(known)) >= 2 for known in server.runs.values()), agent, shell)
    (run,) = server.runs.values()
    (found,) = (shell.folder / "runs" / run.sweep).iterdir()
    # rounds that the client holds back are lost with it, and sent later
    wait_for(lambda: Checkpoint(found / "checkpoints").round > rounds(run)[-1], agent, shell)
    pid = training(agent)
    assert pid is not None
    started = [pid, *descendants(pid)]
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        assert agent.wait(180) == 0
    else:
        agent.send_signal(signal.SIGINT)
        wait_for(lambda: "Waiting for runs to end" in shell.printed(), agent, shell)
        wait_for(lambda: at_rest(agent), agent, shell)  # interrupted before it waits it ends alone, and leaves its run
        agent.send_signal(signal.SIGINT)
        agent.wait(180)
        assert not running([pid]), "the agent waits for its run"
        assert run.state == "failed", shell.printed()
        assert "stopped; go on with" in shell.printed()
        assert "stopped; go on with" in run.output, "the log at W&B says why"
    wait_for(lambda: not running(started), None, shell)  # W&B's own process outlives the training and may still send
    done = Checkpoint(found / "checkpoints").round
    assert done >= 2
    more = f"federation.rounds={done + 2}"
    shell.run(sys.executable, str(ROOT / "train.py"), f"output={found}", "resume=true", more)
    assert list(server.runs) == [run.name], "also in the project of the sweep: the server keeps runs apart by it"
    assert run.state == "finished"
    assert rounds(run) == list(range(1, done + 3)), "no round twice, none missing"
    assert_arrived(run, RunFolder(found))


@pytest.mark.exhaustive
def test_folds_that_were_stopped_under_an_agent_go_on_as_its_run(shell: Shell, server: WandbServer) -> None:
    settings = {**PLAIN, "data.n_sites": 3, "federation.rounds": 2, "algorithm": "fedavg"}
    agent = shell.agent(shell.sweep({**settings, "protocol": "leave_one_site_out"}))
    wait_for(lambda: any(known.job_type == "fold" and rounds(known) for known in server.runs.values()), agent, shell)
    pid = training(agent)
    assert pid is not None
    started = [pid, *descendants(pid)]
    os.kill(pid, signal.SIGKILL)
    assert agent.wait(180) == 0
    wait_for(lambda: not running(started), None, shell)
    (whole,) = (run for run in server.runs.values() if run.sweep)
    (found,) = (shell.folder / "runs" / whole.sweep).iterdir()
    shell.run(sys.executable, str(ROOT / "train.py"), f"output={found}", "resume=true")
    assert {run.state for run in server.runs.values()} == {"finished"}
    assert {run.project for run in server.runs.values()} == {"trial"}
    assert len(server.runs) == 4, "three folds, and the agent's run that gathers them"
    assert "best/test/global/dice" in whole.summary
    for site in ("site_01", "site_02", "site_03"):
        assert_arrived(server.runs[RunAddress.of(RunFolder(found / site)).id], RunFolder(found / site))


@pytest.mark.exhaustive
@pytest.mark.waits(180)
def test_an_offline_run_and_its_continuation_are_synced_as_one(shell: Shell, server: WandbServer) -> None:
    train = [sys.executable, str(ROOT / "train.py"), "output=run"]
    told = [f"{key}={value}" for key, value in {**SMALL, "algorithm": "fedavg"}.items()]
    shell.run(*train, *told, "wandb.mode=offline")
    shell.run(*train, "resume=true", "federation.rounds=3")
    assert not server.operations, "offline is offline"
    parts = sorted(str(path) for path in (shell.folder / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    shell.run("wandb", "sync", *parts)
    (run,) = server.runs.values()
    assert run.name == RunAddress.of(RunFolder(shell.folder / "run")).id
    assert (run.state, run.project, rounds(run)) == ("finished", "federated-segmentation", [1, 2, 3])
    assert_arrived(run, RunFolder(shell.folder / "run"))
