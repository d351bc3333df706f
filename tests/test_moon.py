"""MOON: its loss against reference arrays, and its steps against a loop written down anew."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
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
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import read_settings, unused
from fedseg.models.embedding import Embedding
from fedseg.models.volumes import Heads
from tests.lines import golden
from tests.tiny_run import TINY
from tests.world import CPU, assert_same, assert_same_shared, build, evaluate, simulate, toy_sites

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moon", "flmrcm"])
def test_on_an_encoder_that_does_not_learn_it_is_fedavg_and_a_run_says_so(name: str, tmp_path: Path) -> None:
    fedavg, ours = (simulate(one, tmp_path / one, rounds=2, frozen=True) for one in ("fedavg", name))
    assert_same_shared(ours.server, fedavg.server)
    (detail,) = unused(Experiment(read_settings([*TINY, f"algorithm={name}", "model.freeze_encoder=true"])))
    assert detail.startswith(f"algorithm={name}, since the encoder, whose deepest map it is about, does not learn")
    weight = {"moon": {"mu": 0.0}, "flmrcm": {"adversarial": 0.0}}[name]
    others = [build(name), build(name, frozen=True, **weight), build(name, frozen=True, adapters=(2, "both"))]
    assert not any(method.adds_nothing for method in others)
    assert not build("moon", frozen=True, features="decoder").adds_nothing  # its cure


def told(network: nn.Module, images: Tensor, features: str) -> Tensor:
    """The features, of length 1, of the parts in a row."""
    deepest = network.get_submodule("encoder")(images)
    found: Tensor = deepest[-1] if features == "bottleneck" else network.get_submodule("decoder")(deepest)
    return normalize(found.flatten(2).mean(dim=2), dim=1)


@pytest.mark.parametrize("negatives", ["previous", "batch"])
@pytest.mark.parametrize("features", ["bottleneck", "decoder"])
def test_a_rounds_steps_are_those_of_the_formula(features: str, negatives: str) -> None:
    """A second round's, whose site has a last model; against other images of three already a first round's."""
    knobs, site, mu, steps = {"features": features, "negatives": negatives}, toy_sites()["s1"], 2.0, 3
    site = replace(site, batch_size=3)
    worker, kept, round = build("moon", SGD, mu=mu, temperature=0.5, **knobs), State(), 1
    server = worker.init_server({})
    message = worker.broadcast(server, "s1", TrainTask(1, 7))
    if negatives == "previous":
        _, kept = turn(worker, site, TrainTask(1, 7, steps=2), message, State(), CPU, evaluate)
        round = 2
    update, again = turn(worker, site, TrainTask(round, 7, steps=steps), message, kept, CPU, evaluate)

    network = build("moon", SGD).model
    network.load_state_dict({**network.state_dict(), **server["model"], **server["buffers"]})
    last = deepcopy(network).eval()
    last.load_state_dict({k.removeprefix("last."): t for k, t in kept.get("own").items()}, strict=bool(kept.tensors))
    received, recipe = deepcopy(network).eval(), Recipe.build(SGD, "sigmoid", 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=SGD.lr)
    for batch in site.train_batches(derive_seed(7, "batches", round, "s1"), steps):
        images = recipe.normalize(batch["image"])
        network.zero_grad()
        probe = deepcopy(network)  # so that statistics move once
        z = told(network, images, features)
        with torch.no_grad():
            near, far = told(received, images, features), told(last, images, features)
        if negatives == "previous":
            odds = (((z * far).sum(dim=1) - (z * near).sum(dim=1)) / 0.5).exp()
        else:
            others = ~torch.eye(3, dtype=torch.bool)
            odds = torch.stack([((z[i] @ near[others[i]].T - z[i] @ near[i]) / 0.5).exp().sum() for i in range(3)])
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
        if negatives == "previous":
            torch.testing.assert_close(again["own"][f"last.{name}"], trained[name].detach(), rtol=1e-4, atol=1e-6)
    assert ("own" in again.tensors) == (negatives == "previous")  # without a last model nothing is kept of it


def test_a_contrast_of_images_is_no_mean_over_images_nor_over_patients() -> None:
    with pytest.raises(ValueError, match=r"training\.pieces=2: a step of Moon is no sum over pieces"):
        build("moon", Training(pieces=2), negatives="batch")
    build("moon", Training(pieces=2))
    mixes = build("moon", SGD, norm="group", negatives="batch").mixes_patients
    assert mixes == "its loss compares images of different patients (compares_patients)"
    assert not build("moon", SGD, norm="group").mixes_patients
    alone = replace(toy_sites()["s1"], batch_size=1)
    with pytest.raises(
        ValueError, match=r"site 's1' trains on batches of one image, .* take data\.batch_size=2 or more"
    ):
        build("moon", SGD, negatives="batch").check_site(alone)
    build("moon", SGD).check_site(alone)


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


@pytest.mark.parametrize(("features", "part", "other"), [
    ("decoder", "segmentation_head", "bottleneck"), ("bottleneck", "encoder", "decoder"),
])  # fmt: skip
def test_a_network_of_which_only_the_other_features_are_known_is_refused_with_these(
    features: str, part: str, other: str
) -> None:
    worker = build("moon")
    network = deepcopy(worker.model)
    delattr(network, part)
    with pytest.raises(ValueError, match=rf"TinyNet has no {part} \(parts: .*\); take algorithm\.features={other}$"):
        type(worker)(network, worker.recipe, features=features)
    type(worker)(network, worker.recipe, features=other)


def test_of_several_maps_that_enter_a_head_the_finest_counts_and_a_head_must_be_called() -> None:
    network, images = build("fedavg").model.eval(), toy_sites()["s1"].images
    network.segmentation_head = Heads(nn.Conv2d(4, 2, 1), [nn.Conv2d(4, 2, 1)])
    network.get_submodule("decoder").register_forward_hook(lambda _module, _maps, finest: [finest, finest[..., ::2]])
    finest, _ = network.get_submodule("decoder")(network.get_submodule("encoder")(images))
    assert torch.equal(Embedding(network)(images)[1], finest)
    network.forward = lambda images: images
    with pytest.raises(ValueError, match="TinyNet answers without its segmentation_head"):
        Embedding(network)(images)
