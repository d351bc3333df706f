"""The check of a user's own data: every kind of defect is found and named, and nothing else is."""

import csv
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedseg.datamodules import DataError, FolderDataModule, PhantomDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.check.duplicates import ALIKE, outlines_of
from fedseg.datamodules.check.sheet import Sheet
from fedseg.datamodules.check.statistics import SiteStatistics, brightness, moments, percentiles
from fedseg.datamodules.duplicates import digest
from fedseg.datamodules.findings import KINDS, Finding
from fedseg.launch.check import FAULTY, READY, main
from fedseg.launch.command import INTERRUPTED, MISTAKE
from tests.data_files import make_site, make_sites, picture, save, save_volume, square, write_manifest

Damage = Callable[[Path], None]


def findings(root: Path, **knobs: object) -> list[Finding]:
    return check(FolderDataModule(root=str(root), **knobs)).findings


def of(found: list[Finding], kind: str) -> Finding:
    """The only finding of a kind."""
    (one,) = [finding for finding in found if finding.kind == kind]
    return one


def smooth(number: int, side: int = 96) -> np.ndarray:
    """A picture with structure at large scales, as photographs have it."""
    coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


# --- one defect at a time ---------------------------------------------------------------------------------------------


def test_sound_data_has_no_findings(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b", count=12)
    for number, path in enumerate(sorted(root.glob("*/masks/*"))):
        save(path, np.roll(square(), number, axis=1))
    assert findings(root) == []


def drop(name: str) -> Damage:
    return lambda root: (root / "a" / name).unlink()


def write(name: str, content: bytes) -> Damage:
    return lambda root: (root / "a" / name).write_bytes(content) and None


def mask(array: np.ndarray) -> Damage:
    return lambda root: save(root / "a/masks/case_02.png", array) and None


def image(array: np.ndarray) -> Damage:
    return lambda root: save(root / "a/images/case_02.png", array) and None


def truncate(name: str) -> Damage:
    return lambda root: (root / "a" / name).write_bytes((root / "a" / name).read_bytes()[:50]) and None


def new(name: str, array: np.ndarray) -> Damage:
    return lambda root: save(root / "a" / name, array) and None


def values(array: np.ndarray, name: str) -> Damage:
    def damage(root: Path) -> None:
        drop(name)(root)
        save((root / "a" / name).with_suffix(".npy"), array)

    return damage


def copied(target: str, to: str = "a/images/case_02.png") -> Damage:
    return lambda root: (root / to).write_bytes((root / target).read_bytes()) and None


def renamed(name: str) -> Damage:
    def damage(root: Path) -> None:
        for kind in ("images", "masks"):
            (root / "a" / kind / "case_02.png").rename(root / "a" / kind / name)

    return damage


def compressed(name: str) -> Damage:
    def damage(root: Path) -> None:
        (root / "a" / name).unlink()
        Image.fromarray(square() * 255).save((root / "a" / name).with_suffix(".jpg"), quality=50)

    return damage


not_finite = np.full((20, 24), np.nan, np.float32)
DEFECTS: list[tuple[str, Damage, str, str]] = [
    ("missing mask", drop("masks/case_02.png"), "case_02", "has no mask"),
    ("missing image", drop("images/case_02.png"), "case_02", "has no image"),
    ("unreadable file", truncate("images/case_02.png"), "case_02", "cannot be read"),
    ("unreadable file", truncate("masks/case_02.png"), "case_02", "cannot be read"),
    ("unreadable file", write("images/case_02.png", b""), "case_02", "cannot be read"),
    ("size mismatch", mask(square(20, 30)), "case_02", "the mask is 20 x 30, its image case_02.png 20 x 24"),
    ("image values", values(not_finite, "images/case_02.png"), "case_02", "not finite"),
    ("mask values", values(square() * 0.5, "masks/case_02.png"), "case_02", "soft map"),
    ("unknown label ids", mask(square(label=7)), "case_02", "7, not in any of data.regions (64 pixels)"),
    ("channels differ", values(np.zeros((20, 24, 5), np.uint8), "images/case_02.png"), "", "5 channels, others 3"),
    ("grey and colour", image(picture(1, channels=1)), "", "1 channels, others 3"),
    ("blank image", image(np.full((20, 24, 3), 9, np.uint8)), "case_02", "has one value everywhere"),
    ("empty mask", mask(square(label=0)), "case_02", "nothing is outlined"),
    ("foreign file", write("images/notes.txt", b"hello"), "notes", "is none of .png"),
    ("ambiguous name", new("images/case_02.jpg", picture(5)), "case_02", "same case as case_02"),
    ("duplicate image", copied("b/images/case_101.png"), "case_02", "b/case_101, at another site"),
    ("duplicate image", copied("a/images/case_03.png"), "case_02", "case_03, of another patient"),
    ("suspicious name", renamed("case_02 (1).png"), "case_02 (1)", "odd signs"),
    ("suspicious name", renamed("Case_03.png"), "case_03", "upper and lower case"),
    ("mask among images", renamed("case_02_mask.png"), "case_02_mask", "that of a mask"),
    ("lossy mask", compressed("masks/case_02.png"), "case_02", "outlines only"),
]


@pytest.mark.parametrize(("kind", "damage", "case", "told"), DEFECTS, ids=lambda value: str(value)[:30])
def test_a_defect_is_found_and_named(tmp_path: Path, kind: str, damage: Damage, case: str, told: str) -> None:
    root = make_sites(tmp_path, "a", "b")
    damage(root)
    finding = of(findings(root), kind)
    assert finding.site == "a"
    assert finding.case == case
    assert told in finding.what
    assert finding.cure
    assert not case or case in Path(finding.file).name


def test_all_defects_at_once(tmp_path: Path) -> None:
    """One run names them all; nothing hides another."""
    root = make_sites(tmp_path, "a", "b", count=12)
    expected = set()
    for number, (kind, damage, case, _) in enumerate(DEFECTS):
        if case == "case_02" and kind not in ("duplicate image", "lossy mask"):
            site = root / f"site_{number:02d}"
            make_site(root, site.name, first=1000 * (number + 1))
            for folder in ("images", "masks"):
                next(iter(sorted((site / folder).iterdir()))).rename(site / folder / "case_02.png")
            (root / "a").rename(root / "kept")
            site.rename(root / "a")
            damage(root)
            (root / "a").rename(site)
            (root / "kept").rename(root / "a")
            expected.add((kind, site.name, case))
    found = {(finding.kind, finding.site, finding.case) for finding in findings(root)}
    assert expected <= found
    assert len(expected) >= 12


# --- sites, patients, splits ------------------------------------------------------------------------------------------


def test_site_of_one_patient_cannot_be_split(tmp_path: Path) -> None:
    make_site(make_sites(tmp_path, "a"), "small", 1, first=500)
    found = findings(tmp_path)
    assert of(found, "split impossible").site == "small"
    assert not [f for f in findings(tmp_path, unseen=["small"]) if f.kind == "split impossible"]


def test_site_of_two_patients_lacks_validation(tmp_path: Path) -> None:
    make_site(make_sites(tmp_path, "a"), "small", 2, first=500)
    finding = of(findings(tmp_path), "empty split")
    assert (finding.site, "val" in finding.what) == ("small", True)


def test_unknown_unseen_site(tmp_path: Path) -> None:
    finding = of(findings(make_sites(tmp_path, "anna", "bert"), unseen=["bart"]), "layout")
    assert "'bart'" in finding.what
    assert "bert" in finding.cure


def manifest(root: Path, count: int = 12, **changes: dict[int, str]) -> Path:
    """Two sites, two images per patient; ``changes`` replaces cells: column -> {row: value}."""
    rows = []
    for number in range(count):
        site, stem = "ab"[number % 2], f"{number:02d}"
        save(root / f"{stem}.png", picture(number))
        save(root / f"{stem}_m.png", np.roll(square(), number % 7, axis=1))
        row = {"site": site, "image": f"{stem}.png", "mask": f"{stem}_m.png"}
        rows.append(row | {"patient": f"{site}{number // 4}", "split": ""})
    for column, cells in changes.items():
        for number, value in cells.items():
            rows[number][column] = value
    return write_manifest(root / "sites.csv", rows)


def test_manifest_without_defects(tmp_path: Path) -> None:
    manifest(tmp_path)
    assert not [finding for finding in findings(tmp_path) if finding.severity != "note"]


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "patient in two splits",
            {"split": {0: "train", 2: "test"}},
            "in two official splits (00 in train, 02 in test)",
        ),
        ("patient at two sites", {"patient": {0: "p", 1: "p"}}, "1 patient(s) at a, b: p"),
        ("missing image", {"image": {3: "gone.png"}}, "line 5"),
        ("missing mask", {"mask": {3: "gone.png"}}, "line 5"),
        ("manifest", {"split": {3: "trian"}}, "unknown split 'trian'"),
        ("manifest", {"site": {3: ""}}, "line 5: the cell 'site' is empty"),
        ("not labelled", {"mask": {3: ""}}, "no mask"),
        ("ambiguous name", {"image": {2: "00.png"}}, "the name occurs 2 times"),
    ],
)
def test_manifest_defects(tmp_path: Path, kind: str, changes: dict[str, dict[int, str]], told: str) -> None:
    manifest(tmp_path, **changes)
    finding = of(findings(tmp_path), kind)
    assert told in finding.what


