"""Runs found on disk, and one run read and condensed."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedseg.reporting import ReportingError
from fedseg.reporting.folder import CONFIG, DURING_TRAINING, FINDINGS, METRICS, SPLITS, RunFolder, file_name, patient_of
from fedseg.reporting.summary import CHECKPOINTS, ENCODER, case_scores
from fedseg.reporting.units import in_common, stated

FOLDS = "leave_one_site_out"
ACROSS = "flower"  # the engine of sites on machines of their own, which keep the table of splits
PATIENTS_UNKNOWN = "patients unknown"
IDENTITY = ["checkpoint", "split", "view", "site", "seen"]
NEEDED = ("seed", "algorithm.name", "algorithm.preset", "data.name")
COSTS: dict[str, Callable[[list[float]], float]] = {
    "wall_seconds": sum,
    "cpu_seconds": sum,
    "peak_memory_bytes": max,
    "peak_gpu_bytes": max,
}
CURVE_METRIC = "dice"  # rounds are scored by quick metrics only


@dataclass(frozen=True)
class LeftOut:
    """A folder that takes no part.

    Attributes:
        path: the folder.
        reason: why, and what to do about it.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Run:
    """What a comparison needs of one finished run.

    Attributes:
        folder: where it stands.
        settings: dotted key -> value.
        cases: (checkpoint, split, view, site, seen, case, metric, value, patient), regions averaged.
        regions: (checkpoint, split, view, site, seen, region, metric, value): mean over patients of each one's cases.
        curve: (round, view, value): validation Dice, mean over seen sites.
        rounds: (round, steps, seconds): sums over sites; no seconds where some did not tell theirs.
        traffic: (round, down, up): bytes of all sites.
        work: (round, site, steps), as often as a site trained.
        carried: (round, site, bytes), by group and direction.
        splits: (site, case, patient, split, seen); of all folds where sites were held out in turn; of a run across
            machines, what its scores tell: training cases are missing.
        groups: (site, case, column, value): groups of patients, where they were asked for (`evaluation.groups`).
        unknown: sites whose patients are unknown, so that each case counts as one.
        cost: name -> what all processes of the run used together; NaN for what its folder does not tell.
        defined: site, case and region of test scores of the metric that are numbers.
        undefined: of those that are none: the case does not show the region.
        units: metric -> unit of the lengths in it.
        lengths: site -> unit of the lengths there; empty where the folder does not say.
        grid: that the final scores stand on ("own" or "network").
    """

    folder: RunFolder
    settings: dict[str, Any]
    cases: pd.DataFrame
    regions: pd.DataFrame
    curve: pd.DataFrame
    rounds: pd.DataFrame
    traffic: pd.DataFrame
    work: pd.DataFrame
    carried: pd.DataFrame
    splits: pd.DataFrame
    groups: pd.DataFrame
    unknown: frozenset[str]
    cost: dict[str, float]
    defined: frozenset[tuple[str, str, str]]
    undefined: frozenset[tuple[str, str, str]]
    units: dict[str, str]
    lengths: dict[str, str]
    grid: str

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings["seed"])

    @property
    def split_seed(self) -> int:
        """The seed that split the cases: the run's own, unless the data's is fixed."""
        fixed = self.settings.get("data.split_seed")
        return self.seed if fixed is None else int(fixed)

    @property
    def held_out(self) -> bool:
        """Whether its scores are of sites that were held out in turn."""
        return bool(self.settings.get("protocol") == FOLDS)


def find_runs(places: Sequence[str]) -> list[Path]:
    """Folders that hold runs, in the order given.

    Args:
        places: folders of runs, folders that contain some at any depth, or globs.

    Raises:
        ReportingError: a place that does not exist, or that holds no run.
    """
    found: dict[Path, Path] = {}  # by what it is; a run may be named in two ways
    for place in places:
        folders = [Path(place)] if Path(place).exists() else _matching(place)
        if not folders:
            raise ReportingError(f"{place}: there is no such folder (and no folder matches it as a pattern)")
        runs = [run for folder in folders for run in _runs_below(folder)]
        if not runs:
            raise ReportingError(f"{place} holds no run: no config.yaml at any depth; give folders made by train.py")
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def _matching(pattern: str) -> list[Path]:
    """What a pattern finds, which may start at the root."""
    return sorted(Path(found) for found in glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob is relative)


