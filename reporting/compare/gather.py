"""Runs that may be compared: refused where they may not, named by method, and joined into one table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import yaml

from fedseg.evaluation import INVENTED
from fedseg.reporting import ReportingError
from fedseg.reporting.circumstance import CIRCUMSTANCE, ENGINE
from fedseg.reporting.compare.runs import ACROSS, LeftOut, Run
from fedseg.reporting.folder import GROUPS, NETWORK_GRID, RunFolder
from fedseg.reporting.groups import NOT_STATED
from fedseg.reporting.summary import ENTROPY, OWN_STATISTICS
from fedseg.reporting.units import GRIDS, MIXED, in_common

# What may differ between runs of one method.
WITHIN = (*CIRCUMSTANCE, *ENGINE, "seed", "protocol", "stages", "evaluation.", "data.split_seed", "data.unseen",
    "algorithm.preset", "algorithm.name", "data.preset", "model.preset")  # fmt: skip
# What a method may do with the data: part of the method. Every other setting of the data must be the same.
TRAINING_DATA = ("data.batch_size", "data.sampling", "data.augment", "data.labelled_patients", "data.unlabelled",
    "data.neighbours", "data.channels", "data.public", "data.public_images")  # fmt: skip
SHARED = ("evaluation.tolerance", "evaluation.choose_by")
MADE_BY = {
    OWN_STATISTICS: ("evaluation.statistics_per",),
    ENTROPY: ("evaluation.entropy_passes", "evaluation.entropy_per", "evaluation.entropy_lr"),
}
"""Views, and the settings that say what they are: runs that scored one agree on these."""
DIAL_KEYS = ("data.appearance", "data.annotation", "data.structure", "data.amount")
"""Of the phantom: what its hospitals differ in."""
SHOWN_FOLDERS = 2
NAMED_METHODS = 16  # a note names all methods of so many
NAMED_TOGETHER = 3  # else so many that have a value in common, and so many that have one of their own
TUNED = re.compile(r"(.+)_tuned \(tuned, \d+ trials(?:, .+)?\)")
"""What `_labels` calls a preset that `sweep.py tune` wrote, and the method's own."""
_WRITTEN: dict[str, str] = {}  # most settings are the same in all runs
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A run's settings -> the default of every setting that it could have."""


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed only.

    Attributes:
        label: algorithm, and the settings that tell it from other methods of the same name.
        name: of the algorithm.
        settings: without circumstances.
        seeds: of its ordinary runs.
    """

    label: str
    name: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]

    def distance(self, other: Method) -> int:
        """In how many settings beside the algorithm's own two methods differ."""
        keys = {key for key in (*self.settings, *other.settings) if not key.startswith("algorithm.")}
        return sum(self.settings.get(key) != other.settings.get(key) for key in keys)


@dataclass(frozen=True)
class Gathered:
    """Everything that is compared.

    Attributes:
        methods: by label.
        runs: label of the method -> its runs.
        cases: method, seed, checkpoint, split, view, site, seen, case, metric, value, patient.
        regions: the same by region instead of case, patients averaged.
        left_out: folders that take no part.
        notes: what a reader should know before comparing.
    """

    methods: dict[str, Method]
    runs: dict[str, list[Run]]
    cases: pd.DataFrame
    regions: pd.DataFrame
    left_out: list[LeftOut]
    notes: list[str]

    @property
    def grid(self) -> str:
        """The grid that the scores stand on."""
        grid = in_common(run.grid for runs in self.runs.values() for run in runs)
        return GRIDS.get(grid, grid)

    def unit(self, metric: str) -> str:
        """Of a metric's lengths; empty where the runs do not say."""
        return in_common(run.units.get(metric, "") for runs in self.runs.values() for run in runs)

    def check_unit(self, metric: str) -> None:
        """Refuse a metric that is in mm at some sites and in pixels at others.

        Raises:
            ReportingError: it is; the message names the sites.
        """
        if self.unit(metric) != MIXED:
            return
        sites = sorted({site for run in self.everyone for site in run.lengths})
        told = [f"{in_common(run.lengths.get(site) for run in self.everyone)} at {site}" for site in sites]
        raise ReportingError(
            f"metric={metric} has lengths in {', '.join(told)}: means and answers over these sites would mix both. "
            "Take metric=dice; or state the spacing of images that have none (spacing in DIR/SITE/site.yaml, in mm) "
            "and run again"
        )

    @property
    def everyone(self) -> list[Run]:
        """All runs."""
        return [run for runs in self.runs.values() for run in runs]

    @property
    def group_minimum(self) -> int:
        """Groups of fewer patients are not shown: the strictest minimum of the runs that know groups."""
        minima = (int(run.settings["evaluation.group_minimum"]) for run in self.everyone if len(run.groups))
        return max(minima, default=0)

    @property
    def unknown(self) -> list[str]:
        """Sites whose patients are unknown in some run."""
        return sorted({site for runs in self.runs.values() for run in runs for site in run.unknown})

    @property
    def ordinary(self) -> list[tuple[Method, Run]]:
        """Runs in which sites were scored by a federation that they took part in."""
        return [(self.methods[label], run) for label, runs in self.runs.items() for run in runs if not run.held_out]


