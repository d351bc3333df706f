"""Scores of saved models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError, as_yaml, departing
from fedseg.federation.checkpoint import Checkpoint
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.run import saved_config
from fedseg.launch.scores.crossing import check_crossing, cross_scores
from fedseg.launch.scores.scoring import Scorer, score_checkpoints
from fedseg.reporting.compare.runs import FOLDS
from fedseg.reporting.crossing import COLUMNS as COLUMNS_ACROSS
from fedseg.reporting.folder import COLUMNS, METRICS, RunFolder
from fedseg.reporting.reporter import write_report
from fedseg.reporting.summary import CHECKPOINTS, OWN_STATISTICS
from fedseg.reporting.units import in_common

GRID, CROSSING = "evaluation.grid", "evaluation.cross_sites"
KEYS = [column for column in COLUMNS[METRICS] if column not in ("value", "unit")]


def rescore(folder: RunFolder, overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Score the last and the best models of a run's folder; columns as in metrics.csv.

    Args:
        folder: the run's folder.
        overrides: see `launch.folders.reopen.settings`; the grid may change too.

    Raises:
        ReportingError: the folder holds no checkpoint, or the run's data changed or can no longer be read.
    """
    run = Reopened.read(folder, overrides, [GRID, CROSSING])
    run.prepare_data()
    federation, splits = run.federation(Scorer(run.experiment)), run.experiment.evaluation.splits
    return pd.DataFrame(score_checkpoints(federation, run.snapshot.server, splits))


def rescore_across(folder: RunFolder, overrides: Sequence[str] = ()) -> bool:
    """Score every site's personal model at all other sites, if the run or an override asks for it; whether it did.

    Raises:
        ConfigError: the run has no personal models, or they lie on other machines.
    """
    run = Reopened.read(folder, overrides, [GRID, CROSSING])
    if not run.experiment.evaluation.cross_sites:
        return False
    check_crossing(run.experiment)
    if run.experiment.config.engine != "in-process":
        raise ConfigError(
            "the personal models of this run stayed at its sites, so that evaluation.cross_sites=true belongs to the "
            "run itself; take evaluation.cross_sites=false here"
        )
    run.prepare_data()
    scores = folder.scores()
    rows, events = cross_scores(run.federation(Scorer(run.experiment)), scores)
    folder.write_cross_sites(rows, COLUMNS_ACROSS)
    folder.append_events(events)
    write_report(folder, scores, title=run.experiment.title)
    return True


def folds_of(folder: RunFolder) -> list[RunFolder]:
    """The runs that the folder of leave-one-site-out gathers; none of another run."""
    return folder.folds() if saved_config(folder).protocol == FOLDS else []


def other_grid(scores: pd.DataFrame, before: pd.DataFrame) -> str:
    """The grid of a run's final scores where the new ones are on another; empty where they are not, or none are."""
    final = before[before["checkpoint"].isin(CHECKPOINTS)]
    grids = in_common(final["grid"].unique()), in_common(scores["grid"].unique())
    return grids[0] if grids[0] != grids[1] else ""


def adopt(folder: RunFolder, scores: pd.DataFrame) -> Path:
    """Take scores on another grid for the run's final ones: in metrics.csv, in its summary and in its settings.

    Returns:
        The table that keeps the earlier final scores.
    """
    before = folder.scores()
    final = before["checkpoint"].isin(CHECKPOINTS)
    kept = folder.path / f"metrics-{other_grid(scores, before)}-grid.csv"
    write_atomic(kept, before[final].to_csv(index=False, lineterminator="\n"))
    config = departing(saved_config(folder), {GRID: in_common(scores["grid"].unique())})
    write_atomic(folder.config_path, as_yaml(config))
    table = pd.concat([before[~final], scores], ignore_index=True)[list(COLUMNS[METRICS])]
    write_atomic(folder.path / METRICS, table.to_csv(index=False, lineterminator="\n"))
    write_report(folder, folder.scores(), title=Experiment(config).title)
    return kept


def last_round_done(folder: RunFolder) -> bool:
    """Whether a run trained to its last round, so that its final scores should be there."""
    return Checkpoint(folder.checkpoints).round >= int(saved_config(folder).federation.rounds)


def without_older_definition(scores: pd.DataFrame, before: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Both tables without the scores that older versions gave to cases that do not show a region, and how many.

    Where every earlier score is defined, and some are not now, the earlier ones are of such a version. Models that an
    older version did not score at unseen sites (with their own statistics) are left out too.
    """
    if not (before["view"] == OWN_STATISTICS).any():
        scores = scores[scores["view"] != OWN_STATISTICS]
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
