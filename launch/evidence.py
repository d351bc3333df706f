"""What images add to a comparison: how different sites are, and the cases in which two models differ most.

Runs keep no images; their data and saved models are opened again. What cannot be read any more is said, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from configs.compose import ConfigError, load
from datamodules import DataError
from evaluation.statistics import over_seeds
from federation.checkpoint import CheckpointError
from launch.differences import site_differences, update_differences
from launch.experiment import Experiment
from launch.gallery import draw_cases
from launch.run import check_splits
from reporting import ReportingError
from reporting.compare.analysis import GLOBAL, REFERENCE, Analysis, Model
from reporting.compare.report import Case, Extras
from reporting.compare.runs import Run
from reporting.compare.verdicts import Verdict

UNREADABLE = (ConfigError, DataError, CheckpointError, ReportingError)


def look_again(analysis: Analysis, verdicts: Sequence[Verdict], count: int, out: Path) -> Extras:
    """Measure how sites differ, and draw cases.

    Args:
        analysis: the runs.
        verdicts: which two models each site's answer is about.
        count: cases with the largest gain per site, and as many with the largest loss.
        out: folder of the pictures.
    """
    differences, no_differences = _differences(analysis)
    cases, no_cases = _cases(analysis, verdicts, count, out)
    return Extras(differences, no_differences, cases, no_cases)


def _differences(analysis: Analysis) -> tuple[pd.DataFrame | None, str]:
    """By images and masks of one run (all have the same cases), and by the updates of all runs of one method."""
    runs = _reference_runs(analysis)
    if not runs:
        return None, "All runs hold sites out in turn; differences between sites are measured on ordinary runs."
    tables, problem = [], ""
    try:
        tables.append(_by_images(runs[0]))
    except UNREADABLE as error:
        problem = f"Images cannot be looked at again: {error}"
    noted = [update_differences(updates) for run in runs if len(updates := run.folder.updates())]
    if noted:
        together = pd.concat(noted).groupby(["site", "other", "measure"], sort=False)["value"].mean()
        tables.append(together.reset_index())
    return (pd.concat(tables, ignore_index=True) if tables else None), problem


def _by_images(run: Run) -> pd.DataFrame:
    experiment = Experiment(load(run.folder.read_config()))
    experiment.data.setup()
    check_splits(run.folder, experiment.data.splits())
    return site_differences(experiment)


def _reference_runs(analysis: Analysis) -> list[Run]:
    """FedAvg's runs, or those of another method that has noted updates."""
    ordinary = analysis.gathered.ordinary
    chosen = [m.label for m, _ in ordinary if m.name == REFERENCE] or [
        m.label for m, r in ordinary if len(r.folder.updates())
    ]
    label = chosen[0] if chosen else ordinary[0][0].label if ordinary else ""
    return [run for method, run in ordinary if method.label == label]


def _cases(analysis: Analysis, verdicts: Sequence[Verdict], count: int, out: Path) -> tuple[list[Case], str]:
    """Pictures by site; the models that validation chose, of the first seed that both have."""
    wanted: dict[tuple[Model, Model], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.personal is not None and verdict.shared is not None and verdict.test:
            wanted.setdefault((verdict.personal, verdict.shared), []).append(verdict)
    found: list[Case] = []
    problems = []
    for (personal, shared), group in wanted.items():
        gains = {verdict.site: extremes(analysis, personal, shared, verdict.site, count) for verdict in group}
        runs = _runs_of(analysis, personal, shared)
        try:
            drawn = draw_cases(
                {name: run.folder for name, run in runs.items()}, {s: list(g) for s, g in gains.items()}, out
            )
        except UNREADABLE as error:
            problems.append(f"No cases of {', '.join(gains)}: {error}")
            continue
        found += [Case(site, case, gains[site][case], picture) for (site, case), picture in drawn.items()]
    return sorted(found, key=lambda case: (case.site, -case.gain)), " ".join(problems)


def extremes(analysis: Analysis, personal: Model, shared: Model, site: str, count: int) -> dict[str, float]:
    """Cases of the first shared seed with the largest gains, then those with the largest losses: case -> gain.

    Gains are means over seeds, as the test takes them.
    """
    table = analysis.gain(personal, shared, site)
    if table is None:
        return {}
    means = pd.Series(over_seeds(table.to_numpy()), index=table.columns)
    means = means[table.iloc[0].notna()].sort_values(ascending=False)
    gains, losses = means[means > 0].head(count), means[means < 0].tail(count)
    return {str(case): float(gain) for case, gain in pd.concat([gains, losses]).items()}


def _runs_of(analysis: Analysis, personal: Model, shared: Model) -> dict[str, Run]:
    """One run where its own global model is the other one, else one of each method; the first seed of both."""
    own = analysis.twins.get(Model(personal.method, GLOBAL)) == shared
    labels = [personal.method] if own else [personal.method, shared.method]
    seeds = [
        {run.seed for run in analysis.gathered.runs[label] if not run.held_out}
        for label in (personal.method, shared.method)
    ]
    first = min(set.intersection(*seeds))
    return {
        label: next(r for r in analysis.gathered.runs[label] if r.seed == first and not r.held_out) for label in labels
    }
