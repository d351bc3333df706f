"""Scores of saved models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from omegaconf import DictConfig

from configs.compose import ConfigError, compose, parsed
from federation.checkpoint import Checkpoint
from federation.contract import RoundRecord
from launch.experiment import Experiment
from launch.run import check_splits, saved_config
from launch.scoring import Scorer, score_checkpoints
from launch.settings import SCHEMA
from reporting import ReportingError
from reporting.folder import COLUMNS, METRICS, RunFolder

KEYS = [column for column in COLUMNS[METRICS] if column != "value"]


class Silent:
    """An observer that says nothing."""

    def round_started(self, round: int, rounds: int, sites: object) -> None:
        """Nothing."""

    def site_done(self, task: str, round: int, site: str, scalars: object, seconds: float) -> None:
        """Nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Nothing."""


def settings(folder: RunFolder, overrides: Sequence[str] = ()) -> DictConfig:
    """The settings of a run, for scoring it on this machine.

    Args:
        folder: the run's folder.
        overrides: of `trainer.accelerator` and `trainer.threads`. A run made on a GPU is scored on the CPU where there
            is no GPU, unless an accelerator is given.

    Raises:
        ConfigError: another setting, which would score another run; or a damaged config.
        ReportingError: the folder holds no run.
    """
    saved = saved_config(folder)
    given = parsed(overrides, SCHEMA)
    strange = [key for key in given if key != "trainer"] + [
        f"trainer.{key}" for key in given.get("trainer", {}) if key not in ("accelerator", "threads")
    ]
    if strange:
        raise ConfigError(f"{strange[0]} belongs to the run; only trainer.accelerator and trainer.threads may change")
    missing = saved.trainer.accelerator == "gpu" and not torch.cuda.is_available()
    fallback = ["trainer.accelerator=cpu"] if missing else []
    return compose([*fallback, *overrides], SCHEMA, base=saved)


def rescore(folder: RunFolder, overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Score the last and the best models of a run's folder; columns as in metrics.csv.

    Args:
        folder: the run's folder.
        overrides: see `settings`.

    Raises:
        ReportingError: the folder holds no checkpoint.
    """
    experiment = Experiment(settings(folder, overrides))
    experiment.check()
    checkpoint = Checkpoint(folder.checkpoints)
    snapshot = checkpoint.load()
    if snapshot is None:
        raise ReportingError(f"{folder.path} holds no checkpoint yet; its run was stopped before the first one")
    experiment.data.setup()
    check_splits(folder, experiment.data.splits())
    scorer = Scorer(experiment)
    federation = experiment.federation(checkpoint, scorer, Silent())
    federation.transport.restore(snapshot.kept)
    return pd.DataFrame(score_checkpoints(federation, scorer, snapshot.server, checkpoint))


def difference(scores: pd.DataFrame, before: pd.DataFrame) -> tuple[float, int]:
    """Largest absolute difference between two tables of scores, and how many scores both have.

    Scores that are undefined in one table only differ infinitely.
    """
    both = scores.merge(before, on=KEYS, suffixes=("", "_before"))
    now, then = both["value"], both["value_before"]
    gaps = (now - then).abs().where(now.notna() & then.notna(), math.inf).where(now.notna() | then.notna(), 0.0)
    return float(gaps.max()) if len(gaps) else 0.0, len(both)
