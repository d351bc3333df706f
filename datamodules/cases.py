"""The unit of scoring: one image, one volume or one stack of slices of one patient."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.findings import Finding, Report, few, place, refuse

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


Pixels = NDArray[np.uint8] | NDArray[np.float32]  # 0 to 255, or 0 to 1
LONGEST_NAME = 200  # characters of a site or a case
NO_SITES = {".", "..", "pooled"}


@dataclass(frozen=True)
class Case:
    """One image or one volume of one patient.

    Attributes:
        site: Name of the site.
        case: Name of the case, unique within its site.
        patient: What a split may not cut: a patient, a video sequence, a scene. Equal to ``case`` when unknown.
        image: Path of the image; empty when the data module makes the image itself or ``slices`` are given.
        mask: Path of the mask; empty likewise; None means that the case is not labelled.
        split: Official split, honoured.
        channels: Paths of further images on the grid of ``image`` (other modalities): its further channels, in order.
        absent: Places among all modalities of those that the case lacks: their channels are 0.
        masks: Where several files make the mask: of each the region that it shows (empty where it holds label ids) and
            its path (empty where it would show nothing); ``mask`` is the first path then.
        raters: Where several raters outlined the case: of each the name, and its ``masks``; these have their label ids
            in files of their own, or are made by the data module. ``mask`` is some path then, and ``masks`` is empty.
        slices: For a case made of single 2-D images: those images, in order.
        columns: Of a manifest: names of its columns and the cells of the case's row.
        frame: Of images and masks in time (NIfTI of four dimensions): which frame is the case, from 0; None: no time.
    """

    site: str
    case: str
    patient: str
    image: str = ""
    mask: str | None = None
    split: Split | None = None
    channels: tuple[str, ...] = ()
    masks: tuple[tuple[str, str], ...] = ()
    slices: tuple[Case, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    absent: tuple[int, ...] = ()
    frame: int | None = None
    raters: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there is a mask."""
        return self.mask is not None

    @property
    def image_files(self) -> tuple[str, ...]:
        """Paths of all images, slice by slice and modality by modality."""
        return tuple(name for part in self.slices or (self,) for name in (part.image, *part.channels) if name)

    @property
    def mask_files(self) -> tuple[str, ...]:
        """Paths of all masks, slice by slice."""
        parts = [one for part in self.slices or (self,) for one in part.by_rater() or (part,)]
        return tuple(name for part in parts for _, name in part.mask_layers if name)

    @property
    def mask_layers(self) -> tuple[tuple[str, str], ...]:
        """``masks``, also of a single file; none where the case is not labelled."""
        return self.masks or (() if self.mask is None else (("", self.mask),))

    @property
    def by_several(self) -> bool:
        """Whether its masks are those of raters."""
        return any(part.raters for part in self.slices or (self,))

    def by_rater(self) -> tuple[Case, ...]:
        """The case as each of several raters outlined it; none where there is one mask."""
        return tuple(replace(self, mask=layers[0][1], masks=layers, raters=()) for _, layers in self.raters)

    def __str__(self) -> str:
        return place(self.site, self.case)


@dataclass(frozen=True)
class Sample:
    """A case, decoded.

    Attributes:
        image: (D, H, W, C) uint8, or float32 in [0, 1]; D = 1 for a 2-D image.
        labels: (D, H, W) uint8 label ids, or None.
        spacing: Millimetres per voxel (slice, row, column), or None when unknown: scores are then in pixels.
        notes: What reading the files had to decide and a user should know.
        colours: Label ids and their colours, of a mask whose palette's indices are the ids; or names.
        prints: Hashes of each image file and its mask, to find copies; made where samples are kept.
        plane: Of a volume's slices in the patient: "sagittal", "coronal" or "axial"; empty where unknown.
        attainable: Regions and the best Dice that the network's grid allows; made where samples are kept.
        taught: (D, H, W) label ids that training draws one of, each time anew; none where it learns ``labels``.
        agreement: Regions and the mean Dice of pairs of raters, where there are several.
        box: Slices, rows and columns to which a volume is cut for the network; None where it stays whole.
    """

    image: Pixels
    labels: NDArray[np.uint8] | None
    spacing: tuple[float, float, float] | None = None
    notes: tuple[Finding, ...] = ()
    colours: tuple[tuple[int, str], ...] = ()
    prints: tuple[tuple[str, str], ...] = ()
    plane: str = ""
    attainable: tuple[tuple[str, float], ...] = ()
    box: tuple[slice, slice, slice] | None = None
    taught: tuple[NDArray[np.uint8], ...] = ()
    agreement: tuple[tuple[str, float], ...] = ()


