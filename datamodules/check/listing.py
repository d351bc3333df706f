"""Lists the cases of data that may be broken: every problem becomes a finding, and what is left is checked further."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.base import MultiCenterDataModule
from datamodules.cases import SPLITS, Case, Split, check_cases, stack_slices
from datamodules.check.findings import Finding, few
from datamodules.errors import DataError
from datamodules.folder import NO_CASES, REQUIRED, FolderDataModule
from datamodules.readers import FLAT, VOLUMES, stem_of, suffix_of

NOT_SITES = {"", ".", "..", "pooled"}
KNOWN = (*FLAT, *VOLUMES)
MASK_WORDS = re.compile(r"(^|[_\-. ])(mask|seg|segmentation|label|labels|gt|annotation|manual\d?)$", re.IGNORECASE)
ODD_NAME = re.compile(r"(\bcopy\b|\bkopie\b|\(\d+\)|~|[^\x20-\x7e]|^\s|\s$|\s\s)", re.IGNORECASE)


def list_cases(data: MultiCenterDataModule) -> tuple[list[Case], list[Finding]]:
    """The cases that can be read on, and everything that would stop or trouble a run before it reads an image."""
    findings: list[Finding] = []
    try:
        cases = data.cases()
        check_cases(cases)
    except DataError as error:
        cases = _leniently(data, findings)
        if not any(finding.severity == "error" for finding in findings):  # a problem that only the strict way knows
            findings.append(Finding.of_error("layout", error))
    cases = sorted(cases, key=lambda case: (case.site, case.case))
    missing = {(finding.site, finding.case) for finding in findings if finding.kind == "missing mask"}
    unlabelled = _not_labelled(case for case in cases if (case.site, case.case) not in missing)
    findings += [*unlabelled, *_patients(cases), *_names(cases)]
    if isinstance(data, FolderDataModule):
        findings += _not_listed(data, cases)
    return cases, findings


def _leniently(data: MultiCenterDataModule, findings: list[Finding]) -> list[Case]:
    if not isinstance(data, FolderDataModule):
        try:
            cases = data.cases()
        except DataError as error:
            findings.append(Finding.of_error("layout", error))
            return []
    elif (manifest := _manifest(data)) is not None:
        cases = list(_read_table(manifest, findings))
    else:
        cases = [case for site in _sites(data.root, findings) for case in _pair_up(data, site, findings)]
    kept = _sound(cases, findings)
    return list(_stacks(kept, findings)) if isinstance(data, FolderDataModule) and data.stack_slices else kept


def _manifest(data: FolderDataModule) -> Path | None:
    default = data.root / "sites.csv"
    return data.manifest or (default if default.is_file() else None)


# --- folders ----------------------------------------------------------------------------------------------------------


def _sites(root: Path, findings: list[Finding]) -> list[Path]:
    if not root.is_dir():
        findings.append(Finding("layout", f"{root} is no folder", "set data.root to the folder that holds the sites"))
        return []
    sites = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if {"images", "masks"} & {site.name for site in sites}:
        cure = f"move them to {root}/<site>/images and {root}/<site>/masks"
        findings.append(Finding("layout", f"{root} holds images without a site", cure))
        return []
    if not sites:
        cure = "give each site a folder with the folders images and masks, or write a manifest sites.csv"
        findings.append(Finding("layout", f"{root} holds no site", cure))
    return sites


def _files(site: Path, kind: str, findings: list[Finding]) -> dict[str, Path]:
    """Files by stem; the first of two with one stem counts."""
    folder = site / kind
    if not folder.is_dir():
        cure = f"create it with the {kind}; every folder in data.root is a site, so move others away"
        findings.append(Finding("layout", f"the folder {kind} is missing", cure, site.name, file=str(folder)))
        return {}
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in NO_CASES:
            continue
        where = {"site": site.name, "case": stem_of(path), "file": str(path)}
        if path.is_dir() or suffix_of(path) not in KNOWN:
            what = "a folder among images" if path.is_dir() else f"{suffix_of(path) or 'no suffix'} is no known type"
            findings.append(
                Finding("foreign file", what, f"move it, or convert it to one of {', '.join(KNOWN)}", **where)
            )
        elif stem_of(path) in files:
            other = files[stem_of(path)].name
            findings.append(Finding("ambiguous name", f"same case as {other}", "rename or remove one", **where))
        else:
            files[stem_of(path)] = path
    if not files:
        findings.append(Finding("layout", f"no {kind} in {folder}", f"add {kind}", site.name, file=str(folder)))
    return files


def _pair_up(data: FolderDataModule, site: Path, findings: list[Finding]) -> Iterator[Case]:
    images = _files(site, "images", findings)
    optional = data.missing_masks == "unlabelled" and not (site / "masks").is_dir()
    masks = {} if optional else _files(site, "masks", findings)
    expected = {f"{stem}{data.mask_suffix}": stem for stem in images}
    hint = _suffix_hint(images, masks, data.mask_suffix)
    for stem in sorted(masks.keys() - expected.keys()):
        what = "mask without an image"
        cure = hint or "add the image, rename the mask, or remove it"
        findings.append(Finding("missing image", what, cure, site.name, stem, str(masks[stem])))
    for name, stem in expected.items():
        mask = masks.get(name)
        if mask is None and data.missing_masks == "error":
            cure = hint or f"add masks/{name}.*, remove the image, or set data.missing_masks=unlabelled"
            findings.append(Finding("missing mask", "image without a mask", cure, site.name, stem, str(images[stem])))
        patient = _patient(data, site.name, stem, images[stem], findings)
        yield Case(site.name, stem, patient, str(images[stem]), None if mask is None else str(mask))


def _suffix_hint(images: Iterable[str], masks: Iterable[str], suffix: str) -> str:
    """The cure when masks have an ending that data.mask_suffix does not tell."""
    names = sorted(images, key=len, reverse=True)
    endings = Counter(mask[len(name) :] for mask in masks for name in names if mask.startswith(name))
    if not endings:
        return ""
    ending, count = endings.most_common(1)[0]
    return f"set data.mask_suffix={ending}" if count > 1 and ending != suffix and not ending.isdigit() else ""


def _patient(data: FolderDataModule, site: str, stem: str, image: Path, findings: list[Finding]) -> str:
    if data.patient_pattern is None:
        return stem
    found = data.patient_pattern.search(stem)
    if found is None:
        cure = "correct data.patient_pattern, or rename the file"
        findings.append(Finding("layout", "data.patient_pattern finds no patient", cure, site, stem, str(image)))
        return stem
    return str(found.group(1))


# --- manifest ---------------------------------------------------------------------------------------------------------


def _read_table(path: Path, findings: list[Finding]) -> Iterator[Case]:
    """Cases of the rows that name an existing image."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        cure = "correct data.manifest, or save the table as CSV UTF-8"
        findings.append(Finding("manifest", f"cannot be read ({error})", cure, file=str(path)))
        return
    header = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), skipinitialspace=True
    )
    reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
    if lacking := [name for name in REQUIRED if name not in reader.fieldnames]:
        what = f"has no column {', '.join(lacking)}; its columns are {', '.join(reader.fieldnames)}"
        findings.append(Finding("manifest", what, f"name the columns {', '.join(REQUIRED)}", file=str(path)))
        return
    for row in reader:
        if any(row.values()):
            yield from _read_row(row, f"line {reader.line_num}", path, findings)


