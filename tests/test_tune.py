"""Tuning: the same number of trials for every method, judged on validation of seen sites, and presets that say so."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pytest
from omegaconf import OmegaConf
from pydantic import Field, NonNegativeFloat, PositiveInt

from fedseg.configs.compose import ConfigError, as_yaml, choices, compose, load
from fedseg.configs.knobs import Knob
from fedseg.datamodules import SiteData
from fedseg.federation.engine import RoundError
from fedseg.federation.ranges import Fixed, ProperShare, Searched, Share
from fedseg.launch.compare import analysed
from fedseg.launch.run import execute, flat, saved_config, traced_settings
from fedseg.launch.settings import METHODS, SCHEMA
from fedseg.launch.sweep import DONE, FAILED, Job, Result, outcome
from fedseg.launch.tune import run_tune
from fedseg.launch.tuning.search import axis, search_space
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import LeftOut, read_run
from fedseg.reporting.folder import RunFolder
from sweep import main
from tests.run_folders import write_run
from tests.tiny_run import TINY

JOB = [*(word for word in TINY if not word.startswith("evaluation.")), "data.n_sites=2", "federation.rounds=2"]
Score = Callable[[Mapping[str, Any]], float]


class Pretended:
    """Runs trials without training: a score follows from the values."""

    def __init__(self, score: Score, stop_after: int | None = None) -> None:
        self.score = score
        self.stop_after = stop_after
        self.tried: list[dict[str, float]] = []
        self.batches: list[int] = []
        self.jobs: list[Job] = []

    def __call__(
        self, jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], lock: int | None
    ) -> Generator[Result, None, None]:
        self.batches.append(len(jobs))
        for job in jobs:
            if self.stop_after is not None and len(self.tried) == self.stop_after:
                raise KeyboardInterrupt
            self.tried.append(dict(job.combination))
            self.jobs.append(job)
            score = self.score(job.combination)
            if math.isinf(score):
                yield Result(job, FAILED, exit_code=2 if score > 0 else -9, complaint="it diverged")
            else:
                yield Result(job, DONE, values={"val/global/dice": score, "val/personal/dice": score})


def in_process(
    jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], lock: int | None
) -> Generator[Result, None, None]:
    """Runs trials for real."""
    yield from map(ran, jobs)


def ran(job: Job) -> Result:
    try:
        execute(job.config)
    except RoundError as error:
        return Result(job, FAILED, exit_code=2, complaint=str(error))
    return outcome(job, 1.0)


def near(lr: float) -> Score:
    return lambda values: 1 - abs(math.log10(values["training.lr"]) - math.log10(lr)) / 10


def tune(where: Path, methods: str, runner: Any, *words: str, budget: int = 6) -> int:
    return run_tune([methods, f"budget={budget}", f"output={where}", *JOB, *words], runner)


def preset(where: Path, name: str) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.load(where / f"{name}_tuned.yaml")))


# --------------------------------------------------------------------------------------------------- where is searched


@pytest.mark.parametrize(
    ("kind", "default", "found"),
    [
        (NonNegativeFloat, 0.1, (0.01, 1.0, True, False)),
        (Annotated[float, Field(gt=0.05)], 0.1, (0.05, 1.0, True, False)),
        (Share, 0.2, (0.0, 1.0, False, False)),
        (ProperShare, 0.9, (0.0, 0.99, False, False)),
        (PositiveInt, 20, (5, 80, True, True)),
        (PositiveInt, 1, (1, 4, True, True)),
        (NonNegativeFloat | None, 0.1, (0.01, 1.0, True, False)),
        (Annotated[NonNegativeFloat, Searched(0.5, 2.0, log=False)], 1.0, (0.5, 2.0, False, False)),
    ],
)
def test_where_a_setting_is_searched_follows_from_its_range(kind: Any, default: float, found: Any) -> None:
    made = axis("algorithm.x", Knob(kind, default, ""), default)
    assert made is not None
    assert (made.low, made.high, made.log, made.whole) == pytest.approx(found)


@pytest.mark.parametrize(
    ("kind", "default"),
    [(Fixed[Share], 0.2), (bool, True), (Literal["a", "b"], "a"), (NonNegativeFloat | None, None), (float, 0.0)],
)
def test_variants_switches_and_fixed_settings_are_not_searched(kind: Any, default: Any) -> None:
    assert axis("algorithm.x", Knob(kind, default, ""), default) is None


@pytest.mark.slow
def test_every_method_tunes_the_learning_rate_and_its_space_holds_its_defaults() -> None:
    for name in choices("algorithm", METHODS):
        config = compose([f"algorithm={name}"], SCHEMA)
        axes = search_space(config)
        assert axes[0].key == "training.lr", name
        for one in axes:
            assert one.low <= one.default <= one.high, (name, one)
            assert one.default == OmegaConf.select(config, one.key)
        compose([f"algorithm={name}", *(f"{a.key}={a.low:g}" for a in axes)], SCHEMA)
        compose([f"algorithm={name}", *(f"{a.key}={a.high:g}" for a in axes)], SCHEMA)


def test_what_only_serves_unseen_sites_is_not_searched() -> None:
    assert [a.key for a in search_space(compose(["algorithm=iopfl"], SCHEMA))] == ["training.lr", "algorithm.alpha"]


@pytest.mark.parametrize(("name", "given", "searched"), [
    ("fednova", "mu=0.1", []), ("fedamp", "sigma=2", ["algorithm.share", "algorithm.lam"]),
])  # fmt: skip
def test_what_is_marked_as_fixed_is_not_searched_from_a_preset_either(name: str, given: str, searched: Any) -> None:
    config = compose([f"algorithm={name}", f"algorithm.{given}"], SCHEMA)
    assert [a.key for a in search_space(config)] == ["training.lr", *searched]


@pytest.mark.parametrize(("name", "searched"), [
    ("fedcost", ["algorithm.power"]), ("fedcostwavg", ["algorithm.images"]), ("fedpidavg", []),
])  # fmt: skip
def test_what_the_method_does_not_read_is_not_searched(name: str, searched: Any) -> None:
    assert [a.key for a in search_space(compose([f"algorithm={name}"], SCHEMA))] == ["training.lr", *searched]


def test_what_is_given_by_hand_is_not_searched() -> None:
    config = compose(["algorithm=ditto", "algorithm.lam=1"], SCHEMA)
    assert [a.key for a in search_space(config, ["algorithm.lam", "data.size"])] == ["training.lr"]


# ------------------------------------------------------------------------------------------------------------- trials


@pytest.mark.slow
def test_every_method_gets_as_many_trials_and_begins_untuned(tmp_path: Path) -> None:
    runner = Pretended(near(3e-3))
    assert tune(tmp_path, "fedavg,ditto,scaffold", runner) == 0
    assert len(runner.tried) == 18
    assert runner.tried[0] == {"training.lr": 1e-3}
    assert runner.tried[6] == {"training.lr": 1e-3, "algorithm.lam": 0.1}
    assert runner.tried[12] == {"training.lr": 1e-2}
    for place, name in enumerate(("fedavg", "ditto", "scaffold")):
        own = runner.tried[6 * place : 6 * place + 6]
        best = max(own, key=near(3e-3))
        assert preset(tmp_path, name)["training"]["lr"] == best["training.lr"]
        assert preset(tmp_path, name)["training"]["trials"] == 6
        assert len(pd.read_csv(tmp_path / name / "trials.csv")) == 6
    assert preset(tmp_path, "scaffold")["training"]["optimizer"] == "sgd"  # of the preset that it departs from


@pytest.mark.slow
def test_trials_follow_from_the_seed(tmp_path: Path) -> None:
    runs = {}
    for name, words in {"a": [], "again": [], "other": ["sweep_seed=1"]}.items():
        runs[name] = Pretended(near(3e-3))
        tune(tmp_path / name, "ditto", runs[name], *words, budget=8)
    assert runs["a"].tried == runs["again"].tried
    assert runs["a"].tried[0] == runs["other"].tried[0]
    assert runs["a"].tried[1:] != runs["other"].tried[1:]
    assert len({str(values) for values in runs["a"].tried}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, done: int) -> None:
    whole, first, rest = Pretended(near(3e-3)), Pretended(near(3e-3), stop_after=done), Pretended(near(3e-3))
    tune(tmp_path / "whole", "ditto", whole)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "parts", "ditto", first)
    assert not (tmp_path / "parts" / "ditto_tuned.yaml").exists()
    tune(tmp_path / "parts", "ditto", rest)
    assert first.tried + rest.tried == whole.tried
    assert preset(tmp_path / "parts", "ditto") == preset(tmp_path / "whole", "ditto")
    nothing_left = Pretended(near(3e-3))
    tune(tmp_path / "parts", "ditto", nothing_left)
    assert nothing_left.tried == []


@pytest.mark.slow
def test_a_larger_budget_goes_on_and_a_smaller_one_is_refused(tmp_path: Path) -> None:
    tune(tmp_path, "ditto", Pretended(near(3e-3)), budget=3)
    more = Pretended(near(3e-3))
    tune(tmp_path, "ditto", more, budget=5)
    assert len(more.tried) == 2
    with pytest.raises(ConfigError, match=r"holds 5 trials already.*budget=5 or more"):
        tune(tmp_path, "ditto", more, budget=4)


@pytest.mark.slow
def test_trials_side_by_side_are_as_many(tmp_path: Path) -> None:
    runner = Pretended(near(3e-3))
    tune(tmp_path, "ditto", runner, "jobs=4")
    assert runner.batches == [4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feddg_released", "fedprox_bn+fedadam", "lcfed_released", "scaffold", "finetune"])
def test_a_preset_stays_what_it_departs_from_but_for_what_was_tuned(tmp_path: Path, name: str) -> None:
    assert run_tune([name, "budget=1", f"output={tmp_path}"], Pretended(near(3e-3))) == 0
    plain, tuned = (compose([f"algorithm={a}"], SCHEMA) for a in (name, tmp_path / f"{name}_tuned.yaml"))
    before, now = flat(plain), flat(tuned)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    assert changed == {"algorithm.preset", "training.trials"}


@pytest.mark.slow
def test_what_is_given_by_hand_of_the_method_stands_in_its_preset(tmp_path: Path) -> None:
    words = ["ditto", "budget=1", f"output={tmp_path}", "algorithm={lam: 3}", "algorithm.weighting=uniform"]
    with pytest.raises(ConfigError, match="named first"):
        run_tune(words, Pretended(near(3e-3)))
    words[3] = "algorithm.lam=3"
    assert run_tune(words, Pretended(near(3e-3))) == 0
    found = compose([f"algorithm={tmp_path / 'ditto_tuned.yaml'}"], SCHEMA).algorithm
    assert (found.lam, found.weighting) == (3.0, "uniform")


@pytest.mark.slow
def test_trials_are_runs_of_one_group_at_wandb(tmp_path: Path) -> None:
    for words, group in (([], "tune-phantom-ditto"), (["wandb.group=mine"], "mine")):
        runner = Pretended(near(3e-3))
        tune(tmp_path / group, "ditto", runner, *words, budget=2)
        assert [(job.config.wandb.group, job.config.wandb.name) for job in runner.jobs] == [
            (group, "ditto-trial_000"),
            (group, "ditto-trial_001"),
        ]


@pytest.mark.slow
def test_a_failed_trial_counts_and_a_killed_one_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = Pretended(lambda values: math.inf if values["training.lr"] > 1e-3 else near(1e-2)(values))
    assert tune(tmp_path / "fails", "ditto", fails) == 0
    table = pd.read_csv(tmp_path / "fails" / "ditto" / "trials.csv")
    assert len(table) == 6
    assert 0 < table["val/personal/dice"].isna().sum() < 6
    assert table.loc[table["val/personal/dice"].isna(), "complaint"].str.contains("it diverged").all()
    with pytest.raises(ReportingError, match=r"trial_000 .*signal 9.*the same command goes on"):
        tune(tmp_path / "killed", "ditto", Pretended(lambda _: -math.inf))
    again = Pretended(near(3e-3))
    assert tune(tmp_path / "killed", "ditto", again) == 0
    assert len(again.tried) == 6
    capsys.readouterr()
    assert tune(tmp_path / "all", "ditto", Pretended(lambda _: math.inf)) == 1
    assert "all trials failed, so that there is no preset" in capsys.readouterr().out
    assert not (tmp_path / "all" / "ditto_tuned.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name the methods to tune"),
        (["ditto"], "budget=N"),
        (["ditto", "budget=0"], "budget=0 should be a whole number, at least 1"),
        (["dito", "budget=2"], "did you mean 'ditto'"),
        (["ditto,ditto", "budget=2"], "names a method twice"),
        (["contrastive", "budget=2", "algorithm.pairing=instance"], "no model that segments"),
        (["fedavg", "budget=2", "training.lr=0.1"], "nothing is left to tune"),
        (["ditto", "budget=2", "evaluation.test=true"], "no trial scores or draws test cases"),
        (["ditto", "budget=2", "protocol=leave_one_site_out"], "leave out stages= and protocol="),
        (["fedavg", "budget=2", "metric=val/personal/dice"], "algorithm=fedavg has val/global/dice"),
        (["ditto", "budget=2", "metric=best/test/global/dice"], "algorithm=ditto has val/personal/dice"),
        (["ditto", "budget=2", "algorithm=fedprox"], "named first: python sweep.py tune fedprox"),
        (["fedavg", "budget=2", "training={lr: 0.1}"], "nothing is left to tune"),
        (["ditto", "budget=2", "resume=true"], "resume is not needed"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        run_tune(words, Pretended(near(1.0)))
    assert told in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_search_in_the_folder_and_a_strangers_preset_are_refused(tmp_path: Path) -> None:
    tune(tmp_path, "ditto", Pretended(near(3e-3)), budget=1)
    for word, told in {
        "sweep_seed=1": "sweep_seed",
        "data.size=48": "settings",
        "algorithm.lam=1": "settings, space",
    }.items():
        with pytest.raises(ConfigError, match=f"holds a search with other {told}; take another output=DIR"):
            tune(tmp_path, "ditto", Pretended(near(3e-3)), word, budget=1)
    with pytest.raises(ReportingError, match="of another search; move it away, or take another presets=DIR"):
        tune(tmp_path / "b", "ditto", Pretended(near(3e-3)), f"presets={tmp_path}", budget=1)
    assert tune(tmp_path / "b", "ditto", Pretended(near(3e-3)), f"presets={tmp_path / 'c'}", budget=1) == 0
    assert (tmp_path / "c" / "ditto_tuned.yaml").is_file()


def test_without_optuna_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["tune", "ditto", "budget=1", f"output={tmp_path}", *JOB]) == 2
    assert 'needs Optuna; pip install -e ".[tune]"' in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- for real, and used


@pytest.fixture
def no_test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can read a test case."""
    for name in ("eval_batches", "input_batches"):
        real = getattr(SiteData, name)

        def guarded(site: SiteData, split: Any, real: Any = real) -> Any:
            if split == "test":
                raise AssertionError("a test case was read")
            return real(site, split)

        monkeypatch.setattr(SiteData, name, guarded)


