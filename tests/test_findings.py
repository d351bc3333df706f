"""What is noticed in data: a run tells it once and keeps it, and a check finds the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedseg.datamodules import DataError, FolderDataModule
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.check.command import check
from fedseg.datamodules.findings import COLUMNS, Finding, as_rows, causes
from fedseg.datamodules.listed import likely_pattern
from fedseg.launch.run import note_findings
from fedseg.reporting.folder import FINDINGS, RunFolder
from tests.data_files import make_site, make_sites, picture, save, square, write_manifest

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
        told = [finding for finding in data.findings if finding.kind == "blank image"]
        assert len(told) == 12
        assert told[0] == Finding("blank image", "looks odd", "look at it", "a", "case_00")


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


# --- a run and a check see the same -----------------------------------------------------------------------------------


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda root: shutil.copy(root / source, root / target) and None


def saved(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: save(root / name, array) and None


def saved_again(root: Path) -> None:
    """The same pixels in a file of another format: other bytes."""
    (root / "a/images/case_02.png").unlink()
    save(root / "a/images/case_02.tif", picture(3))


def renamed(pattern: str) -> Callable[[Path], None]:
    def rename(root: Path) -> None:
        for kind in ("images", "masks"):
            for number, path in enumerate(sorted((root / "a" / kind).iterdir())):
                path.rename(path.with_name(pattern.format("ABC"[number // 2] * 4, number % 2) + path.suffix))

    return rename


def listed(*rows: tuple[str, str, str, str, str]) -> Callable[[Path], None]:
    """All files of two sites, and further rows of site, image, mask, case, patient."""

    def write(root: Path) -> None:
        names = ("site", "image", "mask", "case", "patient")
        plain = [(p.parts[-3], p.name, p.name, p.stem, p.stem) for p in sorted(root.glob("*/images/*"))]
        table = [
            dict(zip(names, (s, f"{s}/images/{i}" if "/" not in i else i, f"{s}/masks/{m}", c, p), strict=True))
            for s, i, m, c, p in (*plain, *rows)
        ]
        write_manifest(root / "sites.csv", table)

    return write


TWICE = ("a", "case_00.png", "case_00.png", "second reading", "")
FREE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a copy within a site": (copied("a/images/case_03.png", "a/images/case_02.png"), "duplicate image"),
    "a copy at another site": (copied("b/images/case_103.png", "a/images/case_02.png"), "duplicate image"),
    "the same pixels in another format": (saved_again, "duplicate image"),
    "one mask for two images": (copied("a/masks/case_03.png", "a/masks/case_02.png"), "identical masks"),
    "one value": (saved("a/images/case_02.png", np.full((20, 24, 3), 9, np.uint8)), "blank image"),
    "nothing outlined": (saved("a/masks/case_02.png", square(label=0)), "empty mask"),
    "grey among colour": (saved("a/images/case_02.png", picture(2, channels=1)), "grey and colour"),
    "patients in names without digits": (renamed("malignant_{}_{:03d}"), "patients unknown"),
    "patients in names with digits": (renamed("p1{}-{}"), "patients unknown"),
    "a stray copy": (renamed("{} ({})"), "suspicious name"),
    "masks among images": (renamed("{}{}_mask"), "mask among images"),
    "two rows for one image": (listed(TWICE), "image listed twice"),
    "one image at two sites": (
        listed(("b", "a/images/case_00.png", "case_100.png", "guest", "")),
        "image at two sites",
    ),
    "one patient at two sites": (listed(("b", "case_100.png", "case_100.png", "x", "case_01")), "patient at two sites"),
    "a file that no row names": (
        lambda root: (listed()(root), make_site(root, "a", 1, first=50))[-1],
        "not in the manifest",
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_a_run_and_a_check_notice_the_same(tmp_path: Path, name: str) -> None:
    damage, kind = FREE[name]
    make_sites(tmp_path, "a", "b")
    for number, path in enumerate(sorted(tmp_path.glob("*/masks/*"))):
        save(path, np.roll(square(), number, axis=1))
    damage(tmp_path)
    settings = {"root": str(tmp_path), "size": [20, 24]}
    run = FolderDataModule(**settings)
    run.setup()
    checked = [finding for finding in check(FolderDataModule(**settings)).findings if finding.kind != "sites differ"]
    assert kind in {finding.kind for finding in run.findings}
    assert set(run.findings) == set(checked)


@pytest.mark.parametrize("patients", [("", ""), ("x", "y")])
def test_no_split_cuts_the_rows_of_one_image(tmp_path: Path, patients: tuple[str, str]) -> None:
    make_sites(tmp_path, "a", "b", count=8)
    link = tmp_path / "linked"
    link.symlink_to(tmp_path / "a/images")
    rows = [
        {
            "site": "a",
            "image": f"{place}/case_{n:02d}.png",
            "mask": f"a/masks/case_{n:02d}.png",
            "case": f"{n}-{reader}",
        }
        | {"patient": f"{patients[reader]}{n}" if patients[0] else ""}
        for n in range(8)
        for reader, place in enumerate(("a/images", "linked"))
    ]
    write_manifest(tmp_path / "sites.csv", rows)
    data = FolderDataModule(root=str(tmp_path), size=16)
    data.setup()
    split = {row["case"]: row["split"] for row in data.splits()}
    assert all(split[f"{n}-0"] == split[f"{n}-1"] for n in range(8))
    assert len(set(split.values())) == 3
    (told,) = [finding for finding in data.findings if finding.kind == "image listed twice"]
    assert told.what.startswith("8 image(s) are listed more than once (0-0 = 0-1, ")


def test_one_image_in_two_official_splits_is_refused(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    image = {"site": "a", "image": "a/images/case_00.png", "mask": "a/masks/case_00.png"}
    write_manifest(tmp_path / "sites.csv", [image | {"case": s, "split": s} for s in ("train", "test")])
    with pytest.raises(DataError, match="is in two official splits"):
        FolderDataModule(root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (
            [f"malignant_{p}_{n:03d}" for p in ("ALAL", "BOBO") for n in range(3)],
            r"^(?:malignant)[_\- ]+(.+?)[_\- ]+\d+$",
        ),
        ([f"ALAL-{n}" for n in range(3)] + [f"BOBO-{n}" for n in range(2)], r"^(.+?)[_\- ]+\d+$"),
        ([f"p{p}s{n}" for p in range(3) for n in range(4)], r"^(.*\d)[A-Za-z]+\d+$"),
        ([f"case_{n}" for n in range(9)], ""),
        ([f"{kind}_{n}" for kind in ("benign", "malignant") for n in range(9)], ""),
        ([f"p{n}" for n in range(9)], ""),
    ],
)
def test_patients_are_seen_in_names(names: list[str], pattern: str) -> None:
    assert likely_pattern(names) == pattern


def test_the_cures_for_unknown_patients_work(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    renamed("malignant_{}_{:03d}")(tmp_path)
    data = FolderDataModule(root=str(tmp_path))
    data.setup()
    (told,) = [finding for finding in data.findings if finding.kind == "patients unknown"]
    suggested, alone = (part.partition("'")[0] for part in told.cure.split("patient_pattern='")[1:])
    for pattern, patients in ((alone, 6), (suggested, 3)):
        shutil.rmtree(tmp_path / "b")
        make_site(tmp_path, "b", first=100)
        if patients == 3:
            for path in sorted((tmp_path / "b").rglob("*.png")):
                path.rename(path.with_name(f"malignant_{path.stem}_{0:03d}.png"))
        data = FolderDataModule(root=str(tmp_path), patient_pattern=pattern)
        data.setup()
        assert "patients unknown" not in {finding.kind for finding in data.findings}
        assert len({row["patient"] for row in data.splits() if row["site"] == "a"}) == patients
