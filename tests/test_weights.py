"""FedCost, q-FFL and GA: weights written down anew, and what they reduce to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.fedcost import by_dice, mixed
from fedseg.algorithms.ga import adjusted
from fedseg.algorithms.recipe import Training
from fedseg.federation.client import turn
from fedseg.federation.contract import LOSS, Cohort, TrainTask
from fedseg.federation.state import Mean, State, Update
from tests.lines import LineSite, close, federate_lines, golden, lines, slope
from tests.world import CPU, ToySite, assert_same_shared, build, evaluate, simulate, toy_sites, training_of

LR, STEPS = 0.05, 4
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)
ADAM = Training(optimizer="adam", lr=1e-2)


def world(examples: tuple[int, ...] = (10, 20, 40)) -> tuple[dict[str, LineSite], Tensor]:
    data = golden("scaffold_s82")
    return lines(data, [STEPS] * len(data["A"]), examples), data["x"][0]


def loss_of(site: LineSite, w: Tensor) -> Tensor:
    return 0.5 * (site.rows @ w - site.targets).pow(2).mean()


def trained(site: LineSite, w: Tensor) -> tuple[Tensor, float]:
    """The site's model after a round from w, and its mean loss."""
    losses = []
    for _ in range(STEPS):
        losses.append(float(loss_of(site, w)))
        w = w - LR * slope(site, w)
    return w, sum(losses) / STEPS


# ------------------------------------------------------------------------------------------------------ FedCost


@pytest.mark.slow
@pytest.mark.parametrize(("cost", "knobs"), [("ratio", {"images": 0.3}), ("pid", {})])
def test_rounds_by_loss_are_the_papers(cost: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    sites, start = world()
    w, past = start, {name: [] for name in sites}  # type: dict[str, list[float]]
    images = {name: site.examples / 70 for name, site in sites.items()}
    for server, _ in federate_lines("fedcost", tmp_path, sites, start, SGD, 7, cost=cost, **knobs):
        ends = {}
        for name, site in sites.items():
            ends[name], loss = trained(site, w)
            past[name].append(loss)
        before = {name: losses[-2] if len(losses) > 1 else losses[-1] for name, losses in past.items()}
        if cost == "ratio":
            ratios = {name: before[name] / past[name][-1] for name in sites}
            share = {name: 0.3 * images[name] + 0.7 * ratios[name] / sum(ratios.values()) for name in sites}
        else:
            falls = {name: max(0.0, before[name] - past[name][-1]) for name in sites}
            lasts = {name: sum(past[name][-5:]) for name in sites}
            fell = sum(falls.values()) or 1.0
            share = {
                name: 0.45 * images[name] + 0.45 * falls[name] / fell + 0.1 * lasts[name] / sum(lasts.values())
                for name in sites
            }
        w = sum((share[name] * ends[name] for name in sites), torch.zeros_like(w)) / sum(share.values())
        torch.testing.assert_close(server["model"]["w"], w, rtol=1e-6, atol=1e-9)  # losses travel in single precision


def test_what_the_chosen_cost_does_not_read_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"algorithm\.power has no effect with algorithm\.cost=pid; take algorithm\.cost="
    ):
        build("fedcost", cost="pid", power=2.0)
    with pytest.raises(ValueError, match=r"or leave algorithm\.images at 0\.5"):
        build("fedcost", images=0.2)
    build("fedcost", cost="ratio", images=0.2)


def test_by_images_alone_it_is_fedavg(tmp_path: Path) -> None:
    sites, start = world()
    ours = federate_lines("fedcost", tmp_path / "a", sites, start, SGD, 2, cost="ratio", images=1.0)
    theirs = federate_lines("fedavg", tmp_path / "b", sites, start, SGD, 2)
    close(ours[-1][0]["model"]["w"], theirs[-1][0]["model"]["w"])


@pytest.mark.slow
def test_of_power_zero_it_is_fedavg_of_equal_sites_bit_for_bit(tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "b", weighting="uniform").server
    assert_same_shared(simulate("fedcost", tmp_path / "a", power=0.0).server, fedavg)


def update(site: str, **scalars: float) -> Update:
    return Update(scalars=scalars, site=site, examples=5)


def test_scores_weigh_linearly_or_by_a_power_and_the_median_stands_in() -> None:
    told = [update("a", **{"validation/dice": 0.8}), update("b", **{"validation/dice": 0.2}), update("c")]
    assert by_dice(told, 1.0) == pytest.approx({"a": 0.8, "b": 0.2, "c": 0.5})
    assert by_dice(told, 2.0) == pytest.approx({"a": 0.64, "b": 0.04, "c": 0.25})
    assert by_dice([update("a"), update("b")], 1.0) == {"a": 1.0, "b": 1.0}
    nothing = [update(name, **{"validation/dice": 0.0}) for name in "ab"]
    assert by_dice(nothing, 1.0) == {"a": 1.0, "b": 1.0}


