"""Heart in cine MRI of one hospital: the release of the ACDC challenge. Its regions are those of M&Ms, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import files, folders, unexpected
from fedseg.datamodules.readers import stem_of
from fedseg.datamodules.readers.kinds import NIFTI

REGIONS: Mapping[str, Sequence[int]] = {"lv": [1], "myo": [2], "rv": [3]}
"""Cavity of the left ventricle, its muscle, cavity of the right ventricle: ids as M&Ms stores them."""
STORED: Mapping[int | str, int] = {3: 1, 1: 3}
"""ACDC counts the other way round: 1 right ventricle, 2 muscle, 3 left ventricle."""
PHASES = ("ED", "ES")
"""End of diastole and of systole: the frames that are annotated."""
SITE = "ACDC"
INFO, MASK = "Info.cfg", "_gt"
OFFICIAL: Mapping[str, Split] = {"training": "train", "testing": "test"}


class ACDCDataModule(MultiCenterDataModule):
    """Short-axis cine MRI of the heart, one site; a case is a volume at the end of diastole (ED) or systole (ES).

    Layout: ROOT/{training,testing}/<patient>/ with Info.cfg, whose lines "ED: 1" and "ES: 12" number frames from 1, and
    <patient>_frame01.nii.gz with <patient>_frame01_gt.nii.gz for each of the two. Patients right below ROOT are read as
    well, without a split. Both cases of a patient are one patient. Other files, such as <patient>_4d.nii.gz, are not
    read. Labels are 1 cavity of the right ventricle, 2 muscle, 3 cavity of the left ventricle (the challenge's page on
    evaluation); here they get the ids of M&Ms, 3, 2 and 1, so that both can be in one federation (`data=mnms
    data.acdc=ROOT`).

    Sites: one, ACDC, the University Hospital of Dijon; 100 patients for training and 50 for testing, five groups of 30.
    There is no federation of it alone but with other data.

    How to obtain: the page of the challenge (Bernard et al., IEEE TMI 2018). Terms: those of its authors, who ask to be
    cited; check them there.

    Args:
        root: The folder that holds training and testing, called "database" in the release.
        leave_out: Patients that take no part.
        regions: Region name to label ids.
        label_values: Mask values to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, a patient without Info.cfg, or a frame that it names without image or mask.
    """

    def __init__(
        self,
        *,
        root: str,
        leave_out: Sequence[str] = [],
        regions: Mapping[str, Sequence[int]] = REGIONS,
        label_values: Mapping[int | str, int] = STORED,
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.leave_out = frozenset(leave_out)

    def cases(self) -> list[Case]:
        """Both volumes of every patient; no image is opened."""
        there = patients(self.root)
        if strange := sorted(self.leave_out - {folder.name for folder in there}):
            raise DataError(f"data.leave_out: {self.root} has no patient {strange[0]}; remove it")
        return volumes_of(there, self.leave_out)

    def states_patients(self, site: str) -> bool:
        """The release does."""
        return True


def patients(root: Path) -> dict[Path, Split | None]:
    """Folders of the patients of the release, and their split.

    Raises:
        DataError: Another layout.
    """
    expected = f"training/ and testing/ with a folder for each patient, holding {INFO} and <patient>_frame01.nii.gz"
    parts: list[tuple[Path, Split | None]] = [(root, None)]
    if named := [folder for folder in folders(root) if folder.name in OFFICIAL]:
        parts = [(folder, OFFICIAL[folder.name]) for folder in named]
    found = {folder: split for part, split in parts for folder in folders(part)}
    if not found or not any((folder / INFO).is_file() for folder in found):
        raise unexpected(root, expected)
    return found


def volumes_of(there: Mapping[Path, Split | None], leave_out: frozenset[str]) -> list[Case]:
    """Both volumes of every patient.

    Raises:
        DataError: A patient without Info.cfg, or a frame that it names without image or mask.
    """
    taken = {folder: split for folder, split in there.items() if folder.name not in leave_out}
    return [case for folder, split in taken.items() for case in _of_patient(folder, split)]


def _of_patient(folder: Path, split: Split | None) -> Iterator[Case]:
    patient = folder.name
    known = {stem_of(path): path for path in files(folder, NIFTI)}
    for phase, number in _frames(folder / INFO).items():
        image = f"{patient}_frame{number:02d}"
        for name in (image, image + MASK):
            if name not in known:
                raise DataError(
                    f"site {SITE!r}, patient {patient!r}: {folder / INFO} names frame {number} as {phase}, but there "
                    f"is no {name}.nii.gz beside it; add it, correct the number, or set data.leave_out=[{patient}]"
                )
        columns = (("phase", phase),)
        mask = str(known[image + MASK])
        yield Case(SITE, f"{patient}_{phase}", patient, str(known[image]), mask, split, columns=columns)


def _frames(path: Path) -> dict[str, int]:
    """The frames that a patient's Info.cfg names, counted from 1."""
    cure = "write the numbers of its frames as in 'ED: 1' and 'ES: 12', one a line"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}, or leave the patient out") from error
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for phase in PHASES:
        if not re.fullmatch(r"0*[1-9][0-9]*", told.get(phase, "")):
            raise DataError(f"{path} does not say which frame is {phase} ({told.get(phase, 'no such line')!r}); {cure}")
    if int(told[PHASES[0]]) == int(told[PHASES[1]]):
        raise DataError(f"{path} names frame {told[PHASES[0]]} as {' and '.join(PHASES)}; {cure}")
    return {phase: int(told[phase]) for phase in PHASES}
