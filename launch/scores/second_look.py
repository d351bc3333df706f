"""What images add to a comparison: how different sites are, and the cases in which two models differ most.

Runs keep no images; their data and saved models are opened again. What cannot be read any more is said, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError
from fedseg.evaluation.statistics import over_seeds
from fedseg.federation.checkpoint import CheckpointError
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import settings
from fedseg.launch.folders.restore import check_data
from fedseg.launch.scores.differences import site_differences
from fedseg.launch.scores.gallery import draw_cases
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import GLOBAL, Analysis, Model
from fedseg.reporting.compare.report import Extras, ShownCase
from fedseg.reporting.compare.runs import Run
from fedseg.reporting.compare.verdicts import Verdict

UNREADABLE = (ConfigError, DataError, CheckpointError, ReportingError)


def look_again(
    analysis: Analysis, verdicts: Sequence[Verdict], count: int, out: Path, elsewhere: Sequence[str] = ()
) -> Extras:
    """Measure how sites differ, and draw cases.

    Args:
        analysis: the runs.
        verdicts: which two models each site's answer is about.
        count: cases with the largest gain per site, and as many with the largest loss.
        out: folder of the pictures.
        elsewhere: see `launch.folders.reopen.settings`.
    """
    differences, no_differences = _differences(analysis, elsewhere)
    cases, no_cases = _cases(analysis, verdicts, count, out, elsewhere)
    return Extras(differences, no_differences, cases, no_cases)


def _differences(analysis: Analysis, elsewhere: Sequence[str]) -> tuple[pd.DataFrame | None, str]:
    """By images and masks of one run (all have the same cases), and by the updates of all runs of one method."""
    if not analysis.reference_runs:
        return None, "All runs hold sites out in turn; differences between sites are measured on ordinary runs."
    tables, problem = [], ""
    try:
        tables.append(_by_images(analysis.reference_runs[0], elsewhere))
    except UNREADABLE as error:
        problem = f"Images cannot be looked at again: {error}"
    if analysis.update_distances is not None:
        tables.append(analysis.update_distances)
    return (pd.concat(tables, ignore_index=True) if tables else None), problem


def _by_images(run: Run, elsewhere: Sequence[str]) -> pd.DataFrame:
    experiment = Experiment(settings(run.folder, elsewhere))
    experiment.data.setup()
    check_data(run.folder, experiment.data)
    return site_differences(experiment)


def _cases(
    analysis: Analysis, verdicts: Sequence[Verdict], count: int, out: Path, elsewhere: Sequence[str]
) -> tuple[list[ShownCase], str]:
    """Pictures of the models that validation chose, each with a seed that tested the case."""
    wanted: dict[tuple[Model, Model, int], dict[str, list[Extreme]]] = {}
    for verdict in verdicts:
        if verdict.personal is not None and verdict.shared is not None and verdict.site in analysis.sites:
            for one in extremes(analysis, verdict.personal, verdict.shared, verdict.site, count):
                group = wanted.setdefault((verdict.personal, verdict.shared, one.seed), {})
                group.setdefault(verdict.site, []).append(one)
    found: list[ShownCase] = []
    problems = []
    for (personal, shared, seed), sites in wanted.items():
        runs = {name: run.folder for name, run in _runs_of(analysis, personal, shared, seed).items()}
        choices = {site: [one.case for one in group] for site, group in sites.items()}
        try:
            drawn = draw_cases(runs, choices, out, checkpoint=analysis.options.checkpoint, elsewhere=elsewhere)
        except UNREADABLE as error:
            problems.append(f"No cases of {', '.join(choices)} with seed {seed}: {error}")
            continue
        for site, chosen in sites.items():
            found += [ShownCase(site, drawn[site, one.case], *one) for one in chosen]
    return sorted(found, key=lambda case: (case.site, -case.gain)), " ".join(problems)


class Extreme(NamedTuple):
    """A case in which a personal and a global model differ much: its mean gain, and that of the seed to draw."""

    case: str
    gain: float
    seed: int
    own_gain: float
    seeds: int


def extremes(analysis: Analysis, personal: Model, shared: Model, site: str, count: int) -> list[Extreme]:
    """Cases with the largest gains, then those with the largest losses, over all seeds.

    Gains are means over the seeds that tested a case, as the test takes them; drawn is the seed nearest to the mean.
    """
    table = analysis.gain(personal, shared, site)
    if table is None:
        return []
    table = table.droplevel("patient", axis=1)
    means = pd.Series(over_seeds(table.to_numpy()), index=table.columns).sort_values(ascending=False)
    chosen = pd.concat([means[means > 0].head(count), means[means < 0].tail(count)])
    found = []
    for case, gain in chosen.items():
        own = {int(str(seed)): float(value) for seed, value in table[case].dropna().items()}
        seed = min(own, key=lambda one: (abs(own[one] - gain), one))
        found.append(Extreme(str(case), float(gain), seed, own[seed], len(own)))
    return found


def _runs_of(analysis: Analysis, personal: Model, shared: Model, seed: int) -> dict[str, Run]:
    """One run where its own global model is the other one, else one of each method; of one seed."""
    own = analysis.twins.get(Model(personal.method, GLOBAL)) == shared
    labels = [personal.method] if own else [personal.method, shared.method]
    return {
        label: next(r for r in analysis.gathered.runs[label] if r.seed == seed and not r.held_out) for label in labels
    }