@pytest.mark.slow
@pytest.mark.usefixtures("no_test_cases")
def test_trials_never_read_test_cases_and_their_preset_is_a_method(tmp_path: Path) -> None:
    held_out = ["data.n_sites=3", "data.unseen=[site_03]"]
    assert tune(tmp_path, "ditto", in_process, *held_out, budget=2) == 0
    trial = tmp_path / "ditto" / "trial_001"
    scores = RunFolder(trial).scores()
    assert set(scores["split"]) == {"val"}
    assert set(scores["site"]) == {"site_01", "site_02"}
    left_out = read_run(trial, "dice")
    assert isinstance(left_out, LeftOut)
    assert "evaluation.test=false" in left_out.reason
    told = (tmp_path / "ditto_tuned.yaml").read_text()
    assert told.startswith("# ditto tuned by 2 trials: ")
    assert "python sweep.py tune ditto budget=2 sweep_seed=0" in told
    config = compose([f"algorithm={tmp_path / 'ditto_tuned.yaml'}"], SCHEMA)
    assert (config.algorithm.name, config.algorithm.preset) == ("ditto", "ditto_tuned")
    assert config.training.trials == 2
    tried = saved_config(RunFolder(tmp_path / "ditto" / "trial_000")), saved_config(RunFolder(trial))
    assert (config.training.lr, config.algorithm.lam) in [(t.training.lr, t.algorithm.lam) for t in tried]
    with pytest.raises(AssertionError, match="a test case was read"):  # the guard is one
        execute(compose([f"algorithm={tmp_path / 'ditto_tuned.yaml'}", *TINY, f"output={tmp_path / 'x'}"], SCHEMA))


