"""Patches, the grid that cases keep or are brought to, and the window that slides over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.check.command import check
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.fitting import Fitting, on_own_grid, to_shape
from fedseg.datamodules.patches import Patches
from fedseg.datamodules.phantom import PhantomDataModule
from fedseg.evaluation import predict_cases
from fedseg.models import Window
from tests.data_files import folder, save_volume

CASE = Case("a", "one", "one")
sides = st.integers(1, 12)


@given(shape=st.tuples(sides, sides, sides), size=st.tuples(sides, sides, sides))
def test_patches_side_by_side_cover_every_voxel_and_have_the_size(shape: Any, size: Any) -> None:
    patches, whole = Patches(size, 0.5, (1,)), np.arange(1, np.prod(shape) + 1).reshape(shape)
    seen = [patches.cut(whole, corner) for corner in patches.corners(shape)]
    assert {patch.shape for patch in seen} == {size}
    assert set(np.concatenate([patch.ravel() for patch in seen])) - {0} == set(whole.ravel())


@given(shape=st.tuples(sides, sides), size=st.tuples(sides, sides), seed=st.integers(0, 10**6))
def test_a_training_patch_lies_inside_where_it_fits_and_is_a_function_of_its_seed(
    shape: Any, size: Any, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)
    patches = Patches(size, 0.5, (1, 2))
    corner = patches.corner(shape, labels, seed)
    assert corner == patches.corner(shape, labels, seed)
    for first, own, side in zip(corner, shape, size, strict=True):
        assert 0 <= first <= own - side if own > side else first == -((side - own) // 2)
    assert patches.cut(labels, corner).shape == size


def test_a_share_of_patches_is_centred_on_regions_small_ones_as_often_as_large() -> None:
    labels = np.zeros((60, 60), np.uint8)
    labels[10:50, 10:30] = 1
    labels[40, 45] = 2
    drawn = {
        share: [Patches((9, 9), share, (1, 2)).corner(labels.shape, labels, seed) for seed in range(400)]
        for share in (0.0, 0.5, 1.0)
    }
    middles = {share: [int(labels[y + 4, x + 4]) for y, x in corners] for share, corners in drawn.items()}
    assert set(middles[1.0]) == {1, 2}
    assert 0.4 < np.mean(np.equal(middles[1.0], 2)) < 0.6
    assert np.mean(np.equal(middles[0.0], 2)) < 0.02
    assert 0.45 < np.mean(np.not_equal(middles[0.5], 0)) < 0.9


def cube(spacing: tuple[float, float, float] | None = (2.0, 1.0, 1.0)) -> Sample:
    labels = np.zeros((12, 24, 24), np.uint8)
    labels[4:8, 6:18, 6:18] = 1
    return Sample((labels * 200)[..., None], labels, spacing)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (4.0, 0.5, 2.0), (None, 2.0, 2.0)])
def test_a_case_is_brought_to_a_spacing_with_its_extent_and_its_volumes(spacing: Any) -> None:
    sample = cube()
    fitted = Fitting((8, 8, 8), True, spacing)(CASE, sample)
    wanted = tuple(new or own for new, own in zip(spacing, sample.spacing, strict=True))
    assert fitted.spacing == pytest.approx(wanted)
    extent = [side * step for side, step in zip(fitted.image.shape, fitted.spacing, strict=False)]
    assert extent == pytest.approx([24.0, 24.0, 24.0])
    volume = [(one.labels == 1).sum() * np.prod(one.spacing) for one in (sample, fitted)]
    assert volume[1] == pytest.approx(volume[0], rel=0.01)
    assert fitted.image.dtype == np.uint8
    assert fitted.image[fitted.labels == 1].mean() > 150


def test_a_case_stays_as_it_is_without_a_spacing_to_go_to_or_at_it() -> None:
    sample = cube()
    for spacing in (None, (2.0, 1.0, 1.0)):
        assert Fitting((8, 8, 8), True, spacing)(CASE, sample) is sample
    with pytest.raises(
        DataError, match=r"case 'one': data.resample=\[1,1,1\], but its spacing is not known; give data.spacing"
    ):
        Fitting((8, 8, 8), True, (1.0, 1.0, 1.0))(CASE, cube(None))


def brain(edge: int = 3) -> Sample:
    """An organ in a box of noise, 0 elsewhere."""
    sample = cube()
    image = np.zeros_like(sample.image)
    image[edge:-1, 4:-2, 5:-3] = np.random.default_rng(0).integers(1, 90, (11 - edge, 18, 16, 1))
    return Sample(np.where(sample.labels[..., None] > 0, 200, image).astype(np.uint8), sample.labels, sample.spacing)


@pytest.mark.parametrize("spacing", [None, (4.0, 1.0, 1.0)])
def test_a_volume_is_cut_to_what_is_not_0_and_predictions_come_back(spacing: Any) -> None:
    sample, whole = brain(), Fitting((8, 8, 8), True, spacing)
    fitting = Fitting((8, 8, 8), True, spacing, crop=(1,))
    boxed = fitting.boxed(sample)
    assert boxed.box == (slice(3, 11), slice(4, 22), slice(5, 21))
    fitted = fitting(CASE, boxed)
    inside = Sample(sample.image[boxed.box], sample.labels[boxed.box], sample.spacing)
    assert np.array_equal(fitted.image, whole(CASE, inside).image)
    assert np.array_equal(fitted.labels, fitting.labels(CASE, sample.labels, sample.spacing, boxed.box))
    maps = np.stack([fitted.labels == 1, fitted.labels == 0]).astype(np.float32).swapaxes(0, 1)
    back = np.stack([*on_own_grid(maps, len(maps), sample.labels.shape, boxed.box)])
    outside = np.ones(sample.labels.shape, bool)
    outside[boxed.box] = False
    assert not back.swapaxes(0, 1)[:, outside].any()
    assert spacing or np.array_equal(back[:, 0] > 0.5, sample.labels == 1)
    assert np.array_equal(Fitting((8, 8, 8), True, spacing).boxed(sample).image, sample.image)
    empty = Sample(np.zeros_like(sample.image), sample.labels, sample.spacing)
    assert fitting.boxed(empty).box is None


@pytest.mark.parametrize("cure", ["data.crop_background=false", "correct the mask"])
def test_what_cropping_would_cut_off_is_refused_by_run_and_check(tmp_path: Path, cure: str) -> None:
    sample = brain()
    knobs: dict[str, Any] = {"dimensions": 3, "size": [8, 8, 8], "crop_background": True}
    for number in range(6):
        stray = sample.labels.transpose(2, 1, 0).copy()
        stray[0, 0, 0] = number == 2
        save_volume(tmp_path / "a/images" / f"v{number}.nii.gz", sample.image[..., 0].transpose(2, 1, 0))
        save_volume(tmp_path / "a/masks" / f"v{number}.nii.gz", stray)
    with pytest.raises(DataError, match=r"v2': its mask shows 1 voxel\(s\) of a region where the image is 0") as raised:
        folder(tmp_path, **knobs)
    (told,) = [one for one in check(FolderDataModule(root=str(tmp_path), **knobs)).findings if one.severity == "error"]
    assert told.kind == "mask values"
    assert cure in str(raised.value)
    assert cure in str(told)
    if cure == "correct the mask":
        save_volume(tmp_path / "a/masks/v2.nii.gz", sample.labels.transpose(2, 1, 0))
    else:
        knobs["crop_background"] = False
    data = folder(tmp_path, **knobs)
    site = data.site("a")
    (masks, *_) = predict_cases(lambda images: (images > 0.6).float(), site, "test", data.regions, grid="own")
    assert masks.prediction.shape == (1, 12, 24, 24)
    assert np.array_equal(masks.prediction, masks.truth)
    assert site.image(site.cases("test")[0]).shape == ((8, 18, 16, 1) if knobs["crop_background"] else (12, 24, 24, 1))


def test_slices_are_not_cropped() -> None:
    with pytest.raises(DataError, match=r"data.crop_background is for volumes \(data.dimensions=3\); leave it out"):
        FolderDataModule(root=".", crop_background=True)


def test_maps_go_to_a_grid_and_back() -> None:
    smooth = torch.nn.functional.avg_pool3d(
        torch.rand(1, 2, 20, 24, 28, generator=torch.Generator().manual_seed(0)), 9, 1
    )
    maps = smooth[0].numpy()
    back = to_shape(to_shape(maps, (20, 30, 30)), maps.shape[1:])
    assert np.abs(back - maps).max() < 0.02
    assert np.allclose(to_shape(np.ones((1, 5, 6, 7), np.float32), (3, 9, 7)), 1)


@pytest.mark.parametrize("shape", [(1, 1, 40, 23), (1, 1, 5, 60), (1, 1, 12, 17, 30), (1, 1, 4, 40, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_a_sliding_window_answers_as_the_network_where_that_looks_at_single_voxels(shape: Any, overlap: float) -> None:
    conv = nn.Conv2d(1, 3, 1) if len(shape) == 4 else nn.Conv3d(1, 3, 1)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Window((8,) * (len(shape) - 2), 2, overlap)(conv, images)
        assert torch.allclose(found, conv(images), atol=1e-6)


def phantom(**settings: Any) -> PhantomDataModule:
    common = {"anatomy": "organ", "n_sites": 2, "cases_per_site": 5, "amount": 0.0, "resolution": 32, "batch_size": 2}
    data = PhantomDataModule(**{**common, **settings})
    data.setup()
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_patches_and_evaluation_whole_images(workers: int) -> None:
    data = phantom(fit="patches", size=[16, 24], workers=workers)
    site = data.site("site_01")
    batches = list(site.train_batches(3, 2))
    assert [tuple(batch["image"].shape) for batch in batches] == [(2, 1, 16, 24)] * 2
    assert [tuple(batch["mask"].shape) for batch in batches] == [(2, 2, 16, 24)] * 2
    assert {tuple(batch["image"].shape) for batch in site.eval_batches("test")} == {(1, 1, 32, 32)}
    tiles = torch.cat([batch["image"] for batch in site.input_batches("test")])
    assert tiles.shape == (4 * len(site.cases("test")), 1, 16, 24)
    again = list(phantom(fit="patches", size=[16, 24]).site("site_01").train_batches(3, 2))
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(batches, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_cases_of_many_sizes_lie_in_one_cache(tmp_path: Path, cache: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = [(20, 24, 8), (22, 24, 9), (20, 24, 7), (31, 18, 8), (20, 24, 8)]
    for number, shape in enumerate(shapes):
        mask = np.zeros(shape, np.uint8)
        mask[5:12, 6:14, 2:6] = 1
        save_volume(tmp_path / "data/a/images" / f"v{number}.nii.gz", rng.integers(0, 99, shape).astype(np.int16))
        save_volume(tmp_path / "data/a/masks" / f"v{number}.nii.gz", mask)
    for _ in range(2):  # the second time from the disk
        data = folder(
            tmp_path / "data", dimensions=3, size=16, channels=1, cache=cache, cache_dir=str(tmp_path / "cache")
        )
        data.setup()
        slices = data.site("a")._shared.slices
        found = {case.case: data.site("a").image(case).shape for case in slices.stores[0].cases}
        assert found == {f"v{n}": (depth, width, height, 1) for n, (height, width, depth) in enumerate(shapes)}
        for case in slices.stores[0].cases:
            assert np.array_equal(data.site("a").truth(case), data.read(case).labels)
    assert not [finding for finding in check(data).findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dimensions": 4}, "data.dimensions=4: 2 for images and slices, or 3 for volumes"),
        ({"dimensions": 3, "fit": "resize"}, "leave data.fit out"),
        ({"dimensions": 3, "size": [16, 16]}, r"\[slices, height, width\]"),
        ({"size": [16, 16, 16]}, r"\[height, width\]"),
        ({"dimensions": 3, "neighbours": 1}, "data.neighbours is for slices"),
        ({"dimensions": 3, "foreground_slices_only": True}, "data.foreground_slices_only is for slices"),
        ({"resample": [1.0, 1.0]}, "set data.fit=patches to keep a spacing"),
        ({"fit": "patches", "resample": [1.0, 1.0, 1.0]}, r"give \[row, column\] in millimetres"),
        ({"dimensions": 3, "resample": [1.0, 0.0, 1.0]}, r"give \[slice, row, column\] in millimetres, all above 0"),
        ({"foreground_patches": 1.5}, "data.foreground_patches=1.5: a share, from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        FolderDataModule(root=str(tmp_path), **settings)


WINDOW = {"intensity": "window", "window": [0, 9]}


@pytest.mark.parametrize(
    ("settings", "told", "cure"),
    [
        ({"foreground_patches": 0.8}, "take data.fit=patches, or leave it at 0.5", {"fit": "patches"}),
        ({"foreground_patches": 0.8}, "on whole images; .* leave it at 0.5", {"foreground_patches": 0.5}),
        ({"window": [0, 9]}, "data.intensity=percentile; take data.intensity=window", {"intensity": "window"}),
        ({"window": [0, 9]}, "data.window has no effect .* leave it out", {"window": None}),
        ({"window": [0, 9]}, "says both for itself, under data.per_site", {"window": None, "per_site": {"a": WINDOW}}),
        (
            {"percentiles": [1, 99], "intensity": "minmax"},
            "data.percentiles has no effect with data.intensity=minmax; take data.intensity=percentile",
            {"intensity": "percentile"},
        ),
        ({"per_site": {"a": {"window": [0, 9]}}}, "a: window has .* intensity: window", {"per_site": {"a": WINDOW}}),
    ],
)
def test_settings_that_nothing_reads_are_refused_and_the_cures_help(
    tmp_path: Path, settings: dict[str, Any], told: str, cure: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=told):
        FolderDataModule(root=str(tmp_path), **settings).check_named({"a": []})
    FolderDataModule(root=str(tmp_path), **{**settings, **cure}).check_named({"a": []})


@pytest.mark.slow
def test_a_grid_too_coarse_is_told_with_the_spacing_that_does_and_that_cure_works() -> None:
    coarse = {"dimensions": 3, "size": 16, "slices": 12, "cases_per_site": 6}
    data = phantom(**coarse, resample=[20.0, 20.0, 20.0], regions={"organ": [1, 2]})
    (found, *_) = [finding for finding in data.findings if finding.kind == "grid too coarse"]
    assert "(data.resample=[20,20,20]) a perfect mask of 'organ' scores a Dice of" in found.what
    assert "set data.resample=[" in found.cure
    spacing = [float(number) for number in found.cure.partition("[")[2].partition("]")[0].split(",")]
    cured = phantom(**coarse, resample=spacing, regions={"organ": [1, 2]})
    assert not [
        finding for finding in cured.findings if finding.kind == "grid too coarse" and finding.site == found.site
    ]
