"""The folder that a comparison leaves: one page, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from fedseg.common.files import write_atomic
from fedseg.common.text import count
from fedseg.evaluation.statistics import LEAST_PATIENTS
from fedseg.reporting.compare.across import across_section
from fedseg.reporting.compare.analysis import (
    AGAINST_GLOBAL,
    AGAINST_LOCAL,
    AGAINST_OWN_STATISTICS,
    AGAINST_REFERENCE,
    OVERALL,
    Analysis,
)
from fedseg.reporting.compare.by_group import group_grids, group_means
from fedseg.reporting.compare.choice import choose
from fedseg.reporting.compare.design import methods_text, patient_grid
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.page import (
    PagePicture,
    Section,
    badge,
    counted_once,
    file_picture,
    headline,
    picture,
    render,
    same_models,
    save_figures,
    small_print,
    tally,
)
from fedseg.reporting.compare.plots import DARK, LIGHT, draw_all, draw_heterogeneity
from fedseg.reporting.compare.tables import (
    Grid,
    cost_grid,
    fairness_grid,
    metric_grid,
    region_grid,
    region_site_grids,
    run_grid,
    save_tables,
    score_grid,
    test_grid,
    verdict_grid,
)
from fedseg.reporting.compare.verdicts import SURE_SEEDS, Verdict, amount, probability, units, verdicts
from fedseg.reporting.summary import Table
from fedseg.reporting.units import signed

PAGE = "report.html"
LEAST_SITES = 3  # for a correlation
PARTS = TABLES, PLOTS, CASES = "tables", "plots", "cases"
CAPTIONS = {
    "gain": "Gain of the personal model over the global one, by site",
    "scores": "Mean and interval of every model; lines: local and pooled training",
    "tuning": "Methods as they come and tuned by trials on validation cases",
    "personal_gains": "Gain of personal models over their global one",
    "transfer": "Gain over local training; red is negative transfer",
    "critical_difference": "Average rank of these trained models over patients; a bar joins what is not told apart",
    "ranks": "Rank at each site: mean over seeds, and range",
    "win_tie_loss": "Share of patients that the row's model wins against the column's",
    "heterogeneity": "Gain of the personal model against how different the site is from all others",
    "progress": "Validation Dice (network's grid) over rounds, traffic and, on a clock, time; dotted: the target",
}


@dataclass(frozen=True)
class ShownCase:
    """A picture of a case in which the personal and the global model differ most.

    Attributes:
        site: its site.
        picture: a PNG file.
        case: its name.
        gain: of the personal model, mean over the seeds that tested the case.
        seed: whose models are drawn.
        own_gain: with that seed.
        seeds: how many tested the case.
    """

    site: str
    picture: Path
    case: str
    gain: float
    seed: int
    own_gain: float
    seeds: int


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
    cases: Sequence[ShownCase] = ()
    no_cases: str = ""


def without_images(analysis: Analysis, why: str) -> Extras:
    """What can be told without looking at images again."""
    return Extras(analysis.update_distances, f"Images are not looked at again: {why}", (), f"Not drawn: {why}")


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        verdicts: of the mean over sites, then one per site.
        small_print: what a reader of the verdicts must know.
        unseen: what is said about sites that took no part.
        answers: the verdicts as a table.
        scores: models x sites.
        regions: the same for each region, where there are several.
        groups: models x groups of patients, where the runs know some.
    """

    page: Path
    verdicts: Sequence[Verdict]
    small_print: Sequence[str]
    unseen: Sequence[str]
    answers: Table
    scores: Table
    regions: Sequence[Table] = ()
    groups: Sequence[Table] = ()

    def text(self, stream: TextIO) -> str:
        """What to print on `stream`."""
        lines = []
        for verdict in self.verdicts:
            lines += [f"{'PROVISIONAL ' if verdict.provisional else ''}{badge(verdict)}  {verdict.text}"]
            lines += [f"    {detail}" for detail in verdict.details]
        told = [f"- {line}" for line in self.small_print]
        head = [f"{headline(self.verdicts)}.", f"{tally(self.verdicts)}\n"]
        if not self.verdicts:
            head = head[:1]
        tables = [table.text(stream) for table in (self.scores, *self.regions, *self.groups)]
        parts = [*tables, *head, *lines, *self.unseen, "", *told, f"\nThe report: {self.page}"]
        return "\n".join(parts)


