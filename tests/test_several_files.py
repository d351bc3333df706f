"""Cases of several files: modalities become channels, masks of single regions or lesions become one map."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import predict
import train
from fedseg.configs.compose import compose
from fedseg.datamodules import DataError, FolderDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.check.command import check
from fedseg.datamodules.check.report import tables
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.readers import Layer, Reading, combine
from fedseg.datamodules.regions import Regions
from fedseg.launch.settings import SCHEMA
from tests.data_files import folder, picture, save, save_volume, write_manifest
from tests.tiny_run import TINY

NESTED = {"disc": [1, 2], "cup": [2]}
COUNT = 6


def discs(number: int) -> np.ndarray:
    mask = np.zeros((20, 24), np.uint8)
    mask[2:14, 3 : 15 + number % 3] = 255
    return mask


def cups(number: int) -> np.ndarray:
    mask = np.zeros((20, 24), np.uint8)
    mask[5:10, 6 : 10 + number % 3] = 255
    return mask


def images(root: Path, site: str = "a", count: int = COUNT, name: str = "{}") -> None:
    for number in range(count):
        save(root / site / "images" / f"{name.format(f'p{number}')}.png", picture(number))


def in_folders(root: Path, site: str = "a") -> dict[str, Any]:
    for number in range(COUNT):
        save(root / site / "masks/disc" / f"p{number}.png", discs(number))
        save(root / site / "masks/cup" / f"p{number}.png", cups(number))
    return {}


def by_name(root: Path, site: str = "a") -> dict[str, Any]:
    for number in range(COUNT):
        save(root / site / "masks" / f"p{number}_disc_gt.png", discs(number))
        save(root / site / "masks" / f"p{number}_cup_gt.png", cups(number))
    return {"mask_suffix": "_{region}_gt"}


def by_table(root: Path, site: str = "a") -> dict[str, Any]:
    in_folders(root, site)
    write_manifest(root / "sites.csv", rows(site))
    return {}


def rows(site: str = "a") -> list[dict[str, str]]:
    return [
        {
            "site": site,
            "image": f"{site}/images/p{number}.png",
            "mask_Disc": f"{site}/masks/disc/p{number}.png",
            "mask_cup": f"{site}/masks/cup/p{number}.png",
        }
        for number in range(COUNT)
    ]


Masks = Callable[..., dict[str, Any]]
EACH = pytest.mark.parametrize("masks", [in_folders, by_name, by_table])


def faults(root: Path, **knobs: Any) -> list[Finding]:
    data = FolderDataModule(root=str(root), **{"size": [20, 24], "batch_size": 4} | knobs)
    return [finding for finding in check(data).findings if finding.severity == "error"]


def settings_in(message: str) -> dict[str, Any]:
    """The setting under data. that a message proposes."""
    written = re.search(r"data\.(\w+=(?:\{.*?\}|\[.*?\]|[^\s';,]+))(?=[ ,;']|$)", message)
    assert written, message
    name, _, value = written[1].partition("=")
    return {name: value if name == "mask_suffix" else yaml.safe_load(value)}


# --- masks ------------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_masks_of_single_regions_become_one(tmp_path: Path, masks: Masks, cache: str) -> None:
    images(tmp_path)
    knobs = {"regions": NESTED, "cache": cache, "cache_dir": str(tmp_path / ".cache")} | masks(tmp_path)
    data = folder(tmp_path, **knobs)
    for case in data.site("a").cases("train"):
        number = int(case.case[1:])
        shown = data.regions.encode(torch.from_numpy(data.site("a").truth(case)[0]))
        assert np.array_equal(shown[0], discs(number) > 0)
        assert np.array_equal(shown[1], cups(number) > 0)
    assert faults(tmp_path, **knobs) == []
    before = {row["case"]: row["mask"] for row in data.fingerprints()}
    save(tmp_path / "a/masks" / ("p0_cup_gt.png" if masks is by_name else "cup/p0.png"), np.roll(cups(0), 2, axis=1))
    again = folder(tmp_path, **knobs)
    after = {row["case"]: row["mask"] for row in again.fingerprints()}
    assert {case for case in before if before[case] != after[case]} == {"p0"}, "the second file counts, too"
    shown = again._shared.slices.stores[0].truth(0)[0] == 2
    assert np.array_equal(shown, np.roll(cups(0), 2, axis=1) > 0)


@given(
    arrays(np.bool_, (3, 1, 4, 5)),
    st.permutations(range(1, 8)),
)
def test_any_regions_come_back_from_their_union(maps: np.ndarray, ids: list[int]) -> None:
    """With an id for every combination, what the map encodes is what the files show."""
    names = ("x", "y", "z")
    regions = {name: tuple(ids[k - 1] for k in range(1, 8) if k >> bit & 1) for bit, name in enumerate(names)}
    reading = Reading(ids=tuple(range(1, 8)), regions=regions)
    labels = combine([Layer(name, one.astype(np.uint8)) for name, one in zip(names, maps, strict=True)], reading)
    shown = Regions(regions).encode(torch.from_numpy(labels)).numpy()
    assert np.array_equal(shown.transpose(1, 0, 2, 3), maps)


def test_label_ids_of_several_files_stay_where_they_agree() -> None:
    reading = Reading(ids=(1, 2, 7, 255), regions={"disc": (1, 2), "cup": (2,)}, ignored=(255,))
    one = np.array([[[1, 2, 0, 7, 255, 1, 9, 1]]], np.uint8)
    other = np.array([[[1, 1, 2, 1, 1, 0, 1, 255]]], np.uint8)
    wanted = np.array([[[1, 2, 2, 1, 255, 1, 9, 255]]], np.uint8)
    for layers in ([one, other], [other, one]):
        assert np.array_equal(combine([Layer("", labels) for labels in layers], reading), wanted)
    alone = combine([Layer("", one)], reading)
    assert np.array_equal(alone, one)


def test_several_lesions_are_their_union(tmp_path: Path) -> None:
    images(tmp_path, name="benign ({})")
    for number in range(COUNT):
        save(tmp_path / "a/masks" / f"benign (p{number})_mask.png", cups(number))
        if number % 2:
            save(tmp_path / "a/masks" / f"benign (p{number})_mask_1.png", np.roll(cups(number), 8, axis=0))
    with pytest.raises(DataError, match=r"data\.mask_suffix=_mask\*") as caught:
        folder(tmp_path)
    data = folder(tmp_path, **settings_in(str(caught.value)))
    for number, truth in enumerate(data._shared.slices.stores[0].truth(k)[0] for k in range(COUNT)):
        wanted = cups(number) | (np.roll(cups(number), 8, axis=0) if number % 2 else 0)
        assert np.array_equal(truth, wanted > 0)


def test_a_cell_names_several_files(tmp_path: Path) -> None:
    images(tmp_path)
    for number in range(COUNT):
        save(tmp_path / "a/masks" / f"p{number}_1.png", cups(number))
        save(tmp_path / "a/masks" / f"p{number}_2.png", np.roll(cups(number), 8, axis=0))
    table = [
        {"site": "a", "image": f"a/images/p{k}.png", "mask": f"a/masks/p{k}_1.png | a/masks/p{k}_2.png"}
        for k in range(COUNT)
    ]
    write_manifest(tmp_path / "sites.csv", table)
    data = folder(tmp_path)
    assert np.array_equal(data._shared.slices.stores[0].truth(0)[0], (cups(0) | np.roll(cups(0), 8, axis=0)) > 0)
    assert not [finding for finding in data.findings if finding.kind == "not in the manifest"]
    (tmp_path / "a/masks/p3_2.png").unlink()
    with pytest.raises(DataError, match=r"p3.*line 5: mask .*p3_2.png does not exist"):
        folder(tmp_path)


@EACH
def test_regions_that_overlap_without_an_id_get_one(tmp_path: Path, masks: Masks) -> None:
    images(tmp_path)
    knobs = masks(tmp_path)
    told = r"site 'a', case 'p\d': masks .*: \d+ pixels show disc and cup, which no label id of data.regions means"
    with pytest.raises(DataError, match=told) as caught:
        folder(tmp_path, regions={"disc": [1], "cup": [2]}, **knobs)
    cured = settings_in(str(caught.value))
    assert cured == {"regions": {"disc": [1, 3], "cup": [2, 3]}}
    data = folder(tmp_path, **cured, **knobs)
    shown = data.regions.encode(torch.from_numpy(data._shared.slices.stores[0].truth(0)[0]))
    assert np.array_equal(shown[1], cups(0) > 0)
    found = faults(tmp_path, regions={"disc": [1], "cup": [2]}, **knobs)
    assert {finding.kind for finding in found} == {"mask values"}
    assert all("pixels show disc and cup" in finding.what for finding in found)


def test_a_region_that_shows_beyond_its_outer_one_gets_an_id(tmp_path: Path) -> None:
    images(tmp_path)
    in_folders(tmp_path)
    save(tmp_path / "a/masks/cup/p2.png", np.roll(cups(2), 8, axis=0))
    with pytest.raises(DataError, match=r"pixels show cup alone, which no label id") as caught:
        folder(tmp_path, regions=NESTED)
    cured = settings_in(str(caught.value))
    assert cured == {"regions": {"disc": [1, 2], "cup": [2, 3]}}
    folder(tmp_path, **cured)


@EACH
def test_a_region_whose_file_lacks_is_named(tmp_path: Path, masks: Masks) -> None:
    images(tmp_path)
    knobs = {"regions": NESTED} | masks(tmp_path)
    cup = "a/masks/p3_cup_gt.png" if masks is by_name else "a/masks/cup/p3.png"
    (tmp_path / cup).unlink()
    if masks is by_table:
        table = rows()
        table[3]["mask_cup"] = ""
        write_manifest(tmp_path / "sites.csv", table)
    with pytest.raises(DataError, match=r"case 'p3'.*has no mask of cup.*data.missing_masks=empty") as caught:
        folder(tmp_path, **knobs)
    assert {finding.kind for finding in faults(tmp_path, **knobs)} == {"missing mask"}
    cured = settings_in(str(caught.value))
    data = folder(tmp_path, **knobs, **cured)
    truth = data._shared.slices.stores[0].truth(3)[0]
    assert set(np.unique(truth)) == {0, 1}
    assert faults(tmp_path, **knobs, **cured) == []


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("word", ["absent", "unannotated"])
def test_a_region_that_a_site_has_no_files_of_is_declared(tmp_path: Path, masks: Masks, word: str) -> None:
    for site in "ab":
        images(tmp_path, site)
        knobs = {"regions": NESTED} | masks(tmp_path, site)
    for path in (tmp_path / "a/masks").rglob("*"):
        if "cup" in str(path) and path.is_file():
            path.unlink()
    if masks is by_table:
        write_manifest(tmp_path / "sites.csv", [{**row, "mask_cup": ""} for row in rows("a")] + rows("b"))
    told = r"'p0'.*has no mask of cup" if masks is by_table else r"site 'a': no image has a mask of 'cup'"
    with pytest.raises(DataError, match=told) as caught:
        folder(tmp_path, **knobs)
    assert masks is by_table or f"data.{word}={{a: [cup]}}" in str(caught.value)
    data = folder(tmp_path, **knobs, **{word: {"a": ["cup"]}})
    batch = next(iter(data.site("a").train_batches(0, 1)))
    assert not batch["mask"][:, 1].any()
    if word == "unannotated":
        assert batch["known"][:, 0].all()
        assert not batch["known"][:, 1].any()
    else:
        assert "known" not in batch, "everything counts"


def test_a_mask_of_one_region_holds_one_label(tmp_path: Path) -> None:
    images(tmp_path)
    in_folders(tmp_path)
    save(tmp_path / "a/masks/disc/p1.png", np.where(cups(1) > 0, 7, discs(1) // 255).astype(np.uint8))
    told = r"mask .*disc/p1.png: holds the labels 1, 7, yet it is the mask of 'disc' alone"
    with pytest.raises(DataError, match=told) as caught:
        folder(tmp_path, regions=NESTED)
    assert [finding.kind for finding in faults(tmp_path, regions=NESTED)] == ["mask values"]
    cured = settings_in(str(caught.value))
    assert cured == {"label_values": {1: 1, 7: 1}}
    for path in (tmp_path / "a/masks").rglob("*.png"):  # the mapping is for masks of ids
        if path.name != "p1.png":
            save(path, np.asarray(discs(0) // 255 if path.parent.name == "disc" else cups(0) // 255))
    save(tmp_path / "a/masks/cup/p1.png", cups(1) // 255)
    folder(tmp_path, regions=NESTED, **cured)


def test_what_may_belong_to_two_images_is_refused(tmp_path: Path) -> None:
    images(tmp_path)
    save(tmp_path / "a/images/p1_x.png", picture(70))
    for stem in ("p0", "p1", "p1_x", "p2", "p3", "p4", "p5"):
        save(tmp_path / "a/masks" / f"{stem}_1.png", cups(0))
    with pytest.raises(DataError, match=r"p1_x_1.png may be a mask of p1_x, p1"):
        folder(tmp_path, mask_suffix="_*")


def test_an_image_without_masks_has_an_empty_one_if_so_said(tmp_path: Path) -> None:
    images(tmp_path)
    for number in range(1, COUNT):
        save(tmp_path / "a/masks" / f"p{number}.png", cups(number))
    with pytest.raises(DataError, match="has no mask p0"):
        folder(tmp_path)
    data = folder(tmp_path, missing_masks="empty")
    assert not data._shared.slices.stores[0].truth(0).any()
    assert all(row["labelled"] for row in data.splits())
    assert faults(tmp_path, missing_masks="empty") == []


@pytest.mark.parametrize("kind", ["masks", "images"])
def test_folders_of_regions_or_modalities_are_proposed(tmp_path: Path, kind: str) -> None:
    if kind == "masks":
        images(tmp_path)
        in_folders(tmp_path)
    else:
        for number in range(COUNT):
            for modality in ("t1", "flair"):
                save(tmp_path / "a/images" / modality / f"p{number}.png", picture(number, channels=1))
            save(tmp_path / "a/masks" / f"p{number}.png", cups(number))
    with pytest.raises(DataError, match="holds no image, but the folders") as caught:
        folder(tmp_path)
    cured = settings_in(str(caught.value))
    assert cured == (
        {"regions": {"cup": [1, 3], "disc": [2, 3]}} if kind == "masks" else {"modalities": ["flair", "t1"]}
    )
    assert folder(tmp_path, **cured).in_channels == (3 if kind == "masks" else 2)
    name = "disc" if kind == "masks" else "t1"
    (tmp_path / "a" / kind / "notes").mkdir()
    with pytest.raises(DataError, match=rf"notes lies beside the folders .*{name}"):
        folder(tmp_path, **cured)


def test_endings_that_name_regions_are_proposed(tmp_path: Path) -> None:
    images(tmp_path)
    by_name(tmp_path)
    with pytest.raises(DataError, match=r"data.mask_suffix=_\{region\}_gt") as caught:
        folder(tmp_path, regions=NESTED)
    folder(tmp_path, regions=NESTED, **settings_in(str(caught.value)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mask": "a/masks/disc/p0.png"}, "has the column 'mask', and mask_disc, mask_cup"),
        ({"mask_cupp": ""}, "has the column 'mask_cupp', which is no region's; did you mean 'cup'"),
    ],
)
def test_columns_of_regions_must_be_clear(tmp_path: Path, change: dict[str, str], told: str) -> None:
    images(tmp_path)
    in_folders(tmp_path)
    write_manifest(tmp_path / "sites.csv", [{**row, **change} for row in rows()])
    with pytest.raises(DataError, match=told):
        folder(tmp_path, regions=NESTED)


# --- modalities -------------------------------------------------------------------------------------------------------


def grey(number: int, modality: int) -> np.ndarray:
    return picture(10 * number + modality, channels=1) // (modality + 1)


def by_ending(root: Path, names: tuple[str, str] = ("flair", "t1"), between: str = "_") -> dict[str, Any]:
    for number in range(COUNT):
        for k, modality in enumerate(names):
            save(root / "a/images" / f"p{number}{between}{modality}.png", grey(number, k))
        save(root / "a/masks" / f"p{number}.png", cups(number))
    return {"modalities": list(names)}


def nnunet(root: Path) -> dict[str, Any]:
    return by_ending(root, ("0000", "0001"))


def spoken(root: Path) -> dict[str, Any]:
    """One modality's name ends as the other's."""
    return by_ending(root, ("flair", "t1_flair"), "-")


def sub_folders(root: Path) -> dict[str, Any]:
    for number in range(COUNT):
        for k, modality in enumerate(("flair", "t1")):
            save(root / "a/images" / modality / f"p{number}.png", grey(number, k))
        save(root / "a/masks" / f"p{number}.png", cups(number))
    return {"modalities": ["flair", "t1"]}


def columns(root: Path) -> dict[str, Any]:
    by_ending(root)
    table = [
        {
            "site": "a",
            "mask": f"a/masks/p{k}.png",
            "image_T1": f"a/images/p{k}_t1.png",
            "image_flair": f"a/images/p{k}_flair.png",
        }
        for k in range(COUNT)
    ]
    write_manifest(root / "sites.csv", table)
    return {"modalities": ["flair", "t1"]}


LAYOUTS = pytest.mark.parametrize("layout", [by_ending, nnunet, spoken, sub_folders, columns])


@LAYOUTS
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_modalities_are_channels_in_their_order(tmp_path: Path, layout: Masks, cache: str) -> None:
    knobs = layout(tmp_path) | {"cache": cache, "cache_dir": str(tmp_path / ".cache")}
    data = folder(tmp_path, **knobs)
    assert data.in_channels == 2
    assert {row["case"] for row in data.splits()} == {f"p{k}" for k in range(COUNT)}
    for case in data.site("a").cases("train"):
        number = int(case.case[1:])
        wanted = np.stack([grey(number, 0), grey(number, 1)], axis=-1)
        assert np.array_equal(data.site("a").image(case)[0], wanted)
    backwards = folder(tmp_path, **{**knobs, "modalities": knobs["modalities"][::-1]})
    assert np.array_equal(backwards.site("a").image("p0"), data.site("a").image("p0")[..., ::-1])
    assert faults(tmp_path, **knobs) == []
    (rows,) = [one.rows for one in tables(check(data), data.regions, "", ("flair", "t1")) if one.title == "Intensities"]
    assert [row[:2] for row in rows] == [("a", "flair"), ("a", "t1")]
    second = next(path for path in (tmp_path / "a/images").rglob("*") if path.is_file() and "p0" in str(path))
    before = data.fingerprints()
    save(second, grey(40, 0))
    after = folder(tmp_path, **knobs).fingerprints()
    assert [row["case"] for row, now in zip(before, after, strict=True) if row != now] == ["p0"]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("layout", [by_ending, sub_folders, columns])
def test_a_missing_modality_is_named_and_0_where_that_is_wished(tmp_path: Path, layout: Masks, place: int) -> None:
    knobs = layout(tmp_path)
    whole = folder(tmp_path, **knobs).site("a").image("p0")
    name = knobs["modalities"][place]
    gone = next(path for path in (tmp_path / "a/images").rglob("*p0*") if name in str(path.relative_to(tmp_path)))
    table = tmp_path / "sites.csv"
    if table.is_file():
        table.write_text(table.read_text().replace(str(gone.relative_to(tmp_path)), ""))
    else:
        gone.unlink()
    with pytest.raises(DataError, match=r"(?s)p0.*leave the case out|remove the row.*data.missing_modalities=zeros"):
        folder(tmp_path, **knobs)
    data = folder(tmp_path, **knobs, missing_modalities="zeros", augment="strong")
    image = data.site("a").image("p0")
    assert not image[..., place].any()
    assert np.array_equal(image[..., 1 - place], whole[..., 1 - place])
    (told,) = [finding for finding in data.findings if finding.kind == "missing modality"]
    assert (told.case, told.what.split(":")[0]) == ("p0", f"has no {name}")
    assert told in check(FolderDataModule(root=str(tmp_path), **knobs, missing_modalities="zeros")).findings
    seen = [
        (channel.any(), case, number)
        for batch in data.site("a").train_batches(0, 12)
        for own, case in zip(batch["image"], batch["case"], strict=True)
        for number, channel in enumerate(own.numpy())
    ]
    assert {(case, number) for there, case, number in seen if not there} == {("p0", place)}


@pytest.mark.parametrize("knobs", [{"modalities": ["flair"]}, {"modalities": ["flair", "t1"], "stack_slices": True}])
def test_zeros_need_several_modalities_of_whole_cases(knobs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.missing_modalities=zeros: .*; leave it out"):
        FolderDataModule(root=str(tmp_path), missing_modalities="zeros", **knobs)
    FolderDataModule(root=str(tmp_path), **knobs)


@pytest.mark.parametrize("layout", [by_ending, nnunet])
def test_modalities_are_proposed_where_names_show_them(tmp_path: Path, layout: Masks) -> None:
    wanted = layout(tmp_path)["modalities"]
    with pytest.raises(DataError, match=r"if these are one patient's images, set data\.modalities=") as caught:
        folder(tmp_path)
    names = re.search(r"data\.modalities=\[(.*?)\]", str(caught.value))
    assert names is not None
    assert names[1].split(",") == wanted
    assert folder(tmp_path, modalities=names[1].split(",")).in_channels == 2


@LAYOUTS
def test_a_modality_that_lacks_is_named(tmp_path: Path, layout: Masks) -> None:
    knobs = layout(tmp_path)
    lost = next(path for path in (tmp_path / "a/images").rglob("*p2*") if ("t1" in str(path)) or "0001" in path.name)
    lost.unlink()
    told = f"image .*{lost.name} does not exist" if layout is columns else f"has no {knobs['modalities'][1]} beside it"
    with pytest.raises(DataError, match=rf"case 'p2'.*{told}"):
        folder(tmp_path, **knobs)
    assert "missing image" in {finding.kind for finding in faults(tmp_path, **knobs)}


def test_what_is_no_modality_is_refused(tmp_path: Path) -> None:
    knobs = by_ending(tmp_path)
    save(tmp_path / "a/images/p0_t2.png", grey(0, 0))
    with pytest.raises(DataError, match=r"p0_t2.png ends on none of data.modalities \(flair, t1\)"):
        folder(tmp_path, **knobs)
    with pytest.raises(DataError, match=r"data\.modalities has 't1' twice"):
        folder(tmp_path, modalities=["t1", "t1"])


@pytest.mark.parametrize("site_says", [["FLAIR", "T1w"], ["FLAIR"]])
def test_sites_call_modalities_as_they_like(tmp_path: Path, site_says: list[str]) -> None:
    by_ending(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    by_ending(tmp_path, ("FLAIR", "T1w"))
    own = {"modalities": ["flair", "t1"], "per_site": {"a": {"modalities": site_says}}}
    if len(site_says) < 2:
        with pytest.raises(DataError, match=r"site 'a': modalities=\[FLAIR\] are 1, but data.modalities has 2"):
            folder(tmp_path, **own)
        return
    data = folder(tmp_path, **own)
    assert np.array_equal(data.site("a").image("p0"), data.site("b").image("p0"))


@pytest.mark.parametrize(
    ("header", "knobs", "told"),
    [
        (
            "image_t1,image_flair",
            {},
            r"has no column 'image', but image_t1, image_flair; set data.modalities=\[t1,flair\]",
        ),
        ("image,image_flair", {"modalities": ["flair", "t1"]}, "has the column 'image', although data.modalities"),
        ("image_t1,image_x", {"modalities": ["flair", "t1"]}, "has no column 'image_flair'"),
    ],
)
def test_columns_of_modalities_must_be_clear(tmp_path: Path, header: str, knobs: dict[str, Any], told: str) -> None:
    (tmp_path / "sites.csv").write_text(f"site,mask,{header}\na,m.png,x.png,y.png\n")
    with pytest.raises(DataError, match=told):
        folder(tmp_path, **knobs)


def volumes(root: Path) -> dict[str, Any]:
    affine = np.diag([-1.0, -1.0, 4.0, 1.0])
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        for k, modality in enumerate(("0000", "0001")):
            values = rng.normal(100 * 10**k, 10, (24, 20, 4)).astype(np.float32)
            save_volume(root / "a/images" / f"p{number}_{modality}.nii.gz", values, affine)
        mask = np.zeros((24, 20, 4), np.uint8)
        mask[4:12, 4:12, 1:3] = 1
        save_volume(root / "a/masks" / f"p{number}.nii.gz", mask, affine)
    return {"modalities": ["0000", "0001"]}


def test_volumes_of_several_modalities_are_scaled_apart(tmp_path: Path) -> None:
    data = folder(tmp_path, **volumes(tmp_path))
    image = data.site("a").image("p0")
    assert image.shape == (4, 20, 24, 2)
    for channel in range(2):
        assert 0.3 < float(image[..., channel].mean()) < 0.7
    four = np.stack(
        [nibabel.load(tmp_path / "a/images" / f"p0_{k}.nii.gz").get_fdata(dtype=np.float32) for k in ("0000", "0001")],
        axis=-1,
    )
    save_volume(tmp_path / "b/images/p0.nii.gz", four, np.diag([-1.0, -1.0, 4.0, 1.0]))
    again = FolderDataModule(root=str(tmp_path / "b"), size=[20, 24])
    case = Case("b", "p0", "p0", str(tmp_path / "b/images/p0.nii.gz"))
    joined = again.fitted(case, again.read(case))
    assert np.array_equal(joined.image, image), "as one 4-D file"


@pytest.mark.parametrize(("how", "kind"), [("cropped", "size mismatch"), ("moved", "geometry mismatch")])
def test_modalities_lie_on_one_grid(tmp_path: Path, how: str, kind: str) -> None:
    knobs = volumes(tmp_path)
    path = tmp_path / "a/images/p1_0001.nii.gz"
    volume = nibabel.load(path)
    values, affine = volume.get_fdata(dtype=np.float32), np.array(volume.affine)
    if how == "cropped":
        values = values[:-1]
    else:
        affine[:3, 3] += 3
    save_volume(path, values, affine)
    with pytest.raises(DataError, match=r"case 'p1': image .*p1_0001.nii.gz (is 4 x 20 x 23|lies up to)"):
        folder(tmp_path, **knobs)
    assert [finding.kind for finding in faults(tmp_path, **knobs)] == [kind]


def test_depths_may_differ_between_modalities(tmp_path: Path) -> None:
    knobs = by_ending(tmp_path)
    for number in range(COUNT):
        save(tmp_path / "a/images" / f"p{number}_t1.png", grey(number, 1).astype(np.uint16) * 200)
    data = folder(tmp_path, **knobs)
    image = data.site("a").image("p0")
    assert image.dtype == np.float32
    assert np.allclose(image[0, ..., 0], grey(0, 0) / 255)
    assert image[..., 1].max() == 1


def test_stacks_have_modalities_slice_by_slice(tmp_path: Path) -> None:
    for patient in range(COUNT):
        for number in range(3):
            for k, modality in enumerate(("flair", "t1")):
                save(tmp_path / "a/images" / f"p{patient}_{number}_{modality}.png", grey(10 * patient + number, k))
            save(tmp_path / "a/masks" / f"p{patient}_{number}.png", cups(number))
    data = folder(tmp_path, modalities=["flair", "t1"], stack_slices=True, patient_pattern=r"^(p\d+)_")
    assert data.site("a").image("p1").shape == (3, 20, 24, 2)
    assert np.array_equal(data.site("a").image("p1")[2, ..., 1], grey(12, 1))


@pytest.mark.slow
def test_new_images_are_gathered_as_those_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(volumes(tmp_path / "data")["modalities"])
    settings = ("data=folder", f"data.root={tmp_path / 'data'}", f"data.modalities=[{names}]", "algorithm=fedavg")
    tiny = [one for one in TINY if one.split("=")[0] not in ("data.cases_per_site", "data.amount", "data.resolution")]
    run, new = tmp_path / "run", tmp_path / "data/a/images"
    assert train.main([*settings, *tiny, "federation.rounds=1", f"output={run}"]) == 0, capsys.readouterr().err

    def told(images: Path) -> str:
        capsys.readouterr()
        assert predict.main([str(run), "--images", str(images), "--out", str(tmp_path / "none")]) == 2
        return capsys.readouterr().err

    assert predict.main([str(run), "--images", str(new), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    masks = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert masks == {f"p{number}_foreground.nii.gz" for number in range(COUNT)}
    assert "is a file; give a folder of images with a file for each of 0000, 0001" in told(new / "p0_0000.nii.gz")
    (new / "p3_0001.nii.gz").unlink()
    assert "p3_0000.nii.gz has no 0001 beside it" in told(new)


def test_words_of_the_command_line_stay_as_they_are() -> None:
    told = ("data.modalities=[0000,0001]", "data.mask_suffix=_{region}*")
    settings = compose(["data=folder", "data.root=x", *told], SCHEMA)
    assert settings["data"]["modalities"] == ["0000", "0001"]
    assert settings["data"]["mask_suffix"] == "_{region}*"
