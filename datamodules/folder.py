"""Any folder of sites, or a table that lists the files."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MultiCenterDataModule
from datamodules.cases import SPLITS, Case, Split, stack_slices
from datamodules.errors import DataError, nearest
from datamodules.findings import Finding, Report, refuse
from datamodules.readers import FLAT, VOLUMES, stem_of, suffix_of

REQUIRED = ("site", "image", "mask")
OPTIONAL = ("case", "patient", "group", "split")
LARGEST_MANIFEST = 2**27  # bytes
KNOWN = (*FLAT, *VOLUMES)
NO_CASES = {"thumbs.db", "desktop.ini"}


class FolderDataModule(MultiCenterDataModule):
    """ROOT/<site>/images/* with ROOT/<site>/masks/* of the same name, or a manifest.

    The manifest is a table (CSV, separated by comma, semicolon or tab) with the columns site, image, mask and, where
    known, case, patient, group, split; other columns are ignored. Paths are relative to the manifest. An empty mask is
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
            found = read_manifest(table, report)
            self._stating = {case.site for case, patient in found if patient}
            found = [(case, patient or case.case) for case, patient in found]
            for finding in _not_listed([case for case, _ in found]):
                report(finding)
        else:
            found = [case for site in _site_folders(self.root, report) for case in self._folder(site, report)]
        return _stacked(found, report) if self.stack_slices else [case for case, _ in found]

    def states_patients(self, site: str) -> bool:
        """Whether a column or a pattern tells the patients of a site."""
        return self.patient_pattern is not None or site in self._stating

    @property
    def table(self) -> Path | None:
        """The manifest, if there is one."""
        default = self.root / "sites.csv"
        return self.manifest or (default if there(default.is_file) else None)

    def _folder(self, site: Path, report: Report) -> Iterator[tuple[Case, str]]:
        images, masks = (image_files(site / kind, report, site.name) for kind in ("images", "masks"))
        if not images:
            cure = "add images; every folder in data.root is a site, so move others away"
            report(Finding("layout", "is missing or empty", cure, site.name, file=str(site / "images")))
        if not masks and self.missing_masks == "error":
            cure = "add masks of the same names, or set data.missing_masks=unlabelled"
            report(Finding("layout", "is missing or empty", cure, site.name, file=str(site / "masks")))
        expected = {f"{stem}{self.mask_suffix}": stem for stem in images}
        hint = "" if masks.keys() == expected.keys() else _suffix_hint(images, masks, self.mask_suffix)
        for stem in sorted(masks.keys() - expected.keys()):
            cure = hint or "remove it, rename it, or add the image"
            report(Finding("missing image", "has no image", cure, site.name, stem, str(masks[stem])))
        for name, stem in expected.items():
            mask = str(masks[name]) if name in masks else None
            if mask is None and self.missing_masks == "error":
                cure = hint or "add it, remove the image, or set data.missing_masks=unlabelled"
                report(Finding("missing mask", f"has no mask {name}.*", cure, site.name, stem, str(images[stem])))
                mask = ""
            patient = self._patient(site.name, stem, report)
            yield Case(site.name, stem, patient, str(images[stem]), mask), patient

    def _patient(self, site: str, stem: str, report: Report) -> str:
        if self.patient_pattern is None:
            return stem
        found = self.patient_pattern.search(stem)
        if found is not None and found.group(1):
            return str(found.group(1))
        report(Finding("layout", "data.patient_pattern finds no patient", "correct it, or rename the file", site, stem))
        return stem


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


def there(look: Callable[[], bool]) -> bool:
    """What ``path.is_file`` or ``path.is_dir`` says; names that no file can have raise there: too long, a zero byte."""
    try:
        return look()
    except (ValueError, OSError):
        return False


# --- folders ----------------------------------------------------------------------------------------------------------


def _site_folders(root: Path, report: Report) -> list[Path]:
    if not there(root.is_dir):
        report(Finding("layout", f"data.root={root} is no folder", "set data.root to the folder that holds the sites"))
        return []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if {"images", "masks"} & {path.name for path in folders}:
        cure = f"move them to {root}/<site>/images and {root}/<site>/masks"
        report(Finding("layout", f"{root} holds images without a site", cure))
        return []
    if not folders:
        cure = "give each site a folder with the folders images and masks, or write a manifest sites.csv"
        report(Finding("layout", f"{root} holds no site", cure))
    return folders


def image_files(folder: Path, report: Report = refuse, site: str = "") -> dict[str, Path]:
    """Files of a folder by stem; none where there is no folder.

    Args:
        folder: Not searched deeper.
        report: Told of whatever is no image, rather than leaving it out in silence, and of two files of one stem, of
            which the first counts.
        site: Whose folder it is.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.name.lower() in NO_CASES:
            continue
        stem = stem_of(path)
        if path.is_dir():
            report(Finding("foreign file", "is a folder among images", "move it", site, stem, str(path)))
        elif suffix_of(path) not in KNOWN:
            what = f"is none of {', '.join(KNOWN)}"
            report(Finding("foreign file", what, "move or convert it", site, stem, str(path)))
        elif stem in files:
            what = f"is the same case as {files[stem].name}"
            report(Finding("ambiguous name", what, "rename or remove one", site, stem, str(path)))
        else:
            files[stem] = path
    return files


def _suffix_hint(images: Mapping[str, Path], masks: Iterable[str], suffix: str) -> str:
    """The cure when masks have an ending that data.mask_suffix does not tell."""
    endings = Counter[str]()
    for mask in masks:
        longest = next((end for end in range(len(mask), 0, -1) if mask[:end] in images), None)
        if longest is not None:
            endings[mask[longest:]] += 1
    ending, count = endings.most_common(1)[0] if endings else ("", 0)
    return f"set data.mask_suffix={ending}" if count > 1 and ending != suffix and not ending.isdigit() else ""


# --- manifest ---------------------------------------------------------------------------------------------------------


def read_manifest(path: Path, report: Report = refuse) -> list[tuple[Case, str]]:
    """Reads a table of cases.

    Args:
        path: CSV with a header, separated by comma, semicolon or tab, in UTF-8 with or without byte-order mark.
        report: Told of no such file, a missing column, an empty cell that is needed, a bad split, or a file that is
            not there.

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
        rows = _rows(path.read_text(encoding="utf-8-sig"), fault)
    except UnicodeDecodeError as error:
        fault(f"is not UTF-8 ({error})", "save the table as CSV UTF-8")
    except OSError as error:
        fault(f"cannot be read ({error.strerror})", "correct its permissions")
    except csv.Error as error:
        fault(f"is no table ({error})", "save it as CSV UTF-8")
    return [found for line, row in rows for found in _row(row, line, path, report)]


def _rows(text: str, fault: Callable[[str, str], None]) -> list[tuple[int, dict[str | None, Any]]]:
    """Filled rows with their line."""
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
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
    rows = [(reader.line_num, row) for row in reader if any(row.values())]
    if not rows:
        fault("lists no case", "add rows")
    return rows


def _row(row: Mapping[str | None, Any], line: int, table: Path, report: Report) -> Iterator[tuple[Case, str]]:
    cell = {name: (row.get(name) or "").strip() for name in (*REQUIRED, *OPTIONAL)}
    image = table.parent / cell["image"]
    case = cell["case"] or stem_of(Path(cell["image"]))

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
    mask = str(table.parent / cell["mask"]) if cell["mask"] else None
    if mask is not None and not there(Path(mask).is_file):
        cure = f"{correct}; an empty mask cell means not labelled"
        fault("missing mask", f"mask {mask} does not exist", cure)
        mask = ""
    if not there(image.is_file):
        fault("missing image", f"image {image} does not exist", correct)
        return
    patient = cell["patient"] or cell["group"]
    yield Case(cell["site"], case, cell["group"] or patient or case, str(image), mask, split), patient


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
