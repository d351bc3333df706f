"""Sites drawn by how far their labels are from all sites' and by their losses (FedACS), and what makes up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedseg.federation.engine import Federation
from fedseg.federation.heterogeneity import BINS, LABELS, Heterogeneity, distances, histograms, inclusion, systematic
from fedseg.federation.schedule import Schedule, check_cohort
from fedseg.federation.selection import History, Past, history_of
from fedseg.federation.state import State, Update
from tests.test_privacy import transforms
from tests.test_selection import BY_LABELS, trained
from tests.world import Outcome, assert_same, simulate

shares = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=7)


def model_of(outcome: Outcome) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in outcome.server["model"].values()])


# ------------------------------------------------------------------------------------------------------ what is told


def test_cases_are_counted_by_the_root_of_the_share_that_a_region_covers() -> None:
    nan = float("nan")
    found = histograms(torch.tensor([[0.0, nan], [0.0099, nan], [0.011, nan], [0.25, nan], [1.0, nan]]))[LABELS]
    assert found[0].tolist() == [0.4, 0.2, 0, 0, 0, 0.2, 0, 0, 0, 0.2]
    assert found[1].tolist() == [0.0] * BINS  # annotated nowhere
    assert histograms(torch.zeros(0, 2))[LABELS].tolist() == [[0.0] * BINS] * 2


def test_distances_are_half_the_l1_norm_to_the_mean_by_images_over_what_a_site_annotated() -> None:
    q = {"a": torch.zeros(2, BINS), "b": torch.zeros(2, BINS), "c": torch.zeros(2, BINS)}
    q["a"][0, 0] = q["b"][0, 1] = q["a"][1, 2] = 1.0  # region 0: a and b disagree; region 1 only a annotated
    found = distances(q, {"a": 30.0, "b": 10.0, "c": 5.0})
    assert found == {"a": pytest.approx((0.25 + 0.0) / 2), "b": pytest.approx(0.75), "c": 0.0}


@given(st.lists(st.tuples(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 99)), min_size=2))
def test_distances_lie_between_0_and_1_and_are_0_of_equal_sites(sites: list[tuple[list[float], int]]) -> None:
    images = {str(number): float(count) for number, (_, count) in enumerate(sites)}
    told = {str(n): histograms(torch.tensor(covered).unsqueeze(1))[LABELS] for n, (covered, _) in enumerate(sites)}
    assert all(-1e-9 <= d <= 1 + 1e-9 for d in distances(told, images).values())
    assert all(d < 1e-9 for d in distances(dict.fromkeys(told, told["0"]), images).values())


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({}, "site 'b' told no histograms"),
        ({LABELS: torch.ones(2, BINS).double()}, "site 'b' told histograms of its labels that are no shares"),
        ({LABELS: torch.full((2, BINS), float("nan")).double()}, "that are no shares"),
        ({LABELS: torch.eye(1, BINS).double()}, "different numbers of regions: a 2, b 1"),
        ({LABELS: torch.eye(2, 7).double()}, "one of 10 bins for each region"),
        ({LABELS: torch.eye(2, BINS)}, "site 'b' told no histograms"),
    ],
)
def test_what_are_no_histograms_is_refused_with_the_name_of_the_site(told: dict[str, Any], why: str) -> None:
    fine = Update(tensors={LABELS: {LABELS: torch.eye(2, BINS).double()}}, site="a", examples=3)
    bad = Update(tensors={LABELS: told}, site="b", examples=3)
    selection = Heterogeneity("ab", 1, 0.5, 0.1, 0.9)
    with pytest.raises(ValueError, match=why):
        selection.introduced({"a": fine, "b": bad})
    assert selection.introduced({"a": fine, "b": replace(fine, site="b")})["b"] == Past(0, 0.0, None, 3.0, 0.0)


# -------------------------------------------------------------------------------------------------- who is drawn


def test_strengths_follow_the_formula() -> None:
    selection = Heterogeneity("abc", 2, 0.4, 0.1, 0.8)
    first = {"a": Past(0, 0, None, 5, 0.1), "b": Past(0, 0, None, 5, 0.3), "c": Past(0, 0, None, 5, 0.0)}
    s = {"a": 0.4 / 4 + 0.6 / 3, "b": 0.4 * 3 / 4 + 0.6 / 3, "c": 0.6 / 3}
    assert selection.strengths(first) == pytest.approx(s)
    after = selection.remembered(first, {"a": Past(1, 3, 2.0, 5), "c": Past(1, 3, 1.0, 5)})
    losses = {"a": 2.0 / 4.5, "b": 1.5 / 4.5, "c": 1.0 / 4.5}  # b told none: as the mean of the others
    now = {"a": 0.4 / 4 + 0.6 * losses["a"], "b": 0.4 * 3 / 4 + 0.6 * losses["b"], "c": 0.6 * losses["c"]}
    expected = {"a": 0.8 * s["a"] + 0.2 * now["a"], "b": now["b"], "c": 0.8 * s["c"] + 0.2 * now["c"]}
    assert selection.strengths(after) == pytest.approx(expected)
    assert (after["a"].distance, after["b"].strength) == (0.1, None)


@given(shares, st.integers(1, 6))
def test_probabilities_are_proportional_as_far_as_they_can_be_and_sum_to_the_sites_of_a_round(
    values: list[float], count: int
) -> None:
    count = min(count, len(values) - 1)
    found = inclusion({str(n): v for n, v in enumerate(values)}, count)
    assert sum(found.values()) == pytest.approx(count)
    assert all(0 < p <= 1 for p in found.values())
    ratios = [found[str(n)] / v for n, v in enumerate(values) if found[str(n)] < 1]
    assert ratios == pytest.approx([max(ratios, default=0.0)] * len(ratios))
    assert all(v * max(ratios, default=0.0) >= 1 - 1e-9 for n, v in enumerate(values) if found[str(n)] == 1)


@pytest.mark.parametrize(("values", "count"), [([0.5, 0.2, 0.2, 0.1], 2), ([0.7, 0.1, 0.1, 0.1], 3), ([0.6, 0.4], 1)])
def test_every_site_is_drawn_as_often_as_its_probability_says(values: Sequence[float], count: int) -> None:
    wanted, rng, times = inclusion({str(n): v for n, v in enumerate(values)}, count), Random(3), 4000
    drawn = [systematic(wanted, count, rng) for _ in range(times)]
    assert all(len(set(one)) == count for one in drawn)
    for site, p in wanted.items():
        found = fmean(site in one for one in drawn)
        assert abs(found - p) <= 4 * sqrt(p * (1 - p) / times) + 1e-12


def test_twice_the_loss_or_odd_labels_are_drawn_more_often() -> None:
    history: dict[str, Past] = {s: Past(1, 3, 0.4, 5, 0.1, None) for s in "abcd"}
    for odd in (replace(history["a"], loss=0.8), replace(history["a"], distance=0.2)):
        selection = Heterogeneity("abcd", 2, 0.5, 0.1, 0.9)
        drawn = [selection(2, {**history, "a": odd}, Random(seed)) for seed in range(1000)]
        chance = 0.9 * (0.5 * 2 / 5 + 0.5 / 4) + 0.1 / 4
        assert fmean("a" in one for one in drawn) == pytest.approx(2 * chance, abs=0.06)
        assert fmean("b" in one for one in drawn) == pytest.approx(2 * (1 - chance) / 3, abs=0.06)


def test_sites_alike_are_drawn_as_uniform_sampling_draws_them() -> None:
    history = {site: Past(4, 3, 0.3, 5, 0.7, 0.1 + 0.2) for site in "abcd"}
    for seed in range(20):
        found = Heterogeneity(list("abcd"), 2, 0.3, 0.1, 0.9)(5, history, Random(seed))
        assert list(found) == Random(seed).sample(list("abcd"), 2)


@pytest.mark.slow
def test_with_chance_1_it_is_uniform_sampling_bit_for_bit(tmp_path: Path) -> None:
    schedule = {"fraction": 0.6, "dropout": 0.3}
    plain = simulate("fedavg", tmp_path / "plain", rounds=4, schedule=schedule)
    found = simulate("fedavg", tmp_path / "own", rounds=4, schedule={**schedule, **BY_LABELS, "select_chance": 1.0})
    assert trained(found) == trained(plain)
    assert_same(State(found.server.tensors), plain.server)


# ---------------------------------------------------------------------------------------------- a step that is right


class Told(Heterogeneity):
    """Asks the sites that it is told to."""

    wanted: Sequence[str] = ()

    def __call__(self, round: int, history: History, random: Random) -> dict[str, float]:
        return dict.fromkeys(self.wanted, 1.0)


@pytest.mark.parametrize("asked", [1, 2])
def test_the_mean_of_all_draws_is_the_step_along_all_sites(asked: int, tmp_path: Path) -> None:
    """By enumeration: what each draw leads to, times its probability."""

    def drawing(wanted: Sequence[str], sure: float = 0.5) -> Any:
        def change(federation: Federation) -> None:
            federation.select = Told(federation.sites, asked, 0.5, sure, 0.9)
            object.__setattr__(federation.select, "wanted", wanted)

        return change

    schedule = {**BY_LABELS, "fraction": asked / 3, "select_chance": 0.5, "select_unbiased": True}
    start = model_of(simulate("fedavg", tmp_path / "none", rounds=1, schedule={"server_lr": 1e-30}))
    everybody = model_of(simulate("fedavg", tmp_path / "all", rounds=1)) - start
    expected, plain, sites = torch.zeros_like(start), torch.zeros_like(start), ("s0", "s1", "s2")
    chances: Mapping[str, float] = {}
    for left in sites:
        wanted = [left] if asked == 1 else [site for site in sites if site != left]
        outcome = simulate("fedavg", tmp_path / left, rounds=1, schedule=schedule, before=drawing(wanted))
        first = {s: replace(p, loss=None, strength=None) for s, p in history_of(outcome.server).items()}
        chances = Heterogeneity(sites, asked, 0.5, 0.5, 0.9).probabilities(first)
        probability = chances[left] if asked == 1 else 1 - chances[left]
        expected += probability * (model_of(outcome) - start)
        usual = simulate("fedavg", tmp_path / f"{left} plain", rounds=1, before=drawing(wanted))
        plain += probability * (model_of(usual) - start)
    assert max(chances.values()) - min(chances.values()) > 0.05  # there is something to make up for
    assert torch.allclose(expected, everybody, rtol=0, atol=1e-6)
    assert (plain - everybody).norm() > 100 * (expected - everybody).norm()


# ------------------------------------------------------------------------------------------------------- a whole run


def test_all_that_leaves_a_site_is_one_histogram_per_region_and_nothing_where_labels_play_no_part(
    tmp_path: Path,
) -> None:
    outcome = simulate("fedavg", tmp_path / "labels", rounds=1, schedule=BY_LABELS)
    left = [row for row in outcome.observer.rows("audit") if row["task"] == "introduce" and row["group"] == LABELS]
    assert [(row["site"], row["numbers"]) for row in left] == [(site, 2 * BINS) for site in ("s0", "s1", "s2")]
    assert LABELS not in outcome.server.tensors
    none = simulate("fedavg", tmp_path / "none", rounds=1, schedule={**BY_LABELS, "select_labels": 0.0})
    assert not [row for row in none.observer.rows("audit") if row["group"] == LABELS]


def test_one_site_is_nothing_to_choose_from_and_hidden_sites_tell_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all 1 sites"):
        check_cohort(Schedule(selection="heterogeneity", fraction=0.1), (), 1)
    chain = transforms(mechanism="sparse", epsilon_round=1.0, max_epsilon=9.0, clip=0.01)
    with pytest.raises(ValueError, match=r"sparse does not allow; take federation\.selection=uniform"):
        simulate("fedavg", tmp_path, schedule=BY_LABELS, transforms=chain)


@pytest.mark.parametrize("name", ["fedce", "fedamp", "scaffold", "feddyn"])
def test_weights_by_chances_are_refused_beside_a_methods_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take federation\.select_unbiased=false"):
        simulate(name, tmp_path, schedule={**BY_LABELS, "select_unbiased": True})
