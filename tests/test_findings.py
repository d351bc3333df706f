"""What is noticed in data: a run tells it once and keeps it, and a check finds the same."""

from pathlib import Path

import pytest

from datamodules import DataError, FolderDataModule
from datamodules.cases import Case, Sample
from datamodules.findings import COLUMNS, Finding, as_rows, causes
from launch.run import note_findings
from reporting.folder import FINDINGS, RunFolder
from tests.data_files import make_sites

BLANK = Finding("blank image", "every value is 9", "replace it", "a", "p1", "p1.png")
EMPTY = Finding("empty mask", "nothing is outlined", "none needed", "a", "p1", "p1.png")


def test_causes_group_by_cure_and_put_the_worst_first() -> None:
    many = [Finding("unknown label ids", f"{n} pixels", "map them", "ab"[n % 2], f"p{n}") for n in range(476)]
    found = causes([EMPTY, BLANK, *many])
    assert [cause.first for cause in found] == [many[0], BLANK, EMPTY]
    assert str(found[0]) == "site 'a', case 'p0': 0 pixels (and 475 more; a 238, b 238); map them"
    assert str(found[1]) == str(BLANK)


def test_rows_hold_everything_the_worst_first() -> None:
    rows = as_rows([EMPTY, BLANK])
    assert [tuple(row) for row in rows] == [COLUMNS, COLUMNS]
    assert [row["severity"] for row in rows] == ["warning", "note"]
    assert list(rows[0].values()) == ["warning", "blank image", "every value is 9", "replace it", "a", "p1", "p1.png"]


class Noticing(FolderDataModule):
    """Reads files, and notices something in each."""

    def read(self, case: Case) -> Sample:
        sample = super().read(case)
        noticed = Finding("blank image", "looks odd", "look at it", case.site, case.case)
        return Sample(sample.image, sample.labels, sample.spacing, (*sample.notes, noticed), sample.colours)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_reading_notices_is_kept_also_where_files_were_read_before(tmp_path: Path, cache: str) -> None:
    root = make_sites(tmp_path / "data", "a", "b")
    for _ in range(2):  # the second one finds the cache
        data = Noticing(root=str(root), size=16, cache=cache, cache_dir=str(tmp_path / "cache"))
        data.setup()
        data.setup()
        assert len(data.findings) == 12
        assert data.findings[0] == Finding("blank image", "looks odd", "look at it", "a", "case_00")


def test_an_error_that_is_told_ends_the_setup(tmp_path: Path) -> None:
    data = FolderDataModule(root=str(make_sites(tmp_path, "a", "b")))
    with pytest.raises(DataError, match="site 'a': is missing; add it"):
        data.tell(Finding("layout", "is missing", "add it", "a"))
    assert data.findings == []


def test_a_run_says_each_warning_once_and_keeps_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run")
    note_findings(run, [BLANK, EMPTY, Finding("blank image", "every value is 3", "replace it", "b", "p7", "p7.png")])
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: blank image: site 'a', case 'p1': p1.png every value is 9 (and 1 more; a 1, b 1); replace it",
        f"warning: all findings: {tmp_path / 'run' / FINDINGS}",
    ]
    assert [row["kind"] for row in run.findings()] == ["blank image", "blank image", "empty mask"]


def test_folds_say_what_none_of_them_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Finding("empty split", "too few", "add patients", "b")
    note_findings(RunFolder(tmp_path / "a"), [BLANK], part=True)
    capsys.readouterr()
    note_findings(RunFolder(tmp_path / "b"), [BLANK, other], part=True)
    told = capsys.readouterr().err
    assert "blank image" not in told
    assert "empty split" in told
    assert len(RunFolder(tmp_path / "b").findings()) == 2