def write(analysis: Analysis, output: Path, measure: Callable[[Sequence[Verdict]], Extras]) -> Report:
    """Compute and write everything.

    Args:
        analysis: the runs.
        output: folder of the report.
        measure: what else the data tells, once the verdicts are known.
    """
    choice = choose(analysis)
    found = verdicts(analysis, choice)
    told = small_print(analysis, choice, found)
    extras = measure(found)
    light, dark = draw_all(analysis, found, LIGHT), draw_all(analysis, found, DARK)
    gains = analysis.answering[1] if analysis.answering else {}
    rows = None if extras.differences is None else telling(extras.differences, gains)
    if rows is not None:
        for theme, figures in ((LIGHT, light), (DARK, dark)):
            figure = draw_heterogeneity(rows, gains, analysis.options, theme)
            if figure is not None:
                figures["heterogeneity"] = figure
    pictures = {name: picture(light[name], dark[name], CAPTIONS.get(name, name)) for name in light}
    sections = _sections(analysis, extras, rows, pictures, found)
    page = output / PAGE
    write_atomic(page, render(analysis, found, told, pictures.get("gain"), sections))
    answers = verdict_grid(analysis, found)
    grids = [answers, *(grid for s in sections for grid in (*s.grids, *s.folded))]
    beside = {"heterogeneity": extras.differences, **_group_tables(analysis)}
    save_tables(grids, analysis, found, beside, output / TABLES)
    save_figures(light, output / PLOTS)
    scores = score_grid(analysis, analysis.options.checkpoint, seen=bool(analysis.sites))
    unseen = [] if analysis.overview["seen"].all() else _unseen_text(analysis.unseen)
    by_region = [grid.plain(grid.title) for grid in region_site_grids(analysis, seen=bool(analysis.sites))]
    together, _ = group_grids(analysis if analysis.sites else analysis.unseen)
    by_group = [grid.plain(grid.title) for grid in together]
    return Report(page, found, told, unseen, answers.plain(), scores.plain(), by_region, by_group)


def _group_tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    tables = {"groups": group_means(analysis), "unseen_groups": group_means(analysis.unseen)}
    return {name: table for name, table in tables.items() if len(table)}


def _sections(
    analysis: Analysis,
    extras: Extras,
    differences: pd.DataFrame | None,
    pictures: dict[str, PagePicture],
    found: Sequence[Verdict],
) -> list[Section]:
    def drawn(*names: str) -> list[PagePicture]:
        return [pictures[name] for name in names if name in pictures]

    checkpoint = analysis.options.checkpoint
    other = "last" if checkpoint == "best" else "best"
    sections = [
        Section("Scores", pictures=drawn("scores", "tuning"), grids=[score_grid(analysis, checkpoint)], folded=[
            score_grid(analysis, other), metric_grid(analysis), region_grid(analysis),
            *region_site_grids(analysis)]),
        Section("Personal against global", pictures=drawn("personal_gains"), folded=[_personal_grid(analysis)]),
        Section("Fairness and local training", _transfer_text(analysis), drawn("transfer"), [fairness_grid(analysis)],
            folded=[_local_grid(analysis)]),
        Section("Ranks", _rank_text(analysis), drawn("critical_difference", "ranks", "win_tie_loss")),
        Section("Cost", pictures=drawn("progress"), grids=[cost_grid(analysis)]),
        _heterogeneity(analysis, extras, differences, drawn("heterogeneity")),
        _cases(extras, analysis, found),
    ]  # fmt: skip
    if (across := across_section(analysis)) is not None:
        sections.insert(2, across)
    together, by_site = group_grids(analysis)
    if together:
        sections.insert(1, Section("Groups of patients", grids=together, folded=by_site))
    if not analysis.overview["seen"].all():
        unseen = analysis.unseen
        grids = [
            score_grid(analysis, checkpoint, seen=False),
            test_grid(
                unseen,
                AGAINST_REFERENCE,
                "unseen_against_fedavg",
                "Every model against FedAvg, sites that took no part",
            ),
            test_grid(
                unseen,
                AGAINST_OWN_STATISTICS,
                "unseen_against_own_statistics",
                "Every model against FedAvg with the site's own normalisation statistics",
            ),
        ]
        together, by_site = group_grids(unseen)
        grids = [*(grid for grid in grids if grid.rows), *together]
        costs = replace(cost_grid(unseen), name="unseen_cost")
        folded = [score_grid(analysis, other, seen=False), costs, *by_site]
        sections.insert(1, Section("Unseen sites", _unseen_text(unseen), grids=grids, folded=folded))
    if not analysis.sites:
        sections = [section for section in sections if section.title == "Unseen sites"]
    return [
        *sections,
        Section("Data and methods", methods_text(analysis), grids=[patient_grid(analysis)]),
        Section("How to read this", reading(analysis.options)),
        Section("Runs", folded=[run_grid(analysis)]),
    ]


