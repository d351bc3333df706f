"""Robust rules: the published formulas, and what hostile sites can do through the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import trim_mean

from fedseg.federation.combine import Combination, RobustMean, Rule, bounds, geometric_median_weights, krum
from fedseg.federation.contract import Task, Transform
from fedseg.federation.schedule import Schedule, without_effect
from fedseg.federation.state import Mean, State, Update
from fedseg.federation.transport import InProcess
from tests.tiers import every
from tests.world import assert_same, build, simulate, toy_sites

RULES = [rule for rule in get_args(Rule) if rule != "mean"]
SEVEN = {"sites": toy_sites(7)}


def update(site: str, row: list[float], examples: int = 1) -> Update:
    return Update(
        {"model": {"w": torch.tensor(row)}, "buffers": {"v": torch.tensor(row[:1])}, "head": {"h": torch.tensor(row)}},
        {"loss": row[0]},
        site=site,
        examples=examples,
    )


def combined(rule: Rule, rows: list[list[float]], weights: list[float] | None = None, hostile: int = 1) -> State:
    mean = RobustMean(Combination(rule, hostile), ("head",), seed=0)
    for index, row in enumerate(rows):
        mean.add(update(f"s{index}", row), 1.0 if weights is None else weights[index])
    return mean.result()


ROWS = [[1.0, 2.0], [2.0, 4.0], [3.0, 0.0], [2.5, 1.0], [100.0, -50.0]]


def test_median_and_trimmed_mean_go_coordinate_by_coordinate() -> None:
    table = torch.tensor(ROWS)
    assert combined("median", ROWS)["model"]["w"].tolist() == [2.5, 1.0]
    assert combined("median", ROWS[:4])["model"]["w"].tolist() == [2.25, 1.5]  # the middle two
    found = combined("trimmed_mean", ROWS)["model"]["w"]
    torch.testing.assert_close(found.double(), torch.from_numpy(trim_mean(table.double().numpy(), 0.2)))
    assert combined("median", ROWS)["buffers"]["v"].tolist() == [2.5]


def test_norm_bound_brings_updates_to_the_median_norm() -> None:
    rows = [torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]), torch.tensor([0.0, 30.0])]
    assert bounds(rows) == [1.0, 1.0, pytest.approx(1 / 3)]
    found = combined("norm_bound", [row.tolist() for row in rows], weights=[1.0, 1.0, 2.0])
    expected = (rows[0] + rows[1] + 2 * rows[2] / 3) / 4
    torch.testing.assert_close(found["model"]["w"], expected)


def brute_krum(rows: list[list[float]], hostile: int) -> list[int]:
    table = torch.tensor(rows, dtype=torch.float64)
    count = len(rows) - hostile - 2
    scores = []
    for i in range(len(rows)):
        others = [float((table[i] - table[j]).square().sum()) for j in range(len(rows)) if j != i]
        scores.append(min(sum(chosen) for chosen in combinations(others, count)))
    return sorted(range(len(rows)), key=lambda i: scores[i])


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=5, max_size=7, unique_by=tuple))
@settings(max_examples=40, deadline=None)
def test_krum_is_the_published_score(rows: list[list[float]]) -> None:
    table = torch.tensor(rows, dtype=torch.float64)
    squared = torch.cdist(table, table).square()
    scores = [float(squared[i].sort().values[1 : len(rows) - 2].sum()) for i in range(len(rows))]
    best = brute_krum(rows, 1)[0]
    (found,) = krum(list(table), 1, 1)
    assert scores[found] == pytest.approx(scores[best], rel=1e-9, abs=1e-12)
    assert len(krum(list(table), 1)) == len(rows) - 1


def test_krum_takes_one_update_and_multi_krum_the_mean_of_all_but_the_hostile() -> None:
    best, *rest = brute_krum(ROWS, 1)
    assert combined("krum", ROWS)["model"]["w"].tolist() == ROWS[best]
    kept = torch.tensor([ROWS[i] for i in [best, *rest[:-1]]])
    torch.testing.assert_close(combined("multi_krum", ROWS)["model"]["w"], kept.mean(dim=0))


def test_the_geometric_median_is_where_the_sum_of_distances_is_least() -> None:
    table, weights = torch.tensor(ROWS, dtype=torch.float64), [0.1, 0.3, 0.2, 0.2, 0.2]

    def objective(point: Any) -> float:
        return float((torch.tensor(weights) * (table - torch.as_tensor(point)).norm(dim=1)).sum())

    found = torch.tensor(geometric_median_weights(list(table), weights), dtype=torch.float64) @ table
    best = minimize(objective, found.numpy() + 0.1, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12})
    assert objective(found) == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_are_their_own_combination_and_scalars_and_filed_groups_are_the_means(rule: Rule) -> None:
    rows = [[1.5, -2.0]] * 5
    found, plain = combined(rule, rows, weights=[1.0, 2.0, 3.0, 4.0, 5.0]), Mean(("head",))
    torch.testing.assert_close(found["model"]["w"], torch.tensor(rows[0]))
    for index, row in enumerate(rows):
        plain.add(update(f"s{index}", row), index + 1.0)
    assert found.scalars == plain.result().scalars
    assert {group for group in found.tensors if group.startswith("head/")} == {f"head/s{i}" for i in range(5)}


@pytest.mark.parametrize("rule", RULES)
def test_a_site_without_images_has_no_say(rule: Rule) -> None:
    rows = [[1.0, 2.0], [2.0, 4.0], [3.0, 0.0], [2.5, 1.0], [2.0, 2.0]]
    with_idle = combined(rule, [*rows, [99.0, 99.0]], weights=[1.0] * 5 + [0.0])
    torch.testing.assert_close(with_idle["model"]["w"], combined(rule, rows)["model"]["w"])


class Hostile(InProcess):
    """The last site's update is a million times what it learnt, the wrong way round."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for answer in super().ask(tasks, messages):
            if answer.site == "s6" and "model" in answer.tensors:
                bad = {name: -1e6 * tensor for name, tensor in answer["model"].items()}
                answer = replace(answer, tensors={**answer.tensors, "model": bad})
            yield answer