def _runs_below(folder: Path) -> list[Path]:
    """Runs in a folder and below; a run's own folders are not searched (folds belong to their run)."""
    runs = []
    for name, below, files in os.walk(folder):
        below.sort()
        if CONFIG in files:
            runs.append(Path(name))
            below.clear()
    return runs


def read_run(path: Path, metric: str) -> Run | LeftOut:
    """Read a run; big tables are condensed at once.

    Args:
        path: its folder.
        metric: that the comparison is about.

    Returns:
        The run, or why it takes no part: unfinished, damaged, without scores of that metric or of single cases.
    """
    try:
        return _read(path, metric)
    except (ReportingError, OSError, ValueError, LookupError) as error:
        return LeftOut(path, f"damaged: {type(error).__name__}: {error}")


def _read(path: Path, metric: str) -> Run | LeftOut:
    folder = RunFolder(path)
    settings = folder.settings()
    if missing := [key for key in NEEDED if key not in settings]:
        return LeftOut(path, f"its config.yaml is not one of train.py (no {', '.join(missing)})")
    scores = folder.scores()
    final = scores[scores["checkpoint"].isin(CHECKPOINTS)]
    if len(final) and (final["view"] == ENCODER).all():
        return LeftOut(path, "a pre-training run: it has an encoder, and no model that segments")
    scored, ended = set(final["checkpoint"]) == set(CHECKPOINTS), (path / "summary.csv").is_file()
    if not scored and ended:
        again = f"restore it from a copy, or score again: python train.py output={path} resume=true"
        return LeftOut(path, f"damaged: {METRICS} lacks scores that the run's summary is of; {again}")
    if not (scored and ended):
        return LeftOut(path, f"not finished; go on with: python train.py output={path} resume=true")
    if settings.get("evaluation.test") is False:
        return LeftOut(path, "scored no test case (evaluation.test=false), as what chooses settings; train with these")
    if not (final["metric"] == metric).any():
        there = ", ".join(final["metric"].unique())
        return LeftOut(path, f"has no scores of {metric} (evaluation.metrics={there}); choose metric= among these")
    if (final["case"] == "").any():
        cure = "take deployment.case_scores=pseudonyms for a run that will be compared"
        return LeftOut(path, f"its sites told means only, and cases cannot be paired; {cure}")
    final = final.drop(columns="round")
    splits = _splits(folder, settings, final)
    done = pd.concat([part.rounds() for part in _parts(folder, settings)])
    moved = pd.concat([part.traffic() for part in _parts(folder, settings)])
    return Run(
        folder=folder,
        settings=settings,
        cases=with_patients(case_scores(final.assign(round=0)).drop(columns="round"), splits),
        regions=over_patients(with_patients(final, splits), [*IDENTITY, "region", "metric"]),
        curve=_curve(scores),
        rounds=_sums(done),
        traffic=_bytes(moved),
        work=_training(done)[["round", "site", "steps"]],
        carried=moved[["round", "site", "bytes"]],
        splits=splits,
        groups=pd.concat([part.groups() for part in _parts(folder, settings)]).drop_duplicates(ignore_index=True),
        unknown=_unknown(folder, settings, splits),
        cost=_cost(folder),
        defined=_places(final, metric, known=True),
        undefined=_places(final, metric, known=False),
        units=dict(stated(final, ["metric"])[["metric", "unit"]].itertuples(index=False, name=None)),
        lengths=dict(stated(final, ["site"])[["site", "unit"]].itertuples(index=False, name=None)),
        grid=in_common(final["grid"].unique()),
    )


def _places(final: pd.DataFrame, metric: str, *, known: bool) -> frozenset[tuple[str, str, str]]:
    rows = final[(final["metric"] == metric) & (final["split"] == "test") & (final["value"].notna() == known)]
    return frozenset(rows[["site", "case", "region"]].itertuples(index=False, name=None))


