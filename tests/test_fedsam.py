"""Weight perturbation: whole steps against the authors' arrays, and what it reduces to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fedsam import FedSAM
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import Compute
from fedseg.federation.contract import Batch
from tests.lines import Line, drawn_lines, golden, squares
from tests.world import CPU, assert_same, build, simulate, toy_sites


@pytest.mark.parametrize("archive", ["harmofl_wpoptim_sgd_s21", "harmofl_wpoptim_adam_s22"])
def test_whole_steps_are_the_programs(archive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden(archive)
    d0, d1, d2 = data["dims"].tolist()
    network = nn.Sequential(nn.Conv2d(d0, d1, 1), nn.Tanh(), nn.Conv2d(d1, d2, 1)).double()
    nn.utils.vector_to_parameters(data["init"], network.parameters())
    knobs: dict[str, Any] = {"optimizer": "sgd" if "sgd" in archive else "adam", "lr": float(data["lr"])}
    knobs |= {"momentum": float(data["momentum"])} if "sgd" in archive else {}
    training = Training(weight_decay=float(data["weight_decay"]), channels_last=False, **knobs)
    recipe = Recipe(training, "softmax", nn.Identity(), lambda logits, mask, _: cross_entropy(logits, mask))
    worker, reached = FedSAM(network, recipe, rho=float(data["alpha"])).double(), []

    def note(*_: Any) -> None:
        reached.append(nn.utils.parameters_to_vector(worker.model.parameters()).detach().clone())

    monkeypatch.setattr(worker, "on_train_batch_end", note)
    pairs = zip(data["X"], data["Y"], strict=True)
    CPU.fit(worker, [{"image": x[:, :, None, None], "mask": y[:, None, None]} for x, y in pairs])
    torch.testing.assert_close(torch.stack(reached), data["p"], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [Training(lr=1e-2), Training(optimizer="sgd", lr=0.05, momentum=0.9)])
def test_without_perturbation_it_is_fedavg_bit_for_bit(training: Training, tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", training=training)
    assert_same(simulate("fedsam", tmp_path / "b", training=training, rho=0.0).server, fedavg.server)
    perturbed = simulate("fedsam", tmp_path / "c", training=training, rho=0.5)
    assert any(not torch.equal(t, fedavg.server["model"][k]) for k, t in perturbed.server["model"].items())


def test_a_step_takes_two_passes_and_statistics_see_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, plain, passes = build("fedsam", rho=0.5), build("fedavg"), []
    batch: Batch = toy_sites()["s1"].train_batches(3, 1)[0]
    worker.model.register_forward_hook(lambda *_: passes.append(1))
    CPU.fit(worker, [batch])
    CPU.fit(plain, [batch])
    assert len(passes) == 2
    expected: dict[str, Tensor] = dict(plain.model.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in worker.model.named_buffers())


@pytest.mark.parametrize(("name", "knobs"), [("fedsam", {"rho": 0.5}), ("perfedavg", {"alpha": 0.3})])
def test_clipping_acts_on_the_second_gradient_alone(name: str, knobs: dict[str, float]) -> None:
    """The way to where it is taken is that of the first gradient as it is."""
    sites, start = drawn_lines(1, [10])
    rows, targets, lr, clip = sites["s0"].rows, sites["s0"].targets, 0.1, 0.05
    first = rows.T @ (rows @ start - targets) / len(targets)
    there = start + 0.5 * first / first.norm() if name == "fedsam" else start - 0.3 * first
    second = rows.T @ (rows @ there - targets) / len(targets)
    assert min(first.norm(), second.norm()) > 2 * clip
    recipe = Recipe(Training(optimizer="sgd", lr=lr, channels_last=False), "sigmoid", nn.Identity(), squares)
    worker = ALGORITHMS[name](Line(start), recipe, **knobs).double()
    Compute("cpu", gradient_clip=clip).fit(worker, sites["s0"].train_batches(0, 1))
    expected = start - lr * clip * second / second.norm()
    torch.testing.assert_close(worker.model.get_parameter("w").detach(), expected, rtol=1e-6, atol=1e-8)


def test_both_passes_compute_in_the_trainers_precision() -> None:
    worker, computed = build("fedsam", rho=0.5), []
    worker.model.register_forward_hook(lambda _module, _images, logits: computed.append(logits.dtype))
    Compute("cpu", "bf16-mixed").fit(worker, toy_sites()["s1"].train_batches(3, 2))
    assert computed == [torch.bfloat16] * 4
