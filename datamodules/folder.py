"""Any folder of sites, or a table that lists the files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, parse_split, stack_slices
from datamodules.errors import DataError, nearest
from datamodules.readers import FLAT, VOLUMES, stem_of, suffix_of

REQUIRED = ("site", "image", "mask")
OPTIONAL = ("case", "patient", "group", "split")
LARGEST_MANIFEST = 2**27  # bytes
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

    def cases(self) -> list[Case]:
        """Every case of the manifest or the folders; no image is opened.

        Raises:
            DataError: Nothing there, or files that do not pair up.
        """
        if not self.root.is_dir() and self.manifest is None:
            raise DataError(f"data.root={self.root} is no folder; set data.root to the folder that holds the sites")
        manifest = self.manifest or self.root / "sites.csv"
        if self.manifest is not None or manifest.is_file():
            found = read_manifest(manifest)
        else:
            found = [(case, case.patient) for site in _site_folders(self.root) for case in self._folder(site)]
        return _stacked(found) if self.stack_slices else [case for case, _ in found]

    def _folder(self, site: Path) -> list[Case]:
        images = _files(site, "images")
        masks = _files(site, "masks") if (site / "masks").is_dir() else {}
        if not masks and self.missing_masks == "error":
            raise DataError(
                f"site {site.name!r}: {site / 'masks'} is missing or empty; add masks of the same names, or set "
                "data.missing_masks=unlabelled"
            )
        expected = {f"{stem}{self.mask_suffix}" for stem in images}
        if orphans := sorted(set(masks) - expected):
            raise DataError(f"site {site.name!r}: mask {masks[orphans[0]]} has no image; remove it or add the image")
        return [self._case(site.name, stem, path, masks) for stem, path in images.items()]

    def _case(self, site: str, stem: str, image: Path, masks: Mapping[str, Path]) -> Case:
        mask = masks.get(f"{stem}{self.mask_suffix}")
        if mask is None and self.missing_masks == "error":
            raise DataError(
                f"site {site!r}, case {stem!r}: image {image} has no mask {stem}{self.mask_suffix}.*; add it, remove "
                "the image, or set data.missing_masks=unlabelled"
            )
        return Case(site, stem, self._patient(site, stem), str(image), None if mask is None else str(mask))

    def _patient(self, site: str, stem: str) -> str:
        if self.patient_pattern is None:
            if self.stack_slices:
                raise DataError(
                    f"site {site!r}: data.stack_slices needs to know the patients; set data.patient_pattern, such as "
                    r"'^(.+)_\d+$', or give a manifest with a patient column"
                )
            return stem
        found = self.patient_pattern.search(stem)
        if found is None:
            raise DataError(f"site {site!r}: data.patient_pattern finds no patient in case {stem!r}; correct it")
        return found.group(1)


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


def _stacked(found: Iterable[tuple[Case, str]]) -> list[Case]:
    """One case per patient."""
    patients: dict[tuple[str, str], list[Case]] = {}
    for case, patient in found:
        if suffix_of(Path(case.image)) in VOLUMES:
            raise DataError(f"{case}: {case.image} is a volume; data.stack_slices is for 2-D images")
        patients.setdefault((case.site, patient), []).append(case)
    if all(len(slices) == 1 for slices in patients.values()):
        raise DataError("data.stack_slices: every patient has a single image; fill the manifest's patient column")
    return [stack_slices(patient, slices) for (_, patient), slices in patients.items()]


# --- folders ----------------------------------------------------------------------------------------------------------


def _site_folders(root: Path) -> list[Path]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if {"images", "masks"} & {path.name for path in folders}:
        raise DataError(
            f"{root} holds images without a site; move them to {root}/<site>/images and {root}/<site>/masks"
        )
    if not folders:
        raise DataError(f"{root} holds no site: expected {root}/<site>/images and {root}/<site>/masks, or sites.csv")
    return folders


def _files(site: Path, kind: str) -> dict[str, Path]:
    """Files by stem; whatever is no image is refused rather than left out in silence."""
    folder = site / kind
    if not folder.is_dir():
        raise DataError(f"site {site.name!r}: {folder} does not exist; every folder in data.root is a site with images")
    files = image_files(folder, f"site {site.name!r}")
    if not files and kind == "images":
        raise DataError(f"site {site.name!r}: {folder} is empty; add images or remove the site's folder")
    return files


def image_files(folder: Path, where: str) -> dict[str, Path]:
    """Files of a folder by stem; whatever is no image is refused rather than left out in silence.

    Args:
        folder: Not searched deeper.
        where: Begins an error.

    Raises:
        DataError: A file of another type, a folder, or two files of one stem.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in NO_CASES:
            continue
        if path.is_dir() or suffix_of(path) not in (*FLAT, *VOLUMES):
            raise DataError(f"{where}: {path} is none of {', '.join((*FLAT, *VOLUMES))}; move or convert it")
        stem = stem_of(path)
        if stem in files:
            raise DataError(f"{where}: {files[stem]} and {path} are both case {stem!r}; rename or remove one")
        files[stem] = path
    return files


