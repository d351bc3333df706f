"""What was compared, from the runs' own folders: patients of every site, and a paragraph for a paper's methods.

The paragraph holds the items of CLAIM and TRIPOD-AI that settings and counts can fill; what only the authors know is
listed, so that it is not forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from fedseg.common.text import count
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.runs import Run
from fedseg.reporting.compare.tables import Cell, Grid
from fedseg.reporting.summary import WHOLE

SPLITS = ("train", "val", "test")
NEW_SPLITS = "Seeds also change the split."
TO_BE_WRITTEN = (
    "To be written by the authors, since no run knows it: where the images come from and when they were taken, who "
    "was included and why, scanners and protocols, who drew the reference outlines and how well they agree, how this "
    "number of patients came about, ethics and funding (CLAIM 2024; TRIPOD+AI)."
)


def runs_of(analysis: Analysis) -> list[Run]:
    """All runs."""
    return [run for runs in analysis.gathered.runs.values() for run in runs]


def patient_grid(analysis: Analysis) -> Grid:
    """Every site's patients and cases by split; ranges where runs split differently."""
    tables = [_counts(run) for run in runs_of(analysis)]
    sites = sorted({site for table in tables for site, _ in table})
    unknown = set(analysis.gathered.unknown)
    total = {(site, ""): [_total(table, site) for table in tables] for site in sites}
    rows = []
    for site in sites:
        cells = [Cell(f"{site} *" if site in unknown else site), _counted(total[site, ""])]
        cells += [_counted([table.get((site, split), (0, 0)) for table in tables]) for split in SPLITS]
        rows.append(cells)
    note = "Patients, and in brackets cases where these are more; a range where runs split differently."
    if unknown & set(sites):
        note += " * Patients are unknown: each image counts as one."
    return Grid("patients", "Patients by site", ("site", "all", "training", "validation", "test"), rows, note)


def _counts(run: Run) -> dict[tuple[str, str], tuple[int, int]]:
    """(site, split) -> patients and cases of one run; of folds, the whole site is test."""
    table = run.splits[~run.splits["seen"].astype(bool)] if run.held_out else run.splits
    found = table.groupby(["site", "split"])[["patient", "case"]].nunique()
    return {(str(site), str(split)): (int(p), int(c)) for (site, split), (p, c) in _rows(found)}


def _rows(table: pd.DataFrame) -> Iterable[tuple[Any, list[Any]]]:
    return zip(table.index, table.to_numpy().tolist(), strict=True)


def _total(table: Mapping[tuple[str, str], tuple[int, int]], site: str) -> tuple[int, int]:
    own = [numbers for (name, _), numbers in table.items() if name == site]
    return sum(patients for patients, _ in own), sum(cases for _, cases in own)


def _counted(numbers: Sequence[tuple[int, int]]) -> Cell:
    """Patients (cases), with their range over runs."""
    patients, cases = (_span(values) for values in zip(*numbers, strict=True))
    text = patients if patients == cases else f"{patients} ({cases})"
    return Cell(text, float(numbers[0][0]))


def _span(values: Iterable[int]) -> str:
    low, high = min(known := list(values)), max(known)
    return str(low) if low == high else f"{low} to {high}"


def split_sentence(analysis: Analysis) -> str:
    """Whether seeds also change which patients are tested, as the runs' tables of splits have it."""
    seeds: dict[int, set[frozenset[tuple[str, ...]]]] = {}
    for run in runs_of(analysis):
        table = run.splits[["site", "case", "split"]].astype(str)
        seeds.setdefault(run.seed, set()).add(frozenset(table.itertuples(index=False, name=None)))
    if len(seeds) < 2:
        return ""
    if len(set().union(*seeds.values())) == 1:
        return "All seeds have the same split: they change first weights, batches and augmentation only."
    return NEW_SPLITS


def methods_text(analysis: Analysis) -> list[str]:
    """A "Data and methods" in sentences, of what settings and counts tell."""
    settings = common_settings(analysis)
    told = [_data(analysis, settings), _network(settings), _federation(analysis, settings), _evaluation(analysis)]
    return [paragraph for paragraph in told if paragraph] + [TO_BE_WRITTEN]


