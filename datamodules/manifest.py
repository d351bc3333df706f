"""A table that lists the files of all sites."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedseg.common.names import nearest
from fedseg.datamodules.cases import SPLITS, Case, Split
from fedseg.datamodules.findings import Finding, Report, few, refuse
from fedseg.datamodules.pairing import (
    BETWEEN,
    Masks,
    MissingMasks,
    MissingModalities,
    lacking_modalities,
    layers_of,
    missing_cure,
    present,
)
from fedseg.datamodules.per_site import READING
from fedseg.datamodules.readers import stem_of, suffix_of
from fedseg.datamodules.readers.kinds import is_case_file, there
from fedseg.datamodules.site_folders import KNOWN

OPTIONAL = ("case", "patient", "group", "split")
LARGEST_MANIFEST = 2**27  # bytes
SEVERAL = "|"  # between files in a cell


@dataclass(frozen=True)
class Expect:
    """What a table must list.

    Attributes:
        regions: Names of the regions, which columns mask_REGION may tell apart.
        modalities: Names of the columns image_MODALITY, in order; none: one column image.
        needed: Regions of which every mask of a site needs a file, where they have columns.
        missing: What a missing mask of a site means; "error" is "unlabelled" here, as a cell can be left empty.
        modality: What it means that the cell of one of several images is empty.
        raters: Names of the columns mask_RATER; none: one mask. An empty cell is an image that the rater did not see,
            unless missing masks are "empty".
        without: Modalities that a site does not have at all.
    """

    regions: Sequence[str] = ()
    modalities: Sequence[str] = ()
    needed: Callable[[str], Sequence[str]] = lambda _: ()
    missing: Callable[[str], MissingMasks] = lambda _: "unlabelled"
    modality: MissingModalities = "error"
    raters: Sequence[str] = ()
    without: Callable[[str], Sequence[str]] = lambda _: ()


Layers = tuple[tuple[str, str], ...]  # regions and files
Columns = dict[str, str]  # column to the modality, the region or the rater that it holds; to "" where there is one only


def read_manifest(
    path: Path,
    report: Report = refuse,
    settle: Callable[[str, Mapping[str, str], str], None] | None = None,
    expect: Expect = Expect(),
) -> list[tuple[Case, str]]:
    """Reads a table of cases.

    Args:
        path: CSV with a header, separated by comma, semicolon or tab, in UTF-8 with or without byte-order mark.
        report: Told of no such file, a missing column, an empty cell that is needed, a bad split, or a file that is
            not there.
        settle: Takes what a row says of the reading of its site (a column such as spacing), and where it does.
        expect: Which columns hold images and masks.

    Returns:
        Each case whose image is there, with the patient whose slices a stack gathers; empty where the row names none.
    """

    def fault(what: str, cure: str) -> None:
        report(Finding("manifest", what, cure, file=str(path)))

    if not there(path.is_file):
        fault("does not exist", "correct data.manifest")
        return []
    if path.stat().st_size > LARGEST_MANIFEST:
        fault(f"has more than {LARGEST_MANIFEST >> 20} MiB", "this is no table of files")
        return []
    rows: list[tuple[int, dict[str | None, Any]]] = []
    images, masks = Columns(), Columns()
    try:
        text = _text(path.read_bytes(), fault)
        if text is not None:
            names, rows = _rows(text)
            images, masks = _images(names, expect, fault), _masks(names, expect, fault)
            if not _sound(names, rows, images, masks, fault):
                rows = []
    except UnicodeDecodeError as error:
        fault(f"is not UTF-8 ({error})", "save the table as CSV UTF-8")
    except OSError as error:
        fault(f"cannot be read ({error.strerror})", "correct its permissions")
    except csv.Error as error:
        fault(f"is no table ({error})", "save it as CSV UTF-8")
    for line, row in rows:
        own = {key: cell for key in READING if (cell := (row.get(key) or "").strip())}
        if own and settle is not None:
            settle((row.get("site") or "").strip(), own, f"{path}, line {line}")
    return [found for line, row in rows for found in _Row(row, line, path, report, expect).read(images, masks)]


def _text(raw: bytes, fault: Callable[[str, str], None]) -> str | None:
    """The table as text: UTF-8, or UTF-16 as "Unicode text" of spreadsheets is; None where it is no text."""
    if raw.startswith(b"PK"):
        fault("is a workbook (xlsx, ods)", "save it as CSV UTF-8")
        return None
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not wide and b"\x00" in raw[:2]:
        fault("is UTF-16 without its mark, or no text", "save it as CSV UTF-8")
        return None
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-16" if wide else "utf-8-sig").read()


def _rows(text: str) -> tuple[list[str], list[tuple[int, dict[str | None, Any]]]]:
    """Names of the columns, and filled rows with their line."""
    header = text.partition("\n")[0]
    separator, above = max(",;\t", key=header.count), 0
    if told := re.fullmatch(r'"?sep=(.)"?', header.strip(" "), re.IGNORECASE):  # a first line for spreadsheets
        separator, above, text = told.group(1), 1, text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    return names, [(reader.line_num + above, row) for row in reader if any(row.values())]


def _images(names: Sequence[str], expect: Expect, fault: Callable[[str, str], None]) -> Columns:
    """The columns of images."""
    if not expect.modalities:
        several = [name for name in names if name.startswith("image_")]
        if "image" not in names and several:
            told = ",".join(name.removeprefix("image_") for name in several)
            fault(f"has no column 'image', but {few(several)}", f"set data.modalities=[{told}] if they are channels")
            return dict.fromkeys(several, "")
        return {"image": ""}
    columns = {f"image_{modality}".lower(): modality for modality in expect.modalities}
    if "image" in names:
        cure = f"rename it ({', '.join(columns)} are needed), or leave data.modalities out"
        fault("has the column 'image', although data.modalities tells several images apart", cure)
    return columns


def _masks(names: Sequence[str], expect: Expect, fault: Callable[[str, str], None]) -> Columns:
    """The columns of masks."""
    if expect.raters:
        of_raters = {f"mask_{rater}".lower(): rater for rater in expect.raters}
        if "mask" in names:
            cure = f"rename it ({', '.join(of_raters)} are needed), or leave data.raters out"
            fault("has the column 'mask', although data.raters tells several masks apart", cure)
        if len(of_raters) < len(expect.raters):
            fault("cannot tell raters apart whose names differ in upper and lower case only", "rename one")
        for name in names:
            if name.startswith("mask_") and name not in of_raters and name not in READING:
                told = nearest(name.removeprefix("mask_"), expect.raters)
                fault(f"has the column {name!r}, which is no rater's", f"{told}. Name them all, or remove the column")
        return of_raters
    regions = {f"mask_{region}".lower(): region for region in expect.regions}
    apart = [name for name in names if name in regions]
    if not apart:
        return {"mask": ""}
    if len(regions) < len(expect.regions):
        fault("cannot tell regions apart whose names differ in upper and lower case only", "rename one in data.regions")
    if "mask" in names:
        fault(f"has the column 'mask', and {few(apart)}", "keep it, or those of single regions")
    for name in names:
        if name.startswith("mask_") and name not in regions and name not in READING:
            told = nearest(name.removeprefix("mask_"), expect.regions)
            fault(f"has the column {name!r}, which is no region's", f"{told}. Rename or remove it")
    return {name: regions[name] for name in apart}


def _sound(
    names: Sequence[str], rows: Sequence[Any], images: Columns, masks: Columns, fault: Callable[[str, str], None]
) -> bool:
    """Whether every column is there once, and some row."""
    required = ("site", *images, *masks)
    twice = [name for name in dict.fromkeys((*required, *OPTIONAL)) if names.count(name) > 1]
    lacking = [name for name in required if name not in names]
    for name in twice:
        fault(f"has the column {name!r} twice", "remove or rename one")
    for name in lacking:
        needed = f"Needed: {', '.join(required)}; optional: {', '.join(OPTIONAL)}"
        fault(f"has no column {name!r}", f"{nearest(name, {*names} - {''})}. {needed}")
    if not (twice or lacking or rows):
        fault("lists no case", "add rows")
    return not twice and not lacking


@dataclass(frozen=True)
class _Row:
    """A line of the table."""

    cells: Mapping[str | None, Any]
    line: int
    table: Path
    report: Report
    expect: Expect

    def cell(self, name: str) -> str:
        return (self.cells.get(name) or "").strip()

    def read(self, images: Columns, masks: Columns) -> Iterator[tuple[Case, str]]:
        """The case, and the patient that the row names; none where an image lacks."""
        every = {name: _located(self.table, cell) if (cell := self.cell(name)) else None for name in images}
        named = [(name, path) for name, path in every.items() if path is not None]
        first, path = named[0] if named else (next(iter(images)), self.table)
        case = self.cell("case") or _without(stem_of(path), images[first])

        def fault(kind: str, what: str, cure: str) -> None:
            self.report(Finding(kind, f"line {self.line}: {what}", cure, self.cell("site"), case, str(self.table)))

        if None in self.cells:
            fault("manifest", "more cells than the header", "quote cells that contain the separator")
        split = self._split(fault)
        without = self.expect.without(self.cell("site")) if self.expect.modalities else ()
        if extra := [name for name, path in named if images[name] in without]:
            cure = "empty the cell, or correct the setting"
            fault("manifest", f"the cell {extra[0]!r} is filled, although the site lacks it (data.lacks)", cure)
            return
        lacked = [name for name, path in every.items() if path is None and images[name] not in without]
        refused = lacked if self.expect.modality == "error" or not named else ()
        if empty := [*([] if self.cell("site") else ["site"]), *refused]:
            cure = ", or set data.missing_modalities=zeros" * (empty[0] in images and bool(named))
            fault("manifest", f"the cell {empty[0]!r} is empty", f"fill it or remove the row{cure}")
            return
        if lacked:
            names = [images[name] for name in lacked]
            self.report(lacking_modalities(names, self.expect.modality, self.cell("site"), case, str(path)))
        mask, layers, raters = self._outlines(masks, fault)
        lacking = [(path, name) for name, path in named if not is_case_file(path)]
        for path, name in lacking:
            cure = f"{_why_not(path, self.cell(name))}{CORRECT}"
            fault("missing image", f"image {path} does not exist", cure)
        if lacking:
            return
        patient = self.cell("patient") or self.cell("group")
        group = self.cell("group") or patient or case
        (image, *rest), absent = present([*every.values()])
        columns = tuple((name, self.cell(name)) for name in self.cells if name)
        found = Case(self.cell("site"), case, group, image, mask, split, tuple(rest), layers, columns=columns)
        yield replace(found, absent=absent, raters=raters), patient

    def _split(self, fault: Callable[[str, str, str], None]) -> Split | None:
        word = self.cell("split").lower()
        split: Split | None = next((name for name in SPLITS if name == word), None)
        if word and split is None:
            fault("manifest", f"unknown split {word!r}", f"{nearest(word, SPLITS)}, or leave the cell empty")
        return split

    def _outlines(
        self, columns: Columns, fault: Callable[[str, str, str], None]
    ) -> tuple[str | None, Layers, tuple[tuple[str, Layers], ...]]:
        """``Case.mask``, ``Case.masks`` and ``Case.raters``."""
        if not self.expect.raters:
            needed = self.expect.needed(self.cell("site")) if "mask" not in columns else ()
            return *self._mask(columns, needed, fault), ()
        told = [(rater, *self._mask({name: ""}, (), fault)) for name, rater in columns.items()]
        raters = tuple((rater, layers or (("", mask),)) for rater, mask, layers in told if mask is not None)
        return (raters[0][1][0][1] if raters else None), (), raters

    def _mask(
        self, columns: Columns, needed: Sequence[str], fault: Callable[[str, str, str], None]
    ) -> tuple[str | None, Layers]:
        """``Case.mask`` and ``Case.masks``."""
        found: Masks = []
        whole = True
        for name, region in columns.items():
            for cell in _files_in(self.table, self.cell(name)):
                path = _located(self.table, cell)
                found.append((region, path))
                if not is_case_file(path):
                    cure = f"{_why_not(path, cell)}{CORRECT}; an empty mask cell means not labelled"
                    fault("missing mask", f"mask {path} does not exist", cure)
                    whole = False
        site = self.cell("site")
        missing: MissingMasks = "empty" if self.expect.missing(site) == "empty" else "unlabelled"
        mask, layers, lacking = layers_of(found, needed, missing)
        if lacking:
            fault("missing mask", f"has no mask of {few(lacking)}, although others are there", missing_cure(needed))
        return (mask, layers) if whole else ("", ())


CORRECT = "correct the path (relative to the manifest), or remove the row"


def _without(stem: str, modality: str) -> str:
    """A case's name from the name of its first image."""
    return (stem.removesuffix(modality).rstrip(BETWEEN) or stem) if modality else stem


