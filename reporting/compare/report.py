"""The folder that a comparison leaves: one page, tables, plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from reporting.compare.analysis import Analysis
from reporting.compare.page import Picture, Section, file_picture, headline, picture, render, save_figures
from reporting.compare.plots import DARK, LIGHT, draw_all, draw_heterogeneity
from reporting.compare.tables import (
    Grid,
    cost_grid,
    fairness_grid,
    metric_grid,
    region_grid,
    run_grid,
    save_tables,
    score_grid,
    test_grid,
    verdict_grid,
)
from reporting.compare.verdicts import Verdict, amount, verdicts
from reporting.folder import write_atomic
from reporting.summary import Table

PAGE = "report.html"
PARTS = TABLES, PLOTS, CASES = "tables", "plots", "cases"
CAPTIONS = {
    "scores": "Mean and interval of every model; lines: local and pooled training",
    "personal_gains": "Gain of personal models over their global one",
    "transfer": "Gain over local training; red is negative transfer",
    "critical_difference": "Average rank over cases; a bar joins models that are not told apart",
    "ranks": "Rank at each site: mean over seeds, and range",
    "win_tie_loss": "Share of cases that the row's model wins against the column's",
    "heterogeneity": "Gain of the personal model against how different the site is from all others",
    "progress": "Validation Dice over rounds and traffic; dotted: the target",
}


@dataclass(frozen=True)
class Case:
    """A picture of a case in which the personal and the global model differ most.

    Attributes:
        site: its site.
        case: its name.
        gain: of the personal model.
        picture: a PNG file.
    """

    site: str
    case: str
    gain: float
    picture: Path


@dataclass(frozen=True)
class Extras:
    """What is measured on the data itself; each part may be missing, for a reason.

    Attributes:
        differences: site, other, measure, value; None if not measured.
        no_differences: why not.
        cases: pictures of cases.
        no_cases: why there are none.
    """

    differences: pd.DataFrame | None = None
    no_differences: str = ""
    cases: Sequence[Case] = ()
    no_cases: str = ""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        verdicts: one per site.
        answers: the verdicts as a table.
        scores: models x sites.
    """

    page: Path
    verdicts: Sequence[Verdict]
    answers: Table
    scores: Table

    def text(self, stream: TextIO) -> str:
        """What to print on `stream`."""
        lines = [line for verdict in self.verdicts for line in (verdict.text, f"  {verdict.aside}") if line.strip()]
        parts = [self.scores.text(stream), f"{headline(self.verdicts)}.\n", *lines, f"\nThe report: {self.page}"]
        return "\n".join(parts)


def write(analysis: Analysis, output: Path, measure: Callable[[Sequence[Verdict]], Extras]) -> Report:
    """Compute and write everything.

    Args:
        analysis: the runs.
        output: folder of the report.
        measure: what else the data tells, once the verdicts are known.
    """
    found = verdicts(analysis)
    extras = measure(found)
    light, dark = draw_all(analysis, found, LIGHT), draw_all(analysis, found, DARK)
    if extras.differences is not None:
        gains = {verdict.site: float(verdict.test["gain"]) for verdict in found if verdict.test}
        for theme, figures in ((LIGHT, light), (DARK, dark)):
            figure = draw_heterogeneity(telling(extras.differences, gains), gains, analysis.options, theme)
            if figure is not None:
                figures["heterogeneity"] = figure
    pictures = {name: picture(light[name], dark[name], CAPTIONS.get(name, name)) for name in light}
    sections = _sections(analysis, found, extras, pictures)
    page = output / PAGE
    write_atomic(page, render(analysis, found, pictures.get("gain"), sections))
    grids = [verdict_grid(analysis, found), *(grid for s in sections for grid in (*s.grids, *s.folded))]
    save_tables(grids, analysis, found, output / TABLES)
    save_figures(light, output / PLOTS)
    checkpoint = analysis.options.checkpoint
    return Report(page, found, verdict_grid(analysis, found).plain(), score_grid(analysis, checkpoint).plain())


def _sections(
    analysis: Analysis, found: Sequence[Verdict], extras: Extras, pictures: dict[str, Picture]
) -> list[Section]:
    def drawn(*names: str) -> list[Picture]:
        return [pictures[name] for name in names if name in pictures]

    checkpoint = analysis.options.checkpoint
    other = "last" if checkpoint == "best" else "best"
    sections = [
        Section("Scores", pictures=drawn("scores"), grids=[score_grid(analysis, checkpoint)], folded=[
            score_grid(analysis, other), metric_grid(analysis), region_grid(analysis)]),
        Section("Personal against global", pictures=drawn("personal_gains"), folded=[_personal_grid(analysis)]),
        Section("Fairness and local training", _transfer_text(analysis), drawn("transfer"), [fairness_grid(analysis)],
            folded=[_local_grid(analysis)]),
        Section("Ranks", _rank_text(analysis), drawn("critical_difference", "ranks", "win_tie_loss")),
        Section("Cost", pictures=drawn("progress"), grids=[cost_grid(analysis)]),
        _heterogeneity(extras, found, drawn("heterogeneity")),
        _cases(extras, analysis),
    ]  # fmt: skip
    if not analysis.overview["seen"].all():
        grids = [score_grid(analysis, checkpoint, seen=False)]
        folded = [score_grid(analysis, other, seen=False)]
        text = ["Models of federations in which these sites took no part; all their cases are test cases."]
        sections.insert(1, Section("Unseen sites", text, grids=grids, folded=folded))
    return [*sections, Section("Runs", folded=[run_grid(analysis)])]


