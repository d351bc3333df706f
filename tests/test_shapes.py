"""A model of shapes from what sites tell is that of all masks in one place, and draws masks like them."""

from __future__ import annotations

import json
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.regions import Regions
from fedseg.datamodules.shapes import FINE, GRID, ShapeModel, Shapes, distances, labels_of
from fedseg.launch import shapes

REGIONS = Regions({"disc": (1, 2), "cup": (2,)})
OTHERS = Regions({"cup": (2,), "disc": (1, 2)})
SIDES = (64, 48)


def mask(row: float, column: float, outer: float, inner: float) -> NDArray[np.uint8]:
    """Two discs, one in the other; in shares of the sides."""
    rows, columns = np.mgrid[: SIDES[0], : SIDES[1]]
    far = np.hypot((rows + 0.5) / SIDES[0] - row, (columns + 0.5) / SIDES[1] - column)
    found: NDArray[np.uint8] = (far < outer).astype(np.uint8) + (far < inner).astype(np.uint8)
    return found


def masks(seed: int, count: int) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    outer = random.uniform(0.15, 0.3, count)
    rows, columns = random.uniform(0.4, 0.6, (2, count))
    inner = outer * random.uniform(0.4, 0.7, count)
    return [mask(*numbers) for numbers in zip(rows, columns, outer, inner, strict=True)]


SITES = [masks(1, 9), masks(2, 14), masks(3, 6)]
TOLD = [Shapes.of(site, REGIONS) for site in SITES]


def overlap(one: NDArray[np.uint8], other: NDArray[np.uint8], ids: tuple[int, ...]) -> float:
    a, b = np.isin(one, ids), np.isin(other, ids)
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_distances_are_those_of_the_outline_and_tell_the_mask_again() -> None:
    wide = np.zeros((1, 64, 64), bool)
    wide[0, :, :32] = True
    told = distances(wide)[0] / FINE
    np.testing.assert_allclose(told, np.tile(np.linspace(-15 / 16, 15 / 16, GRID), (GRID, 1)), atol=2 / 64)
    nowhere, everywhere = distances(np.stack([np.zeros((9, 9), bool), np.ones((9, 9), bool)]))
    assert (nowhere.min(), everywhere.max()) == (FINE, -FINE)
    for one in SITES[0]:
        again = labels_of(distances(np.stack([one > 0, one == 2])) / FINE, REGIONS, SIDES)
        assert min(overlap(one, again, ids) for ids in REGIONS.labels.values()) > 0.93


def test_the_model_from_sums_of_sites_is_that_of_all_masks() -> None:
    rows = np.stack([distances(np.stack([m > 0, m == 2])).ravel() for site in SITES for m in site]) / FINE
    model = ShapeModel.of(reduce(add, TOLD))
    centred = rows - rows.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    kept = len(model.deviations)
    np.testing.assert_allclose(model.mean.ravel(), rows.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(model.deviations, values[:kept] / np.sqrt(len(rows) - 1), atol=1e-6)
    alike = np.abs((model.directions.reshape(kept, -1) * directions[:kept]).sum(axis=1))
    np.testing.assert_allclose(alike, 1, atol=1e-6)
    assert (values[:kept] ** 2).sum() >= 0.98 * (values**2).sum() > (values[: kept - 1] ** 2).sum()
    backwards = ShapeModel.of(reduce(add, TOLD[::-1]))
    assert all(np.array_equal(a, b) for a, b in zip(vars(model).values(), vars(backwards).values(), strict=True))


def test_masked_sums_are_the_sums(tmp_path: Path) -> None:
    whole, words = reduce(add, TOLD), reduce(add, (one.words(3) for one in TOLD))
    again = Shapes.of_words(words, 3)
    whole.save(tmp_path / "a.json")
    for found in (again, Shapes.load(tmp_path / "a.json")):
        assert all(np.array_equal(a, b) for a, b in zip(vars(found).values(), vars(whole).values(), strict=True))
    for place, word in (
        (0, 9),
        (1, int(words[1]) + 1),
        (2, 10**9),
    ):  # few, another mark, a count beyond
        changed = words.copy()
        changed[place] = word
        with pytest.raises(DataError, match="a file was changed on its way"):
            Shapes.of_words(changed, 3)
    with pytest.raises(DataError, match="different regions"):
        TOLD[0] + Shapes.of(SITES[1], OTHERS)
    with pytest.raises(DataError, match="tell it unmasked"):
        Shapes(2**40, TOLD[0].mark, TOLD[0].shown, TOLD[0].first, TOLD[0].second).words(3)


def test_masks_that_are_drawn_are_like_those_of_the_sites() -> None:
    model = ShapeModel.of(reduce(add, TOLD))
    drawn = model.masks(200, REGIONS, SIDES, np.random.default_rng(0))
    again = model.masks(200, REGIONS, SIDES, np.random.default_rng(0))
    assert all(np.array_equal(one, other) for one, other in zip(drawn, again, strict=True))
    assert all((one == 2).any() for one in drawn)  # every mask of the sites has a cup
    for ids in REGIONS.labels.values():
        real = np.array([np.isin(m, ids).mean() for site in SITES for m in site])
        made = np.array([np.isin(m, ids).mean() for m in drawn])
        assert abs(made.mean() - real.mean()) < 0.5 * real.std()
        assert 0.5 < made.std() / real.std() < 1.5
    with pytest.raises(DataError, match="not those of cup, disc"):
        model.masks(1, OTHERS, SIDES, np.random.default_rng(0))
    with pytest.raises(DataError, match="needs two masks"):
        ShapeModel.of(Shapes.of(SITES[0][:1], REGIONS))


@pytest.mark.slow
def test_commands_of_sites_make_the_model_of_data_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["data=phantom", "data.n_sites=2", "data.cases_per_site=9", "data.amount=0", "data.resolution=32"]
    assert shapes.main([*data, "output=whole.json", "picture=drawn.png"]) == 0
    for site in ("site_01", "site_02"):
        assert shapes.main([*data, f"site={site}", f"tell={site}.json"]) == 0
    assert shapes.main(["told=[site_01.json,site_02.json]", "output=told.json"]) == 0
    assert Path("told.json").read_bytes() == Path("whole.json").read_bytes()
    assert Path("drawn.png").stat().st_size > 500
    assert ShapeModel.load(Path("told.json")).cases == 12
    capsys.readouterr()
    Path("a.json").write_text(json.dumps({**json.loads(Path("told.json").read_text()), "mean": [[1.0]]}))
    with pytest.raises(DataError, match=r"a\.json holds no model of shapes"):
        ShapeModel.load(Path("a.json"))
    for words, told in (
        (["told=[told.json]"], "told.json holds no shapes"),
        ([*data, "picture=a.jpg"], "a name that ends in .png"),
        ([*data, "data.cases_per_site=6", "data.split=[0.5,0.25,0.25]"], "3 masks are too few"),
        ([*data, "data.ignore_labels=[9]"], "leave pixels unknown"),
        ([*data, "data.fit=patches"], "whole images on one grid"),
        ([*data, "data.unlabelled=[site_01,site_02]"], "no site has labelled training images; look at data.root"),
        ([*data, "data.unlabelled=[site_01,site_02]", "tell=a.json"], "no site has labelled training images"),
    ):
        assert shapes.main(words) == 2
        assert told in capsys.readouterr().err
