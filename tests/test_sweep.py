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
from typing import Any, Literal

import pandas as pd
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import fedseg.launch.sweep
import sweep
import train
from fedseg.algorithms import ALGORITHMS
from fedseg.configs.compose import FOLDER, ConfigError, compose
from fedseg.configs.sweeps import Sweep, draw, listed
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.state import State
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sweep import Job, ProgressPrinter, plan, run_jobs, workers
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import summarise
from tests.tiers import every

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


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_combination_of_every_sweep_file_is_a_config(path: Path) -> None:
    sweep = Sweep.read(path.stem)
    assert sweep.name == path.stem, "runs/NAME is where whoever gave the file's name looks for them"
    count = None if sweep.method == "grid" else 20
    combinations = sweep.combinations(count, seed=0)
    assert combinations
    for combination in combinations:
        compose(sweep.settings(combination), SCHEMA)
    for parameter in sweep.parameters.values():  # also the ends of what is drawn
        for end in (parameter.get("min"), parameter.get("max")):
            if end is not None:
                key = next(key for key, value in sweep.parameters.items() if value is parameter)
                compose(sweep.settings({**combinations[0], key: end}), SCHEMA)
    names = [sweep.run_name(combination) for combination in combinations]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_benchmark_is_for_every_method_that_segments() -> None:
    """Also for one that is added: a comparison of all methods leaves none out."""
    listed_methods = Sweep.read("opponents").parameters["algorithm"]["values"]
    assert {name for name, method in ALGORITHMS.items() if method.labelled} <= set(listed_methods)
    sweep = Sweep.read("opponents").fixed({"experiment": "benchmark", "data": "{annotation: 1}", "seed": "0"})
    configs = [compose(sweep.settings(combination), SCHEMA) for combination in sweep.combinations(None, 0)]
    assert len(configs) == len(listed_methods)
    for config in configs:
        assert (config.data.annotation, config.data.appearance, config.data.amount, config.data.size) == (1, 0, 0, 48)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_accepts_every_sweep_file(path: Path) -> None:
    sweeps = pytest.importorskip("wandb.apis.public.sweeps")
    content = yaml.safe_load(path.read_text())
    assert sweeps._validate_config_and_fill_distribution(content)["method"] == content["method"]
    assert [word for word in content["command"] if word.startswith("$")] == COMMAND  # beside it, settings


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
        ({"method": "random", "parameters": {"training.lr": {"min": "1e-4", "max": 1.0}}}, r"write 0\.0001"),
        ({"method": "random", "parameters": {"training.lr": {"min": 0.1}}}, "min below max"),
        ({"method": "random", "parameters": {"training.lr": {"min": 2, "max": 1}}}, "min below max"),
        (
            {"method": "random", "parameters": {"a": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}},
            "above 0",
        ),
        ({"method": "random", "parameters": {"a": {"distribution": "uniforms"}}}, "did you mean 'uniform'"),
        ({"parameters": {"seed": {"value": 1}}, "command": ["${program}", "${args}"]}, "without hyphens"),
        ({"parameters": {"seed": {"value": 1}}, "command": [*COMMAND, "--fast"]}, "'--fast' is neither"),
        ({"parameters": {"seed": {"value": 1}}, "command": " ".join(COMMAND)}, "a list of words"),
        ({"parameters": {"seed": {"value": 1}}, "metric": "val/dice"}, "metric='val/dice' should look like"),
        ({"parameters": {"seed": {"value": 1}}, "metric": {"name": "a", "goal": "max"}}, "should look like"),
        ({"parameters": {"seed": {"value": 1}}, "run_cap": 0}, "run_cap=0 should be a whole number"),
        ({"parameters": {"algorithm": {"values": "fedavg"}}}, "parameters.algorithm.values='fedavg' is not a list"),
        *(
            ({"method": "random", "parameters": {"seed": {"values": [1, 2], "probabilities": p}}}, "list of 2 numbers")
            for p in ([1], 0.5, [0, 0], ["a", "b"])
        ),
        ({"parameters": {"a": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}}, "parameters.a.q=0 must be"),
        ({"method": "random", "parameters": {"a": {"distribution": "normal", "mu": "1e-3"}}}, "parameters.a.mu='1e-3'"),
        ({"parameters": {"a": {"distribution": "int_uniform", "min": 0.5, "max": 2}}}, "parameters.a: int_uniform"),
        ({"method": "random", "parameters": {"a": {"min": 0, "max": math.inf}}}, "parameters.a.max=inf should be"),
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
    assert fixed.after == ("seed=7", "algorithm=local", "federation.rounds=3")