def _local_grid(analysis: Analysis) -> Grid:
    title = "Every model against local training"
    return test_grid(analysis, "against local training", "against_local", title)


def _personal_grid(analysis: Analysis) -> Grid:
    return test_grid(
        analysis, "personal against global", "personal_against_global", "Every personal model against its global one"
    )


def _transfer_text(analysis: Analysis) -> list[str]:
    """Who gains and who loses by taking part."""
    tests = analysis.tests
    rows = tests[tests["question"] == "against local training"] if len(tests) else tests
    if rows.empty:
        return [
            "There is no local training among these runs (algorithm=local), so nobody's gain from taking part is known."
        ]
    sure = rows[rows["p_holm"] <= analysis.options.alpha]
    told = []
    for words, some in (("Gain", sure[sure["effect"] > 0]), ("Negative transfer", sure[sure["effect"] < 0])):
        named = [
            f"{row['site']} with {row['model']} ({amount(row['gain'], analysis.options)})"
            for row in some.to_dict("records")
        ]
        told.append(f"{words} against local training, significant after Holm: {'; '.join(named) or 'none'}.")
    worse = rows[rows["gain"] < 0]
    counts = ", ".join(
        f"{site} with {len(own)} of {(rows['site'] == site).sum()} models" for site, own in worse.groupby("site")
    )
    return [*told, f"Lower mean than local training, significant or not: {counts or 'none'}."]


def _rank_text(analysis: Analysis) -> list[str]:
    found, stability = analysis.ranks, analysis.stability
    if len(analysis.models) < 2:
        return ["One model has no rank."]
    text = []
    if np.isfinite(found.p):
        differ = "differ" if found.p <= analysis.options.alpha else "are not shown to differ"
        text.append(
            f"Over {found.blocks} cases the models' ranks {differ} (Friedman p = {found.p:.2g}; Kendall's W "
            f"{found.agreement:.2f}, 1 if all cases rank the models alike)."
        )
    for level, word in (("seed", "seeds"), ("site", "sites")):
        tau = stability[level]
        if np.isfinite(tau):
            text.append(
                f"Two {word} order the models alike with Kendall's tau {tau:.2f} on average (1: same order, "
                "0: unrelated)."
            )
    return text


def _heterogeneity(extras: Extras, found: Sequence[Verdict], pictures: Sequence[Picture]) -> Section:
    """How different sites are, and whether gain from personalisation follows it."""
    section = Section("Heterogeneity", pictures=pictures, problem=extras.no_differences)
    gains = {verdict.site: float(verdict.test["gain"]) for verdict in found if verdict.test}
    if extras.differences is None or not pictures:
        return section
    rows = telling(extras.differences, gains)
    text = ["Each dot is a site: how different its data is from all other sites', and what its personal model gains."]
    if len(gains) >= 3:
        told = []
        for measure, own in rows.groupby("measure", sort=False):
            rho = float(spearmanr(own["value"], [gains[site] for site in own["site"]]).statistic)
            told.append(f"{measure} {rho:+.2f}".replace("-", "−"))
        text.append(
            f"Spearman correlation over {len(gains)} sites: {', '.join(told)}. So few sites show a tendency, no proof."
        )
    section.text = text
    return section


def telling(differences: pd.DataFrame, gains: Mapping[str, float]) -> pd.DataFrame:
    """Each site against all others, for measures by which sites differ at all."""
    rows = differences[(differences["other"] == "") & differences["site"].isin(list(gains))].dropna(subset=["value"])
    return rows.groupby("measure", sort=False).filter(lambda own: own["value"].nunique() > 1)


def _cases(extras: Extras, analysis: Analysis) -> Section:
    shown = []
    for case in extras.cases:
        kind = "gain" if case.gain > 0 else "loss"
        caption = f"{case.site}, {case.case}: {kind} {amount(case.gain, analysis.options)}"
        shown.append(
            (caption, file_picture(case.picture, f"{case.site}, {case.case}: truth, global and personal contours"))
        )
    text = [
        "At each site the test cases in which its personal model gains most over the global one, and those in "
        "which it loses most."
    ]
    return Section("Cases", text if shown else (), gallery=shown, problem=extras.no_cases)


__all__ = ["Case", "Extras", "Report", "write"]
