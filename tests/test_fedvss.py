"""FedVSS: virtual images, of which one model is unsure and the other one sure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from fedseg.algorithms.fedvss import FedVSS, divergence, of_length
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State
from tests.world import CPU, assert_same, build, simulate, toy_sites


def worker(**knobs: Any) -> tuple[FedVSS, list[Batch]]:
    """A method some steps away from what it received, and batches."""
    method: Any = build("fedvss", **knobs)
    site = toy_sites()["s1"]
    method.receive(method.broadcast(method.init_server({}), "s1", TrainTask(1, 7)), State(), site)
    CPU.fit(build_on(method), site.train_batches(1, 12))
    return method.train(), list(site.train_batches(5, 20))


def build_on(method: FedVSS) -> FedVSS:
    """The same method with FedAvg's steps."""
    plain = build("fedvss", generalise=0.0, align=0.0)
    plain.model = method.model
    return plain


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_divergence_is_that_of_the_pixels_distributions(activation: Literal["sigmoid", "softmax"]) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 3, 5, 5)
    if activation == "sigmoid":
        expected = kl_divergence(Bernoulli(logits=first), Bernoulli(logits=second)).mean()
    else:
        wholes = (Categorical(logits=logits.movedim(1, -1)) for logits in (first, second))
        expected = kl_divergence(*wholes).mean()
    torch.testing.assert_close(divergence(first, second, activation), expected)
    assert float(divergence(first, first, activation)) == 0.0


def test_changes_have_their_length_image_by_image() -> None:
    changes = torch.rand(3, 2, 4, 4) * torch.tensor([1.0, 9.0, 0.0]).view(3, 1, 1, 1)
    found = of_length(changes, 0.5).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0.0]))


def test_without_a_radius_the_first_term_is_0_and_the_second_the_task_loss() -> None:
    method, batches = worker(radius=0.0, generalise=3.0, align=0.5)
    for batch in batches[:3]:
        batch["image"] = batch["image"].clamp(0, 1)
        plain = method.criterion(method.model, batch)
        torch.testing.assert_close(method.loss(batch), 1.5 * plain)


def test_the_local_model_leaves_its_answer_faster_along_the_virtual_change_than_along_any_other() -> None:
    method, batches = worker(radius=0.003)
    won = []
    for batch in batches:
        images = batch["image"]
        answer = method.virtual(images).detach()
        found = [
            float(divergence(answer, method.virtual(images + change).detach(), "sigmoid"))
            for change in (method.unsure(images, answer), of_length(torch.randn_like(images), 0.003))
        ]
        won.append(found[0] > found[1])
    assert sum(won) >= 0.95 * len(won)


def test_the_received_model_is_surer_of_the_masks_of_its_virtual_images_which_stay_images() -> None:
    method, batches = worker(radius=0.003, passes=2)
    for batch in batches:
        images = method.sure(batch)
        before, after = (
            float(method.task_loss(method.virtual(x, method.reference).detach(), batch))
            for x in (batch["image"], images)
        )
        assert after < before
        assert images.min() >= 0
        assert images.max() <= 1
        assert not images.requires_grad
    received = method.sure(batches[0])
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(method.sure(batches[0]), received)  # whatever the local model has become


def test_virtual_images_leave_no_trace_in_running_statistics_and_teach_the_local_model_alone() -> None:
    (method, batches), (plain, _) = worker(), worker(generalise=0.0, align=0.0)
    gradients: list[dict[str, Tensor]] = []
    for one in (method, plain):
        one.model.zero_grad()
        one.loss(batches[0]).backward()
        gradients.append({name: p.grad for name, p in one.model.named_parameters() if p.grad is not None})
    buffers = (dict(one.model.named_buffers()) for one in (method, plain))
    own, usual = buffers
    assert all(torch.equal(own[name], usual[name]) for name in usual)
    assert any(isinstance(module, nn.BatchNorm2d) for module in method.model.modules())
    assert gradients[0].keys() == gradients[1].keys()
    assert any(not torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert not any(tensor.requires_grad for tensor in method.reference.values())


@pytest.mark.slow
def test_without_either_weight_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    plain = simulate("fedavg", tmp_path / "a")
    own = simulate("fedvss", tmp_path / "b", generalise=0.0, align=0.0)
    assert_same(own.server, plain.server)
    assert own.kept == {} or all(not state.get("own") for state in own.kept.values())
