"""Any folder of sites, or a table that lists the files."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MultiCenterDataModule
from datamodules.cases import SPLITS, Case, Split, stack_slices
from datamodules.errors import DataError, nearest
from datamodules.findings import Finding, Report, refuse
from datamodules.per_site import FILES, READING
from datamodules.readers import VOLUMES, stem_of, suffix_of
from datamodules.site_folders import KNOWN, ending_of, folder_of, image_files, pairing_cure, site_folders, there

REQUIRED = ("site", "image", "mask")
OPTIONAL = ("case", "patient", "group", "split")
LARGEST_MANIFEST = 2**27  # bytes


class FolderDataModule(MultiCenterDataModule):
    """ROOT/<site>/images/* with ROOT/<site>/masks/* of the same name, or a manifest.

    The manifest is a table (CSV, separated by comma, semicolon or tab) with the columns site, image, mask and, where
    known, case, patient, group, split, and what differs by site (label_values, spacing, ...: the keys of per_site that
    say how files are read); other columns are ignored. Paths are relative to the manifest. An empty mask is
    a case without label. ``group``, where filled, is what a split may not cut, else ``patient``, else the case itself.
    ROOT/sites.csv is taken as the manifest when it exists. PNG, JPEG, TIFF, PPM, GIF, BMP and NPY hold 2-D images,
    NIfTI holds volumes.

    Args:
        root: Folder with one folder per site, or with sites.csv.
        manifest: The table; null: ROOT/sites.csv if it exists, else the folders.
        regions: Region name to label ids; 0 is the background. A mask of nothing but 0 and 255 counts as 0 and 1 where
            1 is the only label id.
        stack_slices: The 2-D images of a patient, in the order of the number that ends their name, are one case: one
            stack, split and scored as one.
        patient_pattern: For folders: a regular expression whose first group, found in a case's name, is its patient.
        mask_suffix: For folders: what a mask's name has after the image's, such as _mask.
        missing_masks: For folders: an image without a mask is an "error", or "unlabelled".
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Settings that cannot be used; bad files are found by ``setup``.
    """

    site_keys: Mapping[str, Any] = {**MultiCenterDataModule.site_keys, **FILES}

    def __init__(
        self,
        *,
        root: str,
        manifest: str | None = None,
        regions: Mapping[str, Sequence[int]] = {"foreground": [1]},
        stack_slices: bool = False,
        patient_pattern: str | None = None,
        mask_suffix: str = "",
        missing_masks: Literal["error", "unlabelled"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.manifest = Path(manifest).expanduser().absolute() if manifest else None
        self.stack_slices = stack_slices
        self.patient_pattern = _compiled(patient_pattern)
        self.mask_suffix = mask_suffix
        self.missing_masks = missing_masks
        self._stating: set[str] = set()  # sites whose patients the manifest names

    def cases(self) -> list[Case]:
        """Every case of the manifest or the folders; no image is opened.

        Raises:
            DataError: Nothing there, or files that do not pair up.
        """
        return self.survey(refuse)

    def survey(self, report: Report) -> list[Case]:
        """:meth:`cases`, where a problem is reported and what can be read on is still listed.

        A mask that should be there and is not counts as one: its case is labelled, with an empty path.
        """
        table = self.table
        if table is not None:

            def settle(site: str, cells: Mapping[str, str], source: str) -> None:
                self._settle(site, partial(self.per_site.add_cells, site, cells, source), report)

            found = read_manifest(table, report, settle)
            self._stating = {case.site for case, patient in found if patient}
            found = [(case, patient or case.case) for case, patient in found]
            for finding in _not_listed([case for case, _ in found]):
                report(finding)
        else:
            found = list(self._folders(report))
        return _stacked(found, report) if self.stack_slices else [case for case, _ in found]

    def states_patients(self, site: str) -> bool:
        """Whether a column or a pattern tells the patients of a site."""
        return self._pattern(site) is not None or site in self._stating

    @property
    def table(self) -> Path | None:
        """The manifest, if there is one."""
        default = self.root / "sites.csv"
        return self.manifest or (default if there(default.is_file) else None)

    def _folders(self, report: Report) -> Iterator[tuple[Case, str]]:
        """Cases of ROOT/<site>/{images,masks}, with their patients."""
        sites = site_folders(self.root, report)
        for site in sites:
            self._settle(site.name, partial(self.per_site.load, site.name, site), report)
        found = {site.name: [self._files(site, kind, report) for kind in ("images", "masks")] for site in sites}
        endings = {site: ending_of(images, masks) for site, (images, masks) in found.items() if images and masks}
        for site in sites:
            images, masks = found[site.name]
            yield from self._folder(site, images, masks, endings, report)

    def _settle(self, site: str, settle: Callable[[], None], report: Report) -> None:
        """Takes up what a site says for itself."""
        try:
            settle()
        except DataError as error:
            report(Finding.of_error("layout", error, site=site))

    def _files(self, site: Path, kind: str, report: Report) -> dict[str, Path]:
        """Files of a site's images or masks, by name."""
        folder = folder_of(site, kind, report, self.per_site.get(site.name, kind, None))
        files = image_files(folder, report, site.name)
        if not files and (kind == "images" or self._needs_masks(site.name)):
            cure = "add images; every folder in data.root is a site, so move others away"
            if kind == "masks":
                cure = "add masks of the same names, or set data.missing_masks=unlabelled"
            report(Finding("layout", "is missing or empty", cure, site.name, file=str(folder)))
        return files

    def _needs_masks(self, site: str) -> bool:
        return bool(self.per_site.get(site, "missing_masks", self.missing_masks) == "error")

    def _folder(
        self,
        site: Path,
        images: Mapping[str, Path],
        masks: Mapping[str, Path],
        endings: Mapping[str, str | None],
        report: Report,
    ) -> Iterator[tuple[Case, str]]:
        suffix = str(self.per_site.get(site.name, "mask_suffix", self.mask_suffix))
        expected = {f"{stem}{suffix}": stem for stem in images}
        paired = masks.keys() == expected.keys() or site.name not in endings
        hint = "" if paired else pairing_cure(self.root, site.name, endings, suffix)
        for stem in sorted(masks.keys() - expected.keys()):
            cure = hint or "remove it, rename it, or add the image"
            report(Finding("missing image", "has no image", cure, site.name, stem, str(masks[stem])))
        for name, stem in expected.items():
            mask = str(masks[name]) if name in masks else None
            if mask is None and self._needs_masks(site.name):
                cure = hint or "add it, remove the image, or set data.missing_masks=unlabelled"
                report(Finding("missing mask", f"has no mask {name}.*", cure, site.name, stem, str(images[stem])))
                mask = ""
            patient = self._patient(site.name, stem, report)
            yield Case(site.name, stem, patient, str(images[stem]), mask), patient

    def _patient(self, site: str, stem: str, report: Report) -> str:
        pattern = self._pattern(site)
        if pattern is None:
            return stem
        found = pattern.search(stem)
        if found is not None and found.group(1):
            return str(found.group(1))
        report(Finding("layout", "data.patient_pattern finds no patient", "correct it, or rename the file", site, stem))
        return stem

    def _pattern(self, site: str) -> re.Pattern[str] | None:
        own = self.per_site.get(site, "patient_pattern", None)
        return self.patient_pattern if own is None else _compiled(own)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.patient_pattern={pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise DataError(rf"data.patient_pattern={pattern!r} needs a group in brackets: '^(.+)_\d+$'")
    return compiled


def _stacked(found: Iterable[tuple[Case, str]], report: Report) -> list[Case]:
    """One case per patient; volumes, which do not belong here, stay as they are."""
    patients: dict[tuple[str, str], list[Case]] = {}
    volumes = []
    for case, patient in found:
        if suffix_of(Path(case.image)) in VOLUMES:
            what, cure = "is a volume", "data.stack_slices is for 2-D images: move it, or set data.stack_slices=false"
            report(Finding("layout", what, cure, case.site, case.case, case.image))
            volumes.append(case)
        else:
            patients.setdefault((case.site, patient), []).append(case)
    if patients and all(len(slices) == 1 for slices in patients.values()):
        what = "data.stack_slices: every patient has a single image"
        cure = r"set data.patient_pattern, such as '^(.+)_\d+$', or fill the manifest's column patient"
        report(Finding("layout", what, cure))
    return volumes + [stack_slices(patient, slices, report) for (_, patient), slices in patients.items()]


# --- manifest ---------------------------------------------------------------------------------------------------------


def read_manifest(
    path: Path, report: Report = refuse, settle: Callable[[str, Mapping[str, str], str], None] | None = None
) -> list[tuple[Case, str]]:
    """Reads a table of cases.

    Args:
        path: CSV with a header, separated by comma, semicolon or tab, in UTF-8 with or without byte-order mark.
        report: Told of no such file, a missing column, an empty cell that is needed, a bad split, or a file that is
            not there.
        settle: Takes what a row says of the reading of its site (a column such as spacing), and where it does.

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
    try:
        text = _text(path.read_bytes(), fault)
        rows = [] if text is None else _rows(text, fault)
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
    return [found for line, row in rows for found in _row(row, line, path, report)]


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


def _rows(text: str, fault: Callable[[str, str], None]) -> list[tuple[int, dict[str | None, Any]]]:
    """Filled rows with their line."""
    header = text.partition("\n")[0]
    separator, above = max(",;\t", key=header.count), 0
    if told := re.fullmatch(r'"?sep=(.)"?', header.strip(" "), re.IGNORECASE):  # a first line for spreadsheets
        separator, above, text = told.group(1), 1, text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    names = reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
    twice = [name for name in (*REQUIRED, *OPTIONAL) if names.count(name) > 1]
    lacking = [name for name in REQUIRED if name not in names]
    for name in twice:
        fault(f"has the column {name!r} twice", "remove or rename one")
    for name in lacking:
        needed = f"Needed: {', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}"
        fault(f"has no column {name!r}", f"{nearest(name, {*names} - {''})}. {needed}")
    if twice or lacking:
        return []
    rows = [(reader.line_num + above, row) for row in reader if any(row.values())]
    if not rows:
        fault("lists no case", "add rows")
    return rows


def _row(row: Mapping[str | None, Any], line: int, table: Path, report: Report) -> Iterator[tuple[Case, str]]:
    cell = {name: (row.get(name) or "").strip() for name in (*REQUIRED, *OPTIONAL)}
    image = _located(table, cell["image"])
    case = cell["case"] or stem_of(image)

    def fault(kind: str, what: str, cure: str) -> None:
        report(Finding(kind, f"line {line}: {what}", cure, cell["site"], case, str(table)))

    if None in row:
        fault("manifest", "more cells than the header", "quote cells that contain the separator")
    word = cell["split"].lower()
    split: Split | None = next((name for name in SPLITS if name == word), None)
    if word and split is None:
        fault("manifest", f"unknown split {word!r}", f"{nearest(word, SPLITS)}, or leave the cell empty")
    if empty := [name for name in ("site", "image") if not cell[name]]:
        fault("manifest", f"the cell {empty[0]!r} is empty", "fill it or remove the row")
        return
    correct = "correct the path (relative to the manifest), or remove the row"
    mask = str(_located(table, cell["mask"])) if cell["mask"] else None
    if mask is not None and not there(Path(mask).is_file):
        cure = f"{_why_not(Path(mask), cell['mask'])}{correct}; an empty mask cell means not labelled"
        fault("missing mask", f"mask {mask} does not exist", cure)
        mask = ""
    if not there(image.is_file):
        fault("missing image", f"image {image} does not exist", f"{_why_not(image, cell['image'])}{correct}")
        return
    patient = cell["patient"] or cell["group"]
    yield Case(cell["site"], case, cell["group"] or patient or case, str(image), mask, split), patient


def _located(table: Path, cell: str) -> Path:
    """The file that a cell names; where it has backslashes, as tables from Windows do, they may be slashes."""
    path = table.parent / cell
    return path if "\\" not in cell or there(path.is_file) else table.parent / cell.replace("\\", "/")


def _why_not(path: Path, cell: str) -> str:
    """What a path that leads nowhere probably got wrong, as the start of a cure."""
    if re.match(r"^[A-Za-z]:[/\\]", cell):
        return "it is a path of Windows (a drive and backslashes): write it from the manifest's folder on; "
    if there((Path.cwd() / cell.replace("\\", "/")).is_file):
        return "paths start at the manifest's folder, not where the command is typed: "
    beside = path.parent.iterdir() if there(path.parent.is_dir) else ()
    if alike := [other.name for other in beside if other.name.lower() == path.name.lower()]:
        return f"there is {alike[0]}, and upper and lower case count: "
    return "backslashes were read as slashes: " if "\\" in cell else ""


def _not_listed(cases: Sequence[Case]) -> Iterator[Finding]:
    """Image files next to listed ones that no row names."""
    listed = {str(Path(name)) for case in _files(cases) for name in (case.image, case.mask) if name}
    sites = {str(Path(name).parent): case.site for case in _files(cases) for name in (case.image, case.mask) if name}
    for folder, site in sites.items():
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and suffix_of(path) in KNOWN and str(path) not in listed:
                yield Finding(
                    "not in the manifest", "no row names this file", "add a row, or ignore it", site, file=str(path)
                )


def _files(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases that are files: slices instead of stacks."""
    for case in cases:
        yield from case.slices or (case,)