def gather(found: Iterable[Run | LeftOut], defaults: Defaults | None = None) -> Gathered:
    """Join runs.

    Args:
        found: what `read_run` returned.
        defaults: today's defaults of all settings of a run; settings that a run lacks, because it is older than they
            are, are taken to have them. None: they stay missing, and tell methods apart.

    Raises:
        ReportingError: no run is left, two runs have the same settings and seed, or runs cannot be compared; the
            message names the fields that differ, and in which folders.
    """
    runs, left_out = [], []
    for one in found:
        if isinstance(one, LeftOut):
            left_out.append(one)
        else:
            runs.append(one)
    if not runs:
        told = "\n".join(f"  {one.path}: {one.reason}" for one in left_out)
        raise ReportingError(f"no run is left to compare\n{told}")
    runs, younger = (runs, []) if defaults is None else with_younger_settings(runs, defaults)
    check_comparable(runs)
    known_groups(runs)  # refused now, where two runs disagree
    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        grouped[run.settings["algorithm.name"], signature(own_settings(run.settings))].append(run)
    _check_repeats(grouped.values())
    labels = _labels(list(grouped.values()))
    by_label = {
        label: sorted(group, key=lambda run: run.seed) for label, group in zip(labels, grouped.values(), strict=True)
    }
    by_label = dict(sorted(by_label.items()))
    methods = {label: _method(label, group) for label, group in by_label.items()}
    return Gathered(
        methods,
        by_label,
        _joined(by_label, "cases"),
        _joined(by_label, "regions"),
        left_out,
        [*younger, *_notes(methods, by_label)],
    )


def known_groups(runs: Sequence[Run]) -> pd.DataFrame:
    """Site, case, column and value (`evaluation.groups`): what all runs know together.

    Raises:
        ReportingError: two of them put one case into different groups.
    """
    place = ["site", "case", "column"]
    every = pd.concat(
        [pd.DataFrame(columns=[*place, "value", "run"]), *(run.groups.assign(run=str(run.path)) for run in runs)]
    )
    every["column"] = every["column"].str.lower()
    told = every.drop_duplicates([*place, "value"])
    differing = told[told.duplicated(place, keep=False)].sort_values(place, kind="stable")
    if len(differing):
        one, other = differing.iloc[:2].to_dict("records")
        raise ReportingError(
            f"site {one['site']}, case {one['case']}: {one['column']} is {one['value']!r} in {one['run']}/{GROUPS}, "
            f"but {other['value']!r} in {other['run']}/{GROUPS}: the manifest changed between these runs. Remove "
            f"{GROUPS} of those that were wrong; all runs are then grouped as the others say"
        )
    return told[[*place, "value"]].replace({"value": {"": NOT_STATED}})


