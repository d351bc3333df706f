"""One run from its config to its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.compose import ConfigError, compose, load, parsed
from federation.checkpoint import Checkpoint
from federation.engine import Federation
from launch.experiment import Experiment
from launch.scoring import Notes, Scorer, Scores, paint_overlays, score_checkpoints
from launch.settings import SCHEMA
from reporting import ReportingError
from reporting.folder import RunFolder
from reporting.reporter import Reporter
from reporting.summary import Summary
from reporting.wandb import WandbRun

Execute = Callable[[DictConfig], Summary]
"""Runs one config from its start, or from where it stands, to its end."""
MAY_CHANGE = (
    "federation.rounds",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.deterministic",
    "deployment.patience",
    "deployment.timeout",
    "wandb.",
    "output",
    "resume",
    "experiment",
    "evaluation.overlays",
)


def read_settings(arguments: Sequence[str]) -> DictConfig:
    """The config of the command line; of a resumed run, what its folder holds and the few settings that may change.

    Raises:
        ConfigError: settings that cannot be used, or that would make a resumed run another one.
        ReportingError: there is no run to resume.
    """
    given = parsed(arguments, SCHEMA)
    if given.get("resume") is not True:
        config = compose(arguments, SCHEMA)
        if config.resume:
            raise ConfigError("resume=true belongs on the command line, beside output=DIR")
        return config
    if given.get("output") is None:
        raise ConfigError("resume=true needs output=DIR, the folder of the run to go on with")
    saved = load(RunFolder(str(given["output"])).read_config())
    config = compose(arguments, SCHEMA, base=saved)
    before, now = flat(saved), flat(config)
    changed = sorted(
        key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    )
    if changed:
        told = ", ".join(f"{key}: {before.get(key)!r} in the folder, {now.get(key)!r} now" for key in changed)
        raise ConfigError(f"resume=true goes on with the run as it was started ({told}); start another run for that")
    return config


def execute(config: DictConfig) -> Summary:
    """Train, score, report.

    Raises:
        ConfigError, DataError, ReportingError, RoundError: with a message for the user.
    """
    if config.engine == "flower":
        raise ConfigError("engine=flower is for runs across machines: start them with flwr run (docs/deployment.md)")
    experiment = Experiment(config)
    experiment.check()
    folder = RunFolder.create(config.output or default_folder(config), resume=config.resume)
    experiment.data.setup()
    experiment.check_sites()
    checkpoint = Checkpoint(folder.checkpoints)
    if checkpoint.round > config.federation.rounds:
        raise ConfigError(f"federation.rounds={config.federation.rounds}, but {checkpoint.round} rounds are done")
    if checkpoint.round:
        check_splits(folder, experiment.data.splits())
    folder.write_config(OmegaConf.to_yaml(config))
    folder.write_environment({"seed": config.seed, "split_seed": experiment.data.split_seed})
    folder.write_splits(experiment.data.splits())
    folder.truncate(checkpoint.round if checkpoint.round else -1)
    if experiment.pretrained is not None:
        print(f"starts from the {experiment.pretrained.told()}", flush=True)
    with Reporter(folder, open_wandb(config, folder), title=experiment.title) as reporter:
        reporter.progress.say(f"{experiment.title}; the run's folder: {folder.path}")
        scorer = Scorer(experiment)
        federation = experiment.federation(checkpoint, scorer, Notes(reporter, scorer))
        train_and_score(federation, scorer, reporter)
        if config.evaluation.overlays:
            regions = experiment.data.regions.names
            for pictures in paint_overlays(federation, experiment, checkpoint, folder.scores()).values():
                reporter.overlays(pictures, regions)
        return reporter.finish()


def train_and_score(federation: Federation, scorer: Scores, reporter: Reporter) -> None:
    """Run all rounds, and score the last and the best models."""
    method: Any = federation.algorithm
    reporter.folder.write_tensors(method.parts.rows(method.model))
    server = federation.run()
    reporter.progress.say("scoring the last and the best models on validation and test cases")
    reporter.scores(score_checkpoints(federation, scorer, server, federation.checkpoint))


def check_splits(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Compare the cases and their splits with those that a run began with.

    Raises:
        ReportingError: the data changed, so that a case may have moved from test to training.
    """
    now = {(r["site"], r["case"]): (r["split"], bool(r["labelled"]), bool(r["seen"])) for r in rows}
    before = {(r.site, r.case): (r.split, bool(r.labelled), bool(r.seen)) for r in folder.splits().itertuples()}
    moved = sorted(case for case in now.keys() | before.keys() if now.get(case) != before.get(case))
    if moved:
        raise ReportingError(
            f"{folder.path}: the data changed since this run began: {len(moved)} cases, the first is {moved[0]} "
            f"({before.get(moved[0])} then, {now.get(moved[0])} now); restore the data, or start another run"
        )


def default_folder(config: DictConfig) -> Path:
    """runs/DATA-ALGORITHM-seedN-TIME."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.data.preset}-{config.algorithm.preset}-seed{config.seed}-{stamp}"


def open_wandb(config: DictConfig, folder: RunFolder) -> WandbRun:
    """The run at W&B: seeds of one method on one data set share a group."""
    group = config.wandb.group or f"{config.data.preset}-{config.algorithm.preset}"
    plain: Any = OmegaConf.to_container(config)
    return WandbRun(
        config.wandb.mode,
        folder,
        plain,
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.wandb.name or f"{group}-seed{config.seed}",
        group=group,
        job_type=config.algorithm.preset,
        tags=config.wandb.tags,
    )


def flat(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value; a mapping that is a value (regions) is not taken apart."""
    plain: Any = OmegaConf.to_container(config)
    rows: dict[str, Any] = {}
    for key, value in plain.items():
        if key in SCHEMA.groups or key in SCHEMA.sections:
            rows |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            rows[key] = value
    return rows