@pytest.mark.parametrize("rule", RULES)
def test_one_hostile_site_does_not_move_the_model_far_and_is_named(rule: Rule, tmp_path: Path) -> None:
    honest = simulate("fedavg", tmp_path / "honest", rounds=1, **SEVEN)
    start = build("fedavg", rounds=1).init_server({})
    robust = simulate(
        "fedavg", tmp_path / "robust", rounds=1, transport=Hostile, schedule={"combine": rule, "hostile": 1}, **SEVEN
    )
    moved = max(float((robust.server["model"][n] - t).abs().max()) for n, t in honest.server["model"].items())
    usual = max(float((start["model"][n] - t).abs().max()) for n, t in honest.server["model"].items())
    assert moved < 10 * usual
    named = [event for event in robust.observer.rows("events") if event["event"] == "far"]
    assert [event["site"] for event in named] == ["s6"]
    assert "times as far from the combined one" in named[0]["detail"]


def test_without_a_rule_one_hostile_site_takes_the_model(tmp_path: Path) -> None:
    taken = simulate("fedavg", tmp_path / "a", rounds=1, transport=Hostile, **SEVEN)
    assert max(float(t.abs().max()) for t in taken.server["model"].values()) > 1e3


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", every(["local", "fedbn", "feddg", "contrastive"], ["fedbn"]))
def test_rules_serve_methods_of_every_kind_and_resume(name: str, rule: Rule, tmp_path: Path) -> None:
    knobs = {"schedule": {"combine": rule}, "sites": toy_sites(5)}
    whole = simulate(name, tmp_path / "whole", rounds=2, **knobs)
    simulate(name, tmp_path / "parts", rounds=1, **knobs)
    assert_same(whole.server, simulate(name, tmp_path / "parts", rounds=2, **knobs).server)


class Sums(Transform):
    name = "sums"
    hides_updates = True


def test_a_rule_and_a_transform_that_shows_sums_only_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"combine=median compares single updates, which sums does not allow"):
        simulate("fedavg", tmp_path, transforms=[Sums()], schedule={"combine": "median"})


@pytest.mark.parametrize(("rule", "needed"), [("krum", 5), ("multi_krum", 5), ("trimmed_mean", 3)])
def test_a_rule_that_needs_more_sites_is_refused_before_anything_runs(rule: Rule, needed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"combine={rule} with federation.hostile=1 needs {needed} sites in a round"):
        simulate("fedavg", tmp_path, sites=toy_sites(2), schedule={"combine": rule})


@pytest.mark.parametrize("rule", ["mean", "norm_bound", "median", "geometric_median"])
def test_how_many_are_hostile_is_said_where_no_rule_reads_it_and_by_yardsticks_once(rule: Rule) -> None:
    method, said = build("fedavg"), f"federation.hostile=2 with federation.combine={rule}"
    assert without_effect(Schedule(hostile=2, combine=rule), method) == [said]
    for schedule in (Schedule(hostile=2, combine="trimmed_mean"), Schedule(hostile=1, combine=rule)):
        assert without_effect(schedule, method) == []
    for name in ("local", "pooled"):
        (told,) = (t for t in without_effect(Schedule(hostile=2, combine=rule), build(name)) if "hostile" in t)
        assert told.startswith("federation.hostile=2 on ")


def test_a_round_in_which_too_few_sites_are_present_is_skipped(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=3, schedule={"combine": "krum", "dropout": 0.5}, sites=toy_sites(5))
    skipped = [event["detail"] for event in outcome.observer.rows("events") if event["event"] == "skipped"]
    assert skipped
    assert all(detail.endswith("5 needed") for detail in skipped)