def _unseen_text(unseen: Analysis) -> list[str]:
    """Who was tested, which models are one, and what is shown against FedAvg over sites."""
    cases = counted_once(unseen)
    text = [
        "Models of federations in which these sites took no part; all their cases are test cases: "
        f"{count(len(unseen.sites), 'site')}, {units(cases)}.",
        *same_models(unseen),
    ]
    if unseen.tests.empty:
        return [*text, "No other model stands beside FedAvg here, so there is nothing to test."]
    opponents = {AGAINST_REFERENCE: "FedAvg", AGAINST_OWN_STATISTICS: "FedAvg with the site's own statistics"}
    for question, opponent in opponents.items():
        rows = unseen.answers_to(question)
        over = rows[rows["site"] == OVERALL]
        told = [
            f"{row['model']} {amount(row['gain'], unseen.options)}, {units(row)}, "
            f"corrected {probability(row['p_holm'])}"
            for row in over.to_dict("records")
        ]
        text += [f"Against {opponent}, mean over sites: {'; '.join(told)}."] if told else []
    if unseen.answers_to(AGAINST_OWN_STATISTICS).size:
        text.append(
            "Own statistics: FedAvg's global model whose normalisation takes its running statistics from the site's "
            "images, without labels; a method for such sites must be better than this."
        )
    return text


def reading(options: Options) -> list[str]:
    """What the page's words mean, in short."""
    better = "higher" if options.higher_is_better else "lower"
    return [
        "Gain: the score of one model minus that of another on the same patients; positive is better "
        f"({better} {options.title}). Dice and other shares are in points of 100{options.on_grid}.",
        "The unit is the patient: scores are averaged over a patient's cases, and in tests over the seeds.",
        f"Interval: {options.confidence:.0%}, from {options.draws} resamples of seeds, of patients within a site, of a "
        "patient's cases and, for means over sites, of sites; that of a gain is no narrower than its t interval, and "
        f"ends where the metric does. Fewer than {LEAST_PATIENTS} patients have none.",
        "p: the larger of two. The sign-flip permutation test asks whether other patients could turn the difference "
        "between these trained models; the t test whether other patients and other seeds could. Corrected by Holm "
        "within the answers over sites, within those at the sites, and within the tables of all tests.",
        f"A model is recommended that is shown better than one of the two others, and not worse than the other by more "
        f"than {options.margin:g} {options.points} (margin=). Shown: corrected p at most {options.alpha:g}, and the "
        "interval excludes 0. Equivalent: the interval lies within the margin. Nothing shown is not no difference.",
        f"Provisional: fewer than {SURE_SEEDS} seeds, so that what another training would bring is hardly known.",
        "Ranks: of these trained models on each patient, averaged; two differ on these patients that are further apart "
        "than the critical difference (Nemenyi). What other trainings would bring is not in it: scores are averaged "
        "over seeds first, and a lucky training is a difference like any other.",
        "Models were chosen on validation patients of all sites. Where another seed draws another split, a test "
        "patient of one seed may be a validation patient of another; data.split_seed keeps the split.",
    ]


def _local_grid(analysis: Analysis) -> Grid:
    title = "Every model against local training"
    return test_grid(analysis, AGAINST_LOCAL, "against_local", title)


def _personal_grid(analysis: Analysis) -> Grid:
    title = "Every personal model against its global one"
    return test_grid(analysis, AGAINST_GLOBAL, "personal_against_global", title)


def _transfer_text(analysis: Analysis) -> list[str]:
    """Who gains and who loses by taking part."""
    rows = analysis.answers_to(AGAINST_LOCAL)
    if rows.empty:
        return [
            "There is no local training among these runs (algorithm=local), so nobody's gain from taking part is known."
        ]
    rows = rows[rows["site"] != OVERALL]
    sure = rows[rows["p_holm"] <= analysis.options.alpha]
    told = []
    for words, some in (("Gain", sure[sure["gain"] > 0]), ("Negative transfer", sure[sure["gain"] < 0])):
        named = [
            f"{row['site']} with {row['model']} ({amount(row['gain'], analysis.options)})"
            for row in some.to_dict("records")
        ]
        told.append(f"{words} against local training, significant after Holm: {'; '.join(named) or 'none'}.")
    worse = rows[rows["gain"] < 0]
    counts = ", ".join(
        f"{site} with {len(own)} of {(rows['site'] == site).sum()} models" for site, own in worse.groupby("site")
    )
    told += [analysis.hopeless] if analysis.hopeless else []
    return [*told, f"Lower mean than local training, significant or not: {counts or 'none'}."]