def with_younger_settings(runs: Sequence[Run], defaults: Defaults) -> tuple[list[Run], list[str]]:
    """Runs that are older than some settings, with these at their defaults.

    Returns:
        The runs, and a note that says what was filled in.
    """
    of_views = {key for keys in MADE_BY.values() for key in keys}
    every = {
        (_owner(run, key), key) for run in runs for key in run.settings if key in of_views or not key.startswith(WITHIN)
    }
    filled: list[Run] = []
    told: dict[str, Any] = {}
    for run in runs:
        wanted = {key for owner, key in every if key not in run.settings and owner == _owner(run, key)}
        known = defaults(run.settings) if wanted else {}
        lacking = {key: known[key] for key in sorted(wanted & known.keys())}
        told |= lacking
        filled.append(replace(run, settings={**run.settings, **lacking}) if lacking else run)
    if not told:
        return filled, []
    listed = ", ".join(f"{key}={signature(value)}" for key, value in sorted(told.items()))
    return filled, [f"Some runs are older than these settings, which are taken at their defaults: {listed}."]


def _owner(run: Run, key: str) -> str:
    """Which method, data set or network a setting belongs to; of no other one can a run lack it."""
    group = key.partition(".")[0]
    return str(run.settings.get(f"{group}.name", ""))


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run's method."""
    own = {key: value for key, value in settings.items() if not key.startswith(WITHIN)}
    if own.get("pretrained"):
        own["pretrained"] = _pretraining(str(own["pretrained"]))
    return own


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose scores do not mean the same.

    Raises:
        ReportingError: settings of the data or of the metrics differ, or cases or splits do.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if _must_agree(key))
    problems = [told for key in keys if (told := _disagreement(key, [(run.settings.get(key), run) for run in runs]))]
    ordinary = [run for run in runs if not run.held_out]
    if told := _disagreement("data.unseen", [(sorted(run.settings.get("data.unseen") or ()), run) for run in ordinary]):
        problems.append(told)
    problems += _view_problems(runs)
    if told := _grid_problem(runs):
        problems.append(told)
    if not problems:
        problems = _split_problems(runs) or _definition_problems(runs)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        cure = "compare runs that agree, one group at a time"
        if any(problem.startswith(DIAL_KEYS) for problem in problems):
            cure += "; gain against each dial of the phantom: python -m fedseg.reporting.dials FOLDER"
        raise ReportingError(f"these runs cannot be compared:\n{listed}\n{cure}")


def _view_problems(runs: Sequence[Run]) -> list[str]:
    """A view of one name would be two kinds of models."""
    told = []
    for view, keys in MADE_BY.items():
        scored = [run for run in runs if (run.cases["view"] == view).any()]
        values = {key: [(run.settings[key], run) for run in scored if key in run.settings] for key in keys}
        told += [problem for key in keys if (problem := _disagreement(key, values[key]))]
    return told


def _grid_problem(runs: Sequence[Run]) -> str:
    """Scores on the network's grid are no match for those on the cases' own."""
    told = _disagreement("the grid of the final scores", [(run.grid, run) for run in runs])
    older = [run for run in runs if run.grid == NETWORK_GRID]
    if not told or not older:
        return told
    here = [run for run in older if run.settings.get("engine") != ACROSS]
    cures = [f"score its saved models again: python evaluate.py {here[0].path} evaluation.grid=own"] if here else []
    if len(here) < len(older):
        cures.append("across machines the sites score again when the run is resumed")
    return f"{told}; {'; '.join(cures)}"


def _must_agree(key: str) -> bool:
    if key in SHARED:
        return True
    return key.startswith("data.") and key not in TRAINING_DATA and not key.startswith(WITHIN)


def _disagreement(key: str, values: Sequence[tuple[Any, Run]]) -> str:
    """Which value stands in which folder; empty if there is one value only."""
    where: dict[str, list[str]] = defaultdict(list)
    for value, run in values:
        where[signature(value)].append(str(run.path))
    if len(where) < 2:
        return ""
    return f"{key} is " + ", but ".join(f"{value} in {_folders(paths)}" for value, paths in where.items())


def _folders(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:SHOWN_FOLDERS])
    return shown if len(paths) <= SHOWN_FOLDERS else f"{shown} and {len(paths) - SHOWN_FOLDERS} more"


def _split_problems(runs: Sequence[Run]) -> list[str]:
    """Runs of one split seed have the same splits, and all runs the same cases."""
    problems = []
    first: dict[tuple[bool, int], Run] = {}
    for run in runs:
        other = first.setdefault((run.held_out, run.split_seed), run)
        if told := _difference(other, run, list(run.splits.columns)):
            problems.append(f"splits (splits.csv) of the same split seed {run.split_seed}: {told}")
        elif run.settings.get("engine") == ACROSS == other.settings.get("engine"):
            continue  # which cases train is not told
        elif told := _difference(runs[0], run, ["site", "case", "patient"]):
            problems.append(f"cases (splits.csv): {told}")
    return problems


