"""APFL: whole local steps against the formula's arrays, alpha's gradient, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from fedseg.algorithms.apfl import APFL
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import Compute, turn
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State
from tests.world import CPU, build, evaluate, toy_sites

STEPS = np.load(Path(__file__).parent / "golden" / "apfl_steps_s87.npz")


def network() -> nn.Module:
    """The archive's Linear-Tanh-Linear, as convolutions over images of one pixel."""
    d0, d1, d2 = STEPS["dims"].tolist()
    return nn.Sequential(nn.Conv2d(d0, d1, 1), nn.Tanh(), nn.Conv2d(d1, d2, 1)).double()


def load(module: nn.Module, flat: np.ndarray) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.from_numpy(flat), module.parameters())


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


def batch_of(step: int) -> Batch:
    image, mask = (torch.from_numpy(STEPS[name][step])[:, :, None, None] for name in "XY")
    return {"image": image, "mask": mask}


def apfl(**knobs: Any) -> APFL:
    training = Training(optimizer="sgd", lr=float(STEPS["lr"]), channels_last=False)
    recipe = Recipe(training, "sigmoid", nn.Identity(), lambda logits, mask, _: bce(logits, mask))
    made = APFL(network(), recipe, alpha_lr=float(STEPS["lr"]), **knobs).double()
    made.alpha.fill_(float(STEPS["alpha0"]))  # in double precision
    load(made.model, STEPS["w0"])
    load(made.twin, STEPS["v0"])
    return made


@pytest.mark.parametrize("adapt", ["round", "step", "never"])
def test_whole_steps_are_those_of_the_formula(adapt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = apfl(adapt=adapt)
    track: list[tuple[np.ndarray, np.ndarray, float]] = []

    def note(*_: Any) -> None:
        track.append((flat(worker.model.parameters()), flat(worker.twin.parameters()), float(worker.alpha)))

    monkeypatch.setattr(worker, "on_train_batch_end", note)
    CPU.fit(worker, [batch_of(step) for step in range(len(STEPS["X"]))])
    assert len(track) == len(STEPS["X"])
    for step, (shared, own, alpha) in enumerate(track):
        np.testing.assert_allclose(shared, STEPS[f"{adapt}_w"][step], rtol=0, atol=1e-12)
        np.testing.assert_allclose(own, STEPS[f"{adapt}_v"][step], rtol=0, atol=1e-12)
        assert alpha == pytest.approx(STEPS[f"{adapt}_alpha"][step], abs=1e-12)
    assert (len({alpha for *_, alpha in track}) == 1) == (adapt != "step")


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_the_mixtures_loss_falls_as_its_derivative_says(mix: str) -> None:
    worker = apfl(mix=mix)
    alpha = torch.tensor(float(STEPS["alpha0"]), dtype=torch.float64, requires_grad=True)
    worker.mixture_loss(batch_of(0), alpha).backward()
    assert alpha.grad is not None
    assert float(alpha.grad) == pytest.approx(float(STEPS[f"slope_{mix}"]), abs=1e-12)


def test_alpha_of_mixed_weights_follows_the_papers_derivative() -> None:
    """One step from a frozen start: alpha moves by the derivative with the shared model after its step."""
    worker, probe = apfl(mix="weights"), apfl(mix="weights")
    load(probe.model, STEPS["never_w"][0])
    alpha = torch.tensor(float(STEPS["alpha0"]), dtype=torch.float64, requires_grad=True)
    probe.mixture_loss(batch_of(0), alpha).backward()
    assert alpha.grad is not None
    CPU.fit(worker, [batch_of(0)])
    expected = float(STEPS["alpha0"]) - float(STEPS["lr"]) * float(alpha.grad)
    assert float(worker.alpha) == pytest.approx(expected, abs=1e-12)


def test_alpha_takes_the_learning_rate_if_so_told() -> None:
    assert build("apfl", Training(lr=0.123)).alpha_lr == 0.1
    assert build("apfl", Training(lr=0.123), alpha_lr=None).alpha_lr == 0.123


def drift(alpha_lr: float | None = None) -> Tensor:
    knobs = {} if alpha_lr is None else {"alpha_lr": alpha_lr}
    worker = build("apfl", Training(), **knobs)
    kept = State()
    message = build("fedavg").init_server({})
    for round in range(1, 6):
        task = TrainTask(round, 7, steps=4)
        _, kept = turn(worker, toy_sites()["s1"], task, message, kept, CPU, evaluate)
    return kept["own"]["alpha"]


def test_alpha_leaves_its_start_at_defaults() -> None:
    assert abs(float(drift()) - 0.5) > 1e-3
    assert abs(float(drift(1e-3)) - 0.5) < 1e-3


@pytest.mark.slow
def test_clipping_takes_each_models_gradient_by_itself() -> None:
    shared = {}
    for clip in (None, 1e-3):
        for kind in ("fedavg", "apfl"):
            worker = build(kind, Training(optimizer="sgd", lr=0.5))
            message = build("fedavg").init_server({})
            compute = Compute(accelerator="cpu", gradient_clip=clip)
            update, _ = turn(worker, toy_sites()["s1"], TrainTask(1, 7, steps=3), message, State(), compute, evaluate)
            shared[kind, clip] = flat(update["model"].values())
        assert np.array_equal(shared["apfl", clip], shared["fedavg", clip])
    assert not np.array_equal(shared["apfl", None], shared["apfl", 1e-3])