def test_manifest_defects_do_not_hide_each_other(tmp_path: Path) -> None:
    manifest(tmp_path, image={3: "gone.png", 5: "lost.png"}, split={0: "train", 2: "test", 6: "exam"})
    found = findings(tmp_path)
    assert len([finding for finding in found if finding.kind == "missing image"]) == 2
    assert {"manifest", "patient in two splits"} <= {finding.kind for finding in found}


def test_a_run_stops_at_the_first_finding_of_a_check(tmp_path: Path) -> None:
    manifest(tmp_path, image={3: "gone.png", 5: "lost.png"}, mask={7: "gone.png"})
    found: list[Finding] = []
    data = FolderDataModule(root=str(tmp_path))
    cases = data.survey(found.append)
    with pytest.raises(DataError) as error:
        data.cases()
    assert str(error.value) == str(found[0])
    assert [finding.case for finding in found if finding.severity == "error"] == ["gone", "lost", "07"]
    assert [(case.case, case.mask) for case in cases if case.mask == ""] == [("07", "")]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "x\x00.png"])
@pytest.mark.parametrize("column", ["image", "mask"])
def test_names_that_no_file_can_have(tmp_path: Path, column: str, name: str) -> None:
    manifest(tmp_path, **{column: {3: name}})
    assert "line 5" in of(findings(tmp_path), f"missing {column}").what
    (finding,) = findings(tmp_path, manifest=name)
    assert (finding.kind, finding.what) == ("manifest", "does not exist")


