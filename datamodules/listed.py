"""What the names of cases, patients and files tell before any image is opened."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedseg.datamodules.cases import Case, check_cases, join_shared
from fedseg.datamodules.findings import Finding, Report, few
from fedseg.datamodules.readers import stem_of, suffix_of
from fedseg.datamodules.readers.kinds import lacks

MASK_WORDS = re.compile(r"(^|[_\-. ])(mask|seg|segmentation|label|labels|gt|annotation|manual\d?)$", re.IGNORECASE)
ODD_NAME = re.compile(r"(\bcopy\b|\bkopie\b|\(\d+\)|~|[^\x20-\x7e]|^\s|\s$|\s\s)", re.IGNORECASE)
# What the first part of a name may say of an image without naming its patient.
NO_PATIENTS = frozenset(
    [
        "benign",
        "malignant",
        "normal",
        "healthy",
        "lesion",
        "tumor",
        "tumour",
        "cancer",
        "polyp",
        "disease",
        "train",
        "training",
        "val",
        "valid",
        "validation",
        "test",
        "testing",
        "image",
        "images",
        "img",
        "imgs",
        "case",
        "cases",
        "scan",
        "scans",
        "slice",
        "slices",
        "frame",
        "frames",
        "picture",
        "photo",
        "sample",
        "left",
        "right",
    ]
)
# Names in which a patient's images are numbered, the most telling first.
NUMBERED = (
    r"^(.+?)[_\- ]+\d+$",
    r"^(.*\d.*)[_\- ]+\w{1,4}$",
    r"^(.*\d)[A-Za-z]+\d+$",
)


def listed(cases: Sequence[Case], states_patients: Callable[[str], bool], report: Report) -> list[Case]:
    """Looks at a list of cases, and gives those that can be read on, cases of one image with one patient.

    Args:
        cases: Of all sites.
        states_patients: Whether the patients of a site were given, rather than taken from the names of cases.
        report: Told of everything that would stop a run, or that a user should know.
    """
    in_order = sorted(cases, key=lambda case: (case.site, case.case))
    kept = _decodable(check_cases(join_shared(in_order, report), report), report)
    for finding in (
        *_not_labelled(kept),
        *_at_two_sites(kept, states_patients),
        *_unknown(kept, states_patients),
        *_names(kept),
    ):
        report(finding)
    return kept


def _decodable(cases: list[Case], report: Report) -> list[Case]:
    """Cases that need no library but those that are installed; one finding for each library names all others."""
    lacking: dict[tuple[str, str], dict[int, Finding]] = defaultdict(dict)
    for case in cases:
        for name in (*case.image_files, *case.mask_files):
            if needed := lacks(suffix_of(Path(name))):
                package, cure = needed
                found = Finding("unreadable file", f"needs the package {package}", cure, case.site, case.case, name)
                lacking[needed].setdefault(id(case), found)
    for of_one in lacking.values():
        first = next(iter(of_one.values()))
        more = f", as {len(of_one) - 1} more cases do" if len(of_one) > 1 else ""
        report(replace(first, what=first.what + more))
    return [case for case in cases if not any(id(case) in of_one for of_one in lacking.values())]


def _not_labelled(cases: Iterable[Case]) -> Iterator[Finding]:
    for case in cases:
        if not case.labelled:
            yield Finding(
                "not labelled", "no mask", "none needed: it trains unlabelled", case.site, case.case, case.image
            )


def _at_two_sites(cases: Sequence[Case], states_patients: Callable[[str], bool]) -> Iterator[Finding]:
    """Patients at two sites, where patients are known."""
    sites: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.patient != case.case or case.slices or states_patients(case.site):
            sites[case.patient].add(case.site)
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, places in sites.items():
        if len(places) > 1:
            shared[tuple(sorted(places))].append(patient)
    for together, patients in shared.items():
        what = f"{len(patients)} patient(s) at {', '.join(together)}: {few(patients)}"
        cure = "if it is one person, keep the patient at one site; if ids merely repeat, ignore this"
        yield Finding("patient at two sites", what, cure, together[0])


def _unknown(cases: Sequence[Case], states_patients: Callable[[str], bool]) -> Iterator[Finding]:
    """Sites whose patients are unknown although names hint at several images each."""
    by_site: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_site[case.site].append(case)
    for site, members in by_site.items():
        if states_patients(site) or any(case.patient != case.case or case.slices for case in members):
            continue
        names = [case.case for case in members]
        if pattern := likely_pattern(names):
            found = re.compile(pattern)
            first = patient_in(found, names[0])
            several = [name for name in names if patient_in(found, name) == first]
            what = f"names look like several images of one patient ({few(several, 3)}), yet each counts as a patient"
            cure = (
                f"set data.patient_pattern='{pattern}', or fill the manifest's column patient; where every image is a "
                "patient of its own, data.patient_pattern='^(.+)$'"
            )
            yield Finding("patients unknown", what, cure, site)


def likely_pattern(names: Sequence[str]) -> str:
    """A pattern that finds a patient in every name, each in several on average; empty where names hint at none."""
    first = {re.split(r"[_\- ]", name)[0] for name in names}
    words = "|".join(sorted(word for word in first if word.lower() in NO_PATIENTS))
    behind = [rf"^(?:{words})[_\- ]+(.+?)[_\- ]+\d+$"] if words else []
    for pattern in (*behind, *NUMBERED):
        found = re.compile(pattern)
        patients = {name: patient_in(found, name) for name in names}
        several = set(patients.values())
        told = "" not in several and any(patient.lower() not in NO_PATIENTS for patient in several)
        if told and 1 < len(several) <= len(names) / 2:
            return pattern
    return ""


def patient_in(pattern: re.Pattern[str], name: str) -> str:
    """The patient that a name tells; empty if none."""
    found = pattern.search(name)
    return (found.group(1) or "") if found else ""


def _names(cases: Sequence[Case]) -> Iterator[Finding]:
    lower: dict[tuple[str, str], str] = {}
    for case in _flat(cases):
        if not case.image:
            continue
        where = {"site": case.site, "case": case.case, "file": case.image}
        if MASK_WORDS.search(stem_of(Path(case.image))):
            yield Finding("mask among images", "its name is that of a mask", "move it to masks if it is one", **where)
        if ODD_NAME.search(stem_of(Path(case.image))):
            cure = "check that it is no stray copy; plain letters and digits are safest"
            yield Finding("suspicious name", "odd signs in the name, or a copy", cure, **where)
        other = lower.setdefault((case.site, case.case.lower()), case.case)
        if other != case.case:
            what = f"differs from {other!r} in upper and lower case only"
            yield Finding("suspicious name", what, "rename one: some file systems take them for one file", **where)


def _flat(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases that are files: slices instead of stacks."""
    for case in cases:
        yield from case.slices or (case,)