def _curve(scores: pd.DataFrame) -> pd.DataFrame:
    during = scores[
        (scores["checkpoint"] == DURING_TRAINING)
        & (scores["split"] == "val")
        & scores["seen"]
        & (scores["metric"] == CURVE_METRIC)
    ]
    cases = during.groupby(["round", "view", "site", "case"])["value"].mean()
    sites = cases.groupby(["round", "view", "site"]).mean()
    return sites.groupby(["round", "view"]).mean().reset_index()


def _cost(folder: RunFolder) -> dict[str, float]:
    processes = folder.costs()
    complete = bool(processes) and len(processes) == folder.processes()
    told: dict[str, float] = {}
    for name, together in COSTS.items():
        known = [float(value) for process in processes if (value := process.get(name)) is not None]
        told[name] = float(together(known)) if complete and len(known) == len(processes) else float("nan")
    return told


def _training(rounds: pd.DataFrame) -> pd.DataFrame:
    return rounds[rounds["task"].isin(("train", "personalise"))]


def _sums(rounds: pd.DataFrame) -> pd.DataFrame:
    sums = _training(rounds).groupby("round", as_index=False)[["steps", "seconds"]].sum()
    return sums if _training(rounds)["seconds"].notna().all() else sums.assign(seconds=float("nan"))


def _bytes(traffic: pd.DataFrame) -> pd.DataFrame:
    table = traffic.pivot_table(index="round", columns="direction", values="bytes", aggfunc="sum", fill_value=0)
    return table.reindex(columns=["down", "up"], fill_value=0).reset_index()


def _parts(folder: RunFolder, settings: dict[str, Any]) -> list[RunFolder]:
    """The folders of the federations that a run is made of: itself, or its folds."""
    if settings.get("protocol") != FOLDS:
        return [folder]
    return [RunFolder(folder.path / file_name(site)) for site in sorted(folder.scores()["site"].unique())]


def with_patients(cases: pd.DataFrame, splits: pd.DataFrame) -> pd.DataFrame:
    """Scores of cases with the patient of each."""
    known = splits[["site", "case", "patient"]].drop_duplicates(["site", "case"])
    joined = cases.merge(known, on=["site", "case"], how="left")
    return joined.assign(patient=joined["patient"].fillna(joined["case"]))


def over_patients(cases: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean scores by these columns: those of a patient's cases are averaged first, as everywhere in a comparison."""
    of_patients = cases.groupby([*keys, "patient"], observed=True, sort=False)["value"].mean()
    return of_patients.groupby([*keys], observed=True, sort=False).mean().reset_index()


def _splits(folder: RunFolder, settings: dict[str, Any], final: pd.DataFrame) -> pd.DataFrame:
    columns = ["site", "case", "patient", "split", "seen"]
    if settings.get("engine") == ACROSS:
        told = final[["site", "case", "split", "seen"]].drop_duplicates(ignore_index=True)
        return told.assign(patient=told["case"].map(patient_of))[columns]
    parts = _parts(folder, settings)
    if parts == [folder]:
        return _split_rows(folder)[columns]
    return pd.concat([_split_rows(part)[columns].assign(fold=part.path.name) for part in parts], ignore_index=True)


def _unknown(folder: RunFolder, settings: dict[str, Any], splits: pd.DataFrame) -> frozenset[str]:
    """Sites at which nothing says which images are of one patient, and names hint that some are (the check's finding).

    Across machines nothing is known where no pseudonym tells a patient; nor in a folder of an earlier version, which
    kept no findings, where the data are files and each case is its own patient.
    """
    own = {site for site, rows in splits.groupby("site") if (rows["case"] == rows["patient"]).all()}
    if settings.get("engine") == ACROSS:
        return frozenset(map(str, own))
    parts = _parts(folder, settings)
    if any((part.path / FINDINGS).is_file() for part in parts):
        told = {row["site"] for part in parts for row in part.findings() if row["kind"] == PATIENTS_UNKNOWN}
        return frozenset(told & own)
    return frozenset(map(str, own)) if settings.get("data.root") else frozenset()


def _split_rows(folder: RunFolder) -> pd.DataFrame:
    table = folder.splits()
    if table.empty:
        raise ReportingError(f"{folder.path / SPLITS} is missing or empty; restore it from a copy of the run")
    return table
