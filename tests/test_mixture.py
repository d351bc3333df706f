"""A mixture of Gaussians of all sites' intensities is that of EM over all pixels in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedseg.datamodules.check.report import mixture_tables
from fedseg.datamodules.check.statistics import level_counts
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.mixture import LEVELS, SMALLEST, Levels, Mixture
from fedseg.datamodules.told import FEWEST
from fedseg.launch import mixture


def pixels(seed: int, means: tuple[float, ...], deviation: float, count: int = 2000) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    values = random.normal(np.array(means)[random.integers(len(means), size=count)], deviation)
    return np.round(np.clip(values, 0, 1) * (LEVELS - 1)).astype(np.uint8)


SITES = [pixels(1, (0.1, 0.4, 0.7), 0.05), pixels(2, (0.15, 0.8), 0.08, 3000)]
COUNTS = [level_counts(site[:, None])[0] for site in SITES]


def by_pixels(start: Mixture, values: NDArray[np.float64], steps: int) -> tuple[NDArray[np.float64], ...]:
    """EM as the textbook has it, pixel by pixel (Bishop, Pattern Recognition and Machine Learning, 9.2.2)."""
    shares, means, variances = start.shares.copy(), start.means.copy(), start.deviations**2
    for _ in range(steps):
        density = shares * np.exp(-((values[:, None] - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
        owned = density / density.sum(axis=1, keepdims=True)
        held = owned.sum(axis=0)
        shares, means = held / len(values), (owned * values[:, None]).sum(axis=0) / held
        variances = (owned * (values[:, None] - means) ** 2).sum(axis=0) / held
    return shares, means, np.sqrt(variances)


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_sums_of_sites_give_the_mixture_of_all_pixels(steps: int) -> None:
    values = np.concatenate(SITES) / (LEVELS - 1)
    expected = by_pixels(Mixture.start(reduce(add, COUNTS), 3), values, steps)
    order = np.argsort(expected[1])
    for found in (Mixture.fit(COUNTS, 3, steps), Mixture.fit([reduce(add, COUNTS)], 3, steps)):
        for one, other in zip(vars(found).values(), expected, strict=True):
            np.testing.assert_allclose(one, other[order], rtol=0, atol=1e-10)


def test_every_step_tells_the_pixels_better_and_the_end_is_a_fixed_point() -> None:
    whole = reduce(add, COUNTS)
    told = [Mixture.fit(COUNTS, 3, steps).likelihood(whole) for steps in range(12)]
    assert all(later >= earlier for earlier, later in pairwise(told))
    end = Mixture.fit(COUNTS, 3)
    again = Mixture.of(reduce(add, map(end.sums, COUNTS)))
    np.testing.assert_allclose(again.means, end.means, atol=1e-4)
    assert end.shares.sum() == pytest.approx(1)
    assert (np.diff(end.means) > 0).all()


def test_pixels_of_one_level_are_a_component_as_narrow_as_a_level_and_no_number_breaks() -> None:
    black = np.zeros(LEVELS, np.int64)
    black[0] = 500
    for components in (1, 3):
        found = Mixture.fit([black], components)
        assert np.isfinite(np.concatenate(list(vars(found).values()))).all()
        assert found.deviations.min() >= SMALLEST**0.5
        assert found.likelihood(black) == pytest.approx(np.log(1 / np.sqrt(2 * np.pi * SMALLEST)))


def test_what_a_site_is_in_the_mixture_tells_sites_apart() -> None:
    common = Mixture.fit(COUNTS, 3)
    assert [common.shares_of(own).sum() for own in COUNTS] == pytest.approx([1, 1])
    weights = [own.sum() for own in COUNTS]
    mixed = np.average([common.shares_of(own) for own in COUNTS], axis=0, weights=weights)
    np.testing.assert_allclose(mixed, common.shares, atol=1e-4)  # responsibilities of all pixels are the shares
    assert min(common.bits_beside(own) for own in COUNTS) > 0.1
    assert Mixture.fit([COUNTS[0], COUNTS[0]], 3).bits_beside(COUNTS[0]) == pytest.approx(0, abs=1e-6)
    what, who = mixture_tables({"a": COUNTS[0][None], "b": COUNTS[1][None]})
    assert [row[:2] for row in what.rows] == [("grey", "1"), ("grey", "2"), ("grey", "3")]
    assert [row[0] for row in who.rows] == ["a", "b"]


def test_levels_add_up_in_the_clear_and_as_words(tmp_path: Path) -> None:
    a, b, c = (Levels(5 + place, np.stack([own, own[::-1]])) for place, own in enumerate([*COUNTS, COUNTS[0]]))
    words = a.words(3) + b.words(3) + c.words(3)
    together, whole = Levels.of_words(words, 3), a + b + c
    assert together.cases == whole.cases == 18
    assert np.array_equal(together.counts, whole.counts)
    a.save(tmp_path / "a.json")
    assert np.array_equal(Levels.load(tmp_path / "a.json").counts, a.counts)
    changed = words.copy()
    changed[7] += np.uint64(1)
    with pytest.raises(DataError, match="a file was changed on its way"):
        Levels.of_words(changed, 3)
    with pytest.raises(DataError, match="of 2 and 1 channels"):
        a + Levels(5, COUNTS[0][None])
    with pytest.raises(DataError, match="tell it unmasked"):
        Levels(5, np.full((1, LEVELS), 2**62)).words(3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cases": FEWEST - 1, "counts": [COUNTS[0].tolist()]}, "does not add up to 5 cases"),
        ({"cases": 9, "counts": [(-COUNTS[0]).tolist()]}, "does not add up"),
        ({"cases": 9, "counts": [[1, 2]]}, "does not add up"),
        ({"cases": 9}, "holds no levels"),
        ({"cases": 9, "counts": [["x"]]}, "holds no levels"),
    ],
)
def test_a_file_that_tells_no_levels_is_named(content: Mapping[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"a.json {words}"):
        Levels.load(tmp_path / "a.json")


@pytest.mark.slow
def test_masked_sites_get_the_mixture_of_data_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"site_0{number}" for number in (1, 2, 3)]
    data = ["data=phantom", "data.n_sites=3", "data.cases_per_site=8", "data.amount=0", "data.resolution=32"]
    assert mixture.main([*data, "output=whole.json"]) == 0
    shown = capsys.readouterr().out
    keys = f"masked=[{','.join(f'{name}.key.pub' for name in names)}]"
    for name in names:
        assert mixture.main([f"site={name}", f"key={name}.key"]) == 0
    for name in names:
        assert mixture.main([*data, f"site={name}", f"tell={name}.json", f"key={name}.key", keys]) == 0
    assert mixture.main([f"told=[{','.join(f'{name}.json' for name in names)}]", "output=masked.json"]) == 0
    assert Path("masked.json").read_bytes() == Path("whole.json").read_bytes()
    capsys.readouterr()
    assert mixture.main([*data, "site=site_02", "common=masked.json"]) == 0
    own = [line for line in capsys.readouterr().out.splitlines() if "site_02" in line]
    assert len(own) == 3  # channels
    assert all(line in shown.splitlines() for line in own)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["components=²"], "components=² should be a whole number, at least 1"),
        (["components=0"], "components=0 should be a whole number"),
        (["told=[a.json]", "data=phantom"], "told= needs no data"),
        (["told=[a.json]", "output=a.json"], "which it would write over"),
        (["data=phantom", "common=a.json"], "common=a.json holds no mixture"),
        (
            ["data=phantom", "data.n_sites=1", "data.cases_per_site=8", "site=site_9", "tell=b"],
            "no images of that site",
        ),
    ],
)
def test_a_command_that_cannot_be_meant_says_why(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"channels": [{"shares": [1], "means": [0.5], "deviations": [0]}]}')
    assert mixture.main(words) == 2
    assert told in capsys.readouterr().err