def _difference(a: Run, b: Run, columns: list[str]) -> str:
    if a is b or a.splits[columns].equals(b.splits[columns]):
        return ""
    rows = [{tuple(map(str, row)) for row in run.splits[columns].itertuples(index=False)} for run in (a, b)]
    apart = sorted(rows[0] ^ rows[1])
    if not apart:
        return ""
    one = apart[0]
    here, there = (a, b) if one in rows[0] else (b, a)
    told = ", ".join(f"{column} {value}" for column, value in zip(columns, one, strict=True))
    return f"{len(apart)} rows differ; the first ({told}) stands in {here.path}, not in {there.path}"


def _definition_problems(runs: Sequence[Run]) -> list[str]:
    """Older versions scored cases without a region, agreement on nothing as 1; such a run is no match for others."""
    undefined: dict[tuple[str, str, str], Run] = {}
    for run in runs:
        undefined |= dict.fromkeys(run.undefined - undefined.keys(), run)
    for run in runs:
        if scored := sorted(undefined.keys() & run.defined):
            site, case, region = scored[0]
            other = undefined[scored[0]]
            return [
                f"{len(scored)} scores of cases that do not show a region count in {run.path}, which an older version "
                f"made, and not in {other.path} (the first: site {site}, case {case}, {region}); train the older again"
            ]
    return []


def _check_repeats(groups: Iterable[Sequence[Run]]) -> None:
    for group in groups:
        first: dict[tuple[int, int, bool], Run] = {}
        for run in group:
            other = first.setdefault((run.seed, run.split_seed, run.held_out), run)
            if other is not run:
                raise ReportingError(
                    f"{other.path} and {run.path} have the same settings and seed {run.seed}; a run would count twice: "
                    "leave one of them out"
                )
        _check_unseen_once(group)
        seeds: dict[tuple[int, bool], Run] = {}
        for run in group:
            other = seeds.setdefault((run.seed, run.held_out), run)
            if other is not run:
                raise ReportingError(
                    f"{other.path} and {run.path} differ in data.split_seed only "
                    f"({other.split_seed}, {run.split_seed}); "
                    "give them different seeds, or leave data.split_seed empty: the split follows the seed"
                )


def _check_unseen_once(group: Sequence[Run]) -> None:
    """A site that was held out for good in one run, and in turn in another, would count twice."""
    folds = {run.seed: run for run in group if run.held_out}
    for run in group:
        other = folds.get(run.seed)
        sites = set() if run.held_out or other is None else set(run.cases.loc[~run.cases["seen"], "site"])
        if other is not None and (twice := sorted(sites & set(other.cases["site"]))):
            raise ReportingError(
                f"site {twice[0]} took no part in {run.path} (data.unseen), and was held out in turn in {other.path}; "
                f"with seed {run.seed} it would count twice: compare them apart"
            )


def signature(value: Any) -> str:
    """A setting as text, the same for equal settings."""
    told = repr(value)
    if told not in _WRITTEN:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=True)
        _WRITTEN[told] = text.replace("\n...", "").strip()
    return _WRITTEN[told]


def _pretraining(folder: str) -> str:
    """What an encoder comes from: runs of one method start from different folders."""
    origin = RunFolder(folder)
    if not origin.holds_run:
        return folder
    settings = origin.settings()
    return f"{settings.get('algorithm.preset')}, {settings.get('federation.rounds')} rounds"


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The preset's name, and the settings in which groups of that name differ."""
    presets = [str(group[0].settings["algorithm.preset"]) for group in groups]
    own = [own_settings(group[0].settings) for group in groups]
    labels = []
    for preset, settings in zip(presets, own, strict=True):
        peers = [other for name, other in zip(presets, own, strict=True) if name == preset]
        differing = sorted({key for peer in peers for key in peer if any(p.get(key) != peer[key] for p in peers)})
        told = [f"{key.removeprefix('algorithm.')}={signature(settings.get(key))}" for key in differing]
        if trials := settings.get("training.trials"):
            told = [
                f"tuned, {trials} trials",
                *(setting for setting in told if not setting.startswith("training.trials=")),
            ]
        labels.append(f"{preset} ({', '.join(told)})" if told else preset)
    return labels


