"""Mixture of experts: its probabilities, whole steps written out by hand, and what it reduces to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.functional.mixture import mixed_logits
from fedseg.algorithms.moe import MixtureOfExperts
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import turn
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State, Update
from tests.world import CPU, TinyEncoder, TinyNet, assert_same, build, evaluate, toy_sites

activations = pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
SURE = 1000.0
"""A score whose sigmoid is 1."""


def shares(logits: Tensor, activation: str) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=1)


@activations
def test_probabilities_are_mixed_however_sure_the_experts_are(activation: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 300.0):
        one, other = (scale * torch.randn(3, 3, 4, 5, generator=generator).double() for _ in range(2))
        score = torch.tensor([-2.0, 0.3, 5.0]).double()
        leaves = [tensor.requires_grad_() for tensor in (one, other, score)]
        mixed = mixed_logits(one, other, score, activation)
        gate = score.sigmoid().view(3, 1, 1, 1)
        expected = gate * shares(one, activation) + (1 - gate) * shares(other, activation)
        torch.testing.assert_close(shares(mixed, activation), expected, rtol=1e-12, atol=1e-12)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(mixed.square().sum(), leaves))


@activations
def test_a_sure_gate_gives_one_expert_s_logits_bit_for_bit_and_half_precision_is_left(activation: Any) -> None:
    one, other = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for score, expert in ((SURE, one), (-SURE, other)):
        assert torch.equal(mixed_logits(one, other, torch.full((2,), score), activation), expert)
    assert mixed_logits(one.half(), other.half(), torch.zeros(2).half(), activation).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ steps by hand


class Network(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = TinyEncoder(nn.Conv2d(3, 2, 1), nn.Tanh())
        self.encoder.out_channels = [3, 2]
        self.segmentation_head = nn.Conv2d(2, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmentation_head(self.encoder(images)[-1])
        return logits


def expert(weights: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of that network, from its weights and biases."""
    inner, outer = weights[0].flatten(1), weights[2].flatten(1)
    z = (torch.einsum("oc,bchw->bohw", inner, images) + weights[1].view(1, -1, 1, 1)).tanh()
    return torch.einsum("oc,bchw->bohw", outer, z) + weights[3].view(1, -1, 1, 1), z