def _files_in(table: Path, cell: str) -> list[str]:
    """The files that a cell names."""
    if SEVERAL not in cell or is_case_file(_located(table, cell)):
        return [cell] if cell else []
    return [name for part in cell.split(SEVERAL) if (name := part.strip())]


def _located(table: Path, cell: str) -> Path:
    """The file that a cell names; where it has backslashes, as tables from Windows do, they may be slashes."""
    path = table.parent / cell
    return path if "\\" not in cell or is_case_file(path) else table.parent / cell.replace("\\", "/")


def _why_not(path: Path, cell: str) -> str:
    """What a path that leads nowhere probably got wrong, as the start of a cure."""
    if re.match(r"^[A-Za-z]:[/\\]", cell):
        return "it is a path of Windows (a drive and backslashes): write it from the manifest's folder on; "
    if is_case_file(Path.cwd() / cell.replace("\\", "/")):
        return "paths start at the manifest's folder, not where the command is typed: "
    beside = path.parent.iterdir() if there(path.parent.is_dir) else ()
    if alike := [other.name for other in beside if other.name.lower() == path.name.lower()]:
        return f"there is {alike[0]}, and upper and lower case count: "
    return "backslashes were read as slashes: " if "\\" in cell else ""


def not_listed(cases: Sequence[Case]) -> Iterator[Finding]:
    """Image files next to listed ones that no row names."""
    sites = {str(Path(name)): case.site for case in cases for name in (*case.image_files, *case.mask_files)}
    folders = {str(Path(name).parent): site for name, site in sites.items()}
    for folder, site in folders.items():
        for path in sorted(Path(folder).iterdir()):
            if is_case_file(path) and suffix_of(path) in KNOWN and str(path) not in sites:
                yield Finding(
                    "not in the manifest", "no row names this file", "add a row, or ignore it", site, file=str(path)
                )
