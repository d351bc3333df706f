"""Folders and manifests of sites: what is read, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.datamodules import DATASETS, DataError, FolderDataModule
from tests.data_files import (
    folder,
    make_site,
    make_sites,
    picture,
    save,
    save_volume,
    square,
    write_manifest,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sites(tmp_path, "north", "south", "west", count=8)


def test_sites_are_the_folders_and_every_case_has_its_split(root: Path) -> None:
    data = folder(root)
    assert (data.sites, data.unseen_sites, data.in_channels) == (("north", "south", "west"), (), 3)
    rows = data.splits()
    assert len(rows) == 24
    assert set(rows[0]) == {"site", "case", "patient", "split", "labelled", "seen"}
    for name in data.sites:
        site = data.site(name)
        assert [len(site.cases(split)) for split in ("train", "val", "test")] == [5, 1, 2]
        assert site.index == data.sites.index(name)
        listed = {row["case"] for row in rows if row["site"] == name and row["split"] == "test"}
        assert listed == {case.case for case in site.cases("test")}
    case = data.site("north").cases("test")[0]
    number = int(case.case.removeprefix("case_"))
    assert np.array_equal(data.site("north").image(case), picture(number)[None])
    assert np.array_equal(data.site("north").truth(case.case), square()[None])
    assert data.site("north").spacing(case) is None
    assert DATASETS["folder"] is FolderDataModule


def test_setup_is_done_once_and_needed(root: Path) -> None:
    data = FolderDataModule(root=str(root))
    with pytest.raises(DataError, match="call setup"):
        data.site("north")
    data.setup("fit")
    site = data.site("north")
    data.setup("test")
    assert data.site("north") is site
    with pytest.raises(DataError, match="did you mean 'north'"):
        data.site("nroth")
    with pytest.raises(DataError, match="has no case 'case_99'"):
        site.truth("case_99")


def test_unseen_sites_only_test(root: Path) -> None:
    data = folder(root, unseen=["north"])
    assert (data.sites, data.unseen_sites) == (("south", "west"), ("north",))
    site = data.site("north")
    assert (site.seen, site.examples, site.index, len(site.cases("test"))) == (False, 0, 2, 8)
    assert site.cases("train") == site.cases("val") == []
    assert list(site.eval_batches("val")) == []
    with pytest.raises(DataError, match="held out"):
        site.train_batches(0, 1)
    assert {(row["split"], row["seen"]) for row in data.splits() if row["site"] == "north"} == {("test", False)}


@pytest.mark.slow
def test_other_sites_do_not_change_a_split(root: Path) -> None:
    before = [row for row in folder(root).splits() if row["site"] == "west"]
    shutil.rmtree(root / "north")
    assert [row for row in folder(root).splits() if row["site"] == "west"] == before
    assert [row for row in folder(root, split_seed=5).splits() if row["site"] == "west"] != before


def test_pooled_is_the_union_of_seen_sites(root: Path) -> None:
    data = folder(root, unseen=["south"])
    pooled = data.pooled()
    assert (pooled.name, pooled.examples, len(pooled.cases("test"))) == ("pooled", 10, 4)
    assert {case.site for case in pooled.cases("train")} == {"north", "west"}
    west = next(case for case in pooled.cases("val") if case.site == "west")
    assert np.array_equal(pooled.image(west), data.site("west").image(west))
    images = torch.cat([batch["image"] for batch in pooled.eval_batches("train")])
    assert len(images) == 10


def test_label_budgets_count_patients(root: Path) -> None:
    budgets = [{c.case for c in folder(root, labelled_patients=n).site("west").cases("train")} for n in (1, 3, 99)]
    assert [len(cases) for cases in budgets] == [1, 3, 5]
    assert budgets[0] < budgets[1] < budgets[2]
    rows = [row for row in folder(root, labelled_patients=1).splits() if row["site"] == "west"]
    assert [sum(row["labelled"] for row in rows if row["split"] == split) for split in ("train", "val", "test")] == [
        1,
        1,
        2,
    ]


def test_grey_sites_join_colour_sites_and_colour_can_become_grey(tmp_path: Path) -> None:
    make_site(tmp_path, "colour", channels=3)
    make_site(tmp_path, "grey", channels=1)
    data = folder(tmp_path)
    assert data.in_channels == 3
    image = next(iter(data.site("grey").train_batches(0, 1)))["image"]
    assert torch.equal(image[:, 0], image[:, 2])
    assert data.site("grey").image("case_00").shape == (1, 20, 24, 1), "repeated only in batches, to save memory"
    assert folder(tmp_path, channels=1).in_channels == 1
    shutil.rmtree(tmp_path / "colour")
    assert folder(tmp_path).in_channels == 1


def test_memory_is_one_array_per_site(root: Path) -> None:
    stores = folder(root).site("north")._shared.slices.stores
    assert [[block.shape for block in store.blocks] for store in stores] == [[(8, 20, 24, 3)]] * 3
    assert {block.dtype for store in stores for block in store.blocks} == {np.dtype(np.uint8)}
    assert stores[0].labels[0].dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        stores[0].images(0)[:] = 0


def test_sixteen_bit_cases_live_beside_eight_bit_ones(tmp_path: Path) -> None:
    make_site(tmp_path, "mixed", 4, channels=1)
    for number in range(4, 8):
        save(
            tmp_path / "mixed/images" / f"case_{number:02d}.png", (np.arange(480) * 9).astype(np.uint16).reshape(20, 24)
        )
        save(tmp_path / "mixed/masks" / f"case_{number:02d}.png", square())
    data = folder(tmp_path)
    for batch in data.site("mixed").train_batches(0, 2):
        assert batch["image"].max() <= 1
        assert batch["image"].amax((1, 2, 3)).min() > 0.9


# --- volumes and stacks -----------------------------------------------------------------------------------------------


def volume(number: int, depth: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(x, y, z) values that tell their slice, and a mask that is empty in the first and last slice."""
    image = np.broadcast_to(np.arange(depth) * 10.0 + number, (24, 20, depth)).astype(np.float32)
    mask = np.zeros((24, 20, depth), np.uint8)
    mask[3:11, 2:10, 1:-1] = 1
    return image, mask


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    affine = np.diag([-0.5, -1.0, 4.0, 1.0])
    for number in range(6):
        image, mask = volume(number)
        save_volume(tmp_path / "mr" / "images" / f"v{number}.nii.gz", image, affine)
        save_volume(tmp_path / "mr" / "masks" / f"v{number}.nii.gz", mask, affine)
    return tmp_path


