"""Scores by groups of patients, as a column of the manifest tells them; groups of few patients are not shown."""

from collections.abc import Sequence

import pandas as pd

from fedseg.reporting.summary import (
    CHECKPOINTS,
    HEADLINE,
    UNSEEN_ONLY,
    VIEWS,
    Table,
    case_scores,
    shown_number,
)
from fedseg.reporting.units import MIXED, grid_of, stated

EVERYWHERE = "all sites"
NOT_STATED = "not stated"
COLUMNS = ("column", "group", "site", "view", "checkpoint", "metric", "unit", "patients", "mean")
KEYS = list(COLUMNS[:6])


def group_scores(scores: pd.DataFrame, groups: pd.DataFrame, splits: pd.DataFrame, least: int) -> pd.DataFrame:
    """Mean over the patients of each group, over all sites together and at each; columns as in `COLUMNS`.

    A patient's score is the mean over the cases that show a region; patients without one do not count.

    Args:
        scores: metrics.csv; test scores of the last and best models are used.
        groups: site, case, column, value.
        splits: splits.csv, which tells the patient of each case.
        least: patients of a group; groups with fewer have no mean and no number of patients.
    """
    final = scores[scores["checkpoint"].isin(CHECKPOINTS) & (scores["split"] == "test") & (scores["case"] != "")]
    cases = case_scores(final).dropna(subset=["value"]).merge(splits[["site", "case", "patient"]], on=["site", "case"])
    grouped = cases.merge(groups.rename(columns={"value": "group"}), on=["site", "case"])
    grouped["group"] = grouped["group"].replace("", NOT_STATED)
    keys = [key for key in KEYS if key != "site"]
    patients = grouped.groupby([*keys, "site", "patient"], sort=False)["value"].mean().reset_index()
    parts = [patients.assign(site=EVERYWHERE)]
    if patients["site"].nunique() > 1:
        parts.append(patients)
    told = pd.concat(parts).groupby(KEYS)["value"].agg(patients="size", mean="mean").reset_index()
    told = told.merge(stated(final, ["metric"])[["metric", "unit"]], on="metric", how="left")
    told["patients"] = told["patients"].astype("Int64")
    few = (told["patients"] < least) | (told["unit"] == MIXED)
    told.loc[few, ["patients", "mean"]] = pd.NA
    return told[list(COLUMNS)]


def group_tables(found: pd.DataFrame, scores: pd.DataFrame, least: int) -> list[Table]:
    """A table for each column: rows are groups, first of all sites together, then site by site.

    Args:
        found: see `group_scores`.
        scores: metrics.csv.
        least: as there.
    """
    grid = grid_of(scores[scores["checkpoint"].isin(CHECKPOINTS)])
    columns = found[found["metric"] == HEADLINE].groupby("column", sort=False)
    return [_table(f"test {HEADLINE} by {column}, {grid}", own, least) for column, own in columns]


def _table(title: str, own: pd.DataFrame, least: int) -> Table:
    there = set(own["view"])
    views = [view for view in (*VIEWS, *UNSEEN_ONLY) if view in there]
    columns = [(view, checkpoint) for view in views for checkpoint in CHECKPOINTS]
    rows: list[tuple[str, ...]] = []
    hidden = 0
    for site in sorted(own["site"].unique(), key=lambda site: (site != EVERYWHERE, site)):
        rows += [()] * bool(rows)
        for group, cells in own[own["site"] == site].groupby("group"):
            if cells["mean"].isna().all():
                hidden += 1
            else:
                rows.append(_row(group if site == EVERYWHERE else f"{site}: {group}", cells, columns))
    note = "Mean over patients."
    note += f" {hidden} groups of fewer than {least} patients are not shown." if hidden else ""
    body = tuple(row for number, row in enumerate(rows) if row or rows[number + 1 : number + 2] not in ([], [()]))
    return Table((title, "patients", *(" ".join(column) for column in columns)), body, note)


def _row(title: object, cells: pd.DataFrame, columns: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    means = cells.set_index(["view", "checkpoint"])["mean"].astype(float).dropna().to_dict()
    words = (shown_number(means[column]) if column in means else "not shown" for column in columns)
    return (str(title), str(cells["patients"].max()), *words)
