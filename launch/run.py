"""One run from its config to its folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from fedseg.algorithms.recipe import ends
from fedseg.common.parts import JOIN
from fedseg.configs.compose import ConfigError, as_yaml, asked, compose, departing, load, parsed, traced
from fedseg.datamodules import MultiCenterDataModule
from fedseg.datamodules.findings import COLUMNS, Finding, as_rows, causes
from fedseg.datamodules.public import DRAWN
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import event
from fedseg.federation.engine import Federation
from fedseg.federation.ledger import LEDGER, Ledger
from fedseg.federation.schedule import without_effect
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.grouping import group_rows
from fedseg.launch.folders.kept_masks import kept_masks
from fedseg.launch.folders.restore import check_data, check_states, open_checkpoint
from fedseg.launch.scores.crossing import check_crossing, cross_scores
from fedseg.launch.scores.scoring import Scorer, never_trained, not_served, paint_overlays, score_checkpoints
from fedseg.launch.settings import SCHEMA, Evaluation
from fedseg.launch.sites.terms import agreed_terms, listed
from fedseg.reporting import crossing
from fedseg.reporting.circumstance import CIRCUMSTANCE, ENGINE
from fedseg.reporting.environment import Meter
from fedseg.reporting.folder import FINDINGS, RunFolder, flattened
from fedseg.reporting.loggers import RoundLoggers
from fedseg.reporting.places import place_name
from fedseg.reporting.reporter import Reporter
from fedseg.reporting.summary import Summary
from fedseg.reporting.wandb import RUN_ID, RunAddress, WandbRun, swept_by_agent


class Execute(Protocol):
    """Runs one config from its start, or from where it stands, to its end."""

    def __call__(self, config: DictConfig, job_type: str = ...) -> Summary:
        """The result; `job_type` is what the run is to W&B, within its group."""


PROJECT = "federated-segmentation"
LONGEST_NAME = 60
PER_SITE = "data.per_site"
MAY_CHANGE = ("federation.rounds", "data.manifest", "data.left_out", "data.public", *CIRCUMSTANCE)
"""Beginnings of keys, and whole ones; data are known by their content."""
PATHS = (
    "output",
    "pretrained",
    "deployment.keys",
    "deployment.terms",
    "data.root",
    "data.manifest",
    "data.cache_dir",
    "data.public",
    "model.encoder_weights",
)
"""Settings that name a file or a folder."""


def read_settings(arguments: Sequence[str]) -> DictConfig:
    """The config of the command line; of a resumed run, what its folder holds and the few settings that may change.

    Raises:
        ConfigError, ReportingError: as `traced_settings`.
    """
    return traced_settings(arguments)[0]


def traced_settings(arguments: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The config as `read_settings` reads it, and who said what: dotted key -> file or command line.

    Raises:
        ConfigError: settings that cannot be used, or that would make a resumed run another one.
        ReportingError: there is no run to resume.
    """
    given = parsed(arguments, SCHEMA)
    if swept_by_agent() and "mode" not in given.get("wandb", {}):
        arguments = [*arguments, "wandb.mode=online"]
    if asked(given, "resume", bool) is not True:
        config, sources = traced(arguments, SCHEMA)
        if config.resume:
            raise ConfigError("resume=true belongs on the command line, beside output=DIR")
        if swept_by_agent() and config.output is None and (folder := RunFolder(default_folder(config))).holds_run:
            return traced_settings([*arguments, f"output={folder.path}", "resume=true"])  # the agent started it again
        return config, sources
    output = asked(given, "output", str | None)
    if not output:
        raise ConfigError("resume=true needs output=DIR, the folder of the run to go on with")
    saved = saved_config(RunFolder(output))
    config, sources = traced(arguments, SCHEMA, base=saved)
    complete = compose([], SCHEMA, base=saved)  # a setting that is younger than the run had its default
    if changed := differences(complete, config):
        raise ConfigError(f"resume=true goes on with the run as it was started ({changed}); start another run for that")
    if why := stretched(saved, config):
        raise ConfigError(why)
    return config, sources