def test_volumes_are_slices_to_train_and_cases_to_score(volumes: Path) -> None:
    data = folder(volumes, size=[10, 12], intensity="window", window=[0, 100])
    site = data.site("mr")
    assert [len(site.cases(split)) for split in ("train", "val", "test")] == [4, 1, 1]
    assert site.examples == 20
    case = site.cases("test")[0]
    assert site.truth(case).shape == (5, 10, 12)
    assert site.spacing(case) == (4.0, 2.0, 1.0)
    got = list(site.eval_batches("test"))
    assert torch.cat([batch["slice"] for batch in got]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([batch["depth"] for batch in got]).tolist() == [5] * 5
    values = torch.cat([batch["image"] for batch in got])[:, 0, 0, 0] * 100 - int(case.case[1:])
    assert values.tolist() == pytest.approx([0, 10, 20, 30, 40], abs=1e-4)


def test_neighbours_are_channels_and_the_edge_is_repeated(volumes: Path) -> None:
    data = folder(volumes, neighbours=1, intensity="window", window=[0, 100])
    assert data.in_channels == 3
    site = data.site("mr")
    images = torch.cat([batch["image"] for batch in site.eval_batches("test")])[:, :, 0, 0]
    values = (images * 100 - int(site.cases("test")[0].case[1:])).round().tolist()
    assert values == [[0, 0, 10], [0, 10, 20], [10, 20, 30], [20, 30, 40], [30, 40, 40]]


def test_training_may_be_kept_to_slices_that_show_a_region(volumes: Path) -> None:
    site = folder(volumes, foreground_slices_only=True).site("mr")
    assert site.examples == 12
    assert {int(k) for batch in site.train_batches(0, 6) for k in batch["slice"]} == {1, 2, 3}
    assert {int(k) for batch in site.unlabelled_batches(0, 9) for k in batch["slice"]} == {0, 1, 2, 3, 4}
    assert len(torch.cat([batch["slice"] for batch in site.eval_batches("test")])) == 5
    absent = {"mr": ["other"]}
    with pytest.raises(DataError, match="site 'mr': no training slice shows any region"):
        folder(volumes, foreground_slices_only=True, regions={"other": [2]}, background_labels=[1], absent=absent)


def stacked_rows(root: Path, patients: int = 5, slices: int = 12) -> list[dict[str, str]]:
    rows = []
    for patient in range(patients):
        for number in range(1, slices + 1):
            name = f"p{patient}_{number}"
            save(root / "images" / f"{name}.png", np.full((20, 24), 100 * (patient % 2) + number, np.uint8))
            save(root / "masks" / f"{name}.png", square() * np.uint8(number == 3))
            rows.append(
                {
                    "site": "a",
                    "case": name,
                    "patient": f"p{patient}",
                    "image": f"images/{name}.png",
                    "mask": f"masks/{name}.png",
                }
            )
    return rows


def test_slices_of_a_patient_are_stacked_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "sites.csv", stacked_rows(tmp_path)[::-1])
    data = folder(tmp_path, stack_slices=True, manifest=str(manifest))
    site = data.site("a")
    assert {row["case"] for row in data.splits()} == {f"p{i}" for i in range(5)}
    assert site.examples == 12 * len(site.cases("train"))
    case = site.cases("test")[0]
    offset = 100 * (int(case.case[1:]) % 2)
    assert site.image(case)[:, 0, 0, 0].tolist() == [offset + number for number in range(1, 13)]  # 9 before 10
    assert site.truth(case).any((1, 2)).tolist() == [number == 3 for number in range(1, 13)]
    assert case.patient == case.case


