"""Masks of several raters: where they lie, what is made of them, what is learnt, and how far they agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedseg.datamodules import DataError, FolderDataModule, PhantomDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.check.report import tables
from fedseg.datamodules.readers import Reading, raters
from fedseg.datamodules.readers.raters import Opinions, agreement, majority, staple
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.raters import raters_table
from tests.data_files import folder, picture, save, write_manifest

RATERS = ("anna", "ben", "cleo")
NESTED = Reading(ids=(1, 2), regions={"disc": (1, 2), "cup": (2,)})
COUNT = 8


def drawn(number: int, rater: int) -> np.ndarray:
    """The wider the later the rater."""
    mask = np.zeros((20, 24), np.uint8)
    mask[2 : 8 + 2 * rater + number % 2, 3:12] = 255
    return mask


def in_folders(root: Path) -> dict[str, Any]:
    for number in range(COUNT):
        for rater, name in enumerate(RATERS):
            save(root / "a/masks" / name / f"p{number}.png", drawn(number, rater))
    return {"raters": RATERS}


def by_name(root: Path) -> dict[str, Any]:
    for number in range(COUNT):
        for rater, name in enumerate(RATERS):
            save(root / "a/masks" / f"p{number}-{name}_gt.png", drawn(number, rater))
    return {"raters": RATERS, "mask_suffix": "-{rater}_gt"}


def by_table(root: Path) -> dict[str, Any]:
    in_folders(root)
    columns = {f"mask_{name}": f"a/masks/{name}/p" for name in RATERS}
    rows = [
        {"site": "a", "image": f"a/images/p{n}.png", **{name: f"{start}{n}.png" for name, start in columns.items()}}
        for n in range(COUNT)
    ]
    write_manifest(root / "sites.csv", rows)
    return {"raters": RATERS}


Layout = Callable[[Path], dict[str, Any]]


def world(root: Path, layout: Layout = in_folders) -> dict[str, Any]:
    for number in range(COUNT):
        save(root / "a/images" / f"p{number}.png", picture(number))
    return layout(root)


# --- what is made of several masks -----------------------------------------------------------------------------------


def noisy(seed: int, labels: int) -> list[np.ndarray]:
    """Four raters' masks (1, 48, 48) of nested discs, drawn with errors."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    masks = []
    for _ in range(4):
        mask = np.zeros((1, 48, 48), np.uint8)
        for label in range(1, labels + 1):
            far = np.hypot(y - 24 + rng.normal(), x - 24 + rng.normal()) + rng.normal(0, 0.6, (48, 48))
            mask[0][far < 24 - 6.72 * label + rng.normal()] = label
        masks.append(mask)
    return masks


@pytest.mark.parametrize(("labels", "seed"), [(1, 0), (1, 3), (2, 0), (2, 4)])
def test_staple_is_the_insight_toolkit_s(labels: int, seed: int) -> None:
    masks = noisy(seed, labels)
    opinions = Opinions.of(masks)
    ids, theta = staple(opinions, NESTED)
    ours = opinions.settled(ids)
    several = sitk.MultiLabelSTAPLEImageFilter()
    several.SetTerminationUpdateThreshold(1e-9)
    several.SetMaximumNumberOfIterations(1000)
    images = [sitk.GetImageFromArray(mask) for mask in masks]
    np.testing.assert_array_equal(ours, sitk.GetArrayFromImage(several.Execute(images)))
    for rater in range(4):  # their matrix has a row more, for pixels that it could not decide
        theirs = np.reshape(several.GetConfusionMatrix(rater), (labels + 2, labels + 1))[: labels + 1]
        np.testing.assert_allclose(theta[rater], theirs, atol=1e-7)
    assert (ours != opinions.settled(majority(opinions, NESTED))).any()
    if labels == 1:
        one = sitk.STAPLEImageFilter()
        one.SetForegroundValue(1)
        np.testing.assert_array_equal(ours, sitk.GetArrayFromImage(one.Execute(images)) > 0.5)
        np.testing.assert_allclose(theta[:, 1, 1], one.GetSensitivity(), atol=1e-4)