def _read_row(row: Mapping[str | None, str], where: str, path: Path, findings: list[Finding]) -> Iterator[Case]:
    cell = {name: (value or "").strip() for name, value in row.items() if name is not None}
    site, image, mask = (cell[name] for name in REQUIRED)

    def report(kind: str, what: str, cure: str, file: Path = path) -> None:
        findings.append(Finding(kind, f"{where}: {what}", cure, site, cell.get("case", ""), str(file)))

    if None in row:
        report("manifest", "more cells than the header", "quote cells that contain the separator")
    if not site or not image:
        report("manifest", f"the cell {'image' if site else 'site'} is empty", "fill it or remove the row")
        return
    word = cell.get("split", "").lower()
    split: Split | None = next((name for name in SPLITS if name == word), None)
    if word and split is None:
        report("manifest", f"unknown split {word!r}", f"write {', '.join(SPLITS)}, or leave the cell empty")
    if mask and not (path.parent / mask).is_file():
        report(
            "missing mask", "the mask does not exist", "correct the path, or leave the cell empty", path.parent / mask
        )
        mask = ""
    if not (path.parent / image).is_file():
        report("missing image", "the image does not exist", "correct the path, or remove the row", path.parent / image)
        return
    case = cell.get("case") or stem_of(path.parent / image)
    patient = cell.get("group") or cell.get("patient") or case
    yield Case(site, case, patient, str(path.parent / image), str(path.parent / mask) if mask else None, split)