def test_a_part_that_is_nothing_is_left_out() -> None:
    assert mixed((0.5, {"a": 1.0, "b": 3.0}), (0.5, {"a": 0.0, "b": 0.0})) == pytest.approx({"a": 0.125, "b": 0.375})


def test_the_score_that_travels_is_the_trained_models_on_validation_images() -> None:
    worker, site = build("fedcost"), toy_sites()["s1"]
    message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
    answer, _ = turn(worker, site, TrainTask(1, 7, steps=5), message, State(), CPU, evaluate)
    assert answer.scalars["validation/dice"] == worker.mean_dice(worker.model, site.eval_batches("val"))
    assert worker.mean_dice(worker.model, []) is None


# ------------------------------------------------------------------------------------------------------ q-FFL


@pytest.mark.parametrize("q", [0.5, 2.0])
def test_q_ffls_rounds_are_the_papers(q: float, tmp_path: Path) -> None:
    sites, start = world((10, 10, 10))
    w, bound = start, 1 / LR
    for server, _ in federate_lines("qffl", tmp_path, sites, start, SGD, 3, q=q):
        steps, sizes = torch.zeros_like(w), 0.0
        for site in sites.values():
            loss, gone = float(loss_of(site, w)), bound * (w - trained(site, w)[0])
            steps = steps + loss**q * gone
            sizes += q * loss ** (q - 1) * float(gone.pow(2).sum()) + bound * loss**q
        w = w - steps / sizes
        torch.testing.assert_close(server["model"]["w"], w, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_q_ffl_of_strength_zero_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    ours = simulate("qffl", tmp_path / "a", training=ADAM, q=0.0)
    assert_same_shared(ours.server, simulate("fedavg", tmp_path / "b", training=ADAM).server)


def test_q_ffl_refuses_a_bound_of_another_optimiser_than_plain_sgd() -> None:
    with pytest.raises(
        ValueError, match=r"take training\.optimizer=sgd, not adam, or algorithm\.lipschitz=100\.0 \(in an older"
    ):
        build("qffl", ADAM)
    assert build("qffl", ADAM, lipschitz=3.0).lipschitz == 3.0
    with pytest.raises(ValueError, match=r"take training\.schedule=constant and training\.warmup=0, not cosine and 0"):
        build("qffl", training_of("qffl", schedule="cosine"))
    build("qffl", training_of("qffl", schedule="cosine"), lipschitz=3.0)


@pytest.mark.slow
def test_a_site_on_which_the_model_is_bad_has_more_say_with_a_larger_q(tmp_path: Path) -> None:
    sites, start = world((10, 10, 10))
    sites["s0"] = replace(sites["s0"], targets=sites["s0"].targets + 3)
    reached = []
    for q in (0.0, 1.0, 4.0):
        server = federate_lines("qffl", tmp_path / str(q), sites, start, SGD, 40, q=q)[-1][0]
        reached.append(float(loss_of(sites["s0"], server["model"]["w"])))
    assert reached[0] > reached[1] > reached[2]


def test_measuring_the_received_model_changes_nothing_of_it(tmp_path: Path) -> None:
    """Running statistics included; the first local fit is FedAvg's."""
    kept = []
    for name in ("qffl", "fedavg"):
        worker = build(name, training_of("qffl"))
        message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
        kept.append(turn(worker, toy_sites()["s1"], TrainTask(1, 7, steps=3), message, State(), CPU, evaluate)[0])
    assert_same_shared(*kept)


# ------------------------------------------------------------------------------------------------------ GA


def test_weights_move_to_the_sites_that_lose_most() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    moved = adjusted(shares, {"a": -0.1, "b": 0.0, "c": 0.2}, 0.3)
    raw = {"a": 0.5 - 0.05, "b": 0.3, "c": 0.2 + 0.1}
    assert moved == pytest.approx({site: share / sum(raw.values()) for site, share in raw.items()})
    assert adjusted(shares, {}, 0.3) == adjusted(shares, {"a": 0.0}, 0.3) == adjusted(shares, {"a": 1.0}, 0.0) == shares
    assert adjusted({"a": 0.01, "b": 0.99}, {"a": -1.0, "b": 1.0}, 1.0) == pytest.approx({"a": 0.0, "b": 1.0})
    assert sum(adjusted({"a": 0.2, "b": 0.2}, {"a": 1.0}, 0.2).values()) == pytest.approx(0.4)


def test_gas_step_falls_over_the_runs_rounds() -> None:
    assert build("ga", rounds=12).step_rounds == 12
    assert build("ga", rounds=12, step_rounds=3).step_rounds == 3


def test_a_gap_is_what_the_sites_last_model_had_over_the_received_one(tmp_path: Path) -> None:
    first = simulate("ga", tmp_path / "a", 1)
    assert not any("gap" in row for row in first.server.scalars)
    own = float(first.kept["s1"]["own"]["last_dice"])
    worker, site = build("ga"), toy_sites()["s1"]
    message = first.federation.algorithm.broadcast(first.server, "s1", TrainTask(2, 7))
    worker.receive(message, first.kept["s1"], site)
    received = worker.mean_dice(worker.model, site.eval_batches("val"))
    answer, _ = turn(build("ga"), site, TrainTask(2, 7, steps=3), message, first.kept["s1"], CPU, evaluate)
    assert received is not None
    assert answer.scalars["gap"] == pytest.approx(own - received, abs=1e-6)


class Blind(ToySite):
    """Has no validation images."""

    def input_batches(self, split: str) -> Any:
        return self.eval_batches(split)

    def eval_batches(self, split: str) -> Any:
        return () if split == "val" else super().eval_batches(split)


def test_gas_step_falls_linearly_over_its_rounds() -> None:
    """With a gap at one of two equal sites, which alone moves: by s / 2 before both are normalised."""
    method, updates = build("ga", step=0.4, step_rounds=4), [update("a", gap=0.1), update("b")]
    for past, s in ((0, 0.4), (1, 0.3), (3, 0.1), (4, 0.0), (9, 0.0)):
        asked: list[Sequence[float]] = []

        def average(weights: Sequence[float], into: list[Sequence[float]] = asked) -> tuple[State, Cohort]:
            into.append(weights)
            return State(), Cohort({}, 2, 2, 2)

        after = method.aggregate(State(scalars={"rounds": float(past)}), updates, average)
        moved = 0.5 + s / 2
        assert asked[0] == pytest.approx([moved / (moved + 0.5), 0.5 / (moved + 0.5)])
        assert after.scalars["rounds"] == past + 1


def test_without_a_gap_ga_weighs_by_size_whoever_met_whom() -> None:
    """Few sites in a round: a site's weight does not hang on whom it was first averaged with."""
    method, server, asked = build("ga", step=0.2), State(), []

    def average(weights: Sequence[float]) -> tuple[State, Cohort]:
        asked.append(list(weights))
        return State(), Cohort({}, 2, 2, 4)

    sizes = {"a": 100, "b": 10, "c": 10, "d": 10}
    for sites in ("ab", "cd", "bc", "ad"):
        server = method.aggregate(server, [Update(site=site, examples=sizes[site]) for site in sites], average)
        assert asked[-1] == pytest.approx([sizes[site] / sum(sizes[site] for site in sites) for site in sites])
    lone = State(scalars={"share/b": 0.0})
    method.aggregate(lone, [Update(site="b", examples=10)], average)
    assert asked[-1] == [1.0]


@pytest.mark.parametrize("name", ["ga", "fedcost"])
def test_a_site_without_validation_images_tells_no_score_and_has_its_say(name: str) -> None:
    method = build(name)
    server, updates = method.init_server({}), []
    for site in (Blind(**vars(toy_sites()["s0"])), toy_sites()["s1"]):
        task = TrainTask(1, 7, steps=2)
        updates.append(
            turn(build(name), site, task, method.broadcast(server, site.name, task), State(), CPU, evaluate)[0]
        )
    assert not {"gap", "validation/dice"} & updates[0].scalars.keys()
    asked: list[list[float]] = []

    def average(weights: Sequence[float]) -> tuple[State, Cohort]:
        asked.append(list(weights))
        mean = Mean()
        for update, weight in zip(updates, weights, strict=True):
            mean.add(update, weight)
        return mean.result(), Cohort({}, 2, 2, 2)

    assert not method.aggregate(server, updates, average).non_finite()
    assert min(asked[0]) > 0


@pytest.mark.slow
def test_ga_without_a_step_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    assert_same_shared(simulate("ga", tmp_path / "a", 3, step=0.0).server, simulate("fedavg", tmp_path / "b", 3).server)


@pytest.mark.slow
def test_ga_weighs_as_fedavg_first_and_otherwise_later(tmp_path: Path) -> None:
    for rounds, same in ((1, True), (3, False)):
        ours = simulate("ga", tmp_path / f"a{rounds}", rounds, step=1.0).server["model"]
        theirs = simulate("fedavg", tmp_path / f"b{rounds}", rounds).server["model"]
        near = all(torch.allclose(t, theirs[name], atol=1e-6) for name, t in ours.items())
        assert near == same


@pytest.mark.slow
def test_losses_are_remembered_for_five_rounds(tmp_path: Path) -> None:
    sites, start = world()
    server = federate_lines("fedcost", tmp_path, sites, start, SGD, 7, cost="pid")[-1][0]
    assert sorted(name for name in server.scalars if name.endswith("/s0")) == [f"cost/{k}/s0" for k in range(1, 5)]
    assert LOSS == "loss"