def common_settings(analysis: Analysis) -> dict[str, Any]:
    """Settings that all runs share."""
    first, *others = (run.settings for run in runs_of(analysis))
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


def _data(analysis: Analysis, settings: Mapping[str, Any]) -> str:
    splits = pd.concat([run.splits for run in runs_of(analysis)], ignore_index=True)
    sites = count(splits["site"].nunique(), "site")
    patients = len(splits[["site", "patient"]].drop_duplicates())
    cases = len(splits[["site", "case"]].drop_duplicates())
    text = f"Data: {sites}, {count(patients, 'patient')}, {count(cases, 'case')} (table below)."
    if unknown := ", ".join(analysis.gathered.unknown):
        text += f" No known patient is cut by a split; at {unknown} patients are unknown, and each image counts as one."
    else:
        text += " No patient is cut by a split."
    regions = [str(name) for name in analysis.gathered.regions["region"].unique() if name != WHOLE]
    text += f" Outlined: {', '.join(regions)}." if regions else ""
    if size := settings.get("data.size"):
        shown = " x ".join(map(str, size)) if isinstance(size, Sequence) and not isinstance(size, str) else str(size)
        text += (
            f" Images were resized to {shown} pixels" + _worded(settings, "data.augment", "; augmentation: {}") + "."
        )
    sentence = split_sentence(analysis)
    if sentence == NEW_SPLITS:
        sentence += " A test patient of one seed may have been a validation patient of another."
    return " ".join(filter(None, (text, sentence)))


def _network(settings: Mapping[str, Any]) -> str:
    if "model.architecture" not in settings:
        return ""
    weights = settings.get("model.encoder_weights")
    start = f"started from {weights} weights" if weights else "started from random weights"
    text = f"Network: {settings['model.architecture']}" + _worded(settings, "model.encoder", " with encoder {}")
    text += _worded(settings, "model.norm", ", {} normalisation") + f", {start}."
    if "training.optimizer" in settings:
        text += f" Optimiser: {settings['training.optimizer']}" + _worded(settings, "training.lr", ", learning rate {}")
        text += _worded(settings, "data.batch_size", ", batches of {}") + _worded(
            settings, "training.loss", "; loss: {}"
        )
        text += "."
    return text


def _federation(analysis: Analysis, settings: Mapping[str, Any]) -> str:
    runs = runs_of(analysis)
    seeds = sorted({run.seed for run in runs})
    named = ", ".join(analysis.gathered.methods)
    text = f"Methods: {named}; {count(len(runs), 'run')}, seeds {', '.join(map(str, seeds))}."
    if "federation.rounds" in settings:
        steps = settings.get("federation.local_steps")
        work = f"{steps} local steps" if steps else _worded(settings, "federation.local_epochs", "{} local epochs")
        text += f" {settings['federation.rounds']} rounds of {work} a site."
    mechanism = settings.get("privacy.mechanism", "none")
    guarded = "no differential privacy" if mechanism == "none" else f"differential privacy by {mechanism}"
    return f"{text} Images stayed at their site in all methods but pooled training; {guarded}."


def _evaluation(analysis: Analysis) -> str:
    options = analysis.options
    chosen = "the round with the best validation score" if options.checkpoint == "best" else "the last round"
    told = [
        f"Evaluation: {options.title} on test patients, of {chosen}; no test score chose anything.",
        "Scores were averaged within a patient.",
        f"Intervals: hierarchical bootstrap, {options.draws} draws, {options.confidence:.0%}.",
        "Tests: sign-flip permutation on patients and t test over patients and seeds, the larger p counts; "
        f"Holm within each family; margin {options.margin:g} {options.points}.",
    ]
    return " ".join(told)


def _worded(settings: Mapping[str, Any], key: str, words: str) -> str:
    """The words with a setting's value; nothing where runs differ in it, or do not tell it."""
    return words.format(settings[key]) if settings.get(key) is not None else ""
