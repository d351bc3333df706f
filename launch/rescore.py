"""Scores of saved models."""

from __future__ import annotations

import math

import pandas as pd

from configs.compose import load
from federation.checkpoint import Checkpoint
from federation.contract import RoundRecord
from launch.experiment import Experiment
from launch.run import check_splits
from launch.scoring import Scorer, score_checkpoints
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


def rescore(folder: RunFolder) -> pd.DataFrame:
    """Score the last and the best models of a run's folder; columns as in metrics.csv.

    Raises:
        ReportingError: the folder holds no checkpoint.
    """
    experiment = Experiment(load(folder.read_config()))
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
