"""Settings of methods, chosen by as many trials for each: `python sweep.py tune METHOD budget=N`.

A trial is a run of its own whose test cases are left alone. The first is the method as it is without tuning, so that on
validation tuning never ends below it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from fedseg.common.files import write_atomic
from fedseg.common.text import count
from fedseg.configs.compose import ConfigError, as_yaml, compose, file_of, parsed
from fedseg.launch.command import whole
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import data_name, method_name
from fedseg.launch.settings import METHODS, SCHEMA
from fedseg.launch.sweep import Job, Result, alone_in, hang_up_interrupts, outcome, run_jobs, split, workers
from fedseg.launch.tuning.search import Axis, search_space
from fedseg.launch.tuning.study import Study, Trial, best_of
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import flattened
from fedseg.reporting.progress import duration
from fedseg.reporting.summary import Table

OWN = ("budget", "output", "presets", "jobs", "sweep_seed", "metric")
PERSONAL, GLOBAL, WORST = ("val/personal/dice", "val/global/dice", "val/worst_site/dice")
OF_A_TRIAL = {"evaluation.test": "false", "evaluation.overlays": "false", "evaluation.metrics": "[dice]"}
"""Settings of every trial: what is not validated on seen sites is left alone."""
TRIALS = "trials.csv"
Runner = Callable[[Sequence[Job], Sequence[Mapping[str, str]], int | None], Generator[Result, None, None]]


@dataclass(frozen=True)
class Plan:
    """What is tried for one method.

    Attributes:
        method: as given to ``algorithm=``.
        budget: trials, the same for all methods.
        seed: of the draws.
        wanted: what is maximised; empty for the mean over sites, by personal models where the method has them.
        settings: of all trials, as given on the command line.
        output: folder of all methods' searches.
        presets: folder of the presets.
    """

    method: str
    budget: int
    seed: int
    wanted: str
    settings: Mapping[str, str]
    output: Path
    presets: Path

    @cached_property
    def config(self) -> DictConfig:
        """Of the method without tuning."""
        return compose(self._arguments({}), SCHEMA)

    @cached_property
    def by_hand(self) -> list[str]:
        """Keys of what was given on the command line."""
        return list(flattened(parsed([f"{key}={value}" for key, value in self.settings.items()], SCHEMA)))

    @cached_property
    def axes(self) -> list[Axis]:
        """Where it is searched."""
        return search_space(self.config, self.by_hand)

    @cached_property
    def metric(self) -> str:
        """What is maximised."""
        views = Experiment(self.config).declared.views
        if not views:
            raise ConfigError(f"algorithm={self.method} has no model that segments: there is nothing to validate")
        there = [metric for view, metric in (("personal", PERSONAL), ("global", GLOBAL)) if view in views]
        if self.wanted and self.wanted not in (*there, WORST):
            raise ConfigError(f"metric={self.wanted}: algorithm={self.method} has {', '.join((*there, WORST))}")
        return self.wanted or there[0]

    @property
    def name(self) -> str:
        """Of the method, for files."""
        return method_name(self.config)

    @property
    def folder(self) -> Path:
        """Of its trials."""
        return self.output / self.name

    @property
    def preset(self) -> Path:
        """The file that it writes."""
        return self.presets / f"{self.name}_tuned.yaml"

    def check(self) -> None:
        """Refuse what cannot be tuned, before anything runs.

        Raises:
            ConfigError, ReportingError: with the cure.
        """
        if "algorithm" in self.settings:
            raise ConfigError(
                f"the methods to tune are named first: python sweep.py tune {self.settings['algorithm']} ..."
            )
        if taken := [key for key in self.settings if key in OF_A_TRIAL]:
            raise ConfigError(f"{taken[0]} is the search's own: no trial scores or draws test cases; leave it out")
        if self.config.stages or self.config.protocol != "personalised":
            raise ConfigError("sweep.py tune tries single runs of sites that train; leave out stages= and protocol=")
        Experiment(self.config).check()
        if not self.axes:
            raise ConfigError(f"algorithm={self.method}: its settings are all given by hand; nothing is left to tune")
        if self.preset.is_file() and self._mark not in self.preset.read_text(encoding="utf-8"):
            raise ReportingError(f"{self.preset} is of another search; move it away, or take another presets=DIR")
        _ = self.metric

    def study(self) -> Study:
        """Its trials so far."""
        asked = {
            "method": self.method,
            "settings": dict(self.settings),
            "space": [axis.told for axis in self.axes],
            "metric": self.metric,
            "sweep_seed": self.seed,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        return Study(self.folder, self.axes, self.budget, self.seed, asked)

    def job(self, number: int, values: Mapping[str, Any]) -> Job:
        """The run of a trial."""
        name = f"trial_{number:03d}"
        at_wandb = {"wandb.group": f"tune-{data_name(self.config)}-{self.name}", "wandb.name": f"{self.name}-{name}"}
        own = [f"{key}={value}" for key, value in at_wandb.items() if key not in self.settings]
        threads = ["trainer.threads=1"] if self.config.trainer.threads is None else []
        told = (*self._arguments(values), *own, *threads, f"output={self.folder / name}")
        return Job(name, dict(values), told, compose(told, SCHEMA), self.folder / name)

    def _arguments(self, values: Mapping[str, Any]) -> list[str]:
        told = {"algorithm": self.method, **self.settings, **OF_A_TRIAL, **values}
        return [f"{key}={value}" for key, value in told.items()]

    def table(self, trials: Sequence[Trial]) -> Table:
        """All trials in their order."""
        keys = [axis.key for axis in self.axes]
        rows = [(str(t.number), t.told, *(f"{t.values[key]:.4g}" for key in keys)) for t in trials]
        return Table(("trial", self.metric, *keys), tuple(rows))

    def write(self, trials: Sequence[Trial]) -> None:
        """Keep the table of trials, and the preset once all have ended and one has a score."""
        rows = [{"trial": t.number, self.metric: t.score, **t.values, "complaint": t.complaint} for t in trials]
        write_atomic(self.folder / TRIALS, pd.DataFrame(rows).to_csv(index=False))
        if len(trials) == self.budget and (best := best_of(trials)) is not None:
            self.presets.mkdir(parents=True, exist_ok=True)
            write_atomic(self.preset, self._head(trials, best) + as_yaml(OmegaConf.create(self._found(best))))

    @property
    def _mark(self) -> str:
        return f"# Found in {self.folder.absolute()}\n"

    def _head(self, trials: Sequence[Trial], best: Trial) -> str:
        """How a preset was found, as comments."""
        given = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.settings.items())
        lines = [
            f"python sweep.py tune {self.method} budget={self.budget} sweep_seed={self.seed} {given}",
            f"{time.strftime('%Y-%m-%d')}, data {data_name(self.config)}, seed {self.config.seed}; judged by "
            f"{self.metric}, on validation cases of seen sites only",
            *(axis.told for axis in self.axes),
            *self.table(trials).text().splitlines(),
        ]
        reached = f"{best.told} in trial {best.number}, {trials[0].told} untuned"
        first = f"# {self.method} tuned by {count(self.budget, 'trial')}: {reached}\n"
        return first + self._mark + "".join(f"# {line}".rstrip() + "\n" for line in lines)

    def _found(self, best: Trial) -> dict[str, Any]:
        """The settings that make the method what it was in its best trial."""
        config = compose(self._arguments(best.values), SCHEMA)
        base = file_of("algorithm", self.method, METHODS).values
        keys = [f"algorithm.{key}" for key, told in base.items() if key != "name" and key not in SCHEMA.sections]
        keys = [key for key in keys if key.removeprefix("algorithm.") not in SCHEMA.groups]
        keys += [f"{part}.{key}" for part, told in base.items() if isinstance(told, Mapping) for key in told]
        keys += [key for key in self.by_hand if key.startswith("algorithm.")] + list(best.values)
        own: dict[str, Any] = {"name": str(config.algorithm.name)}
        beside: dict[str, dict[str, Any]] = {"training": {}}
        for key in dict.fromkeys(keys):
            part, _, name = key.partition(".")
            place = own if part == "algorithm" else beside.setdefault(part, {})
            place[name] = OmegaConf.select(config, key)
        beside["training"]["trials"] = self.budget
        return {**own, **beside}


def run_tune(given: Sequence[str], runner: Runner = run_jobs) -> int:
    """Tune methods.

    Args:
        given: names of methods, joined by commas, then `budget=` and the other settings of the search and of all runs.
        runner: of trials.

    Returns:
        0 if every method has a preset, 1 if all trials of one failed.

    Raises:
        ConfigError, ReportingError: a mistake; nothing has started. Or a trial was killed.
    """
    if not given or "=" in given[0]:
        raise ConfigError("name the methods to tune: python sweep.py tune ditto,fedprox budget=8")
    own, settings = split(given[1:], OWN)
    if "budget" not in own:
        raise ConfigError("say how many trials every method gets: budget=N")
    budget, seed = whole("budget", own["budget"], 1), whole("sweep_seed", own.get("sweep_seed", "0"), 0)
    output = Path(own.get("output") or Path("runs") / "tune")
    presets = Path(own.get("presets") or output)
    names = [name for name in given[0].split(",") if name]
    plans = [Plan(name, budget, seed, own.get("metric", ""), settings, output, presets) for name in names]
    for plan in plans:
        plan.check()
    if len({plan.name for plan in plans}) < len(plans):
        raise ConfigError(f"{given[0]} names a method twice; name each once")
    slots = workers([plan.config for plan in plans], whole("jobs", own.get("jobs", "1"), 1))
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output) as lock, hang_up_interrupts():
        studies = [plan.study() for plan in plans]
        found = [tune(plan, study, runner, slots, lock) for plan, study in zip(plans, studies, strict=True)]
    return int(not all(found))


def tune(plan: Plan, study: Study, runner: Runner, slots: Sequence[Mapping[str, str]], lock: int | None = None) -> bool:
    """Run the trials of one method that are left; whether there is a preset then."""
    before = f", {len(study.trials())} of them before" if study.trials() else ""
    print(f"{plan.name}: {count(plan.budget, 'trial')}{before}; judged by {plan.metric}; folder: {plan.folder}")
    for axis in plan.axes:
        print(f"  {axis.told}", flush=True)
    while begun := study.next(len(slots)):
        jobs = {job.name: (number, job) for number, values in begun for job in [plan.job(number, values)]}
        done = [outcome(job, job.seconds()) for _, job in jobs.values() if job.finished()]
        left = [job for _, job in jobs.values() if job.name not in {result.job.name for result in done}]
        with closing(runner(left, slots, lock)) as results:
            for result in (*done, *results):
                trial = study.tell(jobs[result.job.name][0], plan.metric, result)
                _report(plan, study, trial, result.seconds)
    trials = study.trials()
    plan.write(trials)
    best = best_of(trials)
    print(f"\n{plan.table(trials).text()}\n")
    if best is None:
        print(f"{plan.name}: all trials failed, so that there is no preset; the first {trials[0].complaint}")
        return False
    print(f"{plan.name}: {best.told} in trial {best.number}, {trials[0].told} untuned. To train with it:")
    print(f"  python train.py algorithm={plan.preset}\n", flush=True)
    return True


def _report(plan: Plan, study: Study, trial: Trial, seconds: float) -> None:
    trials = study.trials()
    plan.write(trials)
    best = best_of(trials)
    told = f"FAILED {trial.complaint}" if trial.score is None else f"{plan.metric} {trial.told}"
    so_far = f"  best {best.told} in trial {best.number}" if best is not None else ""
    print(f"[{len(trials)}/{plan.budget}] trial {trial.number}  {told}{so_far}  {duration(seconds)}", flush=True)