def test_a_missing_mask_is_told_once(tmp_path: Path) -> None:
    """Its case counts as labelled, as it will be once the mask is there."""
    manifest(tmp_path, mask={3: "gone.png"})
    for stacked in (False, True):
        found = findings(tmp_path, stack_slices=stacked)
        assert of(found, "missing mask").case == "03"
        assert {finding.kind for finding in found if finding.severity != "note"} == {"missing mask"}
        assert "not labelled" not in {finding.kind for finding in found}


def test_stacks_are_of_patients_whatever_else_is_wrong(tmp_path: Path) -> None:
    """A group binds patients, and slices of two patients may have one name."""
    rows = []
    for patient in "pqrs":
        for number in range(2):
            save(tmp_path / patient / f"{number}.png", picture(10 * ord(patient) + number))
            save(tmp_path / patient / f"{number}_m.png", square())
            row = {"site": "a", "patient": patient, "group": "g" if patient in "pq" else ""}
            rows.append(row | {"image": f"{patient}/{number}.png", "mask": f"{patient}/{number}_m.png"})
    for number in (0, 1):
        write_manifest(tmp_path / "sites.csv", [*rows, *[rows[0] | {"image": "gone.png"}] * number])
        checked = check(FolderDataModule(root=str(tmp_path), stack_slices=True))
        assert [f.kind for f in checked.findings if f.severity == "error"] == ["missing image"] * number
        (site,) = checked.sites
        assert [(case.case, case.patient, len(case.slices)) for case in site.cases] == [
            ("p", "g", 2),
            ("q", "g", 2),
            ("r", "r", 2),
            ("s", "s", 2),
        ]


def test_volumes_are_no_slices(tmp_path: Path) -> None:
    manifest(tmp_path, image={0: "v.nii.gz"}, mask={0: "", 3: "gone.png"})
    save_volume(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.uint8))
    found = findings(tmp_path, stack_slices=True)
    assert Path(of(found, "layout").file).name == "v.nii.gz"
    assert of(found, "missing mask").case == "03"


