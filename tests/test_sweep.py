"""Sweep files, and running them on this machine without W&B."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import launch.sweep
import sweep
import train
from configs.compose import FOLDER, ConfigError, compose
from configs.sweeps import Sweep, arguments, draw, listed
from launch.settings import SCHEMA
from launch.sweep import Job, Report, run_jobs, workers
from reporting import ReportingError
from reporting.folder import RunFolder

ROOT = Path(__file__).parent.parent
COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
FILES = sorted((FOLDER / "sweep").glob("*.yaml"))
TINY = [
    *("model=tiny", "data.n_sites=2", "data.cases_per_site=8", "data.amount=0", "data.size=32", "data.resolution=32"),
    *("data.batch_size=2", "federation.local_steps=1", "trainer.accelerator=cpu", "evaluation.metrics=[dice]"),
    *("evaluation.overlays=false", "trainer.threads=1"),
]


def written(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {"program": "train.py", "method": "grid", "command": COMMAND, "parameters": {}}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_combination_of_every_sweep_file_is_a_config(path: Path) -> None:
    sweep = Sweep.read(path.stem)
    count = None if sweep.method == "grid" else 20
    combinations = sweep.combinations(count, seed=0)
    assert combinations
    for combination in combinations:
        compose([*sweep.literals, *arguments(combination)], SCHEMA)
    for parameter in sweep.parameters.values():  # also the ends of what is drawn
        for end in (parameter.get("min"), parameter.get("max")):
            if end is not None:
                key = next(key for key, value in sweep.parameters.items() if value is parameter)
                compose([*sweep.literals, *arguments({**combinations[0], key: end})], SCHEMA)
    names = [sweep.run_name(combination) for combination in combinations]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_accepts_every_sweep_file(path: Path) -> None:
    sweeps = pytest.importorskip("wandb.apis.public.sweeps")
    content = yaml.safe_load(path.read_text())
    assert sweeps._validate_config_and_fill_distribution(content)["method"] == content["method"]
    assert content["command"] == COMMAND


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": "other.py"}, "only train.py"),
        ({"method": "best"}, "grid, random or bayes"),
        ({"methods": "grid"}, "did you mean 'method'"),
        ({}, "there are none"),
        ({"parameters": {"seed": [1]}}, r"parameters.seed needs value"),
        ({"parameters": {"training": {"parameters": {"lr": {"value": 1}}}}}, r"written a\.b"),
        ({"parameters": {"seed": {"values": []}}}, "not a list with entries"),
        ({"parameters": {"training.lr": {"min": 0.1, "max": 1.0}}}, "a grid cannot list"),
        ({"method": "random", "parameters": {"training.lr": {"min": "1e-4", "max": 1.0}}}, "min below max"),
        ({"method": "random", "parameters": {"training.lr": {"min": 2, "max": 1}}}, "min below max"),
        (
            {"method": "random", "parameters": {"a": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}},
            "above 0",
        ),
        ({"method": "random", "parameters": {"a": {"distribution": "uniforms"}}}, "did you mean 'uniform'"),
        ({"parameters": {"seed": {"value": 1}}, "command": ["${program}", "${args}"]}, "without hyphens"),
        ({"parameters": {"seed": {"value": 1}}, "command": [*COMMAND, "--fast"]}, "'--fast' is neither"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        Sweep.read(str(path))
    assert str(path) in str(caught.value)


def test_names_of_files() -> None:
    with pytest.raises(ConfigError, match="did you mean 'method_comparison'"):
        Sweep.read("method_comparisons")


def test_a_grid_has_every_combination_and_readable_distinct_names(tmp_path: Path) -> None:
    parameters = {
        "algorithm": {"values": ["fedavg", "ditto"]},
        "training.lr": {"values": [0.1, 1e-5]},
        "algorithm.lr": {"values": [1]},
        "data.unseen": {"values": [["site_01"], ["site/01"], None]},
        "seed": {"min": 0, "max": 2},
        "model": {"value": "tiny"},
    }
    sweep = Sweep.read(str(written(tmp_path, parameters=parameters)))
    combinations = sweep.combinations(None, seed=0)
    assert len(combinations) == 2 * 2 * 3 * 3
    names = [sweep.run_name(combination) for combination in combinations]
    assert len(set(names)) == len(names)
    assert "algorithm=fedavg,lr=0.1,unseen=None,seed=2" in names
    assert all("/" not in name and " " not in name and len(name) <= 100 for name in names)
    fixed = sweep.fixed({"seed": "7", "algorithm": "local", "federation.rounds": "3"})
    assert len(fixed.combinations(None, seed=0)) == 6
    assert fixed.literals == ("seed=7", "algorithm=local", "federation.rounds=3")


def test_long_names_are_cut_and_stay_distinct(tmp_path: Path) -> None:
    stages = [
        '["algorithm=contrastive federation.rounds=4", "algorithm=ditto data.labelled_patients=' + f'{n}"]'
        for n in (1, 2)
    ]
    sweep = Sweep.read(str(written(tmp_path, parameters={"stages": {"values": stages}})))
    one, two = (sweep.run_name(combination) for combination in sweep.combinations(None, 0))
    assert one != two
    assert max(len(one), len(two)) <= 100


def test_draws_follow_their_distributions_and_their_seed(tmp_path: Path) -> None:
    parameters = {
        "training.lr": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0},
        "federation.local_steps": {"min": 1, "max": 3},
        "algorithm.lam": {"min": 0.0, "max": 2.0},
        "data.cases_per_site": {"distribution": "q_uniform", "min": 10, "max": 20, "q": 5},
        "algorithm": {"values": ["ditto", "fedprox"], "probabilities": [0.9, 0.1]},
        "training.weight_decay": {"distribution": "normal", "mu": 1.0, "sigma": 0.1},
    }
    sweep = Sweep.read(str(written(tmp_path, method="random", parameters=parameters)))
    many = sweep.combinations(4000, seed=1)
    assert sweep.combinations(10, seed=1) == many[:10], "more draws leave the first ones as they are"
    assert sweep.combinations(10, seed=2) != many[:10]
    column = {key: [combination[key] for combination in many] for key in parameters}
    decades = [math.floor(math.log10(value)) for value in column["training.lr"]]
    assert all(abs(decades.count(d) / 4000 - 0.25) < 0.03 for d in (-4, -3, -2, -1))
    assert set(column["federation.local_steps"]) == {1, 2, 3}
    assert 0.95 < sum(column["algorithm.lam"]) / 4000 < 1.05
    assert set(column["data.cases_per_site"]) == {10, 15, 20}
    assert abs(column["algorithm"].count("ditto") / 4000 - 0.9) < 0.02
    assert abs(sum(column["training.weight_decay"]) / 4000 - 1) < 0.01
    with pytest.raises(ConfigError, match="count=N"):
        sweep.combinations(None, seed=0)


def test_stepped_draws_are_what_they_look_like() -> None:
    rng = random.Random(0)
    assert draw({"distribution": "q_uniform", "min": 0.1, "max": 0.1000001, "q": 0.1}, rng) == 0.1
    assert listed({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}) == (0, 0.25, 0.5, 0.75, 1)


# ------------------------------------------------------------------------------------------------------------ running

STAND_IN = """
import json, os, sys, time, signal
from pathlib import Path
told = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(told["output"])
folder.mkdir(parents=True, exist_ok=True)
record = {"told": told, "started": time.time(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
          "threads": os.environ.get("OMP_NUM_THREADS")}
def end(*_):
    (folder / "interrupted").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(float(os.environ.get("NAP", "0")))
(folder / "record.json").write_text(json.dumps({**record, "ended": time.time()}))
if told["seed"] == "1":
    print("error: seed 1 brings bad luck")
    sys.exit(2)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of train.py, so that only the sweep's own work is looked at."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(launch.sweep, "TRAIN", script)
    monkeypatch.setattr(Job, "values", lambda self: {"val/personal/dice": 0.5 + self.config.seed / 100})
    return script


def jobs(folder: Path, seeds: Sequence[int]) -> list[Job]:
    made = []
    for seed in seeds:
        told = (f"seed={seed}", f"output={folder / f'seed={seed}'}")
        made.append(Job(f"seed={seed}", {"seed": seed}, told, compose(told, SCHEMA), folder / f"seed={seed}"))
    return made


def test_jobs_run_side_by_side_each_on_its_device_and_one_failure_stops_no_other(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAP", "0.3")
    (tmp_path / "out").mkdir()
    slots = [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    results = list(run_jobs(jobs(tmp_path / "out", range(4)), slots))
    assert {result.job.name: result.exit_code for result in results} == {f"seed={s}": 2 * (s == 1) for s in range(4)}
    (failed,) = (result for result in results if result.state == "failed")
    assert failed.job.complaint() == "error: seed 1 brings bad luck"
    records = [json.loads((tmp_path / "out" / f"seed={seed}" / "record.json").read_text()) for seed in range(4)]
    assert {record["gpu"] for record in records} == {"3", "5"}
    assert {record["threads"] for record in records} == {"1"}
    spans = sorted((record["started"], record["ended"], record["gpu"]) for record in records)
    for one in spans:
        others = [span for span in spans if span is not one and span[0] < one[1] and one[0] < span[1]]
        assert all(span[2] != one[2] for span in others), "a device has one run at a time"


def test_the_report_names_failures_and_sorts_by_the_sweeps_metric(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = jobs(tmp_path, range(3))
    sweep = Sweep("mine", "grid", {"seed": {"values": [0, 1, 2]}}, metric="val/personal/dice")
    for maximize, first in ((True, "seed=2"), (False, "seed=0")):
        aimed = Sweep("mine", "grid", sweep.parameters, "val/personal/dice", maximize)
        report = Report(aimed, made, tmp_path, parallel=1)
        report.start(3)
        for result in run_jobs(made, [{}]):
            report.add(result)
        report.end()
        assert report.table().rows[0][0] == first
        told = capsys.readouterr()
        assert "[1/3] seed=0  val/personal/dice 0.5000" in told.out
        assert "[2/3] seed=1  FAILED (exit code 2): error: seed 1 brings bad luck" in told.out
        assert "\033" not in told.out
        assert "failed: seed=1: error: seed 1 brings bad luck" in told.err
        table = pd.read_csv(tmp_path / "sweep.csv").set_index("run")
        assert list(table["state"]) == ["finished", "failed", "finished"]
        assert table.loc["seed=2", "val/personal/dice"] == 0.52


def test_an_interrupted_sweep_interrupts_its_runs(stand_in: Path, tmp_path: Path) -> None:
    """As after Ctrl-C in the sweep's terminal; the signal goes to the sweep alone."""
    code = (
        "import sys, launch.sweep, sweep; from pathlib import Path\n"
        f"launch.sweep.TRAIN = Path({str(stand_in)!r})\n"
        "sys.exit(sweep.main(sys.argv[1:]))"
    )
    path = written(tmp_path, parameters={"seed": {"values": [0, 2, 3]}})
    line = [sys.executable, "-c", code, str(path), f"output={tmp_path / 'out'}", "jobs=2"]
    environment = {**os.environ, "NAP": "60"}
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [tmp_path / "out" / f"seed={seed}" / "pid" for seed in (0, 2)]
    try:
        deadline = time.monotonic() + 120
        while not all(pid.exists() and pid.read_text() for pid in pids):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(ReportingError, match="another sweep"), launch.sweep._alone_in(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"go on with: python sweep.py {path} output={tmp_path / 'out'} jobs=2" in err
        assert "Traceback" not in err
        assert all((pid.parent / "interrupted").exists() for pid in pids)
        assert not (tmp_path / "out" / "seed=3").exists()
        with launch.sweep._alone_in(tmp_path / "out"):
            pass  # nobody holds the folder any more
    finally:
        process.kill()
        for pid in pids:
            if pid.exists():
                with_pid = int(pid.read_text() or 0)
                if with_pid and Path(f"/proc/{with_pid}").exists():
                    os.kill(with_pid, signal.SIGKILL)


def test_places_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([], SCHEMA)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert workers(config, 3) == [{}, {}, {}]
    cores = len(workers(config, None))
    assert len(workers(compose([f"trainer.threads={cores}"], SCHEMA), None)) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, None)] == ["0", "1"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, None)] == ["6", "GPU-7"]
    assert workers(compose(["trainer.accelerator=cpu"], SCHEMA), 1) == [{}]


@pytest.mark.slow
def test_a_sweep_skips_what_is_finished_goes_on_with_the_rest_and_names_what_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, parameters={"algorithm": {"value": "fedavg"}, "seed": {"values": [0, 1, -1]}})
    out = tmp_path / "out"
    started = [*TINY, "algorithm=fedavg", "federation.rounds=2"]
    assert train.main([*started, "seed=0", f"output={out / 'seed=0'}"]) == 0
    assert train.main([*started, "seed=1", f"output={out / 'seed=1'}", "federation.rounds=1"]) == 0
    untouched = (out / "seed=0" / "metrics.csv").stat().st_mtime_ns
    (out / "seed=-1").mkdir()
    (out / "seed=-1" / "config.yaml").write_text("data: [")  # damaged
    capsys.readouterr()
    assert sweep.main([str(path), f"output={out}", *TINY, "federation.rounds=2", "jobs=2"]) == 1
    told = capsys.readouterr()
    assert "3 runs, 1 of them finished before, 2 at a time" in told.out
    assert (out / "seed=0" / "metrics.csv").stat().st_mtime_ns == untouched
    assert sorted(set(RunFolder(out / "seed=1").scores()["round"])) == [1, 2]
    assert "failed: seed=-1: error: " in told.err
    assert "config.yaml is damaged" in told.err
    table = pd.read_csv(out / "sweep.csv").set_index("run")
    assert dict(table["state"]) == {"seed=0": "finished", "seed=1": "finished", "seed=-1": "failed"}
    scores = RunFolder(out / "seed=1").scores().query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
    mean = scores.groupby(["site", "case"])["value"].mean().groupby("site").mean().mean()
    assert table.loc["seed=1", "best/test/global/dice"] == pytest.approx(mean)
    # other settings for what is there are noticed before anything starts
    assert sweep.main([str(path), f"output={out}", *TINY, "federation.rounds=2", "training.lr=0.5"]) == 2
    assert "holds a run with other settings (training.lr: 0.001 in the folder, 0.5 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none_such"], "unknown sweep"),
        (["method_comparison", "--fast"], "not of the form key=value"),
        (["method_comparison", "jobs=0"], "jobs=0 should be a whole number"),
        (["tune_ditto"], "count=N"),
        (["method_comparison", "resume=true"], "the same command goes on"),
        (["method_comparison", "federation.round=2"], "did you mean 'federation.rounds'"),
    ],
)
def test_a_sweeps_user_makes_mistakes_without_a_stack_trace(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*given, f"output={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--help"]) == 0
    assert "jobs" in capsys.readouterr().out
    assert sweep.main([]) == 2
    assert "SWEEP" in capsys.readouterr().err