def test_the_later_of_equal_words_counts_as_at_wandb(tmp_path: Path) -> None:
    command = [*COMMAND[:-1], "seed=5", "data={size: 32}", COMMAND[-1], "algorithm=local", "data.n_sites=3"]
    parameters = {"seed": {"values": [0, 1]}, "algorithm": {"values": ["ditto", "fedavg"]}, "data.size": {"value": 48}}
    sweep = Sweep.read(str(written(tmp_path, parameters=parameters, command=command)))
    made = [compose(sweep.settings(combination), SCHEMA) for combination in sweep.combinations(None, seed=0)]
    told = {(config.seed, config.algorithm.name, config.data.size, config.data.n_sites) for config in made}
    assert told == {(0, "local", 48, 3), (1, "local", 48, 3)}
    assert sweep.varying == ("seed",)
    by_hand = sweep.fixed({"algorithm": "fedbn", "seed": "9"})
    (config,) = (compose(by_hand.settings(combination), SCHEMA) for combination in by_hand.combinations(None, seed=0))
    assert (config.seed, config.algorithm.name) == (9, "fedbn")


@pytest.mark.parametrize("values", [[0.12345671, 0.12345672], [10000001.0, 10000002.0], [1e-5, 0.1 + 0.2]])
def test_numbers_that_look_alike_when_shortened_are_different_runs(tmp_path: Path, values: list[float]) -> None:
    sweep = Sweep.read(str(written(tmp_path, parameters={"training.lr": {"values": values}})))
    assert len({sweep.run_name(combination) for combination in sweep.combinations(None, 0)}) == 2


def test_a_cap_on_runs_is_kept(tmp_path: Path) -> None:
    grid = Sweep.read(str(written(tmp_path, parameters={"seed": {"min": 0, "max": 9}}, run_cap=3)))
    assert [len(grid.combinations(count, seed=0)) for count in (None, 2)] == [3, 2]
    with pytest.raises(ConfigError, match="count=4 is above run_cap=3"):
        grid.combinations(4, seed=0)
    assert len(Sweep.read("tune_ditto").combinations(None, seed=0)) == 40


@pytest.mark.parametrize(
    "parameters",
    [
        {"seed": {"min": 0, "max": 10**12}},
        {"seed": {"min": 0, "max": 10**200}},
        {"training.lr": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1.0e-12}},
        {f"a.{number}": {"values": list(range(10))} for number in range(40)},
    ],
)
def test_a_grid_is_counted_before_it_is_listed(tmp_path: Path, parameters: dict[str, Any]) -> None:
    sweep = Sweep.read(str(written(tmp_path, parameters=parameters)))
    with pytest.raises(ConfigError, match="at most 10000; give fewer values, or count=N"):
        sweep.combinations(None, 0)
    first, *_, last = sweep.combinations(10, 0)
    assert list(first) == list(last) == list(parameters)
    assert first != last
    with pytest.raises(ConfigError, match="at most 10000"):
        sweep.combinations(10**12, 0)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 1.0e-300}, "too fine"),
        ({"distribution": "q_normal", "mu": 1.0e30, "q": 1}, "too fine"),
        ({"distribution": "log_uniform", "min": 0, "max": 1.0e4}, "these are logarithms"),
        ({"distribution": "log_normal", "mu": 1.0e4}, "these are logarithms"),
        ({"distribution": "uniform", "min": -1.0e308, "max": 1.0e308}, "should be a number"),
        ({"min": 0, "max": 10**400}, "should be a number"),
    ],
)
def test_ranges_that_no_machine_spans_are_refused(tmp_path: Path, parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sweep.read(str(written(tmp_path, method="random", parameters={"a": parameter})))


@pytest.mark.parametrize("word", ["010", "0x10", "1_000", "no", "on", "1:30", "1_0.5", "Yes"])
def test_words_that_wandb_would_change_are_refused(tmp_path: Path, word: str) -> None:
    path = written(tmp_path, parameters={"seed": {"values": ["WORD", 1]}})
    path.write_text(path.read_text().replace("WORD", word))
    with pytest.raises(ConfigError, match=f"W&B does not read {word} as it stands.*'{word}' for the (text|word)"):
        Sweep.read(str(path))
    path.write_text(path.read_text().replace(f" {word}", f" '{word}'"))
    assert Sweep.read(str(path)).combinations(None, 0)[0] == {"seed": word}


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
    assert listed({"distribution": "q_uniform", "min": 0.1, "max": 0.4, "q": 0.1}) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("parameters", "word", "given", "mode"),
    [
        ({}, (), {}, "disabled"),
        ({"wandb.mode": {"value": "offline"}}, (), {}, "offline"),
        ({}, ("wandb.mode=offline",), {}, "offline"),
        ({}, (), {"wandb": "{mode: offline}"}, "offline"),
        ({"wandb.mode": {"value": "offline"}}, (), {"wandb.mode": "online"}, "online"),
    ],
)
def test_wandb_is_off_unless_somebody_says_otherwise(
    tmp_path: Path, parameters: dict[str, Any], word: tuple[str, ...], given: dict[str, str], mode: str
) -> None:
    path = written(tmp_path, parameters={"seed": {"value": 0}, **parameters}, command=[*COMMAND, *word])
    sweep = Sweep.read(str(path)).fixed(given)
    (job,) = plan(sweep, sweep.combinations(None, 0), tmp_path / "out")
    assert job.config.wandb.mode == compose(job.arguments, SCHEMA).wandb.mode == mode