def slice_order(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts slice names by the numbers in them, wherever they stand: ``scan_9_t1`` comes before ``scan_10_t1``."""
    pieces = re.split(r"(\d+)", name)
    return tuple((text, int(number)) for text, number in zip(pieces[::2], [*pieces[1::2], "-1"], strict=True))


def _doubtful(names: Sequence[str]) -> str:
    """Why numbers in names do not tell the order of slices; empty where they do."""
    keys = [slice_order(name) for name in names]
    if len({tuple(text for text, _ in key) for key in keys}) > 1:
        return "names differ in more than numbers"
    differ = sum(len({number for _, number in column}) > 1 for column in zip(*keys, strict=True))
    return "" if differ == 1 or len(names) == 1 else f"names differ in {differ} numbers"


def stack_slices(name: str, slices: Sequence[Case], report: Report = refuse) -> Case:
    """Makes one case of the single 2-D images of a patient.

    Args:
        name: Name of the new case, usually the patient's.
        slices: The images; they are put in the order of the numbers in their names.
        report: Told of slices without a mask although others have one, of different raters, of different official
            splits, and where numbers do not tell the order.
    """
    ordered = tuple(sorted(slices, key=lambda case: slice_order(case.case)))
    first = ordered[0]
    unlabelled = [case.case for case in ordered if not case.labelled]
    if unlabelled and len(unlabelled) < len(ordered):
        what = f"slice {unlabelled[0]!r} has no mask although others of the patient do"
        cure = "add the mask, leave the slice out, or set data.stack_slices=false"
        report(Finding("missing mask", what, cure, first.site, name))
    raters = [[rater for rater, _ in case.raters] for case in ordered if case.labelled]
    if any(names != raters[0] for names in raters):
        what, cure = "its slices have masks by different raters", "add the masks that lack, or leave the rater out"
        report(Finding("missing mask", what, cure, first.site, name))
    if doubt := _doubtful([case.case for case in ordered]):
        told = f"the order of its slices is not certain: {doubt} ({few([case.case for case in ordered])})"
        cure = "name them alike with one number each, or list their cases in the manifest under such names"
        report(Finding("slice order", told, cure, first.site, name))
    _check_split(name, ordered, report)
    mask = "" if len(unlabelled) < len(ordered) else None
    split = next((case.split for case in ordered if case.split is not None), None)
    columns = _together([dict(case.columns) for case in ordered])
    return Case(first.site, name, first.patient, mask=mask, split=split, slices=ordered, columns=columns)


def _together(rows: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    """Cells of all rows; several values of a column stand side by side."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple((name, " and ".join(dict.fromkeys(row.get(name, "") for row in rows))) for name in names)


def join_shared(cases: Sequence[Case], report: Report = refuse) -> list[Case]:
    """Gives cases of one image file (two graders, say) one patient, so that no split cuts them.

    Args:
        cases: Of all sites.
        report: Told of each site with such cases, and of images that are at two sites.
    """
    by_file: dict[tuple[str, int | None], list[Case]] = {}
    for case in cases:
        for file in case.image_files:
            by_file.setdefault((os.path.realpath(file), case.frame), []).append(case)
    patients = Groups()
    shared: dict[str, list[str]] = {}
    for owners in by_file.values():
        places = sorted({case.site for case in owners})
        if len(places) > 1:
            what = f"is also listed at {', '.join(places[1:])}: it may train at one site and test at the other"
            cure = "list it at one site"
            report(Finding("image at two sites", what, cure, places[0], owners[0].case, owners[0].image))
        for site in places:
            same = [case for case in owners if case.site == site]
            if len(same) > 1:
                shared.setdefault(site, []).append(" = ".join(case.case for case in same))
            patients.join([(site, case.patient) for case in same])
    for site, names in shared.items():
        what = f"{len(names)} image(s) are listed more than once ({few(names)}); they count as one patient each"
        report(Finding("image listed twice", what, "right for several graders of an image; else remove rows", site))
    return [replace(case, patient=patients.first((case.site, case.patient))[1]) for case in cases]


class Groups:
    """Sets of names that belong together, each known by its first name."""

    def __init__(self) -> None:
        self._above: dict[tuple[str, str], tuple[str, str]] = {}

    def first(self, name: tuple[str, str]) -> tuple[str, str]:
        """The name that a group is known by; a name that was never joined stands for itself."""
        while name in self._above:
            name = self._above[name]
        return name

    def join(self, names: Iterable[tuple[str, str]]) -> None:
        """These belong together, and so do all that were joined to any of them."""
        tops = sorted({self.first(name) for name in names})
        self._above.update(dict.fromkeys(tops[1:], tops[0]))


def check_cases(cases: Sequence[Case], report: Report = refuse) -> list[Case]:
    """Looks for cases that cannot be told apart or split.

    Args:
        cases: Of all sites.
        report: Told of no case at all, a case name twice within a site, a name that cannot name files, and a patient in
            two official splits.

    Returns:
        Those that a check can go on with: the first of each name.
    """
    if not cases:
        report(Finding("layout", "there is no case at all", "check data.root"))
    named: dict[tuple[str, str], list[Case]] = {}
    patients: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        named.setdefault((case.site, case.case), []).append(case)
        patients.setdefault((case.site, case.patient), []).append(case)
    for (site, name), same in named.items():
        if len(same) > 1:
            files = ", ".join(case.image for case in same[:3] if case.image)
            what = f"the name occurs {len(same)} times" + (f" ({files})" if files else "")
            cure = (
                "case names must be unique within a site: rename the files, or give them names in the manifest's case "
                "column"
            )
            report(Finding("ambiguous name", what, cure, site, name))
    for site in {case.site: None for case in cases}:
        if not site or re.search(r"[/\\]", site) or site in NO_SITES:
            cure = "names must not be empty; a site has no slash, nor is it '.', '..' or 'pooled'"
            report(Finding("layout", f"{site!r} cannot be the name of a site", cure))
    kept = [same[0] for names, same in named.items() if _can_be_written(*names, report)]
    for (_, patient), same in patients.items():
        _check_split(patient, same, report)
    return kept


def _can_be_written(site: str, case: str, report: Report) -> bool:
    """Whether these names can name files and rows."""
    if case and (site + case).isprintable() and max(len(site), len(case)) <= LONGEST_NAME:
        return True
    what = f"site {site[:80]!r}, case {case[:80]!r} cannot name files and rows"
    report(Finding("layout", what, f"names must be printable and have 1 to {LONGEST_NAME} characters"))
    return False


def _check_split(patient: str, cases: Iterable[Case], report: Report) -> None:
    """A patient's cases must be in one official split."""
    found: dict[Split, Case] = {}
    for case in cases:
        if case.split is not None:
            found.setdefault(case.split, case)
    if len(found) > 1:
        told = ", ".join(f"{case.case} in {split}" for split, case in found.items())
        what = f"patient {patient!r} is in two official splits ({told}): scores would leak"
        cure = "correct the manifest's split column, or empty it to let the suite split by patient"
        report(Finding("patient in two splits", what, cure, next(iter(found.values())).site))