@pytest.mark.slow
def test_a_method_that_diverges_ends_in_what_it_complained_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, "fedprox", in_process, "training.lr=1e30", "training.optimizer=sgd", budget=1) == 1
    assert "all trials failed" in capsys.readouterr().out


def found_preset(where: Path) -> Path:
    tune(where, "ditto", Pretended(near(3e-3)), budget=3)
    return where / "ditto_tuned.yaml"


@pytest.mark.slow
def test_a_runs_settings_outlive_its_presets_file(tmp_path: Path) -> None:
    file = found_preset(tmp_path)
    config = compose([f"algorithm={file}", *JOB, f"output={tmp_path / 'run'}"], SCHEMA)
    RunFolder(tmp_path / "run").write_config(as_yaml(config))
    file.unlink()
    resumed, _ = traced_settings([f"output={tmp_path / 'run'}", "resume=true"])
    assert resumed.algorithm == config.algorithm
    again = compose([f"experiment={tmp_path / 'run' / 'config.yaml'}"], SCHEMA)
    assert again.algorithm == config.algorithm
    assert again.training == config.training
    other = compose([f"experiment={tmp_path / 'run' / 'config.yaml'}", "algorithm=fedprox"], SCHEMA)
    assert other.algorithm.name == "fedprox"
    assert load(as_yaml(config), SCHEMA) == config


def test_preset_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        compose([f"algorithm={tmp_path / 'none.yaml'}"], SCHEMA)
    (tmp_path / "ditto.yaml").write_text("name: ditto\n")
    with pytest.raises(ConfigError, match=r"'ditto' names one of the suite's own.*rename the file"):
        compose([f"algorithm={tmp_path / 'ditto.yaml'}"], SCHEMA)
    (tmp_path / "ditto.yaml").rename(tmp_path / "mine.yaml")
    assert compose([f"algorithm={tmp_path / 'mine.yaml'}"], SCHEMA).algorithm.preset == "mine"


@pytest.mark.slow
def test_a_comparison_shows_tuned_and_untuned_side_by_side_with_the_budget(tmp_path: Path) -> None:
    file = found_preset(tmp_path)
    write_run(tmp_path / "runs" / "tuned", str(file), 0, "data.n_sites=3")
    for name in ("ditto", "local", "fedavg"):
        write_run(tmp_path / "runs" / name, name, 0, "data.n_sites=3")
    found = [read_run(path, "dice") for path in sorted((tmp_path / "runs").iterdir())]
    methods = list(analysed(found, Options()).gathered.methods)
    assert "ditto" in methods
    assert "ditto_tuned (tuned, 3 trials)" in methods