@pytest.mark.parametrize("name", ["a #b", "2024_01_02", "12:30", "[a, b]", "{a: b}", "'a'", "no"])
def test_a_folder_of_any_name_is_the_one_that_runs_write_into(tmp_path: Path, name: str) -> None:
    sweep = Sweep.read(str(written(tmp_path, parameters={"seed": {"value": 0}})))
    (job,) = plan(sweep, sweep.combinations(None, 0), tmp_path / name)
    assert job.config.output == str(job.folder) == str(tmp_path / name / "run")


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
if told["seed"] == "11":
    print("error: of a part that was repeated", flush=True)
    raise ValueError("the last word\\nand more")
if told["seed"] == "12":
    print("round 3", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of train.py, so that only the sweep's own work is looked at."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(fedseg.launch.sweep, "TRAIN", script)
    monkeypatch.setattr(Job, "values", lambda self: {"val/personal/dice": 0.5 + self.config.seed / 100})
    return script


def jobs(folder: Path, seeds: Sequence[int]) -> list[Job]:
    made = []
    for seed in seeds:
        told = (f"seed={seed}", f"output={folder / f'seed={seed}'}")
        made.append(Job(f"seed={seed}", {"seed": seed}, told, compose(told, SCHEMA), folder / f"seed={seed}"))
    return made


@pytest.mark.slow
def test_jobs_run_side_by_side_each_on_its_device_and_one_failure_stops_no_other(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAP", "0.3")
    (tmp_path / "out").mkdir()
    slots = [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    results = list(run_jobs(jobs(tmp_path / "out", range(4)), slots))
    assert {result.job.name: result.exit_code for result in results} == {f"seed={s}": 2 * (s == 1) for s in range(4)}
    (failed,) = (result for result in results if result.state == "failed")
    assert failed.failure == "(exit code 2): error: seed 1 brings bad luck"
    records = [json.loads((tmp_path / "out" / f"seed={seed}" / "record.json").read_text()) for seed in range(4)]
    assert {record["gpu"] for record in records} == {"3", "5"}
    assert {record["threads"] for record in records} == {"1"}
    spans = sorted((record["started"], record["ended"], record["gpu"]) for record in records)
    for one in spans:
        others = [span for span in spans if span is not one and span[0] < one[1] and one[0] < span[1]]
        assert all(span[2] != one[2] for span in others), "a device has one run at a time"


@pytest.mark.slow
def test_the_report_names_failures_and_sorts_by_the_sweeps_metric(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = jobs(tmp_path, range(3))
    sweep = Sweep("mine", "grid", {"seed": {"values": [0, 1, 2]}}, metric="val/personal/dice")
    for maximize, first in ((True, "seed=2"), (False, "seed=0")):
        aimed = Sweep("mine", "grid", sweep.parameters, "val/personal/dice", maximize)
        report = ProgressPrinter(aimed, made, tmp_path, parallel=1)
        report.start(3)
        for result in run_jobs(made, [{}]):
            report.add(result)
        report.end()
        assert report.table().rows[0][0] == first
        told = capsys.readouterr()
        assert "[1/3] seed=0  val/personal/dice 0.5000" in told.out
        assert "[2/3] seed=1  FAILED (exit code 2): error: seed 1 brings bad luck" in told.out
        assert "\033" not in told.out
        assert "failed: seed=1 (exit code 2): error: seed 1 brings bad luck" in told.err
        table = pd.read_csv(tmp_path / "sweep.csv").set_index("run")
        assert list(table["state"]) == ["finished", "failed", "finished"]
        assert table.loc["seed=2", "val/personal/dice"] == 0.52


def test_a_failure_is_told_by_the_last_attempts_last_word(stand_in: Path, tmp_path: Path) -> None:
    made = jobs(tmp_path, [11, 12])
    for job in made:
        job.log.write_text("error: of an earlier attempt\n")
    told = {result.job.name: result.failure for result in run_jobs(made, [{}])}
    assert told == {
        "seed=11": "(exit code 1): ValueError: the last word",
        "seed=12": f"(killed by signal 9, {signal.strsignal(9)}): round 3",
    }


def finished_run(folder: Path, config: DictConfig) -> RunFolder:
    run = RunFolder(folder)
    run.write_config(OmegaConf.to_yaml(config))
    row = {"round": 1, "checkpoint": "best", "site": "a", "seen": True, "view": "personal", "region": "all"}
    row |= {"case": "1", "metric": "dice", "value": 0.75, "unit": "", "grid": "own"}
    run.append_scores({**row, "split": split} for split in ("val", "test"))
    summary = summarise(run.scores())
    run.write_summary(summary.table, summary.markdown())
    run.cost_path.write_text('[{"wall_seconds": 20.5}, {"wall_seconds": 3}]')
    Checkpoint(run.checkpoints).save(1, State(), {}, {})
    return run


@pytest.mark.slow
def test_a_finished_run_with_damaged_or_lost_scores_is_a_failure_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, parameters={"seed": {"values": [0, 1, 2, 3]}}, metric={"name": "val/personal/dice"})
    given = ["federation.rounds=1"]
    for seed in range(4):
        folder = tmp_path / "out" / f"seed={seed}"
        finished_run(folder, compose([*given, f"seed={seed}", f"output={folder}"], SCHEMA))
    (tmp_path / "out" / "seed=1" / "metrics.csv").write_text("no,table\n1,2\n")
    (tmp_path / "out" / "seed=2" / "metrics.csv").unlink()
    (tmp_path / "out" / "seed=3" / "cost.json").write_text("[{")
    assert sweep.main([str(path), f"output={tmp_path / 'out'}", *given]) == 1
    told = capsys.readouterr()
    assert "4 runs, 2 of them finished before" in told.out
    damaged, gone = (line for line in told.err.splitlines() if line.startswith("failed: "))
    assert damaged.startswith("failed: seed=1 (its result cannot be read): ")
    assert f"{tmp_path / 'out' / 'seed=1' / 'metrics.csv'} is damaged" in damaged
    assert f"{tmp_path / 'out' / 'seed=2' / 'metrics.csv'} is gone" in gone
    assert f"delete {tmp_path / 'out' / 'seed=2'}" in gone
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert list(table["state"]) == ["finished", "failed", "failed", "finished"]
    assert list(table["seconds"].fillna(-1)) == [23.5, 23.5, 23.5, -1]
    assert table["val/personal/dice"][0] == 0.75


def test_a_run_that_ends_well_and_leaves_no_scores_stops_no_other(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(job: Job) -> dict[str, float]:
        if job.config.seed == 0:
            raise ReportingError("metrics.csv is damaged")
        return {}

    monkeypatch.setattr(Job, "values", values)
    results = list(run_jobs(jobs(tmp_path, [0, 2]), [{}]))
    assert [result.state for result in results] == ["failed", "finished"]
    assert "metrics.csv is damaged" in results[0].failure


@pytest.mark.waits(50)
@pytest.mark.slow
@pytest.mark.parametrize("name", every(["SIGINT", "SIGTERM", "SIGHUP"], ["SIGINT"]))
def test_an_interrupted_sweep_interrupts_its_runs(
    stand_in: Path, tmp_path: Path, name: Literal["SIGINT", "SIGTERM", "SIGHUP"]
) -> None:
    """As after Ctrl-C in the sweep's terminal, or when that is closed; the signal goes to the sweep alone."""
    code = (
        "import sys, fedseg.launch.sweep, sweep; from pathlib import Path\n"
        f"fedseg.launch.sweep.TRAIN = Path({str(stand_in)!r})\n"
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
        holder = rf"another sweep \(process {process.pid}\) still works"
        with pytest.raises(ReportingError, match=holder), fedseg.launch.sweep.alone_in(tmp_path / "out"):
            pass
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"go on with: python sweep.py {path} output={tmp_path / 'out'} jobs=2" in err
        assert "Traceback" not in err
        assert all((pid.parent / "interrupted").exists() for pid in pids)
        assert not (tmp_path / "out" / "seed=3").exists()
        with fedseg.launch.sweep.alone_in(tmp_path / "out"):
            pass  # nobody holds the folder any more
    finally:
        process.kill()
        for pid in pids:
            if pid.exists():
                with_pid = int(pid.read_text() or 0)
                if with_pid and Path(f"/proc/{with_pid}").exists():
                    os.kill(with_pid, signal.SIGKILL)


def test_runs_of_a_killed_sweep_are_named(tmp_path: Path) -> None:
    with fedseg.launch.sweep.alone_in(tmp_path) as lock:
        assert lock is not None
        os.write(lock, f"{os.getpid()}\n".encode())
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        content = (tmp_path / ".lock").read_text().replace(f"{os.getpid()}\n", f"{ended.pid}\n", 1)
        (tmp_path / ".lock").write_text(content)
        told = f"runs of a sweep that was killed still work in .*: kill {os.getpid()}$"
        with pytest.raises(ReportingError, match=told), fedseg.launch.sweep.alone_in(tmp_path):
            pass


def test_a_sweep_under_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with fedseg.launch.sweep.hang_up_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_places_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = [compose([], SCHEMA)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert workers(config, 3) == [{}, {}, {}]
    cores = len(workers(config, None))
    assert len(workers([*config, compose([f"trainer.threads={cores}"], SCHEMA)], None)) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, None)] == ["0", "1"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers(config, None)] == ["6", "GPU-7"]
    on_cpu = compose(["trainer.accelerator=cpu"], SCHEMA)
    assert workers([on_cpu], 1) == [{}]
    assert workers([on_cpu, *config], 1) == [{"CUDA_VISIBLE_DEVICES": "6"}]


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
    assert "failed: seed=-1 (exit code 2): error: " in told.err
    assert "config.yaml is damaged" in told.err
    table = pd.read_csv(out / "sweep.csv").set_index("run")
    assert dict(table["state"]) == {"seed=0": "finished", "seed=1": "finished", "seed=-1": "failed"}
    scores = RunFolder(out / "seed=1").scores().query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
    mean = scores.groupby(["site", "case"])["value"].mean().groupby("site").mean().mean()
    assert table.loc["seed=1", "best/test/global/dice"] == pytest.approx(mean)
    # other settings for what is there are noticed before anything starts
    assert sweep.main([str(path), f"output={out}", *TINY, "federation.rounds=2", "training.lr=0.5"]) == 2
    assert "holds a run with other settings (training.lr: 0.001 in the folder, 0.5 now)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none_such"], "unknown sweep"),
        (["method_comparison", "--fast"], "not of the form key=value"),
        (["method_comparison", "jobs=0"], "jobs=0 should be a whole number"),
        (["tune_ditto", "count=41"], "count=41 is above run_cap=40"),
        (["method_comparison", "count=0"], "count=0 should be a whole number"),
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