def _method(label: str, runs: Sequence[Run]) -> Method:
    seeds = tuple(sorted({run.seed for run in runs}))
    return Method(label, str(runs[0].settings["algorithm.name"]), own_settings(runs[0].settings), seeds)


def _joined(by_label: Mapping[str, Sequence[Run]], table: str) -> pd.DataFrame:
    parts = []
    for label, runs in by_label.items():
        for run in runs:
            rows: pd.DataFrame = getattr(run, table)
            parts.append(rows.assign(method=label, seed=run.seed))
    joined = pd.concat(parts, ignore_index=True)
    words = joined.columns.difference(["seed", "seen", "value"])
    return joined.astype(dict.fromkeys(words, "category"))


def _notes(methods: Mapping[str, Method], runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Differences that do not forbid a comparison, and that a reader must know."""
    notes = []
    together = [method.settings for method in methods.values()]
    for key in sorted({key for settings in together for key in settings if not key.startswith("algorithm.")}):
        where: dict[str, list[str]] = defaultdict(list)
        for label, method in methods.items():
            where[signature(method.settings.get(key))].append(label)
        if len(where) > 1:
            notes.append(f"Methods differ in {key}: {_told(where)}.")
    notes += _notes_on_data([run for group in runs.values() for run in group])
    units: dict[str, set[str]] = defaultdict(set)
    for metric, unit in (told for group in runs.values() for run in group for told in run.units.items()):
        units[metric].add(unit)
    if mixed := [metric for metric, told in units.items() if in_common(told) == MIXED]:
        notes.append(
            f"{', '.join(mixed)}: in mm where the spacing is known, and in pixels elsewhere; no mean over sites is "
            "shown, and tables/metrics.csv has the sites'."
        )
    seeds = {label: sorted({run.seed for run in group}) for label, group in runs.items()}
    every = sorted({seed for own in seeds.values() for seed in own})
    for label, own in seeds.items():
        if own != every:
            notes.append(f"{label} has seeds {own} of {every}; it is paired with others on seeds that both have.")
    metrics = {label: set.intersection(*({*run.cases["metric"]} for run in group)) for label, group in runs.items()}
    shared = set.intersection(*metrics.values())
    if extra := sorted(set.union(*metrics.values()) - shared):
        notes.append(f"Not all runs have {', '.join(extra)} (evaluation.metrics differs).")
    return notes


def _told(where: Mapping[str, Sequence[str]]) -> str:
    """Values of a setting and the methods that have them; of many methods, how many have the same."""
    few = sum(map(len, where.values())) <= NAMED_METHODS
    told = {
        value: ", ".join(labels) if few or len(labels) <= NAMED_TOGETHER else f"{len(labels)} methods"
        for value, labels in where.items()
    }
    own = [value for value, labels in where.items() if len(labels) == 1]
    hidden = own if not few and len(own) > NAMED_TOGETHER else []
    shown = [f"{value} ({who})" for value, who in told.items() if value not in hidden]
    return "; ".join([*shown, f"{len(hidden)} methods with a value of their own"] if hidden else shown)


def _notes_on_data(runs: Sequence[Run]) -> list[str]:
    """Data in different places, which only the names of cases tell apart, and sites that no test case speaks for."""
    notes = []
    roots = sorted({str(run.settings["data.root"]) for run in runs if run.settings.get("data.root")})
    if len(roots) > 1:
        notes.append(
            f"The data lies in different folders ({', '.join(roots)}); sites and cases have the same names there, and "
            "are taken to be the same images and masks."
        )
    ordinary = [run for run in runs if not run.held_out]
    seen = {site for run in ordinary for site in run.splits.loc[run.splits["seen"], "site"]}
    with_score = [run.cases[(run.cases["split"] == "test") & run.cases["value"].notna()] for run in ordinary]
    tested = {site for cases in with_score for site in cases.loc[cases["metric"] != INVENTED, "site"]}
    if untested := sorted(seen - tested):
        notes.append(f"No test cases that show a region, and so no answer: {', '.join(untested)}.")
    return notes