def entropy(p: Tensor, mask: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return -(mask * p.log() + (1 - mask) * (1 - p).log()).mean()
    classes = torch.cat([1 - mask.sum(dim=1, keepdim=True), mask], dim=1)
    return -(classes * p.log()).sum(dim=1).mean()


def by_logits(activation: str) -> Any:
    if activation == "sigmoid":
        return lambda logits, mask, _: binary_cross_entropy_with_logits(logits, mask)
    return lambda logits, mask, _: cross_entropy(logits, torch.cat([1 - mask.sum(1, keepdim=True), mask], 1))


@activations
def test_steps_are_those_of_the_formula(activation: Any) -> None:
    torch.manual_seed(0)
    lr, momentum, alone, classes = 0.3, 0.9, 0.7, 2 + (activation == "softmax")
    training = Training(optimizer="sgd", lr=lr, momentum=momentum, channels_last=False)
    recipe = Recipe(training, activation, nn.Identity(), by_logits(activation))
    worker = MixtureOfExperts(Network(classes), recipe, alone=alone).double()
    with torch.no_grad():
        for parameter in worker.parameters():
            parameter.copy_(torch.randn_like(parameter))
    modules = (worker.model, worker.twin, worker.gate)
    weights = [[p.detach().clone().requires_grad_() for p in module.parameters()] for module in modules]
    labels = torch.randint(3, (2, 4, 1, 5, 6))
    batches = [
        {"image": torch.randn(4, 3, 5, 6).double(), "mask": torch.cat([of == 1, of == 2], dim=1).double()}
        for of in labels
    ]
    CPU.fit(worker, batches)

    learning = [tensor for tensors in weights for tensor in tensors]
    speed = [torch.zeros_like(tensor) for tensor in learning]
    for batch in batches:
        (shared, z), (own, _) = (expert(tensors, batch["image"]) for tensors in weights[:2])
        u, c = weights[2]
        gate = (z.detach().mean(dim=(2, 3)) @ u.flatten() + c).sigmoid().view(-1, 1, 1, 1)
        mixture = gate * shares(shared, activation) + (1 - gate) * shares(own, activation)
        alone_loss = entropy(shares(shared, activation), batch["mask"], activation)
        loss = entropy(mixture, batch["mask"], activation) + alone * alone_loss
        speed = [momentum * v + g for v, g in zip(speed, torch.autograd.grad(loss, learning), strict=True)]
        with torch.no_grad():
            for tensor, v in zip(learning, speed, strict=True):
                tensor.sub_(lr * v)
    found = [p.detach() for module in modules for p in module.parameters()]
    assert [p.shape for p in found] == [tensor.shape for tensor in learning]
    for p, tensor in zip(found, learning, strict=True):
        torch.testing.assert_close(p, tensor.detach(), rtol=1e-10, atol=1e-12)
    images = batches[0]["image"]
    torch.testing.assert_close(
        worker.predict(images, "global"), shares(expert(weights[0], images)[0], activation)[:, -2:].detach().float(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ reductions


def one_turn(worker: Algorithm) -> tuple[Update, State]:
    message = build("fedavg").init_server({})
    return turn(worker, toy_sites()["s1"], TrainTask(1, 7, steps=3), message, State(), CPU, evaluate)


def with_gate(score: float, alone: float) -> MixtureOfExperts:
    worker = build("moe", alone=alone)
    assert isinstance(worker, MixtureOfExperts)
    worker.gate.bias.data.fill_(score)
    return worker


def of_twin(kept: State) -> dict[str, Tensor]:
    return {name.removeprefix("twin."): t for name, t in kept["own"].items() if name.startswith("twin.")}


def test_a_gate_at_one_leaves_fedavg_and_at_zero_fedavg_beside_local_training_bit_for_bit() -> None:
    plain = build("fedavg")
    start = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    fedavg, _ = one_turn(plain)
    local = plain.model.state_dict()
    for score, alone in ((SURE, 0.0), (-SURE, 1.0)):
        update, kept = one_turn(with_gate(score, alone))
        assert_same(State(update.tensors), State(fedavg.tensors))  # nor does anything else leave
        assert kept["own"]["gate.bias"].tolist() == [score]
        assert not kept["own"]["gate.weight"].any()
        own = of_twin(kept)
        assert own.keys() == local.keys()
        for name in start if score > 0 else own:
            assert torch.equal(own[name], (start if score > 0 else local)[name]), name


def test_as_it_comes_both_experts_and_the_gate_learn_and_only_the_shared_one_leaves() -> None:
    fedavg, _ = one_turn(build("fedavg"))
    update, kept = one_turn(build("moe"))
    assert {group: ts.keys() for group, ts in update.tensors.items()} == {
        group: ts.keys() for group, ts in fedavg.tensors.items()
    }
    assert kept["own"]["gate.weight"].any()
    head = "segmentation_head.0.weight"
    moved = of_twin(kept)[head] - build("moe").model.state_dict()[head]
    assert moved.any()
    for other in (fedavg["model"][head], moved):
        assert not torch.equal(update["model"][head], other)


def gate_s_gradient(worker: MixtureOfExperts, batch: Batch) -> Tensor:
    worker.zero_grad()
    worker.loss(batch).backward()
    assert worker.gate.weight.grad is not None
    return worker.gate.weight.grad.abs().max()


@activations
def test_the_gate_learns_nothing_where_experts_agree(activation: Any) -> None:
    torch.manual_seed(0)
    recipe = Recipe.build(Training(), activation, in_channels=3)
    worker = MixtureOfExperts(TinyNet(classes=2 + (activation == "softmax")), recipe)
    (batch,) = toy_sites()["s1"].train_batches(0, 1)
    if activation == "softmax":
        batch["mask"][:, 0] -= batch["mask"][:, 1]
    assert gate_s_gradient(worker, batch) < 1e-7
    with torch.no_grad():
        for parameter in worker.twin.get_submodule("segmentation_head").parameters():
            parameter.neg_()
    assert gate_s_gradient(worker, batch) > 1e-3


def test_a_network_without_an_encoder_is_refused() -> None:
    recipe = Recipe.build(Training(), "sigmoid", in_channels=3)
    with pytest.raises(ValueError, match="algorithm=moe needs a network with the parts encoder; Conv2d has no encoder"):
        MixtureOfExperts(nn.Conv2d(3, 2, 1), recipe)