def test_stacks_from_folders_need_a_pattern(tmp_path: Path) -> None:
    stacked_rows(tmp_path / "a")
    with pytest.raises(DataError, match=r"set data.patient_pattern"):
        folder(tmp_path, stack_slices=True)
    stacked = folder(tmp_path, stack_slices=True, patient_pattern=r"^(p\d)_")
    assert len(stacked.splits()) == 5
    flat = folder(tmp_path, patient_pattern=r"^(p\d)_")
    assert len(flat.splits()) == 60
    assert len({(row["patient"], row["split"]) for row in flat.splits()}) == 5, "a patient was cut"


def test_stacks_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    rows = stacked_rows(tmp_path, patients=3, slices=3)
    for change, message in [
        ({"mask": ""}, "slice 'p0_1' has no mask although others"),
        ({"patient": ""}, None),
    ]:
        changed = [rows[0] | change, *rows[1:]]
        write_manifest(tmp_path / "sites.csv", changed)
        if message:
            with pytest.raises(DataError, match=message):
                folder(tmp_path, stack_slices=True)
        else:
            assert len(folder(tmp_path, stack_slices=True).splits()) == 4
    save(tmp_path / "images" / "p0_1.png", picture(0, 10, 10))
    save(tmp_path / "masks" / "p0_1.png", square(10, 10))
    write_manifest(tmp_path / "sites.csv", rows)
    with pytest.raises(DataError, match="case 'p0': its slices differ"):
        folder(tmp_path, stack_slices=True)
    write_manifest(tmp_path / "sites.csv", [row | {"patient": ""} for row in rows])
    with pytest.raises(DataError, match="every patient has a single image"):
        folder(tmp_path, stack_slices=True)


# --- manifests --------------------------------------------------------------------------------------------------------