def test_a_staple_that_has_not_settled_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    staple(Opinions.of(noisy(0, 1)), NESTED)
    assert not capsys.readouterr().err
    monkeypatch.setattr(raters, "STEPS", 3)
    staple(Opinions.of(noisy(0, 1)), NESTED)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: STAPLE: after 3 steps")


@given(arrays(np.uint8, (3, 1, 3, 4), elements=st.integers(0, 2)))
def test_more_than_half_outline_a_region(masks: np.ndarray) -> None:
    opinions = Opinions.of(list(masks))
    assert (opinions.answers[opinions.places] == np.moveaxis(masks, 0, -1)).all()
    found = opinions.settled(majority(opinions, NESTED))
    for ids in NESTED.regions.values():  # although no two may have said the same label id
        np.testing.assert_array_equal(np.isin(found, ids), np.isin(masks, ids).sum(axis=0) >= 2)


def test_half_is_no_majority_and_who_does_not_say_has_no_vote() -> None:
    reading = Reading(ids=(1, 255), regions={"disc": (1,)}, ignored=(255,))
    masks = [np.array(mask, np.uint8).reshape(1, 1, 5) for mask in ([1, 1, 1, 255, 0], [0, 1, 255, 255, 0])]
    opinions = Opinions.of(masks)
    assert opinions.settled(majority(opinions, reading)).ravel().tolist() == [0, 1, 1, 255, 0]
    assert opinions.settled(staple(opinions, reading)[0]).ravel()[3] == 255
    assert agreement(opinions, reading) == {"disc": pytest.approx(2 / 3)}  # of the pixels that count for both
    nothing = Opinions.of([np.zeros((1, 2, 2), np.uint8)] * 2)
    assert agreement(nothing, reading) == {}
    assert not nothing.settled(staple(nothing, reading)[0]).any()


# --- where they lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [in_folders, by_name, by_table])
def test_every_layout_is_read_alike(tmp_path: Path, layout: Layout) -> None:
    data = folder(tmp_path, **world(tmp_path, layout))
    site = data.site("a")
    for case in (case for split in ("train", "val", "test") for case in site.cases(split)):
        number = int(case.case[1:])
        np.testing.assert_array_equal(site.truth(case)[0], drawn(number, 1) > 0)  # whose mask lies between the others'
        np.testing.assert_array_equal(site.at_own_size(case).labels, site.truth(case))
    areas = [(drawn(0, rater) > 0).sum() for rater in range(3)]
    pairs = [2 * a / (a + b) for a, b in ((areas[0], areas[1]), (areas[0], areas[2]), (areas[1], areas[2]))]
    rows = data.agreement()
    assert rows[0] == {"site": "a", "case": "p0", "split": data.splits()[0]["split"], "region": "foreground",
                       "dice": pytest.approx(np.mean(pairs))}  # fmt: skip
    assert len(rows) == COUNT
    unread = FolderDataModule(root=str(tmp_path), **world(tmp_path, layout))
    (table,) = [one for one in tables(check(unread), unread.regions, "") if one.title.startswith("Agreement")]
    assert table.rows[0][:3] == ("a", "foreground", str(COUNT))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_training_draws_a_rater_and_scores_have_one_truth(tmp_path: Path, cache: str) -> None:
    knobs = {**world(tmp_path / "sites"), "raters_train": "random", "cache": cache, "cache_dir": str(tmp_path / "kept")}
    data = folder(tmp_path / "sites", **knobs)
    data = folder(tmp_path / "sites", **knobs)  # from the cache, where there is one
    site = data.site("a")
    seen: dict[int, set[int]] = {}
    for batch in site.train_batches(seed=1, steps=12):
        for case, mask in zip(batch["case"], batch["mask"], strict=True):
            number = int(case[1:])
            fits = [r for r in range(3) if (mask[0].numpy() > 0.5).tolist() == (drawn(number, r) > 0).tolist()]
            assert len(fits) == 1
            seen.setdefault(number, set()).add(fits[0])
    assert all(len(raters) > 1 for raters in seen.values())
    assert set.union(*seen.values()) == {0, 1, 2}
    for split in ("val", "test"):
        for batch in site.eval_batches(split):
            for case, mask in zip(batch["case"], batch["mask"], strict=True):
                np.testing.assert_array_equal(mask[0].numpy(), drawn(int(case[1:]), 1) > 0)


