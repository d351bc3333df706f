"""pFedMe, Per-FedAvg, two heads and FedAMP: rounds written down anew, and what they reduce to."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fedamp import likeness
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.algorithms.repeated import Paired, Repeated
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, Scored, TrainTask
from fedseg.federation.state import State
from tests.lines import Line, LineSite, close, federate_lines, golden, lines, slope, squares
from tests.world import CPU, assert_same, assert_same_shared, build, evaluate, simulate, toy_sites

LR, STEPS = 0.05, 6
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)


def world() -> tuple[dict[str, LineSite], Tensor]:
    data = golden("scaffold_s82")
    return lines(data, [STEPS] * len(data["A"]), [10] * len(data["A"])), data["x"][0]


# ------------------------------------------------------------------------------------------------------ pFedMe


@pytest.mark.slow
def test_pfedmes_rounds_are_the_papers(tmp_path: Path) -> None:
    sites, start = world()
    lam, inner, outer = 3.0, 2, 0.4
    rounds = federate_lines("pfedme", tmp_path, sites, start, SGD, 3, lam=lam, inner_steps=inner, outer=outer)
    w = start
    for server, kept in rounds:
        ends = []
        for name, site in sites.items():
            theta, local = w.clone(), w.clone()
            for _ in range(STEPS // inner):
                for _ in range(inner):
                    theta = theta - LR * (slope(site, theta) + lam * (theta - local))
                local = local - outer * (local - theta)
            close(kept[name]["own"]["twin.w"], theta)
            ends.append(local)
        w = torch.stack(ends).mean(dim=0)
        close(server["model"]["w"], w)


def test_pfedme_that_goes_all_the_way_after_all_steps_is_fedprox_bit_for_bit(tmp_path: Path) -> None:
    sites, start = world()
    knobs: dict[str, Any] = {"lam": 0.7, "inner_steps": STEPS, "outer": 1.0}
    pfedme = federate_lines("pfedme", tmp_path / "a", sites, start, SGD, 2, **knobs)
    fedprox = federate_lines("fedprox", tmp_path / "b", sites, start, SGD, 2, mu=0.7)
    for (ours, _), (theirs, _) in zip(pfedme, fedprox, strict=True):
        assert_same(ours, theirs)


def test_batches_come_again_or_in_pairs() -> None:
    batches = [{"image": number} for number in range(4)]
    assert [b["image"] for b in Repeated(batches, 2, 7)] == [0, 0, 1, 1, 2, 2, 3]
    pairs = Paired(batches, "second", 2)
    assert [(b["image"], b["second"]["image"]) for b in pairs] == [(0, 1), (2, 3)]
    assert len(pairs) == 2
    assert len(list(pairs)) == len(list(pairs)) == 2


# ------------------------------------------------------------------------------------------------------ Per-FedAvg


def test_per_fedavgs_rounds_are_the_papers(tmp_path: Path) -> None:
    sites, start = world()
    w = start
    for server, _ in federate_lines("perfedavg", tmp_path, sites, start, SGD, 3, alpha=0.3):
        ends = []
        for site in sites.values():
            local = w.clone()
            for _ in range(STEPS):
                local = local - LR * slope(site, local - 0.3 * slope(site, local))
            ends.append(local)
        w = torch.stack(ends).mean(dim=0)
        close(server["model"]["w"], w)


def test_the_second_gradient_of_per_fedavg_is_another_batchs() -> None:
    worker = build("perfedavg", Training(optimizer="sgd", lr=0.1), alpha=0.5)
    site = toy_sites()["s2"]
    first, second = site.train_batches(3, 2)
    other = deepcopy(worker.model)
    learning = list(other.parameters())
    gradients = torch.autograd.grad(worker.criterion(other, first), learning)
    before = [p.detach().clone() for p in learning]
    with torch.no_grad():
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.sub_(0.5 * gradient)
    there = torch.autograd.grad(worker.criterion(other, second), learning)
    worker.receive(worker.broadcast(worker.init_server({}), "s2", TrainTask(1, 7)), State(), site)
    CPU.fit(worker, worker.batches(site, 3, 1))
    for parameter, start, gradient in zip(worker.model.parameters(), before, there, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_the_personal_model_of_per_fedavg_is_plain_steps_away() -> None:
    sites, start = world()
    recipe = Recipe(Training(channels_last=False), "sigmoid", nn.Identity(), squares)
    worker = ALGORITHMS["perfedavg"](Line(start), recipe, alpha=0.3, finetune_steps=2).double()
    site = sites["s1"]
    task = EvaluateTask(1, 7, personalise=True)
    turn(worker, site, task, State({"model": {"w": start}}), State(), CPU, lambda *_: Scored())
    expected = start
    for _ in range(2):
        expected = expected - 0.3 * slope(site, expected)
    close(worker.network("personal").get_parameter("w"), expected)
    close(worker.network("global").get_parameter("w").detach(), start)


@pytest.mark.slow
def test_per_fedavg_without_a_step_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    assert_same_shared(
        simulate("perfedavg", tmp_path / "a", alpha=0.0).server, simulate("fedavg", tmp_path / "b").server
    )


# ------------------------------------------------------------------------------------------------------ two heads


def test_the_shared_model_of_two_heads_is_fedavgs_bit_for_bit(tmp_path: Path) -> None:
    outcome = simulate("fedrod", tmp_path / "a")
    assert_same_shared(outcome.server, simulate("fedavg", tmp_path / "b").server)
    assert {row["group"] for row in outcome.observer.rows("traffic")} == {"model", "buffers"}


def test_the_second_head_adds_to_the_first_and_begins_with_nothing(tmp_path: Path) -> None:
    worker, images = build("fedrod"), toy_sites()["s1"].images
    assert torch.equal(worker.predict(images, "personal"), worker.predict(images, "global"))
    outcome = simulate("fedrod", tmp_path)
    worker.receive(outcome.federation.algorithm.broadcast(outcome.server, "s1", EvaluateTask(2, 7)),
                   outcome.kept["s1"], toy_sites()["s1"])  # fmt: skip
    worker.eval()
    found = []
    with worker.model.get_submodule("segmentation_head").register_forward_pre_hook(lambda _, x: found.append(x[0])):
        shared = worker.model(worker.normalize(images))
    both = torch.sigmoid(shared + worker.head(found[0]))
    torch.testing.assert_close(worker.predict(images, "personal"), both.detach())
    assert (both - torch.sigmoid(shared)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ FedAMP


def test_fedamps_rounds_are_the_papers(tmp_path: Path) -> None:
    sites, start = world()
    lam, share, sigma = 0.5, 0.6, 2.0
    own = {name: start.clone() for name in sites}
    pulled = dict(own)
    for server, kept in federate_lines("fedamp", tmp_path, sites, start, SGD, 3, lam=lam, share=share, sigma=sigma):
        for name, site in sites.items():
            for _ in range(STEPS):
                own[name] = own[name] - LR * (slope(site, own[name]) + lam * (own[name] - pulled[name]))
            close(kept[name]["own"]["own.w"], own[name])
        for name in sites:
            others = [other for other in sites if other != name]
            xi = [share / len(others) * torch.exp(-(own[name] - own[o]).pow(2).sum() / sigma) for o in others]
            pulled[name] = (1 - sum(xi)) * own[name] + sum(x * own[o] for x, o in zip(xi, others, strict=True))
            close(server[f"reply/{name}"]["w"], pulled[name])
        close(server["model"]["w"], torch.stack([own[name] for name in sites]).mean(dim=0))


def test_fedamp_without_a_pull_is_local_training_bit_for_bit(tmp_path: Path) -> None:
    fedamp, local = simulate("fedamp", tmp_path / "a", lam=0.0), simulate("local", tmp_path / "b")
    for site in local.kept:
        own = {k.removeprefix("own."): t for k, t in fedamp.kept[site]["own"].items()}
        assert_same(State({"model": own}), State({"model": local.kept[site]["model"]}))


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_sites_weigh_by_their_likeness(sigma: float | None) -> None:
    models = [{"w": torch.tensor([place, 0.0])} for place in (0.0, 0.1, 3.0)]
    rows = likeness(models, 0.8, sigma)
    for index, row in enumerate(rows):
        assert sum(row) == pytest.approx(1)
        assert row[index] >= 0.2 - 1e-9
    assert rows[0][1] > rows[0][2] > 0
    assert rows[0][1] == pytest.approx(rows[1][0])
    assert likeness(models, 0.0, sigma) == [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    assert likeness(models[:1], 0.8, sigma) == [[1.0]]
    assert likeness([models[0]] * 3, 0.6, None)[0] == pytest.approx([0.4, 0.3, 0.3])


def test_seen_sites_score_the_mean_as_global_and_their_own_as_personal(tmp_path: Path) -> None:
    outcome = simulate("fedamp", tmp_path)
    method = outcome.federation.algorithm
    assert method.broadcast(outcome.server, "s1", EvaluateTask(2, 7))["model"] is outcome.server["model"]
    replies = [method.broadcast(outcome.server, site, TrainTask(3, 7))["model"] for site in ("s0", "s1", "s2")]
    assert len({float(reply["segmentation_head.0.weight"].sum()) for reply in replies}) == 3
    worker = build("fedamp")
    update, _ = turn(worker, toy_sites()["s1"], EvaluateTask(2, 7, splits=("val",)),
                     method.broadcast(outcome.server, "s1", EvaluateTask(2, 7)), outcome.kept["s1"],
                     CPU, evaluate)  # fmt: skip
    assert update.scalars["val/global/dice"] != update.scalars["val/personal/dice"]
