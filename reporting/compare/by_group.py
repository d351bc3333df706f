"""Scores by groups of patients, of runs that know them (`evaluation.groups`); groups of few are not shown."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedseg.common.text import count
from fedseg.evaluation.statistics import over_seeds
from fedseg.reporting.compare.analysis import Analysis, Model, of_patients
from fedseg.reporting.compare.gather import known_groups
from fedseg.reporting.compare.tables import ABSENT, Cell, Grid, number
from fedseg.reporting.folder import file_name
from fedseg.reporting.groups import EVERYWHERE

HIDDEN = "not shown"
COLUMNS = ["column", "group", "site", "method", "view", "patients", "mean"]


def group_means(analysis: Analysis) -> pd.DataFrame:
    """Of every model the mean over the patients of each group, at all sites together and at each; columns: `COLUMNS`.

    A patient's score is the mean over its cases of that group, then over the seeds that tested it. Groups of fewer
    patients than the minimum have neither a mean nor a number.
    """
    least, rows = analysis.gathered.group_minimum, []
    for (column, group), own in known_groups(analysis.gathered.everyone).groupby(["column", "value"]):
        cases = {str(site): set(names) for site, names in own.groupby("site")["case"]}
        for model in analysis.models:
            for site, scores in _by_site(analysis, model, cases):
                told = (len(scores), float(scores.mean())) if len(scores) >= least else (pd.NA, float("nan"))
                rows.append((column, group, site, *model, *told))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"patients": "Int64"})


def _by_site(
    analysis: Analysis, model: Model, cases: Mapping[str, set[str]]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The scores of a group's patients: at all sites together, then at each site that has some."""
    found = {}
    for site, table in analysis.side_by_side(model, analysis.test[model]).items():
        own = table.loc[:, table.columns.get_level_values("case").isin(cases.get(site, ()))]
        if own.shape[1]:
            found[site] = over_seeds(of_patients(own).to_numpy())
    if found:
        yield EVERYWHERE, np.concatenate(list(found.values()))
    if len(analysis.sites) > 1:
        yield from found.items()


def group_grids(analysis: Analysis) -> tuple[list[Grid], list[Grid]]:
    """For every column a table of all sites together, and one of each site."""
    found, least = group_means(analysis), analysis.gathered.group_minimum
    together, apart = [], []
    for column, own in found.groupby("column", sort=False):
        everywhere = own["site"] == EVERYWHERE
        together.append(_grid(analysis, str(column), own[everywhere], least, by_site=False))
        if not everywhere.all():
            apart.append(_grid(analysis, str(column), own[~everywhere], least, by_site=True))
    return together, apart


def _grid(analysis: Analysis, column: str, found: pd.DataFrame, least: int, *, by_site: bool) -> Grid:
    """Models, at each site if asked, by groups; a group that is shown nowhere has no column."""
    shown = found.dropna(subset=["mean"])
    groups = sorted(shown["group"].unique())
    cells = {(row["site"], row["method"], row["view"], row["group"]): row for row in shown.to_dict("records")}
    there = set(zip(found["site"], found["method"], found["view"], found["group"], strict=True))
    rows = []
    for site in sorted(found["site"].unique()):
        for model in analysis.models:
            keys = [(site, *model, group) for group in groups]
            if any(key in cells for key in keys):
                told = [_cell(cells.get(key), analysis, hidden=key in there) for key in keys]
                rows.append([*([Cell(site)] if by_site else []), Cell(model.label), *told])
    few = found.loc[found["mean"].isna(), ["site", "group"]].drop_duplicates()
    note = f"{analysis.options.unit.capitalize()}. Mean over patients, over the seeds that tested each."
    if len(few):
        note += f" {count(len(few), 'group')} of fewer than {least} patients: {HIDDEN}."
    seen = "" if analysis.seen else "unseen_"
    name = f"{seen}groups_{file_name(column)}{'_by_site' if by_site else ''}"
    title = f"{analysis.options.title} by {column}{' and site' if by_site else ''}{analysis.options.on_grid}"
    return Grid(name, title, (*(["site"] if by_site else []), "model", *groups), rows, note)


def _cell(row: Mapping[Hashable, Any] | None, analysis: Analysis, *, hidden: bool) -> Cell:
    if row is None:
        return Cell(HIDDEN if hidden else ABSENT, float("nan"))
    told = number(row["mean"], analysis.options.scale)
    return Cell(told.text, told.key, count(int(row["patients"]), "patient"))