def stretched(saved: DictConfig, config: DictConfig) -> str:
    """Why more or fewer rounds make a config another run than the saved one, with the cure; empty if they do not.

    Raises:
        ConfigError: the method cannot be built.
    """
    before, now = saved.federation.rounds, config.federation.rounds
    if before == now:
        return ""
    complete = compose([], SCHEMA, base=saved)
    training = complete.training
    if ends(training.schedule) and training.schedule_rounds is None:
        return (
            f"federation.rounds={now}: training.schedule={training.schedule} of this run falls over its {before} "
            f"rounds, so that with more of them earlier rounds would have had other learning rates; keep the {before}, "
            "or start another run, whose training.schedule_rounds lets it go on later"
        )
    try:
        why = Experiment(complete).declared.over_rounds
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    if not why:
        return ""
    return (
        f"federation.rounds={now}: this run was begun with {before}, and {why}: earlier rounds would have been others; "
        f"keep the {before}, or start another run"
    )


def saved_config(folder: RunFolder) -> DictConfig:
    """The config of the run that a folder holds.

    Raises:
        ReportingError: there is none.
        ConfigError: it is damaged.
    """
    return load(folder.read_config(), SCHEMA, str(folder.config_path))


def differences(saved: DictConfig, config: DictConfig, may_change: tuple[str, ...] = MAY_CHANGE) -> str:
    """The settings that make a config another run than the saved one, with both values; empty if there is none."""
    before, now = flat(anchored(saved)), flat(anchored(config))
    keys = sorted(before.keys() | now.keys())
    if _says_no_more(now.get(PER_SITE) or {}, before.get(PER_SITE) or {}):
        keys = [key for key in keys if key != PER_SITE]
    free = tuple(name if name.endswith(".") else f"{name}." for name in may_change)
    changed = [key for key in keys if before.get(key) != now.get(key) and not f"{key}.".startswith(free)]
    return ", ".join(f"{key}: {before.get(key)!r} in the folder, {now.get(key)!r} now" for key in changed)