def rows_of(root: Path) -> list[dict[str, str]]:
    return [
        {
            "site": path.parts[-3],
            "image": str(path.relative_to(root)),
            "mask": str(path.relative_to(root)).replace("images", "masks"),
        }
        for path in sorted(root.glob("*/images/*"))
    ]


def test_a_manifest_with_the_fewest_columns_equals_the_folders(root: Path) -> None:
    plain = folder(root).splits()
    write_manifest(root / "sites.csv", rows_of(root)[::-1])
    assert folder(root).splits() == plain


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_marks_and_headers_of_real_tables(root: Path, separator: str, encoding: str) -> None:
    rows = [{("Site " if key == "site" else key.upper()): value for key, value in row.items()} for row in rows_of(root)]
    manifest = write_manifest(root / "table.csv", rows, separator, encoding)
    assert len(folder(root, manifest=str(manifest)).splits()) == 24


def test_groups_win_over_patients_and_official_splits_over_chance(root: Path) -> None:
    rows = [
        row
        | {"case": f"{i:03d}", "patient": f"p{i}", "group": f"g{i % 4}" if i < 8 else "", "split": "", "note": "a, b"}
        for i, row in enumerate(rows_of(root))
    ]
    rows = [row | {"split": "Test" if row["group"] == "g1" else row["split"]} for row in rows]
    manifest = write_manifest(root / "sites.csv", [{k: f'"{v}"' for k, v in row.items()} for row in rows])
    found = {row["case"]: row for row in folder(root, manifest=str(manifest)).splits()}
    assert found["001"]["patient"] == found["005"]["patient"] == "g1"
    assert found["001"]["split"] == found["005"]["split"] == "test"
    assert found["009"]["patient"] == "p9"
    assert len({(row["patient"], row["split"]) for row in found.values() if row["site"] == "north"}) == 4


def test_an_empty_mask_cell_is_an_unlabelled_case(root: Path) -> None:
    rows = [row | {"mask": "" if i < 3 else row["mask"]} for i, row in enumerate(rows_of(root))]
    write_manifest(root / "sites.csv", rows)
    data = folder(root)
    north = data.site("north")
    bare = [row for row in data.splits() if not row["labelled"]]
    assert [(row["site"], row["split"]) for row in bare] == [("north", "train")] * 3
    assert north.examples == 3
    shown = {name for batch in north.unlabelled_batches(0, 4) for name in batch["case"]}
    assert {row["case"] for row in bare} < shown
    assert not {row["case"] for row in bare} & {name for batch in north.train_batches(0, 4) for name in batch["case"]}
    with pytest.raises(DataError, match="has no mask"):
        north.truth(bare[0]["case"])
    unseen = folder(root, unseen=["north"])
    assert len(unseen.site("north").cases("test")) == 5
    assert {row["split"] for row in unseen.splits() if row["case"] in {"case_00", "case_01"} and not row["seen"]} == {
        "unused"
    }


MANIFEST_ERRORS: list[tuple[Callable[[list[dict[str, str]]], list[dict[str, str]]], str]] = [
    (
        lambda rows: [{"sites" if k == "site" else k: v for k, v in r.items()} for r in rows],
        "no column 'site'; did you mean 'sites'",
    ),
    (lambda rows: [rows[0] | {"site": ""}, *rows[1:]], "line 2: the cell 'site' is empty"),
    (
        lambda rows: [rows[0] | {"image": "north/images/none.png"}, *rows[1:]],
        "site 'north', case 'none': .*sites.csv line 2: image .*none.png does not exist",
    ),
    (
        lambda rows: [rows[0] | {"mask": "north/masks/none.png"}, *rows[1:]],
        "mask .*none.png does not exist.*empty mask cell",
    ),
    (lambda rows: [rows[0] | {"mask": rows[0]["mask"] + ",extra"}, *rows[1:]], "more cells than the header"),
    (lambda rows: [rows[0], *rows], "site 'north', case 'case_00': the name occurs 2 times .*case_00.png"),
    (lambda rows: [row | {"split": "trian"} for row in rows], "line 2: unknown split 'trian'; did you mean 'train'"),
    (
        lambda rows: [row | {"patient": "p", "split": "train" if i else "test"} for i, row in enumerate(rows)],
        "patient 'p' is in two official splits",
    ),
    (
        lambda rows: [row | {"split": "test"} for row in rows],
        "site 'north' has no labelled training case.*data.unseen=\\[north\\]",
    ),
    (
        lambda rows: [row | {"mask": ""} if row["site"] == "west" else row for row in rows],
        "site 'west' has no labelled case",
    ),
    (
        lambda rows: [row | {"patient": "p"} if row["site"] == "west" else row | {"patient": ""} for row in rows],
        "site 'west' has a single labelled patient",
    ),
    (lambda rows: [row | {"site": "a/b"} for row in rows], "a site has no slash"),
]


