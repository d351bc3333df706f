"""MOON: its loss against reference arrays, and its steps against a loop written down anew."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedseg.algorithms.moon import model_contrast
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.client import turn
from fedseg.federation.contract import TrainTask
from fedseg.federation.state import State
from tests.lines import golden
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites

SGD = Training(optimizer="sgd", lr=0.05)


@pytest.mark.parametrize("archive", ["moon_loss_s66", "moon_loss_s67"])
def test_the_contrast_and_its_gradient_are_the_references(archive: str) -> None:
    """With one earlier model, and with three."""
    data = golden(archive)
    z = data["z"].clone().requires_grad_()
    loss = float(data["mu"]) * model_contrast(z, data["z_global"], list(data["z_prev"]), float(data["temperature"]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.grad, data["grad"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [Training(lr=1e-2), SGD], ids=["adam", "sgd"])
def test_without_contrast_it_is_fedavg_bit_for_bit(training: Training, tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", training=training)
    assert_same(simulate("moon", tmp_path / "b", training=training, mu=0.0).server, fedavg.server)
    contrasted = simulate("moon", tmp_path / "c", training=training, mu=5.0)
    assert any(not torch.equal(t, fedavg.server["model"][k]) for k, t in contrasted.server["model"].items())


def features(network: nn.Module, images: Tensor) -> Tensor:
    deepest: Tensor = network.get_submodule("encoder")(images)[-1]
    return deepest.flatten(2).mean(dim=2)


def test_a_second_rounds_steps_are_those_of_the_formula() -> None:
    worker, site, mu, steps = build("moon", SGD, mu=2.0, temperature=0.5), toy_sites()["s1"], 2.0, 3
    server = worker.init_server({})
    message = worker.broadcast(server, "s1", TrainTask(1, 7))
    _, kept = turn(worker, site, TrainTask(1, 7, steps=2), message, State(), CPU, evaluate)
    update, again = turn(worker, site, TrainTask(2, 7, steps=steps), message, kept, CPU, evaluate)

    network = build("moon", SGD).model
    network.load_state_dict({**network.state_dict(), **server["model"], **server["buffers"]})
    last = deepcopy(network)
    last.load_state_dict({k.removeprefix("last."): t for k, t in kept["own"].items() if k.startswith("last.")})
    received, recipe = deepcopy(network).eval(), Recipe.build(SGD, "sigmoid", 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=SGD.lr)
    for batch in site.train_batches(derive_seed(7, "batches", 2, "s1"), steps):
        images = recipe.normalize(batch["image"])
        network.zero_grad()
        probe = deepcopy(network)  # so that statistics move once
        z = normalize(features(network, images), dim=1)
        with torch.no_grad():
            near, far = (normalize(features(m, images), dim=1) for m in (received, last.eval()))
        odds = (((z * far).sum(dim=1) - (z * near).sum(dim=1)) / 0.5).exp()
        contrast = torch.log1p(odds).mean()
        gradients = torch.autograd.grad(mu * contrast, list(network.parameters()), allow_unused=True)
        network.load_state_dict(probe.state_dict())
        recipe.loss(network(images), batch["mask"], None).backward()
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.step()
    trained = dict(network.named_parameters())
    for name, difference in update["model"].items():
        torch.testing.assert_close(difference, trained[name].detach() - server["model"][name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(again["own"][f"last.{name}"], trained[name].detach(), rtol=1e-4, atol=1e-6)


def test_a_first_round_and_a_network_without_encoder() -> None:
    """There is no last model yet; a network that has no encoder has no features to contrast."""
    answers = []
    for name in ("fedavg", "moon"):
        worker = build(name, SGD)
        message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
        answers.append(turn(worker, toy_sites()["s1"], TrainTask(1, 7, steps=3), message, State(), CPU, evaluate)[0])
    assert_same(State(answers[0].tensors), State(answers[1].tensors))
    plain = build("fedavg")
    with pytest.raises(
        ValueError, match="algorithm=moon needs a network with the parts encoder; Conv2d has no encoder"
    ):
        type(worker)(nn.Conv2d(3, 2, 1), plain.recipe)