def _not_listed(data: FolderDataModule, cases: Sequence[Case]) -> Iterator[Finding]:
    """Image files next to listed ones that no row names."""
    if _manifest(data) is None:
        return
    listed = {str(Path(name)) for case in _flat(cases) for name in (case.image, case.mask) if name}
    sites = {str(Path(name).parent): case.site for case in _flat(cases) for name in (case.image, case.mask) if name}
    for folder, site in sites.items():
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and suffix_of(path) in KNOWN and str(path) not in listed:
                yield Finding(
                    "not in the manifest", "no row names this file", "add a row, or ignore it", site, file=str(path)
                )


# --- cases as a whole -------------------------------------------------------------------------------------------------


def _stacks(cases: Iterable[Case], findings: list[Finding]) -> Iterator[Case]:
    patients: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        patients[case.site, case.patient].append(case)
    for (site, patient), slices in patients.items():
        try:
            stacked = stack_slices(patient, [replace(case, split=None) for case in slices])
        except DataError as error:  # noqa: PERF203  (one error per patient is the purpose)
            findings.append(Finding.of_error("layout", error, site=site, case=patient))
        else:
            yield replace(stacked, split=slices[0].split)


def _sound(cases: Sequence[Case], findings: list[Finding]) -> list[Case]:
    """Reports what ``check_cases`` refuses, all of it, and drops the second of two cases with one name."""
    kept: dict[tuple[str, str], Case] = {}
    splits: dict[tuple[str, str], dict[Split, Case]] = defaultdict(dict)
    for case in cases:
        if (case.site, case.case) in kept:
            what = f"a second case {case.case!r}, like {kept[case.site, case.case].image}"
            cure = "rename it, or name it in the manifest's column case"
            findings.append(Finding("ambiguous name", what, cure, case.site, case.case, case.image))
            continue
        kept[case.site, case.case] = case
        if case.split is not None:
            splits[case.site, case.patient].setdefault(case.split, case)
    wrong = sorted({case.site for case in cases if case.site in NOT_SITES or re.search(r"[/\\]", case.site)})
    findings += [Finding("layout", f"{site!r} cannot be the name of a site", "rename it", site) for site in wrong]
    for (site, patient), found in splits.items():
        if len(found) > 1:
            told = ", ".join(f"{case.case} in {split}" for split, case in found.items())
            cure = "correct the column split, or empty it to let the suite split by patient"
            findings.append(Finding("patient in two splits", f"patient {patient!r}: {told}", cure, site))
    return list(kept.values())


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
        if case.mask and suffix_of(Path(case.mask)) in (".jpg", ".jpeg"):
            cure = "store masks as PNG; until then set thresholds, data.label_values={'>=128': 1, '<128': 0}"
            yield Finding("lossy mask", "JPEG changes label ids at outlines", cure, case.site, case.case, case.mask)
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