def _rank_text(analysis: Analysis) -> list[str]:
    found, stability = analysis.ranks, analysis.stability
    if len(analysis.ranked) < 2:
        return ["One model has no rank."]
    text = []
    seeds = ", ".join(map(str, analysis.ranked_seeds))
    if np.isfinite(found.p):
        differ = "differ on these patients" if found.p <= analysis.options.alpha else "are not shown to differ"
        text.append(
            f"Over {found.blocks} patients (seeds {seeds}) the ranks of these trained models {differ} (Friedman p = "
            f"{found.p:.2g}; Kendall's W {found.agreement:.2f}, 1 if all patients rank the models alike); what other "
            "trainings would bring is not in it."
        )
    for level, word in (("seed", "seeds"), ("site", "sites")):
        if np.isfinite(tau := stability[level]):
            told = f"{tau:.2f} on average (1: same order, 0: unrelated, -1: opposite)".replace("-", "−")
            text.append(f"Kendall's tau between the orders of the models at two {word} is {told}.")
    if left := [model.label for model in analysis.models if model not in analysis.complete]:
        text.append(f"Not ranked, for want of seeds or sites: {', '.join(left)}.")
    return text


def _heterogeneity(
    analysis: Analysis, extras: Extras, differences: pd.DataFrame | None, pictures: Sequence[PagePicture]
) -> Section:
    """How different sites are, and whether gain from personalisation follows it."""
    section = Section("Heterogeneity", pictures=pictures, problem=extras.no_differences)
    if differences is None or not pictures or analysis.answering is None:
        return section
    model, gains = analysis.answering
    text = [
        "Each dot is a site: how different its data is from all other sites', and what the personal model of one "
        f"method gains there ({model.method}, the best on validation)."
    ]
    told = []
    for measure, own in differences.groupby("measure", sort=False):
        if len(own) >= LEAST_SITES:
            rho = float(spearmanr(own["value"], [gains[site] for site in own["site"]]).statistic)
            few = f" ({len(own)} sites)" if len(own) < len(gains) else ""
            told.append(f"{measure} {signed(rho, 2)}{few}")
    if told:
        least = 2 / math.factorial(len(gains))
        text.append(
            f"Spearman correlation over {len(gains)} sites: {', '.join(told)}. Even a perfect order of {len(gains)} "
            f"sites has p = {least:.2g}, and {count(len(told), 'measure')} {'is' if len(told) == 1 else 'are'} "
            "looked at."
        )
    section.text = text
    return section


def telling(differences: pd.DataFrame, gains: Mapping[str, float]) -> pd.DataFrame:
    """Each site against all others, for measures by which sites differ at all."""
    rows = differences[(differences["other"] == "") & differences["site"].isin(list(gains))].dropna(subset=["value"])
    return rows.groupby("measure", sort=False).filter(lambda own: own["value"].nunique() > 1)


def _cases(extras: Extras, analysis: Analysis, found: Sequence[Verdict]) -> Section:
    shown = []
    names = {"personal": "personal", "global": "global"}  # with the methods, which are the same at all sites
    names |= {one: f"{one} ({model.method})" for verdict in found[:1] for one, model in verdict.models.items()}
    for case in extras.cases:
        kind = "gain" if case.gain > 0 else "loss"
        caption = f"{case.site}, {case.case}: {kind} {amount(case.own_gain, analysis.options)} with seed {case.seed}"
        if case.seeds > 1:
            caption += f", mean of {case.seeds} seeds {amount(case.gain, analysis.options)}"
        shown.append(
            (caption, file_picture(case.picture, f"{case.site}, {case.case}: truth, global and personal contours"))
        )
    text = [
        f"At each site the test cases in which its {names['personal']} model gains most over the {names['global']} "
        "one, and those in which it loses most, by the difference of their scores."
    ]
    return Section("Cases", text if shown else (), gallery=shown, problem=extras.no_cases)


__all__ = ["Extras", "Report", "ShownCase", "write"]
