"""Lists the cases of data that may be broken, and looks at their names, patients and neighbours."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, check_cases
from datamodules.findings import Finding, few
from datamodules.folder import KNOWN, FolderDataModule
from datamodules.readers import stem_of, suffix_of

MASK_WORDS = re.compile(r"(^|[_\-. ])(mask|seg|segmentation|label|labels|gt|annotation|manual\d?)$", re.IGNORECASE)
ODD_NAME = re.compile(r"(\bcopy\b|\bkopie\b|\(\d+\)|~|[^\x20-\x7e]|^\s|\s$|\s\s)", re.IGNORECASE)


def list_cases(data: MultiCenterDataModule) -> tuple[list[Case], list[Finding]]:
    """The cases that can be read on, and everything that would stop or trouble a run before it reads an image."""
    findings: list[Finding] = []
    listed = data.survey(findings.append)
    cases = check_cases(listed, findings.append) if listed or not findings else []
    cases.sort(key=lambda case: (case.site, case.case))
    findings += [*_not_labelled(cases), *_patients(cases), *_names(cases)]
    if isinstance(data, FolderDataModule) and data.table is not None:
        findings += _not_listed(listed)
    return cases, findings


def _not_labelled(cases: Iterable[Case]) -> Iterator[Finding]:
    for case in cases:
        if not case.labelled:
            yield Finding(
                "not labelled", "no mask", "none needed: it trains unlabelled", case.site, case.case, case.image
            )


def _patients(cases: Sequence[Case]) -> Iterator[Finding]:
    """Patients at two sites, and sites whose patients are unknown although names hint at several images each."""
    sites: dict[str, set[str]] = defaultdict(set)
    by_site: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_site[case.site].append(case)
        if case.patient != case.case or case.slices:
            sites[case.patient].add(case.site)
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, places in sites.items():
        if len(places) > 1:
            shared[tuple(sorted(places))].append(patient)
    for together, patients in shared.items():
        what = f"{len(patients)} patient(s) at {', '.join(together)}: {few(patients)}"
        cure = "if it is one person, keep the patient at one site; if ids merely repeat, ignore this"
        yield Finding("patient at two sites", what, cure, together[0])
    for site, members in by_site.items():
        if all(case.patient == case.case and not case.slices for case in members):
            yield from _likely_patients(site, members)


def _likely_patients(site: str, cases: Sequence[Case]) -> Iterator[Finding]:
    prefixes: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        if found := re.match(r"^(.*\d.*)[_\- ]+\w{1,4}$", case.case):
            prefixes[found.group(1)].append(case.case)
    if 1 < len(prefixes) <= len(cases) / 2 and sum(map(len, prefixes.values())) == len(cases):
        example = next(iter(prefixes.values()))
        what = f"names look like several images of one patient ({few(example, 3)}), yet each counts as a patient"
        cure = r"set data.patient_pattern, such as '^(.+)_\w+$', or fill the manifest's column patient"
        yield Finding("patients unknown", what, cure, site)


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


def _not_listed(cases: Sequence[Case]) -> Iterator[Finding]:
    """Image files next to listed ones that no row names."""
    listed = {str(Path(name)) for case in _flat(cases) for name in (case.image, case.mask) if name}
    sites = {str(Path(name).parent): case.site for case in _flat(cases) for name in (case.image, case.mask) if name}
    for folder, site in sites.items():
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and suffix_of(path) in KNOWN and str(path) not in listed:
                yield Finding(
                    "not in the manifest", "no row names this file", "add a row, or ignore it", site, file=str(path)
                )


def _flat(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases that are files: slices instead of stacks."""
    for case in cases:
        yield from case.slices or (case,)
