"""Scores of saved models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from fedseg.federation.checkpoint import Checkpoint
from fedseg.launch.reopen import Reopened
from fedseg.launch.run import saved_config
from fedseg.launch.scoring import Scorer, score_checkpoints
from fedseg.reporting.folder import COLUMNS, METRICS, RunFolder

KEYS = [column for column in COLUMNS[METRICS] if column != "value"]


def rescore(folder: RunFolder, overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Score the last and the best models of a run's folder; columns as in metrics.csv.

    Args:
        folder: the run's folder.
        overrides: see `launch.reopen.settings`.

    Raises:
        ReportingError: the folder holds no checkpoint, or the run's data changed or can no longer be read.
    """
    run = Reopened.read(folder, overrides)
    run.prepare_data()
    scorer = Scorer(run.experiment)
    return pd.DataFrame(score_checkpoints(run.federation(scorer), scorer, run.snapshot.server))


def last_round_done(folder: RunFolder) -> bool:
    """Whether a run trained to its last round, so that its final scores should be there."""
    return Checkpoint(folder.checkpoints).round >= int(saved_config(folder).federation.rounds)


def without_older_definition(scores: pd.DataFrame, before: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Both tables without the scores that older versions gave to cases that do not show a region, and how many.

    Where every earlier score is defined, and some are not now, the earlier ones are of such a version.
    """
    both = scores.merge(before, on=KEYS, suffixes=("", "_before"))
    odd = both[both["value"].isna() & both["value_before"].notna()]
    if odd.empty or before["value"].isna().any():
        return scores, before, 0
    left_out = pd.MultiIndex.from_frame(odd[KEYS])
    kept = [table[~pd.MultiIndex.from_frame(table[KEYS]).isin(left_out)] for table in (scores, before)]
    return kept[0], kept[1], len(odd)


def difference(scores: pd.DataFrame, before: pd.DataFrame) -> tuple[float, int]:
    """Largest absolute difference between two tables of scores, and how many scores both have.

    Scores that are undefined in one table only differ infinitely.
    """
    both = scores.merge(before, on=KEYS, suffixes=("", "_before"))
    now, then = both["value"], both["value_before"]
    gaps = (now - then).abs().where(now.notna() & then.notna(), math.inf).where(now.notna() | then.notna(), 0.0)
    return float(gaps.max()) if len(gaps) else 0.0, len(both)
