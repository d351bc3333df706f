"""Several runs in a row, each starting from the encoder of the one before: pre-training, then fine-tuning."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fedseg.configs.compose import ConfigError, compose, departing
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import (
    MAY_CHANGE,
    Execute,
    beside,
    default_folder,
    differences,
    execute,
    finished,
    saved_config,
    stretched,
)
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import Summary
from fedseg.reporting.wandb import beside_the_agent, remember_agent

OWN = ("stages=", "output=", "resume=", "pretrained=")
FREE = (*MAY_CHANGE, "pretrained")  # always the stage before, whichever way its path is written
FREE_ONCE_USED = tuple(key for key in FREE if key != "federation.rounds")


@dataclass(frozen=True)
class Stage:
    """One of the runs.

    Attributes:
        number: from 1.
        told: its settings, as they were given.
        config: all of its settings.
        folder: where it runs.
    """

    number: int
    told: str
    config: DictConfig
    folder: RunFolder


def execute_stages(arguments: Sequence[str], config: DictConfig, execute: Execute = execute) -> Summary:
    """Run every stage in a folder of its own, OUTPUT/1, OUTPUT/2 ...

    A stage's settings are those of the command line, and then its own. Finished stages are not repeated when the
    command is given again with the same output, and a stopped one goes on. Under `wandb agent` the last stage is the
    agent's run, the others are runs of their own.

    Args:
        arguments: of the command line.
        config: what they make, with `stages`.
        execute: runs one of them.

    Returns:
        The result of the last stage.

    Raises:
        ConfigError: a setting of some stage cannot be used, or is another one than when that stage ran; all are looked
            at before the first one runs.
    """
    if config.pretrained or config.protocol != "personalised":
        raise ConfigError("stages start from each other: leave pretrained out, and take protocol=personalised")
    stages = plan(arguments, config, Path(config.output or default_folder(config)))
    for stage in stages:
        _check(stage, is_used(stages, stage))
    remember_agent(stages[-1].folder)
    for stage in stages:
        last = stage.number == len(stages)
        if not last and finished(stage.folder, stage.config.federation.rounds):
            continue
        print(f"\nstage {stage.number} of {len(stages)}: {stage.told}", flush=True)
        with nullcontext() if last else beside_the_agent():
            alone = departing(_alone(stage), beside(stages[-1].folder))
            summary = execute(alone, job_type="train" if last else f"stage {stage.number}")
    return summary


def plan(arguments: Sequence[str], config: DictConfig, output: Path) -> list[Stage]:
    """What every stage does.

    Raises:
        ConfigError: a setting of some stage cannot be used.
    """
    shared = [argument for argument in arguments if not argument.startswith(OWN)]
    shared.append(f"wandb.mode={config.wandb.mode}")
    stages = []
    for number, told in enumerate(config.stages, 1):
        own = [*shared, *shlex.split(told), f"output={output / str(number)}"]
        own += [f"pretrained={output / str(number - 1)}"] if number > 1 else []
        try:
            stages.append(Stage(number, told, compose(own, SCHEMA), RunFolder(output / str(number))))
        except ConfigError as error:
            raise ConfigError(f"stage {number}: {error}") from error
    return stages


def _check(stage: Stage, used: bool) -> None:
    """Look at a stage before any runs."""
    try:
        Experiment(_alone(stage, pretrained=False)).check()
        changed = changes(stage, used)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.number}: {error}") from error
    if changed:
        raise ConfigError(
            f"stage {stage.number}: {stage.folder.path} holds a run with other settings ({changed}); repeat the "
            "command as it was, or take another output="
        )


def changes(stage: Stage, used: bool) -> str:
    """The settings that are other ones than when the stage ran; empty if there is none, or if it never ran.

    Args:
        stage: which one.
        used: a later stage has started from it, so that its rounds count, too.

    Raises:
        ConfigError: the saved settings are damaged.
    """
    if not stage.folder.holds_run:
        return ""
    saved, now = saved_config(stage.folder), _alone(stage)
    return differences(saved, now, FREE_ONCE_USED if used else FREE) or stretched(saved, now)


def is_used(stages: Sequence[Stage], stage: Stage) -> bool:
    """Whether a later stage has started from this one, so that it must stay as it is."""
    return any(later.folder.holds_run for later in stages[stage.number :])


def _alone(stage: Stage, pretrained: bool = True) -> DictConfig:
    """The settings of one stage, which names no stages of its own."""
    absent = {} if pretrained else {"pretrained": None}  # the stage before may not have run yet
    return departing(stage.config, {"stages": [], "resume": stage.folder.holds_run, **absent})