def test_one_rater_is_learnt_and_another_scored(tmp_path: Path) -> None:
    data = folder(tmp_path, **world(tmp_path), raters_train="ben", raters_test="anna")
    site = data.site("a")
    (batch,) = site.train_batches(seed=1, steps=1)
    for case, mask in zip(batch["case"], batch["mask"], strict=True):
        np.testing.assert_array_equal(mask[0].numpy(), drawn(int(case[1:]), 1) > 0)
    case = site.cases("test")[0]
    np.testing.assert_array_equal(site.truth(case)[0], drawn(int(case.case[1:]), 0) > 0)
    (tmp_path / "a/site.yaml").write_text("raters_train: cleo\nraters: [anna, cleo]\n")
    shutil.rmtree(tmp_path / "a/masks/ben")
    assert folder(tmp_path, raters=["dora"]).agreement()[0]["dice"] <= 0.75  # the site's own raters, two of them


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [in_folders, by_name])
def test_a_rater_may_not_have_seen_an_image(tmp_path: Path, layout: Layout) -> None:
    knobs = world(tmp_path, layout)
    next(path for path in (tmp_path / "a/masks").rglob("*.png") if "cleo" in str(path) and "p3" in str(path)).unlink()
    with pytest.raises(DataError, match=r"p3.*by rater 'cleo'.*missing_masks=unlabelled"):
        folder(tmp_path, **knobs)
    data = folder(tmp_path, **knobs, missing_masks="unlabelled")
    np.testing.assert_array_equal(data.site("a").truth("p3")[0], drawn(3, 0) > 0)  # half of two outline no more
    assert not data.site("a").truth("p3")[0][10:].any()
    none = folder(tmp_path, **knobs, missing_masks="empty", raters_test="cleo", vanishing="allow")
    assert not none.site("a").truth("p3").any()
    with pytest.raises(DataError, match=r"p3': data.raters_train=cleo: has no mask by rater 'cleo', but by anna, ben"):
        folder(tmp_path, **knobs, missing_masks="unlabelled", raters_train="cleo")
    found = check(FolderDataModule(root=str(tmp_path), **knobs)).findings
    assert [one.case for one in found if one.kind == "missing mask"] == ["p3"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"raters": ["anna", "anna"]}, "data.raters has 'anna' 2 times"),
        ({"raters": ["random"]}, "which is a region or a way to choose"),
        ({"raters": ["x", "y"]}, r"if those of a rater, data.raters=\[anna,ben,cleo\]"),
        ({"raters": RATERS, "raters_test": "random"}, "scores need one truth"),
        ({}, r"data.raters=\[anna,ben,cleo\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    world(tmp_path)
    with pytest.raises(DataError, match=message):
        folder(tmp_path, **knobs)


@pytest.mark.parametrize(
    ("column", "knobs", "message"),
    [
        ("mask_disc", {"raters": RATERS}, "has the column 'mask_disc', which is no rater's"),
        ("mask_cleo", {"raters": RATERS[:2]}, "has the column 'mask_cleo', which is no rater's.*Name them all"),
        ("mask_anna", {"raters": ["anna", "Anna"]}, "differ in upper and lower case only"),
        ("", {"raters": RATERS, "per_site": {"a": {"raters": ["ben"]}}}, "'a'.*has raters of its own"),
    ],
)
def test_a_table_s_columns_are_its_raters(tmp_path: Path, column: str, knobs: dict[str, Any], message: str) -> None:
    world(tmp_path, by_table)
    if column:
        names = dict.fromkeys(["mask_anna", *(f"mask_{name}" for name in knobs["raters"][1:]), column])
        cells = {name: "a/masks/anna/p0.png" for name in names if name.islower()}
        write_manifest(tmp_path / "sites.csv", [{"site": "a", "image": "a/images/p0.png", **cells}])
    with pytest.raises(DataError, match=message):
        folder(tmp_path, **knobs)


def test_what_training_counts_is_what_it_learns(tmp_path: Path) -> None:
    shares = {
        how: folder(tmp_path, **world(tmp_path), raters_train=how, raters_test="anna").site("a").covered()
        for how in (*RATERS, "random")
    }
    assert (shares["anna"] < shares["cleo"]).all()
    torch.testing.assert_close(shares["random"], sum(shares[name] for name in RATERS) / 3)


def test_a_choice_between_raters_needs_raters(tmp_path: Path) -> None:
    for number in range(COUNT):
        save(tmp_path / "a/images" / f"p{number}.png", picture(number))
        save(tmp_path / "a/masks" / f"p{number}.png", drawn(number, 0))
    with pytest.raises(DataError, match=r"data.raters_train=staple chooses between raters.*data.raters"):
        folder(tmp_path, raters_train="staple")
    with pytest.raises(DataError, match=r"its masks lie in none of the folders x, y.*mask_suffix=_\{rater\}"):
        folder(tmp_path, raters=["x", "y"])
    with pytest.raises(DataError, match=r"tells raters apart, and none is named.*data.raters"):
        folder(tmp_path, mask_suffix="_{rater}")
    save(tmp_path / "a/masks/p0.png", np.full((20, 24), 7, np.uint8))
    (tmp_path / "a/masks").rename(tmp_path / "anna")
    (tmp_path / "a/masks").mkdir()
    (tmp_path / "anna").rename(tmp_path / "a/masks/anna")
    with pytest.raises(DataError, match="rater 'anna' has unknown label ids"):
        folder(tmp_path, raters=["anna"], regions={"disc": [1, 2]}, label_values={255: 1})
    found = check(
        FolderDataModule(root=str(tmp_path), raters=["anna"], regions={"disc": [1, 2]}, label_values={255: 1})
    )
    assert ("p0", "mask values") in {(one.case, one.kind) for one in found.findings}


# --- the phantom, and what a run shows -------------------------------------------------------------------------------


def test_raters_of_the_phantom_outline_one_image_in_their_own_ways() -> None:
    def made(**knobs: Any) -> PhantomDataModule:
        return PhantomDataModule(n_sites=1, cases_per_site=5, resolution=48, size=48, **knobs)

    one, three = made(), made(raters=3, raters_test="rater_1", raters_train="random")
    case, same = one.cases()[0], three.cases()[0]
    np.testing.assert_array_equal(one.read(case).image, three.read(same).image)
    assert one.read(case).taught == ()
    assert dict(one.read(case).agreement) == {}
    sample = three.read(same)
    np.testing.assert_array_equal(sample.labels, sample.taught[0])
    assert len({int((labels > 0).sum()) for labels in sample.taught}) == 3
    assert 0.6 < dict(sample.agreement)["disc"] < 0.97


def test_a_run_shows_how_far_raters_agree_beside_its_models(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert raters_table(run.raters(), pd.DataFrame()) is None
    common = {"site": "a", "region": "disc"}
    told = [("p0", "test", 0.75), ("p1", "train", 0.1), ("p2", "test", 0.5)]
    run.write_raters([{**common, "case": case, "split": split, "dice": dice} for case, split, dice in told])
    fixed = {
        "round": 1,
        "checkpoint": "best",
        "seen": True,
        "split": "test",
        "metric": "dice",
        "unit": "",
        "grid": "own",
    }
    scores = pd.DataFrame([{**fixed, **common, "case": "p0", "view": "global", "value": 0.8, "unit": ""}])
    table = raters_table(run.raters(), scores)
    assert table is not None
    assert table.header == ("test dice, own grid", "cases", "raters", "global best")
    assert table.rows == (("a", "2", "0.6250", "0.8000"),)
