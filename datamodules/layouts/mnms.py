"""Heart in cine MRI of several centres and vendors: the release of the M&Ms challenge."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.acdc import PHASES, REGIONS, SITE, STORED, patients, volumes_of
from fedseg.datamodules.layouts.common import files, folders, unexpected
from fedseg.datamodules.readers import stem_of
from fedseg.datamodules.readers.kinds import NIFTI

CODE = "external code"
IMAGE, MASK = "_sa", "_sa_gt"
LABELLED: Mapping[str, Split] = {"Training/Labeled": "train", "Validation": "val", "Testing": "test"}
UNLABELLED = "Training/Unlabeled"


@dataclass(frozen=True)
class Subject:
    """A row of the table, and the folder that it is about.

    Attributes:
        code: The subject's name.
        vendor: Of the scanner.
        centre: Where it stands.
        frames: Phase to its frame, counted from 0.
        part: The folder's place in the release.
        line: Of the table.
    """

    code: str
    vendor: str
    centre: str
    frames: Mapping[str, int]
    part: str
    line: int


class MnMsDataModule(MultiCenterDataModule):
    """Short-axis cine MRI of the heart, sites by centre or vendor; a case is a volume at one of two times.

    Layout: ROOT/*.csv with the columns External code, Vendor, Centre, ED and ES, of which the last two number frames
    from 0 (the end of diastole and of systole), and the folders Training/Labeled, Training/Unlabeled, Validation and
    Testing with <code>/<code>_sa.nii.gz and <code>_sa_gt.nii.gz, both of four dimensions, the last being time. Only the
    two named frames are annotated, and only they are read; both are one patient. Labels are 1 cavity of the left
    ventricle, 2 muscle, 3 cavity of the right ventricle. Masks in Training/Unlabeled hold nothing and are not read.

    Sites are centre_1 to centre_5 (a sixth one's images are not in the open release), or vendor_A to vendor_D. 345
    subjects, of whom 25 of vendor C have no labels: centre 1 has 75 for training, 4 for validation, 16 for testing;
    centres 2 and 3 have 50, 5, 19 and 25, 5, 21; centre 4 has 25 without labels, 10, 40; centre 5 none, 10, 40. The
    split is honoured at sites that have labelled subjects in Training; the others' subjects are split anew, unless
    data.unseen holds the sites out, as the challenge did.

    These facts are from public loaders of the release (nnU-Net's Dataset114_MNMs, CineMA), the numbers of subjects by
    centre from a participant's read-me; this was not tried on the release itself.

    How to obtain: registration on the page of the challenge (Campello et al., IEEE TMI 2021). Terms: those of the
    challenge; check them there.

    Args:
        root: The folder that holds the table and the subjects, called "OpenDataset" in the release.
        sites: What makes a site, "centre" or "vendor".
        table: The table's file in the root; null: the only CSV file there.
        unlabeled: Whether subjects of Training/Unlabeled take part, for methods that learn from them.
        leave_out: Subjects that take no part.
        acdc: The root of ACDC, whose patients become one more site of that name; null: none.
        regions: Region name to label ids.
        label_values: Mask values to label ids; ACDC's have rules of their own (data.per_site).
        per_site: See MultiCenterDataModule.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, a table that lacks columns or numbers, or a subject of it without files.
    """

    def __init__(
        self,
        *,
        root: str,
        sites: Literal["centre", "vendor"] = "centre",
        table: str | None = None,
        unlabeled: bool = False,
        leave_out: Sequence[str] = [],
        acdc: str | None = None,
        regions: Mapping[str, Sequence[int]] = REGIONS,
        label_values: Mapping[int | str, int] | None = None,
        per_site: Mapping[str, Mapping[str, Any]] = {},
        **kwargs: Any,
    ) -> None:
        if acdc is not None:
            per_site = {**per_site, SITE: {"label_values": STORED, **per_site.get(SITE, {})}}
        super().__init__(regions=regions, label_values=label_values, per_site=per_site, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.by = sites
        self.table = table
        self.parts = (*LABELLED, *([UNLABELLED] if unlabeled else []))
        self.leave_out = frozenset(leave_out)
        self.acdc = None if acdc is None else Path(acdc).expanduser().absolute()

    def cases(self) -> list[Case]:
        """Both volumes of every subject; no image is opened."""
        subjects = list(self._subjects())
        others = {} if self.acdc is None else patients(self.acdc)
        known = {*(subject.code for subject in subjects), *(folder.name for folder in others)}
        if strange := sorted(self.leave_out - known):
            raise DataError(f"data.leave_out: {self._table()} has no subject {strange[0]}; remove it")
        taken = [one for one in subjects if one.code not in self.leave_out and one.part in self.parts]
        taught = {self._place(one) for one in taken if LABELLED.get(one.part) == "train"}
        found = [case for one in taken for case in self._volumes(one)]
        split = [case if case.site in taught else replace(case, split=None) for case in found]
        return [*split, *volumes_of(others, self.leave_out)]

    def states_patients(self, site: str) -> bool:
        """The release does."""
        return True

    def _place(self, subject: Subject) -> str:
        return f"{self.by}_{subject.centre if self.by == 'centre' else subject.vendor}"

    def _table(self) -> Path:
        """The file that names subjects, vendors, centres and frames."""
        folders(self.root)  # refuses a root that is none
        there = [path for path in files(self.root, (".csv",)) if self.table in (None, path.name)]
        if len(there) > 1:
            raise DataError(f"{self.root} holds several tables; name one, such as data.table='{there[-1].name}'")
        if not there:
            named = "one table (*.csv)" if self.table is None else f"the table {self.table} (data.table)"
            raise unexpected(self.root, f"{named} beside Training, Validation and Testing")
        return there[0]

    def _subjects(self) -> Iterator[Subject]:
        """Of every row; those without labels as well."""
        table = self._table()
        parts = {
            folder.name: part
            for part in (*LABELLED, UNLABELLED)
            if (self.root / part).is_dir()
            for folder in folders(self.root / part)
        }
        if not parts:
            raise unexpected(self.root, "Training/Labeled, Validation and Testing with a folder for each subject")
        seen: dict[str, int] = {}
        for line, row in _rows(table):
            subject = _subject(row, table, line, parts)
            if subject.code in seen:
                raise DataError(f"{table}, line {line}: {subject.code} is in line {seen[subject.code]}; remove one")
            seen[subject.code] = line
            yield subject
        if strange := sorted(parts.keys() - seen.keys()):
            folder = self.root / parts[strange[0]] / strange[0]
            raise DataError(f"{folder} is no subject of {table.name}; add its row or remove it")

    def _volumes(self, subject: Subject) -> Iterator[Case]:
        folder, site = self.root / subject.part / subject.code, self._place(subject)
        known = {stem_of(path): str(path) for path in files(folder, NIFTI)}
        labelled = subject.part != UNLABELLED
        for name in (subject.code + IMAGE, subject.code + MASK) if labelled else (subject.code + IMAGE,):
            if name not in known:
                cure = f"add it, or set data.leave_out=[{subject.code}]"
                raise DataError(f"site {site!r}, subject {subject.code!r}: {folder} has no {name}.nii.gz; {cure}")
        for phase, frame in subject.frames.items():
            yield Case(
                site,
                f"{subject.code}_{phase}",
                subject.code,
                known[subject.code + IMAGE],
                known[subject.code + MASK] if labelled else None,
                LABELLED.get(subject.part),
                columns=(("phase", phase), ("vendor", subject.vendor), ("centre", subject.centre)),
                frame=frame,
            )


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of the table, by names in lower case."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({error}); save it as CSV in UTF-8") from error
    names = [" ".join(name.split()).lower() for name in rows[0]] if rows else []
    for needed in (CODE, "vendor", "centre", *(phase.lower() for phase in PHASES)):
        if needed not in names:
            told = f"has the columns {', '.join(name for name in names if name)}" if names else "is empty"
            raise DataError(
                f"{table} has no column {needed!r}: it {told}; add it (External code, Vendor, Centre, ED, ES)"
            )
    for line, row in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in row):
            yield line, dict(zip(names, (cell.strip() for cell in row), strict=False))


def _subject(row: Mapping[str, str], table: Path, line: int, parts: Mapping[str, str]) -> Subject:
    code, vendor, centre = (row.get(name, "") for name in (CODE, "vendor", "centre"))
    if not code or not vendor or not centre:
        raise DataError(f"{table}, line {line}: write External code, Vendor and Centre of the subject")
    if code not in parts:
        raise DataError(f"{table}, line {line}: {code} has no folder; add it, or remove the row")
    frames = {phase: row.get(phase.lower(), "") for phase in PHASES}
    for phase, frame in frames.items():
        if not frame.isdecimal():
            cure = "write its number, counted from 0"
            raise DataError(f"{table}, line {line}: {phase} of {code} is {frame or 'nothing'}, no frame; {cure}")
    numbers = {phase: int(frame) for phase, frame in frames.items()}
    if len({*numbers.values()}) < len(PHASES):
        raise DataError(f"{table}, line {line}: ED and ES of {code} are both frame {frames['ED']}; correct one")
    return Subject(code, vendor, centre, numbers, parts[code], line)
