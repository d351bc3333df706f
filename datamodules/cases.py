"""The unit of scoring: one image, one volume or one stack of slices of one patient."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, nearest

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


Pixels = NDArray[np.uint8] | NDArray[np.float32]  # 0 to 255, or 0 to 1
LONGEST_NAME = 200  # characters of a site or a case


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
        slices: For a case made of single 2-D images: those images, in order.
    """

    site: str
    case: str
    patient: str
    image: str = ""
    mask: str | None = None
    split: Split | None = None
    slices: tuple[Case, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there is a mask."""
        return self.mask is not None

    def __str__(self) -> str:
        return f"site {self.site!r}, case {self.case!r}"


@dataclass(frozen=True)
class Sample:
    """A case, decoded.

    Attributes:
        image: (D, H, W, C) uint8, or float32 in [0, 1]; D = 1 for a 2-D image.
        labels: (D, H, W) uint8 label ids, or None.
        spacing: Millimetres per voxel (slice, row, column), or None when unknown: scores are then in pixels.
    """

    image: Pixels
    labels: NDArray[np.uint8] | None
    spacing: tuple[float, float, float] | None = None


def parse_split(text: str, where: str) -> Split | None:
    """Reads a cell of a split column.

    Args:
        text: ``train``, ``val``, ``test`` in any case, or empty for "no official split".
        where: Names the cell in an error.

    Raises:
        DataError: Another word.
    """
    word = text.strip().lower()
    if not word:
        return None
    if word not in SPLITS:
        raise DataError(f"{where}: unknown split {text!r}; {nearest(word, SPLITS)}, or leave the cell empty")
    return word


def slice_order(name: str) -> tuple[str, int]:
    """Sorts slice names by the number that ends them: ``scan_9`` comes before ``scan_10``."""
    found = re.search(r"(\d+)$", name)
    return (name[: found.start()], int(found.group(1))) if found else (name, -1)


def stack_slices(name: str, slices: Sequence[Case]) -> Case:
    """Makes one case of the single 2-D images of a patient.

    Args:
        name: Name of the new case, usually the patient's.
        slices: The images; they are put in the order of the number that ends their name.

    Raises:
        DataError: Some of the slices have a mask and some have none.
    """
    ordered = tuple(sorted(slices, key=lambda case: slice_order(case.case)))
    first = ordered[0]
    unlabelled = [case.case for case in ordered if not case.labelled]
    if unlabelled and len(unlabelled) < len(ordered):
        raise DataError(
            f"site {first.site!r}, patient {name!r}: slice {unlabelled[0]!r} has no mask although others of the "
            "patient do; add the mask, leave the slice out, or set data.stack_slices=false"
        )
    splits = {case.split for case in ordered} - {None}
    if len(splits) > 1:
        raise _torn_patient(first.site, name, cast("set[Split]", splits))
    return Case(first.site, name, first.patient, mask=first.mask and "", split=next(iter(splits), None), slices=ordered)


def check_cases(cases: Sequence[Case]) -> None:
    """Refuses cases that cannot be told apart or split.

    Raises:
        DataError: No case at all, a case name twice within a site, a nameless or slashed site, or a patient in two
            official splits.
    """
    if not cases:
        raise DataError("there is no case at all; check data.root")
    for (site, case), count in Counter((case.site, case.case) for case in cases).items():
        if count > 1:
            files = [c.image for c in cases if (c.site, c.case) == (site, case) and c.image]
            raise DataError(
                f"site {site!r}: case {case!r} occurs {count} times{_listed(files)}; case names must be unique within "
                "a site: rename the files, or give them names in the manifest's case column"
            )
        if not site or not case or re.search(r"[/\\]", site) or site in {".", "..", "pooled"}:
            raise DataError(f"site {site!r}, case {case!r}: names must not be empty; a site has no slash, nor 'pooled'")
        if not (site + case).isprintable() or max(len(site), len(case)) > LONGEST_NAME:
            raise DataError(
                f"site {site[:80]!r}, case {case[:80]!r}: names must be printable and have at most {LONGEST_NAME} "
                "characters, as they name files and rows"
            )
    _check_patients(cases)


def _check_patients(cases: Iterable[Case]) -> None:
    official: dict[tuple[str, str], set[Split]] = {}
    for case in cases:
        if case.split is not None:
            official.setdefault((case.site, case.patient), set()).add(case.split)
    for (site, patient), splits in official.items():
        if len(splits) > 1:
            raise _torn_patient(site, patient, splits)


def _torn_patient(site: str, patient: str, splits: set[Split]) -> DataError:
    return DataError(
        f"site {site!r}: patient {patient!r} is in two official splits ({', '.join(sorted(splits))}); scores would "
        "leak: correct the manifest's split column, or empty it to let the suite split by patient"
    )


def _listed(files: Sequence[str]) -> str:
    return f" ({', '.join(files[:3])})" if files else ""