def test_tables_that_are_none(tmp_path: Path) -> None:
    """What a run refuses does not end a check with a traceback."""
    table = tmp_path / "sites.csv"
    for text, told in [
        ("site,image,mask\n" + "x" * 140_000, "is no table"),
        ("site,image,mask,site\na,gone.png,,b\n", "the column 'site' twice"),
        ("site,image,mask\n", "lists no case"),
        ("", "has no column 'site'"),
    ]:
        table.write_text(text)
        assert told in next(f.what for f in findings(tmp_path) if f.kind == "manifest")


def test_names_that_would_harm_files_or_logs(tmp_path: Path) -> None:
    names = dict.fromkeys(range(12), "") | {2: "x" * 250, 4: "a\x1b[31m"}
    manifest(tmp_path, site={3: "b/c"}, case=names, image={5: "gone.png"})
    found = findings(tmp_path)
    assert of(found, "missing image").case == "gone"
    told = [finding.what[:20] for finding in found if finding.kind == "layout"]
    assert told == ["'b/c' cannot be the ", "site 'a', case 'a\\x1", "site 'a', case 'xxxx"]


def test_file_that_no_row_names(tmp_path: Path) -> None:
    manifest(tmp_path)
    save(tmp_path / "extra.png", picture(99))
    assert Path(of(findings(tmp_path), "not in the manifest").file).name == "extra.png"


def test_manifest_without_a_column(tmp_path: Path) -> None:
    write_manifest(tmp_path / "sites.csv", [{"centre": "a", "image": "x", "mask": "y"}])
    assert "no column 'site'" in of(findings(tmp_path), "manifest").what


def test_names_that_hint_at_patients(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "a/images" / f"P{number // 3}_{number}.png", picture(number))
        save(tmp_path / "a/masks" / f"P{number // 3}_{number}.png", square())
    assert of(findings(tmp_path), "patients unknown").site == "a"
    found = findings(tmp_path, patient_pattern=r"^(P\d)_")
    assert not [finding for finding in found if finding.kind == "patients unknown"]
    found = findings(tmp_path, patient_pattern=r"^P\d(x)?")
    assert {finding.what for finding in found if finding.kind == "layout"} == {"data.patient_pattern finds no patient"}


def test_mask_suffix_is_suggested(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "a/images" / f"c{number}.png", picture(number))
        save(tmp_path / "a/masks" / f"c{number}_seg.png", square())
    missing = [finding for finding in findings(tmp_path) if finding.kind == "missing mask"]
    assert len(missing) == 4
    assert missing[0].cure == "set data.mask_suffix=_seg"
    assert not [f for f in findings(tmp_path, mask_suffix="_seg") if f.severity == "error"]


