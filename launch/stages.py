"""Several runs in a row, each starting from the encoder of the one before: pre-training, then fine-tuning."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from configs.compose import ConfigError, compose
from launch.experiment import Experiment
from launch.run import Execute, default_folder, execute, read_settings
from launch.settings import SCHEMA
from reporting.folder import RunFolder
from reporting.summary import Summary

OWN = ("stages=", "output=", "resume=", "pretrained=")


def execute_stages(arguments: Sequence[str], config: DictConfig, execute: Execute = execute) -> Summary:
    """Run every stage in a folder of its own, OUTPUT/1, OUTPUT/2 ...

    A stage's settings are those of the command line, and then its own. Finished stages are not repeated when the
    command is given again with the same output, and a stopped one goes on.

    Args:
        arguments: of the command line.
        config: what they make, with `stages`.
        execute: runs one of them.

    Returns:
        The result of the last stage.

    Raises:
        ConfigError: a setting of some stage cannot be used; all are looked at before the first one runs.
    """
    output = Path(config.output or default_folder(config))
    shared = [argument for argument in arguments if not argument.startswith(OWN)]
    if config.pretrained or config.protocol != "personalised":
        raise ConfigError("stages start from each other: leave pretrained out, and take protocol=personalised")
    settings = [[*shared, *shlex.split(stage), f"output={output / str(n)}"] for n, stage in enumerate(config.stages, 1)]
    for number, stage in enumerate(settings, 1):
        _check(number, stage)
    for number, stage in enumerate(settings, 1):
        folder = RunFolder(output / str(number))
        if (folder.path / "summary.csv").is_file() and number < len(settings):
            continue
        print(f"\nstage {number} of {len(settings)}: {config.stages[number - 1]}", flush=True)
        before = [f"pretrained={output / str(number - 1)}"] if number > 1 else []
        if folder.holds_run:
            stage_config = read_settings([f"output={folder.path}", "resume=true"])
        else:
            stage_config = compose([*stage, *before], SCHEMA)
        summary = execute(_alone(stage_config))
    return summary


def _check(number: int, stage: Sequence[str]) -> None:
    try:
        Experiment(compose(stage, SCHEMA)).check()
    except ConfigError as error:
        raise ConfigError(f"stage {number}: {error}") from error


def _alone(config: DictConfig) -> DictConfig:
    """The settings of one stage, which names no stages of its own."""
    alone: DictConfig = config.copy()
    OmegaConf.set_readonly(alone, False)
    alone.stages = []
    OmegaConf.set_readonly(alone, True)
    return alone