@pytest.mark.parametrize(("spoil", "message"), MANIFEST_ERRORS)
def test_bad_manifests_are_refused_with_line_and_cure(
    root: Path, spoil: Callable[[list[dict[str, str]]], list[dict[str, str]]], message: str
) -> None:
    write_manifest(root / "sites.csv", spoil(rows_of(root)))
    with pytest.raises(DataError, match=message):
        folder(root)


def test_manifests_that_are_none(root: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv does not exist"):
        folder(root, manifest=str(root / "none.csv"))
    (root / "empty.csv").write_text("site,image,mask\n")
    with pytest.raises(DataError, match="lists no case"):
        folder(root, manifest=str(root / "empty.csv"))
    (root / "latin.csv").write_bytes("site,image,mask\nKöln,a,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        folder(root, manifest=str(root / "latin.csv"))


def test_one_patient_may_be_an_unseen_site(tmp_path: Path) -> None:
    make_sites(tmp_path, "many")
    make_site(tmp_path, "one", 1)
    with pytest.raises(DataError, match=r"site 'one' has a single labelled patient.*data.unseen=\[one\]"):
        folder(tmp_path)
    assert folder(tmp_path, unseen=["one"]).unseen_sites == ("one",)


def test_a_single_site_is_a_federation_of_one(tmp_path: Path) -> None:
    assert folder(make_sites(tmp_path, "only")).sites == ("only",)


# --- folders that do not do -------------------------------------------------------------------------------------------


FOLDER_ERRORS: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda root: (root / "north/masks/case_03.png").unlink(),
        "site 'north', case 'case_03': .*images/case_03.png has no mask case_03",
    ),
    (
        lambda root: (root / "north/images/case_03.png").unlink(),
        "site 'north', case 'case_03': .*masks/case_03.png has no image",
    ),
    (lambda root: shutil.rmtree(root / "north/masks"), "site 'north': .*masks is missing or empty"),
    (lambda root: shutil.rmtree(root / "north/images"), "site 'north': .*images is missing or empty"),
    (
        lambda root: [path.unlink() for path in (root / "north/images").iterdir()],
        "site 'north': .*images is missing or empty",
    ),
    (lambda root: (root / "east" / "images").mkdir(parents=True), "site 'east': .*images is missing or empty"),
    (lambda root: (root / "north/images/notes.txt").write_text(""), "notes.txt is none of"),
    (lambda root: save(root / "north/images/case_03.jpg", picture(3)), "case_03.png is the same case as case_03.jpg"),
    (lambda root: (root / "north").rename(root / "images"), "holds images without a site; move them"),
    (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "holds no site"),
    (
        lambda root: save(root / "south/masks/case_103.png", square(8, 24)),
        "site 'south', case 'case_103': mask .* is 1 x 8 x 24",
    ),
    (
        lambda root: save(root / "south/masks/case_103.png", square(label=4)),
        "site 'south', case 'case_103': mask .*case_103.png has unknown label ids 4, not in",
    ),
    (
        lambda root: (root / "west/images/case_203.png").write_bytes(b"\x89PNG"),
        "site 'west', case 'case_203': image .* cannot be read",
    ),
    (
        lambda root: (
            save(root / "west/images/case_203.npy", picture(3, channels=5))
            and (root / "west/images/case_203.png").unlink()
        ),
        "has 3 channels, but site 'west', case 'case_203' has 5",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), FOLDER_ERRORS)