def test_region_that_never_occurs(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b")
    nowhere = of(findings(root, regions={"disc": [1], "cup": [2]}), "region never occurs")
    assert (nowhere.site, "'cup'" in nowhere.what) == ("", True)
    for path in (root / "b/masks").iterdir():
        save(path, square(label=2))
    found = findings(root, regions={"disc": [1, 2], "cup": [2]})
    assert of(found, "region never occurs").site == "a"


def test_images_without_sites(tmp_path: Path) -> None:
    make_site(tmp_path.parent, tmp_path.name)
    assert "without a site" in of(findings(tmp_path), "layout").what


# --- copies -----------------------------------------------------------------------------------------------------------


def test_near_duplicate(tmp_path: Path) -> None:
    root = make_sites(tmp_path, "a", "b")
    original = smooth(1)
    save(root / "a/images/case_02.png", original)
    save(root / "a/masks/case_02.png", square(96, 96))
    Image.fromarray(original).resize((80, 80)).save(root / "b/images/near.jpg", quality=80)
    save(root / "b/masks/near.png", square(80, 80))
    finding = of(findings(root), "near duplicate")
    assert (finding.site, finding.case) == ("a", "case_02")
    assert "b/near" in finding.what


def test_outlines_of_other_pictures_differ() -> None:
    vectors = [outlines_of(smooth(number)) for number in range(12)]
    unit = np.stack([v / np.linalg.norm(v.astype(float)) for v in vectors if v is not None])
    alike = unit @ unit.T - 2 * np.eye(12)
    assert alike.max() < ALIKE - 0.2
    assert outlines_of(np.full((9, 9, 1), 5, np.uint8)) is None


def test_digest_knows_shape_and_type() -> None:
    array = np.arange(6, dtype=np.uint8)
    assert digest(array) == digest(array.copy())
    assert len({digest(array), digest(array.reshape(2, 3)), digest(array.view(np.int8)), digest(array[::-1])}) == 4


def test_copies_of_one_patient_are_told_apart(tmp_path: Path) -> None:
    manifest(tmp_path)
    (tmp_path / "02.png").write_bytes((tmp_path / "00.png").read_bytes())
    finding = of(findings(tmp_path), "duplicate image")
    assert "of the same patient; their masks differ" in finding.what


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_region_sizes_and_labels(tmp_path: Path) -> None:
    make_site(tmp_path, "a", 4, mask=lambda number: square(label=1 if number else 0))
    (site,) = check(FolderDataModule(root=str(tmp_path))).sites
    assert site.regions["foreground"].shares == pytest.approx([64 / 480] * 3)
    assert site.with_labels == site.read == 4
    assert site.labels == {0: 4 * 480 - 3 * 64, 1: 3 * 64}
    assert site.sizes == {(20, 24): 4}
    assert site.types == {"8 bit unsigned": 4}
    assert sum(site.planned.values()) == 4


def test_intensities_match_numpy() -> None:
    values = np.random.default_rng(0).integers(0, 256, 5000)
    histogram = np.bincount(values, minlength=256)
    assert moments(histogram) == pytest.approx((values.mean() / 255, values.std() / 255))
    wanted = np.percentile(values, [1, 50, 99], method="inverted_cdf") / 255
    assert percentiles(histogram, [1, 50, 99]) == pytest.approx(wanted)


def test_distance_in_sds_between_images() -> None:
    sites = [SiteStatistics(name, [], {}) for name in "ab"]
    for site, centre in zip(sites, (0.2, 0.6), strict=True):
        site.means[1] = [np.array([centre - 0.1]), np.array([centre + 0.1])]  # sd = sqrt(0.02 / 1)
    measured = brightness(sites)
    assert measured is not None
    assert measured.matrix[0, 1] == pytest.approx(0.4 / np.sqrt(0.02))
    assert brightness(sites[:1]) is None


@pytest.mark.parametrize("noise", [0.0, 1e-17])
def test_images_that_are_all_alike_are_no_unit(noise: float) -> None:
    sites = [SiteStatistics(name, [], {}) for name in "ab"]
    for site, centre in zip(sites, (0.2, 0.6), strict=True):
        site.means[1] = [np.array([centre]), np.array([centre + noise])]
    measured = brightness(sites)
    assert measured is not None
    assert measured.matrix[0, 1] == pytest.approx(0.4 * 255)


def test_what_differs_most_is_named(tmp_path: Path) -> None:
    """Structures of 17 % and 43 % of the image tell sites apart more than their brightness does."""
    rng = np.random.default_rng(0)
    for site, share in (("a", 0.17), ("b", 0.43)):
        for number in range(6):
            mask = np.zeros((40, 40), np.uint8)
            side = round(40 * float(np.sqrt(share)) + rng.uniform(-1, 1))
            mask[:side, :side] = 1
            save(tmp_path / site / "images" / f"{site}{number}.png", picture(number + 10 * len(site), 40, 40))
            save(tmp_path / site / "masks" / f"{site}{number}.png", mask)
    told = of(findings(tmp_path), "sites differ").what
    assert told.startswith("most in size of 'foreground': size of 'foreground' of a and b (1")
    assert "of the image) lies" in told


def test_one_cause_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sites(tmp_path / "data", "a", "b", count=30)
    for path in (tmp_path / "data").glob("*/masks/*"):
        save(path, square(label=7))
    assert main([str(tmp_path / "data"), "absent={a: [foreground], b: [foreground]}", f"output={tmp_path / 'out'}"])
    told = capsys.readouterr().out
    assert "unknown label ids (60). Cure: " in told
    assert "60 errors of 1 cause" in told


def test_volumes(tmp_path: Path) -> None:
    truth = np.zeros((12, 14, 5), np.uint8)
    truth[3:6, 3:6, 2:4] = 1
    for number in range(4):
        values = np.random.default_rng(number).normal(100, 20, truth.shape).astype(np.int16)
        affine = np.diag([0.5, 0.5, 3.0, 1.0])
        save_volume(tmp_path / "a/images" / f"{number}.nii.gz", values, affine)
        save_volume(tmp_path / "a/masks" / f"{number}.nii.gz", truth, affine)
    (site,) = check(FolderDataModule(root=str(tmp_path))).sites
    assert site.spacings == {(3.0, 0.5, 0.5): 4}
    assert site.depths == {5: 4}
    assert site.types == {"16 bit signed": 4}
    assert (site.regions["foreground"].slices, site.slices) == (8, 20)
    save_volume(tmp_path / "a/masks" / "2.nii.gz", truth, np.diag([-0.5, 0.5, 3.0, 1.0]))
    finding = of(findings(tmp_path), "geometry mismatch")
    assert (finding.severity, finding.site, finding.case) == ("error", "a", "2")
    assert "lies up to" in finding.what


def test_broken_slice_does_not_hide_its_stack(tmp_path: Path) -> None:
    manifest(tmp_path)
    (tmp_path / "00.png").write_bytes(b"broken")
    save(tmp_path / "05.png", picture(5, 30, 30))
    save(tmp_path / "05_m.png", square(30, 30))
    found = findings(tmp_path, stack_slices=True)
    assert Path(of(found, "unreadable file").file).name == "00.png"
    assert of(found, "slices differ").case == "b1"
    save(tmp_path / "05.png", picture(5, channels=1))
    assert of(findings(tmp_path, stack_slices=True), "slices differ").case == "b1"


def test_data_sets_that_draw_their_images() -> None:
    data = PhantomDataModule(n_sites=3, cases_per_site=6, resolution=48)
    checked = check(data)
    assert not [finding for finding in checked.findings if finding.severity == "error"]
    assert sum(site.read for site in checked.sites) == len(data.cases())
    assert all(len(checked.sheet.thumbnails[site.site]) == min(6, site.read) for site in checked.sites)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedseg.datamodules.check.duplicates.BLOCK", 8)  # the search's own memory, full from the start

    def peak(count: int) -> int:
        make_site(tmp_path / str(count), "a", count, size=(200, 200), mask=lambda number: square(200, 200))
        tracemalloc.start()
        check(FolderDataModule(root=str(tmp_path / str(count))))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(8)  # what is imported on the way
    assert peak(48) - peak(8) < 40 * 10_000  # of 120 kB per image


# --- contact sheet ----------------------------------------------------------------------------------------------------


def test_sheet_takes_cases_spread_over_the_site_and_skips_broken_ones(tmp_path: Path) -> None:
    make_site(tmp_path, "a", 21)
    truncate("images/case_04.png")(tmp_path)
    sheet: Sheet = check(FolderDataModule(root=str(tmp_path))).sheet
    names = [name for name, _ in sheet.thumbnails["a"]]
    assert names == ["case_00", "case_05", "case_08", "case_12", "case_16", "case_20"]


def test_outline_is_where_the_mask_is(tmp_path: Path) -> None:
    truth = np.zeros((240, 240), np.uint8)
    truth[60:120, 60:120] = 1
    for number in range(3):
        grey = np.full((240, 240), 100, np.uint8)
        grey[0, number] = 0
        save(tmp_path / "a/images" / f"{number}.png", grey)
        save(tmp_path / "a/masks" / f"{number}.png", truth)
    _, thumbnail = check(FolderDataModule(root=str(tmp_path))).sheet.thumbnails["a"][0]
    yellow = (thumbnail[..., 0] > 200) & (thumbnail[..., 2] < 120)
    rows, columns = np.nonzero(yellow)
    assert (rows.min(), rows.max()) == pytest.approx((60, 119), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((60, 119), abs=1)


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("sites", [1, 21])
def test_sheet_of_any_number_of_sites(tmp_path: Path, sites: int) -> None:
    root = make_sites(tmp_path / "data", *(f"site_{n:02d}" for n in range(sites)), count=2)
    assert main([str(root), f"output={tmp_path / 'out'}"]) == READY
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.height < 8000
        assert np.asarray(sheet.convert("L")).std() > 10


# --- command line -----------------------------------------------------------------------------------------------------


def test_report_of_broken_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_sites(tmp_path / "data", "a", "b", count=12)
    for number in range(7):
        save(root / "a/masks" / f"case_{number:02d}.png", square(label=9))
    assert main([str(root), f"output={tmp_path / 'out'}"]) == FAULTY
    told = capsys.readouterr().out
    assert "unknown label ids (7)" in told
    assert "... and 2 more, all in findings.csv" in told
    assert "7 errors" in told
    assert "not ready" in told
    with (tmp_path / "out/findings.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["severity"] == "error"]
    assert {row["case"] for row in rows} == {f"case_{number:02d}" for number in range(7)}
    report = (tmp_path / "out/report.md").read_text()
    assert "contact_sheet.png" in report
    assert "| a | 12 |" in report


def test_manifest_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest(tmp_path / "data").rename(tmp_path / "data/table.csv")
    assert main([str(path), f"output={tmp_path / 'out'}"]) == READY
    assert "2 sites, 12 cases" in capsys.readouterr().out


def test_named_layout_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            name = f"{split}{number}.png"
            save(tmp_path / "d/Domain1" / split / "ROIs/image" / name, picture(len(name) * number + count))
            levels = np.select([square() == 1], [0], 255).astype(np.uint8)
            levels[10, 10] = 128
            save(tmp_path / "d/Domain1" / split / "ROIs/mask" / name, levels)
    assert main(["data=fundus", f"data.root={tmp_path / 'd'}", f"output={tmp_path / 'out'}"]) == READY
    assert "Domain1  cup" in capsys.readouterr().out
    save(tmp_path / "d/Domain1/train/ROIs/image/alone.png", picture(50))
    assert main(["data=fundus", f"data.root={tmp_path / 'd'}", f"output={tmp_path / 'out'}"]) == FAULTY
    assert "alone.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name the folder"),
        (["nowhere"], "nowhere is no folder"),
        (["data=fundos", "root=."], "did you mean 'fundus'"),
        ([".", "data.regoins={a: [1]}"], "did you mean 'data.regions'"),
        ([".", "batch_size=many"], "batch_size"),
        ([".", "regions={a: [0]}"], "background"),
        ([".", "split=[1, 1, 1]"], "three fractions"),
        ([".", "augment=flip"], "did you mean 'flips'"),
        (["x" * 300], "is no folder"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == MISTAKE
    assert told in capsys.readouterr().err


def test_an_interruption_before_the_first_case_is_read_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedseg.launch.check.build", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["data"]) == INTERRUPTED
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = make_sites(tmp_path / "data", "a"), tmp_path / "out"
    out.write_text("a file")
    for place in (out, out / "below", tmp_path / ("x" * 300)):
        assert main([str(root), f"output={place}"]) == MISTAKE
        told = capsys.readouterr()
        assert f"output={place} cannot be written" in told.err
        assert not told.out, "told before any image is read"
    out.unlink()
    (out / "report.md").mkdir(parents=True)
    assert main([str(root), f"output={out}"]) == MISTAKE
    told = capsys.readouterr()
    assert "report.md" in told.err
    assert "1 site, 6 cases" in told.out


@pytest.mark.slow
def test_knobs_reach_the_data(tmp_path: Path) -> None:
    root = make_sites(tmp_path / "data", "a", "b")
    for path in (root / "a/masks").iterdir():
        save(path, square(label=200))
    out = f"output={tmp_path / 'out'}"
    assert main([str(root), out]) == FAULTY
    assert main([str(root), out, "data.label_values={200: 1}"]) == READY
    assert main([str(root), out, "background_labels=[200]"]) == FAULTY  # nothing else is drawn at a
    assert main([str(root), out, "background_labels=[200]", "absent={a: [foreground]}"]) == READY


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    root = make_sites(tmp_path / "data", "a")
    (root / "a/images/case_00.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "fedseg.datamodules.check", str(root), f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == FAULTY
    assert "unreadable file (1)" in done.stdout
    assert done.stderr == ""


def test_every_kind_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs/check.md").read_text()
    for kind, severity in KINDS.items():
        assert f"| {severity} | {kind} |" in text
