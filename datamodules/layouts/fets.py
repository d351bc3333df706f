"""Glioma in multi-parametric MRI, sites by institution: the release of the FeTS challenge, in the naming of BraTS."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import files, folders, unexpected
from fedseg.datamodules.readers import VOLUMES, stem_of

SITE, SUBJECT = "partition_id", "subject_id"
MASK = "seg"


class FeTSDataModule(MultiCenterDataModule):
    """Brain MRI of glioma with a table that says which institution a subject is from; a case is a subject's volume.

    Layout: ROOT/partitioning_1.csv with the columns Partition_ID and Subject_ID, and for every subject
    ROOT/<subject>/<subject>_{flair,t1,t1ce,t2}.nii.gz with <subject>_seg.nii.gz: 1 necrotic core, 2 oedema, 4 enhancing
    tumour. Images are on one grid of 1 mm, without the skull, 0 outside of the brain.

    Sites are called institution_01 and so on, by the numbers of the table. partitioning_2.csv of the same release cuts
    the largest institutions in two, by the size of the tumour.

    How to obtain: registration with the organisers of the FeTS challenge (Pati et al., 2021). Terms: those of the
    challenge; check them there.

    Args:
        root: The folder that holds the table and the subjects.
        partitioning: The table's file in it.
        modalities: Which images are the channels, in this order.
        leave_out: Sites that take no part, such as institutions of a single subject.
        regions: Region name to label ids.
        label_values: Mask values to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, a subject of the table without files, or one that the table does not name.
    """

    def __init__(
        self,
        *,
        root: str,
        partitioning: str = "partitioning_1.csv",
        modalities: Sequence[str] = ["flair", "t1", "t1ce", "t2"],
        leave_out: Sequence[str] = [],
        regions: Mapping[str, Sequence[int]] = {"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]},
        label_values: Mapping[int | str, int] = {},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.table = self.root / partitioning
        self.modalities = tuple(modalities)
        self.leave_out = frozenset(leave_out)
        if not modalities or len({*modalities}) < len(modalities):
            raise DataError(f"data.modalities=[{', '.join(modalities)}]: name each image once, such as [flair, t1ce]")

    def cases(self) -> list[Case]:
        """Every subject of every site; no image is opened."""
        there = {folder.name: folder for folder in folders(self.root)}
        if not self.table.is_file():
            raise unexpected(self.root, f"{self.table.name} beside a folder for each subject (data.partitioning)")
        sites = dict(self._subjects())
        if strange := sorted(there.keys() - sites.keys()):
            raise DataError(f"{self.root / strange[0]} is no subject of {self.table.name}; add its row or remove it")
        if missing := sorted(sites.keys() - there.keys()):
            raise DataError(f"{self.table} names {missing[0]}, which has no folder; remove its row or add the folder")
        if strange := sorted(self.leave_out - {*sites.values()}):
            raise DataError(f"data.leave_out: {self.table.name} has no {strange[0]}; remove it")
        found = [self._case(there[subject], site) for subject, site in sites.items() if site not in self.leave_out]
        return sorted(found, key=lambda case: (case.site, case.case))

    def modalities_of(self, site: str) -> tuple[str, ...]:
        """The same at every site."""
        return self.modalities

    def _subjects(self) -> Iterator[tuple[str, str]]:
        """Subject and site of every row."""
        with self.table.open(encoding="utf-8-sig", newline="") as file:
            rows = [{str(key).strip().lower(): value for key, value in row.items()} for row in csv.DictReader(file)]
        seen: set[str] = set()
        for line, row in enumerate(rows, start=2):
            number, subject = (str(row.get(name) or "").strip() for name in (SITE, SUBJECT))
            if not number.isdecimal() or not subject:
                raise DataError(f"{self.table}, line {line}: write a number and a name (Partition_ID,Subject_ID)")
            if subject in seen:
                raise DataError(f"{self.table}, line {line}: {subject} is there twice; leave it to one institution")
            seen.add(subject)
            yield subject, f"institution_{int(number):02}"

    def _case(self, folder: Path, site: str) -> Case:
        known = {stem_of(path): path for path in files(folder, VOLUMES)}
        without = self.lacking(site)
        wanted = [f"{folder.name}_{name}" for name in (*(one for one in self.modalities if one not in without), MASK)]
        if lacking := [name for name in wanted if name not in known]:
            raise DataError(
                f"site {site!r}, case {folder.name!r}: {folder} has no {lacking[0]}.nii.gz; add it"
                + ("" if lacking[0] == wanted[-1] else ", or leave it out of data.modalities")
            )
        first, *further, mask = (str(known[name]) for name in wanted)
        absent = tuple(place for place, name in enumerate(self.modalities) if name in without)
        return Case(site, folder.name, folder.name, first, mask, channels=tuple(further), absent=absent)