# --- manifest ---------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> list[tuple[Case, str]]:
    """Reads a table of cases.

    Args:
        path: CSV with a header, separated by comma, semicolon or tab, in UTF-8 with or without byte-order mark.

    Returns:
        Each case with the patient whose slices a stack gathers.

    Raises:
        DataError: No such file, a missing column, an empty cell that is needed, or a bad split.
    """
    if not path.is_file():
        raise DataError(f"data.manifest={path} does not exist")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise DataError(f"{path} has more than {LARGEST_MANIFEST >> 20} MiB: this is no table of files")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save the table as CSV UTF-8") from error
    try:
        return _rows(text, path)
    except csv.Error as error:
        raise DataError(f"{path} is no table ({error}); save it as CSV UTF-8") from error


def _rows(text: str, path: Path) -> list[tuple[Case, str]]:
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
    if twice := sorted({name for name in (*REQUIRED, *OPTIONAL) if reader.fieldnames.count(name) > 1}):
        raise DataError(f"{path} has the column {twice[0]!r} twice; remove or rename one")
    for name in REQUIRED:
        if name not in reader.fieldnames:
            raise DataError(
                f"{path} has no column {name!r}; {nearest(name, set(reader.fieldnames) - {''})}. Needed: "
                f"{', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}"
            )
    rows = [_row(row, f"{path}, line {reader.line_num}", path.parent) for row in reader if any(row.values())]
    if not rows:
        raise DataError(f"{path} lists no case; add rows")
    return rows


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (ValueError, OSError):  # a zero byte in the name, or a name too long for any file
        return False


def _row(row: Mapping[str, Any], where: str, folder: Path) -> tuple[Case, str]:
    if None in row:
        raise DataError(f"{where} has more cells than the header; quote cells that contain the separator")
    cell = {name: (row.get(name) or "").strip() for name in (*REQUIRED, *OPTIONAL)}
    for name in ("site", "image"):
        if not cell[name]:
            raise DataError(f"{where}: the cell {name!r} is empty; fill it or remove the row")
    image = folder / cell["image"]
    for role in ("image", "mask"):
        if cell[role] and not _is_file(folder / cell[role]):
            raise DataError(
                f"{where}: site {cell['site']!r}: {role} {folder / cell[role]} does not exist; correct the path "
                "(relative to the manifest), or remove the row; an empty mask cell means not labelled"
            )
    case = cell["case"] or stem_of(image)
    patient = cell["patient"] or cell["group"] or case
    mask = str(folder / cell["mask"]) if cell["mask"] else None
    split = parse_split(cell["split"], where)
    return Case(cell["site"], case, cell["group"] or patient, str(image), mask, split), patient
