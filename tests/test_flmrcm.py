"""FL-MRCM: its losses against reference arrays, its steps against the formula, what is shown of a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedseg.algorithms.flmrcm import FEATURES, discriminator, domain_loss, pooled_features
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.state import State
from fedseg.models.volumes import create_monai_model
from tests.lines import golden
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites

SGD = Training(optimizer="sgd", lr=0.05)


def test_discriminator_and_losses_are_the_references() -> None:
    data = golden("flmrcm_adv_s91")
    judge = discriminator(data["z_source"].shape[1]).double()
    names = {"0.weight": "fc1_w", "0.bias": "fc1_b", "2.weight": "fc2_w", "2.bias": "fc2_b"}
    judge.load_state_dict({name: data[key] for name, key in names.items()})
    own, others = judge(data["z_source"]), judge(data["z_target"])
    torch.testing.assert_close(own, data["logits_source"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(others, data["logits_target"], rtol=1e-12, atol=1e-12)
    for fooled, key in ((True, "loss_generator"), (False, "loss_discriminator")):
        torch.testing.assert_close(domain_loss(own, others, fooled=fooled), data[key], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [Training(lr=1e-2), SGD], ids=["adam", "sgd"])
def test_without_its_loss_it_is_fedavg_bit_for_bit_and_shows_nothing(training: Training, tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", training=training)
    assert_same(simulate("flmrcm", tmp_path / "b", training=training, adversarial=0.0).server, fedavg.server)
    assert build("flmrcm", adversarial=0.0).per_site == frozenset()
    aligned = simulate("flmrcm", tmp_path / "c", training=training, adversarial=5.0)
    assert any(not torch.equal(t, fedavg.server["model"][k]) for k, t in aligned.server["model"].items())


def test_sites_see_the_features_of_the_others_of_the_round_before_and_never_their_own(tmp_path: Path) -> None:
    outcome = simulate("flmrcm", tmp_path, rounds=2, features=5)
    server, method = outcome.server, outcome.federation.algorithm
    assert {group for group in server.tensors if group.startswith(FEATURES)} == {f"{FEATURES}/s{i}" for i in range(3)}
    assert server[f"{FEATURES}/s1"]["2"].shape == (5, 4 * 2 * 2)
    train = method.broadcast(server, "s1", TrainTask(3, 7))
    assert {group for group in train.tensors if group.startswith(FEATURES)} == {f"{FEATURES}/s0", f"{FEATURES}/s2"}
    assert not any(g.startswith(FEATURES) for g in method.broadcast(server, "s1", EvaluateTask(3, 7)).tensors)
    assert all(f"{FEATURES}/{FEATURES}" not in state.tensors for state in outcome.kept.values())


def test_who_was_absent_is_not_seen_in_the_next_round(tmp_path: Path) -> None:
    outcome = simulate("flmrcm", tmp_path, rounds=2, features=5, schedule={"fraction": 0.67})
    trained = [
        {row["site"] for row in outcome.observer.rows("rounds") if row["task"] == "train" and row["round"] == round}
        for round in (1, 2)
    ]
    (absent,) = trained[0] - trained[1]

    def seen(site: str, round: int) -> set[str]:
        message = outcome.federation.algorithm.broadcast(outcome.server, site, TrainTask(round, 7))
        return {group.removeprefix(f"{FEATURES}/") for group in message.tensors if group.startswith(FEATURES)}

    assert f"{FEATURES}/{absent}" in outcome.server.tensors
    for site in ("s0", "s1", "s2"):
        assert seen(site, 3) == trained[1] - {site}
        assert seen(site, 4) == set()
        assert seen(site, 2) == {"s0", "s1", "s2"} - {site}  # within a round, as where one model travels


def test_a_second_rounds_steps_are_those_of_the_formula() -> None:
    """One optimiser at one point: the network is not moved by teaching the discriminator, nor this by being fooled."""
    weight, times, steps = 2.0, 10.0, 3
    worker, site = build("flmrcm", SGD, adversarial=weight, discriminator_lr=times), toy_sites()["s1"]
    server = worker.init_server({})
    others = torch.rand(7, 16, generator=torch.Generator().manual_seed(3))
    message = State({**worker.broadcast(server, "s1", TrainTask(2, 7)).tensors, "features/s0": {FEATURES: others}})
    update, kept = turn(worker, site, TrainTask(2, 7, steps=steps), message, State(), CPU, evaluate)

    fresh = build("flmrcm", SGD)
    network, judge, recipe = fresh.model, fresh.discriminator, Recipe.build(SGD, "sigmoid", 3)
    network.load_state_dict({**network.state_dict(), **server["model"], **server["buffers"]})
    network.train()
    for batch in site.train_batches(derive_seed(7, "batches", 2, "s1"), steps):
        logits, own = pooled_features(network, recipe.normalize(batch["image"]))
        code = torch.tensor([1.0, 0.0]).expand(len(own), 2)
        bce = nn.functional.binary_cross_entropy_with_logits
        loss = recipe.loss(logits, batch["mask"]) + weight * 0.5 * bce(judge(own), code)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        taught = bce(judge(own.detach()), 1 - code), bce(judge(others), torch.tensor([1.0, 0.0]).expand(7, 2))
        judged = torch.autograd.grad(0.5 * (taught[0] + taught[1]), list(judge.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
            for parameter, gradient in zip(judge.parameters(), judged, strict=True):
                parameter -= 0.05 * times * gradient
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(server["model"][name] + update["model"][name], parameter.detach())
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(kept["own"][f"discriminator.{name}"], parameter.detach())
    assert update[FEATURES]["2"].shape == (steps * site.batch_size, 16)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_features_are_pooled_to_two_cells_along_every_axis(dimensions: int) -> None:
    network: Any = create_monai_model(1, 1, dimensions, width=4)
    _, features = pooled_features(network, torch.zeros(2, 1, *[32] * dimensions))
    assert features.shape == (2, network.encoder.out_channels[-1] * 2**dimensions)


@pytest.mark.slow
def test_an_optimiser_that_is_kept_goes_on_at_the_site(tmp_path: Path) -> None:
    """Both groups of parameters keep their own slots and rates."""
    keep = Training(lr=1e-2, optimizer_state="keep")
    simulate("flmrcm", tmp_path / "a", rounds=1, training=keep)
    resumed = simulate("flmrcm", tmp_path / "a", rounds=3, training=keep)
    assert_same(resumed.server, simulate("flmrcm", tmp_path / "b", rounds=3, training=keep).server)
    slots = resumed.kept["s1"]["optimizer"]
    assert {name.split("/")[0] for name in slots if name.startswith("discriminator")} == {
        f"discriminator.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")
    }
