"""Every site's model at every site, of runs that have it (`evaluation.cross_sites=true`)."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd

from fedseg.common.text import count
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.page import PagePicture, Section, picture
from fedseg.reporting.compare.plots import DARK, LIGHT, Theme
from fedseg.reporting.compare.runs import with_patients
from fedseg.reporting.compare.tables import Cell, Grid, number
from fedseg.reporting.crossing import NOTE, TITLE, draw_matrix, matrix, off_home


def crossed(analysis: Analysis) -> dict[str, tuple[pd.DataFrame, int]]:
    """Method -> models x sites, mean over the seeds that have it, and how many these are."""
    found = {}
    for label, runs in analysis.gathered.runs.items():
        tables = [
            matrix(with_patients(table, run.splits))
            for run in runs
            if not run.held_out and len(table := run.folder.cross_sites())
        ]
        if tables:
            found[label] = pd.concat(tables).groupby(level=0, sort=False).mean()[tables[0].columns], len(tables)
    return found


def across_section(analysis: Analysis) -> Section | None:
    """A heat map and a table of every method that has them; None if none has."""
    found = crossed(analysis)
    if not found:
        return None
    text = [
        f"{TITLE}, over patients. {NOTE} Framed: at home. A site's model that serves others badly has learnt the site.",
        *(_told(label, *told) for label, told in found.items()),
    ]
    pictures = [_picture(label, values) for label, (values, _) in found.items()]
    return Section("Models at other sites", text, pictures, folded=[_grid(*item) for item in found.items()])


def across_text(analysis: Analysis) -> str:
    """The same as Markdown."""
    found = crossed(analysis)
    if not found:
        raise ReportingError("no run there has cross_sites.csv: python evaluate.py RUN evaluation.cross_sites=true")
    return "\n".join(
        f"{_told(label, *told)}\n\n{_grid(label, told).plain().markdown()}" for label, told in found.items()
    )


def _told(label: str, values: pd.DataFrame, seeds: int) -> str:
    home, away = off_home(values)
    return (
        f"{label}, {count(seeds, 'seed')}: personal models have {100 * home:.1f} at home and {100 * away:.1f} at the "
        "other sites, means over sites that took part."
    )


def _picture(label: str, values: pd.DataFrame) -> PagePicture:
    def drawn(theme: Theme) -> mpl.figure.Figure:
        with mpl.rc_context(theme.settings()):
            return draw_matrix(values, ink=theme.ink)

    return picture(drawn(LIGHT), drawn(DARK), f"{label}: every model at every site")


def _grid(label: str, found: tuple[pd.DataFrame, int]) -> Grid:
    values, seeds = found
    rows = [
        [Cell(str(model)), *(number(float(values.loc[model, site]), 100) for site in values.columns)]
        for model in values.index
    ]
    safe = "".join(c if c.isalnum() else "_" for c in label)
    note = f"Points of 100, {count(seeds, 'seed')}. {NOTE}"
    return Grid(f"cross_{safe}", f"{label}: every model at every site", ("model of", *values.columns), rows, note)
