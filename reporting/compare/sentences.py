"""Tables and claims about runs as Markdown, for documents whose numbers come from run folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedseg.common.text import count
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.choice import choose
from fedseg.reporting.compare.design import patient_grid, runs_of, split_sentence
from fedseg.reporting.compare.page import badge, facts, headline, notes, small_print, tally
from fedseg.reporting.compare.verdicts import amount, gain_with_interval, units, verdicts
from fedseg.reporting.summary import Table
from fedseg.reporting.units import signed

CLAIM = re.compile(r"(?P<model>.+?) above (?P<other>.+?) (?:at (?P<n>\d+) of (?P<m>\d+) sites|(?P<mean>on average))")


def named_model(analysis: Analysis, label: str) -> Model:
    """The model of a label such as "ditto personal"; of models that are one, the first.

    Raises:
        ReportingError: there is none.
    """
    known = {model.label: first for model, first in analysis.twins.items()}
    if label not in known:
        raise ReportingError(f"no model is called {label!r}; there are {', '.join(sorted(known))}")
    return known[label]


def facts_text(analysis: Analysis) -> str:
    """What was compared, whether seeds change the split, and what a reader must know."""
    runs = runs_of(analysis)
    seeds = sorted({run.seed for run in runs})
    told = [f"{'; '.join(facts(analysis))}. Seeds: {', '.join(map(str, seeds))}.", split_sentence(analysis)]
    lines = [" ".join(filter(None, told)), *(f"- {note}" for note in notes(analysis))]
    return "\n\n".join([lines[0], *(["\n".join(lines[1:])] if lines[1:] else [])]) + "\n"


def patients_text(analysis: Analysis) -> str:
    """Patients and cases by site."""
    return patient_grid(analysis).plain().markdown()


def scores_text(analysis: Analysis) -> str:
    """Models x sites: mean, and deviation between seeds where there are several."""
    table = analysis.overview
    table = table[(table["checkpoint"] == analysis.options.checkpoint) & table["seen"]]
    cells = {(row["method"], row["view"], row["site"]): row for row in table.to_dict("records")}
    tests = {str(row["site"]): units(row) for row in table.to_dict("records")}
    sites = [*analysis.sites, OVERALL]
    header = (
        f"test {analysis.options.title}",
        *(f"{site}, {tests[site]}" if site != OVERALL else site for site in sites),
    )
    rows = tuple(
        (model.label, *(score_cell(cells.get((model.method, model.view, site)), analysis) for site in sites))
        for model in analysis.models
    )
    note = f"{analysis.options.unit.capitalize()}, {analysis.options.checkpoint} round; {seed_words(analysis)}."
    return Table(header, rows, note).markdown()


def seed_words(analysis: Analysis) -> str:
    """What a cell of `score_cell` says of seeds."""
    seeds = len({run.seed for run in runs_of(analysis)})
    return "mean ± standard deviation between seeds" if seeds > 1 else "one seed"


def score_cell(row: Mapping[Any, Any] | None, analysis: Analysis) -> str:
    """The mean of a row of `Analysis.overview`, and its deviation between seeds where there are several."""
    if row is None or not np.isfinite(row["mean"]):
        return "–"
    scale = analysis.options.scale
    spread = f" ± {row['seed_spread'] * scale:.1f}" if np.isfinite(row["seed_spread"]) else ""
    return f"{row['mean'] * scale:.1f}{spread}"


def answer_text(analysis: Analysis) -> str:
    """The verdicts on the federation and on every site, and their small print."""
    choice = choose(analysis)
    found = verdicts(analysis, choice)
    lines = [f"**{headline(found)}.** {tally(found)}", ""]
    for verdict in found:
        provisional = " (provisional)" if verdict.provisional else ""
        lines.append(f"- {badge(verdict)}{provisional}: {verdict.text}")
        lines += [f"  - {detail}" for detail in verdict.details]
    small = [f"- {line}" for line in small_print(analysis, choice, found)]
    return "\n".join([*lines, *(["", "How to take it:", "", *small] if small else [])]) + "\n"


def headline_text(analysis: Analysis) -> str:
    """The federation's answer, and how many sites have which."""
    found = verdicts(analysis)
    return f"**{headline(found)}.** {tally(found)}\n"


def against_text(analysis: Analysis, label: str) -> str:
    """Every model against one: mean over sites with its interval, and at which sites it lies above."""
    other = named_model(analysis, label)
    lines, above = [], 0
    for model in analysis.models:
        gains = site_gains(analysis, model, other)
        if model == other or not gains:
            continue
        row = analysis.compare(model, other, OVERALL)
        assert row is not None  # it has gains at sites
        above += row["gain"] > 0
        told = gain_with_interval(row, analysis.options)
        lines.append(f"- {model.label}: {told} over sites; {_where(gains, analysis)}.")
    first = f"{above} of {count(len(lines), 'model')} lie above {other.label} on average over sites:"
    return "\n".join([first, "", *lines]) + "\n"


def site_gains(analysis: Analysis, model: Model, other: Model) -> dict[str, float]:
    """Site -> gain of one model over another, where both were tested."""
    found = {site: analysis.compare(model, other, site) for site in analysis.sites}
    return {site: float(row["gain"]) for site, row in found.items() if row is not None}


def _where(gains: Mapping[str, float], analysis: Analysis) -> str:
    def listed(sites: list[str]) -> str:
        told = (f"{site} {signed(gains[site] * analysis.options.scale)}" for site in sites)
        return f" ({', '.join(told)})" if sites else ""

    above = [site for site, gain in gains.items() if gain > 0]
    below = [site for site, gain in gains.items() if gain <= 0]
    return (
        f"above at {len(above)} of {count(len(gains), 'site')}{listed(above)}, not above at {len(below)}{listed(below)}"
    )


def check_claim(analysis: Analysis, claim: str) -> None:
    """Hold a claim such as "fedavg global above local personal at 4 of 4 sites" against the numbers.

    Raises:
        ReportingError: it cannot be read, or is not what the runs say.
    """
    match = CLAIM.fullmatch(claim.strip())
    if match is None:
        raise ReportingError(f"{claim!r} is no claim; write: MODEL above MODEL at N of M sites, or ... on average")
    model, other = named_model(analysis, match["model"]), named_model(analysis, match["other"])
    gains = site_gains(analysis, model, other)
    above = sum(gain > 0 for gain in gains.values())
    if match["mean"]:
        row = analysis.compare(model, other, OVERALL)
        if row is None or not row["gain"] > 0:
            told = "they share no test" if row is None else amount(row["gain"], analysis.options)
            raise ReportingError(f"{claim!r} is not what the runs say: {told} over sites")
    elif (above, len(gains)) != (int(match["n"]), int(match["m"])):
        raise ReportingError(f"{claim!r} is not what the runs say: above at {above} of {len(gains)} sites")