def test_bad_folders_are_refused_with_site_file_and_cure(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(root)
    with pytest.raises(DataError, match=message):
        folder(root)


def test_hidden_files_are_no_cases(root: Path) -> None:
    for name in (".DS_Store", "Thumbs.db"):
        (root / "north/images" / name).write_text("")
    (root / ".git").mkdir()
    assert len(folder(root).splits()) == 24


def test_masks_may_be_missing_or_have_a_suffix_when_said_so(root: Path) -> None:
    (root / "north/masks/case_03.png").unlink()
    rows = folder(root, missing_masks="unlabelled").splits()
    assert [row["case"] for row in rows if row["split"] in {"train", "unused"} and not row["labelled"]] == ["case_03"]
    for path in list(root.glob("*/masks/*")):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    (root / "north/images/case_03.png").unlink()
    assert len(folder(root, mask_suffix="_mask").splits()) == 23


def test_masks_of_0_and_255_and_labels_to_ignore(root: Path) -> None:
    for path in (root / "north/masks").iterdir():
        save(path, square(label=255))
    mask = next(iter(folder(root).site("north").train_batches(0, 1)))["mask"]
    assert mask.sum((1, 2, 3)).tolist() == [64] * 4
    two = {"disc": [1, 2], "cup": [2]}
    with pytest.raises(DataError, match="unknown label ids 255"):
        folder(root, regions=two)
    with pytest.raises(DataError, match="no mask of any site shows 'cup'"):
        folder(root, regions=two, background_labels=[255])
    absent = {"north": ["disc", "cup"], "south": ["cup"], "west": ["cup"]}
    ignoring = folder(root, regions=two, background_labels=[255], absent=absent)
    assert next(iter(ignoring.site("north").train_batches(0, 1)))["mask"].sum() == 0
    elsewhere = {"south": ["cup"], "west": ["cup"]}
    mapped = folder(root, regions=two, label_values={255: 2}, absent=elsewhere)
    assert next(iter(mapped.site("north").train_batches(0, 1)))["mask"].sum((0, 2, 3)).tolist() == [256, 256]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"unseen": ["nort"]}, "data.unseen: no site 'nort'; did you mean 'north'"),
        ({"unseen": ["north", "south", "west"]}, "leave at least one"),
        ({"split": [0.5, 0.5]}, "sum to 1"),
        ({"size": [1, 2, 3]}, "data.size"),
        ({"size": 0}, "data.size"),
        ({"batch_size": 0}, "data.batch_size=0: at least 1"),
        ({"workers": -1}, "data.workers"),
        ({"labelled_patients": 0}, "data.labelled_patients=0: at least 1"),
        ({"channels": 0}, "data.channels"),
        ({"channels": 2}, "has 3 channels, but data.channels=2"),
        ({"window": [1.0]}, "data.window"),
        ({"patient_pattern": "("}, "no regular expression"),
        ({"patient_pattern": "case"}, "needs a group"),
        ({"patient_pattern": "(x)"}, "case 'case_00': data.patient_pattern finds no patient"),
        ({"augment": "flip"}, "did you mean 'flips'"),
        ({"regions": {"a": [1], "b": [1]}, "exclusive": True}, "share label 1"),
    ],
)
def test_bad_settings_are_refused(root: Path, knobs: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        folder(root, **knobs)


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no folder; set data.root"):
        folder(tmp_path / "none")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_site_without_any_mask_trains_nothing_and_shows_its_images(root: Path, cache: str) -> None:
    shutil.rmtree(root / "south" / "masks")
    data = folder(root, missing_masks="unlabelled", unlabelled=["south"], cache=cache)
    site = data.site("south")
    assert site.examples == 0 < site.training_images
    again = folder(root, missing_masks="unlabelled", unlabelled=["south"], cache=cache)
    shown = next(iter(again.site("south").unlabelled_batches(0, 1)))["image"]
    assert len(shown)
