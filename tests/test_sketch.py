"""How far apart the updates of a round are: known answers, and what noting it must not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.federation.contract import Transform
from fedseg.federation.sketch import BLOCK, SIZE, SketchedMean, sketch
from fedseg.federation.state import Mean, Update
from tests.world import assert_same, assert_same_outcome, simulate


class Hiding(Transform):
    """Changes nothing, and forbids looking at single updates."""

    name = "hiding"
    hides_updates = True


def update(site: str, *values: torch.Tensor) -> Update:
    return Update({"model": {f"t{i}": v for i, v in enumerate(values)}}, site=site, examples=1)


def test_the_norm_is_exact_and_names_may_come_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"b": torch.randn(3, 5, generator=generator), "a": torch.randn(BLOCK + 17, generator=generator)}
    norm, numbers = sketch(tensors, seed=1)
    assert norm == pytest.approx(float(torch.cat([t.flatten() for t in tensors.values()]).double().norm()), rel=1e-6)
    assert numbers.shape == (SIZE,)
    assert np.array_equal(sketch(dict(reversed(tensors.items())), seed=1)[1], numbers)
    assert not np.array_equal(sketch(tensors, seed=2)[1], numbers)


def test_a_sketch_adds_up_coordinates_with_random_signs() -> None:
    first, last = torch.zeros(BLOCK), torch.zeros(BLOCK)
    first[5], last[BLOCK - 3] = 2.0, 3.0
    for tensor, place, size in ((first, 5, 2.0), (last, SIZE - 3, 3.0)):
        numbers = sketch({"t": tensor}, seed=0)[1]
        assert np.flatnonzero(numbers).tolist() == [place]
        assert abs(numbers[place]) == size
    many = np.stack([sketch({"t": torch.ones(BLOCK)}, seed=s)[1] for s in range(20)])
    assert abs(many.mean()) < 4 * np.sqrt(64 / many.size)  # 64 signs in each sum
    assert many.var() == pytest.approx(64, rel=0.05)


def test_a_sketch_is_linear() -> None:
    a, b = torch.randn(3000), torch.randn(3000)
    together = sketch({"t": 2 * a - b}, seed=3)[1]
    assert together == pytest.approx(2 * sketch({"t": a}, 3)[1] - sketch({"t": b}, 3)[1], abs=1e-4)


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.6, 0.98])
def test_cosines_survive(cosine: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 300_000, generator=generator)
    b = cosine * a + (1 - cosine**2) ** 0.5 * noise
    true = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    found = []
    for seed in range(10):
        mean = SketchedMean((), seed)
        mean.add(update("a", a), 1.0)
        mean.add(update("b", b), 3.0)
        found.append(mean.differences(1)[0]["cosine_others"])
    assert np.abs(np.array(found) - true).max() < 4 / SIZE**0.5
    assert np.mean(found) == pytest.approx(true, abs=1.5 / SIZE**0.5)


def test_rows_of_updates_whose_geometry_is_known() -> None:
    mean = SketchedMean((), seed=0)
    right = torch.tensor([4.0, 0.0])
    for site, vector, weight in (("a", right, 1.0), ("b", right, 2.0), ("c", -right / 2, 1.0)):
        mean.add(update(site, vector), weight)
    rows = {row["site"]: row for row in mean.differences(7)}
    assert {row["round"] for row in rows.values()} == {7}
    assert [rows[s]["norm"] for s in "abc"] == [4.0, 4.0, 2.0]
    # mean: (4 + 8 - 2) / 4 > 0; the others of a: 8 - 2 > 0, of b: 4 - 2 > 0, of c: 4 + 8 > 0
    assert [rows[s]["cosine"] for s in "abc"] == pytest.approx([1, 1, -1])
    assert [rows[s]["cosine_others"] for s in "abc"] == pytest.approx([1, 1, -1])


def test_there_is_no_cosine_without_a_direction() -> None:
    alone = SketchedMean((), seed=0)
    alone.add(update("a", torch.ones(3)), 1.0)
    assert alone.differences(1)[0]["cosine_others"] is None
    assert alone.differences(1)[0]["cosine"] == pytest.approx(1)
    still = SketchedMean((), seed=0)
    still.add(update("a", torch.zeros(3)), 1.0)
    still.add(update("b", torch.randn(3)), 2.0)
    still.add(update("c", torch.randn(3)), 0.0)
    rows = still.differences(1)
    assert rows[0]["norm"] == 0.0
    assert rows[0]["cosine"] is rows[0]["cosine_others"] is None
    assert rows[1]["cosine_others"] is None  # the others weigh nothing


def test_the_mean_is_the_plain_one() -> None:
    plain, noted = Mean(("head",)), SketchedMean(("head",), seed=0)
    for site in "ab":
        sent = Update(
            {"model": {"w": torch.randn(4)}, "head": {"h": torch.randn(2)}}, {"loss": 1.0}, site=site, examples=1
        )
        plain.add(sent, 2.0)
        noted.add(sent, 2.0)
    assert_same(plain.result(), noted.result())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "lcfed", "feddg"])
def test_a_run_notes_its_updates_and_learns_the_same(method: str, tmp_path: Path) -> None:
    noted = simulate(method, tmp_path / "noted")
    hidden = simulate(method, tmp_path / "hidden", transforms=(Hiding(),))
    assert_same_outcome(noted, hidden)
    rows = noted.observer.rows("updates")
    assert [(row["round"], row["site"]) for row in rows] == [(r, s) for r in (1, 2) for s in ("s0", "s1", "s2")]
    assert all(row["norm"] > 0 and -1 <= row["cosine"] <= 1 for row in rows)
    assert not hidden.observer.rows("updates")


def test_where_nothing_is_shared_there_is_nothing_to_note(tmp_path: Path) -> None:
    assert not simulate("local", tmp_path).observer.rows("updates")