def _says_no_more(now: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether all that is said of sites is in what a run saved, which holds what sites said themselves, too."""
    now, saved = json.loads(json.dumps(now)), json.loads(json.dumps(saved))  # keys are texts, as they were saved
    return all(saved.get(site, {}).get(key) == value for site, own in now.items() for key, value in own.items())


def finished(folder: RunFolder, rounds: int) -> bool:
    """Whether a run came to its end, after so many rounds or more.

    Raises:
        CheckpointError: its checkpoints are damaged.
    """
    return folder.summary_path.is_file() and Checkpoint(folder.checkpoints).round >= rounds


def execute(config: DictConfig, job_type: str = "train") -> Summary:
    """Train, score, report.

    Args:
        config: of the run.
        job_type: what it is to W&B, within its group.

    Raises:
        ConfigError, DataError, ReportingError, RoundError: with a message for the user.
    """
    if config.engine == "flower":
        raise ConfigError("engine=flower is for runs across machines: start them with flwr run (docs/deployment.md)")
    meter = Meter()
    experiment = Experiment(config)
    experiment.check()
    check_crossing(experiment)
    folder = RunFolder.create(config.output or default_folder(config), resume=config.resume)
    with folder.beginning():
        checkpoint, ledger = open_checkpoint(folder, config), Ledger(folder.path / LEDGER)
        experiment.data.setup()
        experiment.check_sites()
        terms = agreed_terms(experiment)
        if checkpoint.round:
            check_data(folder, experiment.data)
            check_states(experiment.algorithm(), checkpoint, experiment.sites(), experiment.others())
        groups = group_rows(experiment)
        folder.write_config(as_yaml(anchored(with_sites(config, experiment.data))))
    folder.write_environment({"seed": config.seed, "split_seed": experiment.data.split_seed})
    folder.write_terms(listed(terms))
    folder.write_splits(experiment.data.splits())
    folder.write_groups(groups)
    folder.write_raters(experiment.data.agreement())
    note_findings(folder, experiment.data.findings, part=job_type != "train")
    folder.write_fingerprints(experiment.data.fingerprints())
    folder.write_inputs(inputs(experiment))
    folder.truncate(checkpoint.round if checkpoint.round else -1)
    if experiment.pretrained is not None:
        print(f"starts from the {experiment.pretrained.told()}", flush=True)
    with open_reporter(config, folder, job_type, experiment.title) as reporter:
        reporter.progress.say(f"{experiment.title}; the run's folder: {folder.path}")
        scorer = Scorer(experiment, kept_masks(experiment, folder))
        ledger.begun(checkpoint.round, "", alike=not experiment.declared.answers_singly)
        with closing(experiment.way(scorer)) as way:
            federation = experiment.federation_over(way, experiment.data.sites, checkpoint, reporter, ledger)
            train_and_score(federation, reporter, experiment.evaluation, unused(experiment))
            cross(federation, reporter, config)
            if config.evaluation.overlays and config.evaluation.test:
                regions = experiment.data.regions.names
                for pictures in paint_overlays(federation, way, experiment, folder.scores()).values():
                    reporter.overlays(pictures, regions)
        return finish(reporter, config, meter)


def finish(reporter: Reporter, config: DictConfig, meter: Meter) -> Summary:
    """The end of a run, wherever its sites are."""
    reporter.folder.write_cost(meter)
    summary = reporter.finish()
    if config.wandb.artifacts:
        reporter.wandb.log_checkpoints(reporter.folder)
    return summary


def inputs(experiment: Experiment) -> dict[str, Any]:
    """What the network takes and answers; the data is prepared, or lies on other machines."""
    data = experiment.data
    *slices, height, width = data.size
    found = {"channels": experiment.in_channels, "height": height, "width": width, "regions": list(data.regions.names)}
    found |= {"slices": slices[0]} if slices else {}
    if experiment.channels:
        return found
    sites = [data.site(name) for name in data.sites]
    types = {site.image(case).dtype.name for site in sites for case in site.cases("train")}
    return found | {"values": sorted(types)}  # of decoded images: uint8, or float32 of files above 8 bit


def unused(experiment: Experiment) -> list[str]:
    """What has no effect: strengths of privacy that nothing reads, and, with the reason, what the method adds."""
    method, data = experiment.declared, experiment.data
    whys = [method.adds_nothing] if method.adds_nothing else []
    here = method.teaches_unannotated and not experiment.channels  # data that are all here and prepared
    if here and not data.ignore_labels and not any(data.expected.unannotated.get(site) for site in data.sites):
        whys.append("every site annotated every region (data.unannotated)")
    added = [f"algorithm={experiment.config.algorithm.preset}, since {why}" for why in whys]
    return [*experiment.privacy.without_effect(), *added]


def train_and_score(federation: Federation, reporter: Reporter, evaluation: Evaluation, idle: Sequence[str]) -> None:
    """Run all rounds, and score the last and the best models; settings that are idle are said before."""
    method: Any = federation.algorithm
    splits = evaluation.splits
    if not federation.checkpoint.round:
        told = without_effect(federation.schedule, federation.algorithm)
        told = [*told, *not_served(federation, evaluation), *idle]
        reporter.notice([event(0, "", "no effect", detail) for detail in told])
    reporter.folder.write_tensors(method.parts.rows(method.model))
    server = federation.run()
    reporter.training_done(federation.checkpoint.round)
    named = " and ".join("validation" if split == "val" else split for split in splits)
    reporter.progress.say(f"scoring the last and the best models on {named} cases")
    reporter.scores(score_checkpoints(federation, server, splits))
    reporter.folder.append_audit(federation.take_late_audit())
    reporter.notice([*federation.late_events, *never_trained(federation, reporter.folder.rounds())])


def cross(federation: Federation, reporter: Reporter, config: DictConfig) -> None:
    """Score every site's personal model at all other sites, if that is asked for."""
    if config.evaluation.cross_sites:
        reporter.progress.say("scoring every site's personal model at all other sites")
        rows, events = cross_scores(federation, reporter.folder.scores())
        reporter.folder.write_cross_sites(rows, crossing.COLUMNS)
        reporter.folder.append_audit(federation.take_late_audit())
        reporter.notice(events)


def with_sites(config: DictConfig, data: MultiCenterDataModule) -> DictConfig:
    """The settings with what sites say for themselves, so that a prediction knows it where their folders are not."""
    return departing(config, {PER_SITE: data.per_site.told()})


def note_findings(folder: RunFolder, findings: Sequence[Finding], part: bool = False) -> None:
    """Keep what was noticed in the data, and say the warnings: one line for one cause.

    Args:
        folder: of the run.
        findings: of its data module, set up.
        part: it is one of several runs side by side (folds, stages): what an earlier one said is not said again.
    """
    rows = as_rows(findings)
    said: list[dict[str, str]] = []
    if part:
        siblings = [RunFolder(path) for path in folder.path.parent.iterdir() if path != folder.path]
        said = [row for other in siblings for row in other.findings()]
    folder.write_findings(rows, COLUMNS)
    known = {tuple(row.values()) for row in said}
    new = [finding for finding in findings if tuple(as_rows([finding])[0].values()) not in known]
    warned = [cause for cause in causes(new) if cause.first.severity == "warning"]
    for cause in warned:
        print(f"warning: {cause.first.kind}: {cause}", file=sys.stderr, flush=True)
    if warned:
        print(f"warning: all findings: {folder.path / FINDINGS}", file=sys.stderr, flush=True)


def anchored(config: DictConfig) -> DictConfig:
    """The same settings with absolute paths, so that they mean the same wherever they are read again."""
    given = {key: value for key in PATHS if isinstance(value := OmegaConf.select(config, key), str)}
    if given.get("data.public") == DRAWN:
        del given["data.public"]
    if str(augment := OmegaConf.select(config, "data.augment")).endswith((".yaml", ".yml")):
        given["data.augment"] = augment
    return departing(config, {key: str(Path(value).expanduser().absolute()) for key, value in given.items()})


def default_folder(config: DictConfig) -> Path:
    """runs/DATA-ALGORITHM-seedN-TIME; under `wandb agent` runs/SWEEP/DATA-ALGORITHM-seedN-RUN."""
    if swept_by_agent():
        return Path("runs") / os.environ["WANDB_SWEEP_ID"] / run_name(config)
    return Path("runs") / f"{run_name(config)}-{time.strftime('%Y%m%d-%H%M%S')}"


def beside(folder: RunFolder) -> dict[str, Any]:
    """Settings of folds and early stages: W&B's project and entity are those of the run that they belong to."""
    place = RunAddress.of(folder)
    return {"wandb.project": place.project, "wandb.entity": place.entity} if place.project else {}


def run_name(config: DictConfig) -> str:
    """DATA-ALGORITHM-seedN; under `wandb agent` also the run's id, since a sweep may vary anything else."""
    name = f"{data_name(config)}-{method_name(config)}-seed{config.seed}"
    return f"{name}-{os.environ[RUN_ID]}" if swept_by_agent() else name


def open_reporter(config: DictConfig, folder: RunFolder, job_type: str, title: str) -> Reporter:
    """The observer of a run, with W&B and loggers as its settings say.

    Raises:
        ReportingError: one of these cannot be opened.
    """
    loggers = RoundLoggers(config.loggers, folder, folder.settings()) if config.loggers else None
    return Reporter(folder, open_wandb(config, folder, job_type), title=title, loggers=loggers)


def open_wandb(config: DictConfig, folder: RunFolder, job_type: str) -> WandbRun:
    """The run at W&B: seeds of one method with the same settings on one data set share a group."""
    return WandbRun(
        config.wandb.mode,
        folder,
        dashboard_config(config),
        project=config.wandb.project or os.environ.get("WANDB_PROJECT", PROJECT),
        entity=config.wandb.entity,
        name=config.wandb.name or run_name(config),
        group=group_name(config),
        job_type=job_type,
        tags=config.wandb.tags,
        images=config.wandb.images,
    )


def dashboard_config(config: DictConfig) -> dict[str, Any]:
    """The settings under the names that a command line gives them, which are those of a sweep's parameters too.

    With nested settings a sweep's ``algorithm=ditto`` would take the place of all that is said about the algorithm.
    """
    rows = flat(config)
    return rows | {group: rows.pop(f"{group}.preset") for group in SCHEMA.groups}


def group_name(config: DictConfig) -> str:
    """The group at W&B: the one asked for, else DATA-ALGORITHM-DIGEST; the digest leaves out seed, folder and site."""
    if config.wandb.group is not None:
        return str(config.wandb.group)
    alone = (*CIRCUMSTANCE, *ENGINE, "seed", "data.unseen", "protocol", "pretrained")
    told = {key: value for key, value in flat(config).items() if not key.startswith(alone)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:6]
    protocol = "" if config.protocol == "personalised" else f"-{config.protocol}"
    return f"{data_name(config)}-{method_name(config)}{protocol}-{digest}"


def method_name(config: DictConfig) -> str:
    """The method; of parts from outside (`package.module:Name`) their names alone."""
    return JOIN.join(part.rpartition(":")[2] for part in str(config.algorithm.preset).split(JOIN))


def data_name(config: DictConfig) -> str:
    """The data set; of one's own images also their folder or table, so that two of them have two names."""
    if config.data.preset != "folder":
        return str(config.data.preset).rpartition(":")[2]
    place = place_name(Path(config.data.root).expanduser().absolute(), config.data.manifest)
    safe = re.sub(r"[^\w.+-]+", "_", place).strip("_.")
    return f"folder-{safe[:LONGEST_NAME]}" if safe else "folder"


def flat(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value; a mapping that is a value (regions) is not taken apart."""
    plain: Any = OmegaConf.to_container(config)
    return flattened(plain)
