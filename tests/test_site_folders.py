"""Which folders are sites, what their folders may be called, and tables as other programs write them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedseg.datamodules import DataError, FolderDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.site_folders import CALLED, is_output
from fedseg.launch.check import READY, beside, main
from tests.data_files import folder, make_sites, save
from tests.data_files import picture as image

KNOBS = {"size": [20, 24]}


def kinds(root: Path) -> set[str]:
    return {finding.kind for finding in check(FolderDataModule(root=str(root), **KNOBS)).findings}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("spell", [str, str.upper, str.title])
def test_usual_names_of_folders_are_taken_with_a_note(tmp_path: Path, kind: str, spell: Callable[[str], str]) -> None:
    for name in CALLED[kind]:
        root = make_sites(tmp_path / spell(name), "a", "b")
        (root / "a" / kind).rename(root / "a" / spell(name))
        data = folder(root)
        assert len(data.splits()) == 12
        assert ("folder name" in {finding.kind for finding in data.findings}) == (spell(name) != kind)


def test_two_folders_of_usual_names_are_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b")
    (root / "a/masks").rename(root / "a/labels")
    shutil.copytree(root / "a/labels", root / "a/annotations")
    with pytest.raises(DataError, match=r"has no folder masks, but annotations, labels; rename one") as error:
        folder(root)
    line = str(error.value).split("write '")[1].partition("'")[0]
    (root / "a/site.yaml").write_text(line)
    assert len(folder(root).splits()) == 12


@pytest.mark.parametrize("names", [("images", "masks"), ("imagesTr", "labelsTr"), ("Image", "Annotations")])
def test_images_without_a_site_are_told_by_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    make_sites(tmp_path, "a")
    for kind, name in zip(("images", "masks"), names, strict=True):
        (tmp_path / "a" / kind).rename(tmp_path / name)
    (tmp_path / "a").rmdir()
    with pytest.raises(DataError, match=r"holds images without a site; move them \(.*\) to .*<site>/images"):
        folder(tmp_path)


def a_run(path: Path) -> None:
    save(path / "overlays/a.png", image(1))
    for name in ("config.yaml", "environment.json"):
        (path / name).write_text("")


def a_check(path: Path) -> None:
    save(path / "contact_sheet.png", image(1))
    for name in ("findings.csv", "report.md"):
        (path / name).write_text("")


def a_starting_run(path: Path) -> None:
    path.mkdir(parents=True)
    (path / ".lock").touch()


@pytest.mark.parametrize("make", [a_run, a_check, a_starting_run])
@pytest.mark.parametrize("place", ["out", "runs/first", "runs/sweep/first"])
def test_what_this_suite_wrote_is_no_site(tmp_path: Path, make: Callable[[Path], None], place: str) -> None:
    root = make_sites(tmp_path, "a", "b")
    make(root / place)
    assert is_output(root / place.partition("/")[0])
    data = folder(root)
    assert data.sites == ("a", "b")
    assert {finding.severity for finding in data.findings if finding.kind == "left out"} == {"note"}
    assert "left out" in kinds(root)


def test_a_folder_without_images_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b")
    (root / "protocol").mkdir()
    (root / "protocol/readme.txt").write_text("")
    data = folder(root)
    assert data.sites == ("a", "b")
    assert "not a site" in {finding.kind for finding in data.findings}
    assert "not a site" in kinds(root)


def test_a_folder_with_images_elsewhere_is_never_left_out(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b")
    (root / "b/images").rename(root / "b/stored")
    (root / "b/masks").rename(root / "b/drawn")
    with pytest.raises(DataError, match=r"site 'b': .*images is missing or empty"):
        folder(root)


@pytest.mark.slow
def test_the_report_never_lies_among_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_sites(tmp_path / "data", "a", "b")
    monkeypatch.chdir(root)
    assert main(["."]) == READY
    assert sorted(path.name for path in root.iterdir()) == ["a", "b"]
    assert (tmp_path / "data-data-check/report.md").is_file()
    monkeypatch.chdir(tmp_path)
    data = FolderDataModule(root=str(root))
    assert beside(Path("data-check"), data) == Path("data-check")
    for place in ("data", "data/a", "data/a/images"):
        with pytest.raises(ValueError, match="name one beside"):
            beside(Path(place), data)


# --- tables -----------------------------------------------------------------------------------------------------------

ROWS = [["site", "image", "mask"]] + [
    [s, f"{s}/images/case_{n:02d}.png", f"{s}/masks/case_{n:02d}.png"]
    for s, f in (("a", 0), ("b", 100))
    for n in range(f, f + 6)
]


def table(separator: str = ",", end: str = "\n", slash: str = "/", above: str = "") -> str:
    return above + end.join(separator.join(row).replace("/", slash) for row in ROWS) + end


DIALECTS = {
    "windows": table(slash="\\", end="\r\n").encode(),
    "sep=;": table(";", "\r\n", above="sep=;\r\n").encode(),
    "sep quoted": table(";", "\r\n", above='"sep=;"\r\n').encode(),
    "sep is a tab": table("\t", above="sep=\t\n").encode(),
    "unicode text": table("\t", "\r\n").encode("utf-16"),
    "unicode text, big": b"\xfe\xff" + table("\t", "\r\n").encode("utf-16-be"),
    "mark": b"\xef\xbb\xbf" + table(";", "\r\n").encode(),
    "mark and sep": b"\xef\xbb\xbf" + table(";", "\r\n", "\\", "sep=;\r\n").encode(),
    "CR": table(end="\r").encode(),
    "blanks": table(" , ").encode(),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tables_as_other_programs_write_them(tmp_path: Path, dialect: str) -> None:
    make_sites(tmp_path, "a", "b")
    (tmp_path / "sites.csv").write_bytes(DIALECTS[dialect])
    rows = folder(tmp_path).splits()
    assert sorted(row["case"] for row in rows) == sorted(Path(image).stem for _, image, _ in ROWS[1:])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (table("\t").encode("utf-16-le"), "is UTF-16 without its mark.*save it as CSV UTF-8"),
        (b"PK\x03\x04" + bytes(50), "is a workbook"),
        (table().replace("a/images", "C:\\data\\a\\images").encode(), "line 2: .*a drive and backslashes"),
        (
            table().replace("case_00", "CASE_00").encode(),
            "line 2: .*there is case_00.png, and upper and lower case count",
        ),
        (table(slash="\\").replace("case_00", "gone").encode(), "line 2: .*backslashes were read as slashes"),
        (table(";", above="sep=;\n").replace("case_00", "gone").encode(), "line 3: "),
    ],
)
def test_tables_that_lead_nowhere_name_the_cause(tmp_path: Path, content: bytes, told: str) -> None:
    make_sites(tmp_path, "a", "b")
    (tmp_path / "sites.csv").write_bytes(content)
    with pytest.raises(DataError, match=told):
        folder(tmp_path)


def test_paths_from_where_the_command_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sites(tmp_path, "a", "b")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/sites.csv").write_text(table())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="paths start at the manifest's folder, not where the command is typed"):
        folder(tmp_path, manifest="lists/sites.csv")
