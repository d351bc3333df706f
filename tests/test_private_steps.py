"""DP-SGD with patients as units: gradients, noise, sampling, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.private import Batch, PrivateStep, by_patient
from fedseg.algorithms.recipe import Training
from fedseg.datamodules.sampling import patient_plans
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, Guarantee, TrainTask
from fedseg.federation.state import State
from fedseg.federation.transforms import answer
from fedseg.privacy.accounting import Account
from fedseg.privacy.patient_level import PatientLevel
from tests.world import CPU, ToySite, assert_same, build, evaluate, simulate, toy_sites

SILENT = 1e-12  # noise too small to see


def gradient_of(objective: Tensor, learning: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(objective, learning))


def one_at_a_time(algorithm: Any, batch: Batch, clip: float, patients: float) -> list[Tensor]:
    """Clipped gradients by plain autograd: a fresh forward pass for each patient, all slices at once."""
    learning = list(algorithm.model.parameters())
    total = [torch.zeros_like(p) for p in learning]
    for patient in sorted(set(batch["patient"].tolist())):
        rows = [i for i, p in enumerate(batch["patient"].tolist()) if p == patient]
        algorithm.model.zero_grad()
        loss = algorithm.recipe.loss(algorithm.model(algorithm.normalize(batch["image"][rows])), batch["mask"][rows])
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in learning))
        for sum_, p in zip(total, learning, strict=True):
            sum_ += p.grad * min(1.0, clip / norm) / patients
    return total


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1e6])
def test_the_gradient_is_the_sum_of_clipped_gradients_taken_one_at_a_time(clip: float) -> None:
    step = PrivateStep(clip, SILENT / clip, patients=2.0)
    algorithm = build("fedavg", private=step, norm="group")
    (batch,) = toy_sites()["s2"].patient_batches(seed=3, steps=1, rate=0.9)
    assert len(batch["patient"].unique()) > 2
    learning = list(algorithm.model.parameters())
    found = gradient_of(step.objective(algorithm.loss, batch, learning), learning)
    for got, expected in zip(found, one_at_a_time(algorithm, batch, clip, 2.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedper", "finetune"])
def test_one_patient_moves_the_gradient_by_the_bound_at_most(name: str) -> None:
    step = PrivateStep(0.05, SILENT, patients=2.0)
    algorithm = build(name, private=step, norm="group")
    site = toy_sites()["s2"]
    message = algorithm.init_server({})
    algorithm.receive(message, State(), site)
    (batch,) = site.patient_batches(seed=3, steps=1, rate=1.0)
    learning = [p for p in algorithm.parameters() if p.requires_grad]
    whole = gradient_of(step.objective(algorithm.loss, batch, learning), learning)
    patients = batch["patient"].unique().tolist()
    for left_out in patients:
        keep = batch["patient"] != left_out
        rest = {key: value[keep] for key, value in batch.items() if isinstance(value, Tensor)}
        without = gradient_of(step.objective(algorithm.loss, rest, learning), learning)
        moved = math.sqrt(sum(float((a - b).double().pow(2).sum()) for a, b in zip(whole, without, strict=True)))
        assert moved <= 0.05 / 2.0 * (1 + 1e-4)


def test_a_patient_with_many_slices_counts_once_and_may_come_in_pieces() -> None:
    algorithm = build("fedavg", norm="group")
    algorithm.recipe = algorithm.recipe.__class__(**{**vars(algorithm.recipe), "loss": _mean_square})
    learning = list(algorithm.model.parameters())
    slices = {"image": torch.rand(7, 3, 8, 8), "mask": torch.rand(7, 2, 8, 8), "patient": torch.zeros(7)}
    whole = PrivateStep(1.0, 1.0, 1.0, piece=7).gradient(algorithm.loss, slices, learning)
    pieces = PrivateStep(1.0, 1.0, 1.0, piece=3).gradient(algorithm.loss, slices, learning)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def _mean_square(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    return (logits - mask).square().mean()


def test_noise_has_the_stated_deviation_and_an_empty_step_is_noise_only() -> None:
    step = PrivateStep(clip=0.5, noise=2.0, patients=4.0)
    weights = [nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(300, 100))]
    empty = {"image": torch.empty(0), "mask": torch.empty(0), "case": [], "patient": torch.empty(0, dtype=torch.int64)}
    torch.manual_seed(0)
    noise = gradient_of(step.objective(lambda batch: pytest.fail("no patient"), empty, weights), weights)
    for tensor in noise:
        assert float(tensor.std()) == pytest.approx(2.0 * 0.5 / 4.0, rel=0.02)
        assert float(tensor.mean()) == pytest.approx(0.0, abs=0.01)


def test_a_patient_whose_gradient_is_not_finite_is_left_out() -> None:
    step = PrivateStep(1.0, SILENT, patients=1.0)
    weight = nn.Parameter(torch.ones(3))
    batch = {"image": torch.tensor([1.0, torch.inf]), "patient": torch.tensor([0, 1])}
    (gradient,) = gradient_of(step.objective(lambda b: (weight * b["image"].sum()).sum(), batch, [weight]), [weight])
    torch.testing.assert_close(gradient, torch.full((3,), 1 / math.sqrt(3)))


def test_seeded_steps_repeat_and_secret_ones_do_not() -> None:
    weight = nn.Parameter(torch.zeros(5))
    batch = {"patient": torch.empty(0, dtype=torch.int64)}
    draws = {}
    for kind in ("seeded", "secret"):
        step = PrivateStep(1.0, 1.0, 1.0, randomness=kind)  # type: ignore[arg-type]
        twice = []
        for _ in range(2):
            torch.manual_seed(0)
            twice += gradient_of(step.objective(lambda b: torch.zeros(()), batch, [weight]), [weight])
        draws[kind] = torch.equal(*twice)
        assert (step.seed(5) == 5) == (kind == "seeded")
    assert draws == {"seeded": True, "secret": False}


def test_patients_are_drawn_whole_and_independently() -> None:
    patients = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    items = np.stack([np.zeros(30, int), patients, np.arange(30)], axis=1)
    plans = patient_plans(items, patients, steps=4000, rate=0.2, seed=1)
    drawn = np.array([[p in plan.patients for p in range(10)] for plan in plans])  # type: ignore[operator]
    assert np.abs(drawn.mean(axis=0) - 0.2).max() < 0.03
    together = np.corrcoef(drawn.T.astype(float)) - np.eye(10)
    assert np.abs(together).max() < 0.08
    assert any(not plan.picks for plan in plans), "a step may be empty"
    for plan in plans[:50]:
        assert sorted(pick.slice for pick in plan.picks) == [i for i in range(30) if patients[i] in plan.patients]  # type: ignore[operator]
    assert plans[7] == patient_plans(items, patients, steps=8, rate=0.2, seed=1)[7]
    assert len({pick.seed for plan in plans[:100] for pick in plan.picks}) == sum(len(p.picks) for p in plans[:100])


def test_a_turn_trains_through_empty_steps_and_tells_no_loss() -> None:
    step = PrivateStep(1.0, 1.0, patients=0.2)
    site, worker = toy_sites()["s0"], build("fedavg", private=step, norm="group")
    batches = list(worker.batches(site, 5, 6))
    assert any(not len(batch["patient"]) for batch in batches)
    message = worker.init_server({})
    task = TrainTask(1, 7, steps=6)
    update, _ = turn(worker, site, task, message, State(), CPU, evaluate)
    assert not update.refusal
    assert "loss" not in update.scalars
    assert update.scalars["rate"] == pytest.approx(0.2 / 2)
    assert all(bool((t != 0).any()) for t in update["model"].values())


def test_an_optimiser_that_evaluates_a_step_more_than_once_is_refused() -> None:
    """Each evaluation releases something of the patients drawn, and the account knows of one a step."""
    site, answers = toy_sites()["s0"], {}
    for optimizer in ("torch.optim:LBFGS", "sgd"):
        training = Training(optimizer=optimizer, lr=0.05, channels_last=False)
        worker = build("fedavg", training, private=PrivateStep(1.0, 1.0, patients=2.0), norm="group")
        transform = PatientLevel((1.0,), Account(Guarantee("patient", 1e-5)))
        task, message = TrainTask(1, 7, steps=2), worker.init_server({})
        answers[optimizer], _ = answer(worker, site, task, message, State(), CPU, evaluate, [transform])
    refused = answers["torch.optim:LBFGS"]
    assert (
        "takes more than one private gradient a step, and one is charged; take training.optimizer=sgd"
        in refused.refusal
    )
    assert not refused.tensors
    assert not answers["sgd"].refusal


@pytest.mark.parametrize("finite", [True, False])
def test_no_time_leaves_with_private_steps(finite: bool) -> None:
    """How long a step takes tells how many slices were drawn, and so of whom; also where the update is refused."""
    site, worker = toy_sites()["s0"], build("fedavg", private=PrivateStep(1.0, 1.0, patients=2.0), norm="group")
    message = worker.init_server({})
    if not finite:
        next(iter(message["model"].values())).fill_(torch.nan)
    task, transform = TrainTask(1, 7, steps=2), PatientLevel((1.0,), Account(Guarantee("patient", 1e-5)))
    update, _ = answer(worker, site, task, message, State(), CPU, evaluate, [transform])
    assert ("not finite" in update.refusal) != finite
    assert set(update.scalars) == (
        {"steps", *(f"transform/patient/{n}" for n in ("epsilon", "spent"))} if finite else set()
    )


@pytest.mark.slow
def test_private_training_learns(tmp_path: Path) -> None:
    """With little noise it comes near to ordinary training."""
    sites: Any = {f"s{i}": ToySite.make(f"s{i}", i, count=12) for i in range(2)}
    step = PrivateStep(clip=1.0, noise=0.05, patients=4.0)
    outcome = simulate(
        "fedavg", tmp_path, rounds=12, sites=sites, private=step, norm="group", training=Training(lr=3e-2)
    )
    first, last = _scores(outcome, 1), _scores(outcome, 12)
    assert last > first + 0.2


def _scores(outcome: Any, rounds: int) -> float:
    algorithm = build("fedavg", norm="group")
    if rounds > 1:
        algorithm.model.load_state_dict({**algorithm.model.state_dict(), **outcome.server["model"]})
    task = EvaluateTask(rounds, 7, splits=("val",))
    site: Any = ToySite.make("s0", 0, count=12)
    return evaluate(algorithm, site, task).means["val/global/dice"]


def test_fine_tuning_stays_at_the_site_and_is_not_noised(tmp_path: Path) -> None:
    step = PrivateStep(1.0, 1.0, patients=2.0)
    worker, site = build("finetune", private=step, norm="group"), toy_sites()["s1"]
    message = worker.init_server({})
    worker.receive(message, State(), site)
    seen: list[bool] = []
    worker.personalise(site, lambda steps: seen.append(worker.recipe.private is None))  # type: ignore[arg-type]
    assert seen == [True]
    assert worker.recipe.private is step


def test_without_private_steps_nothing_changed(tmp_path: Path) -> None:
    assert_same(
        simulate("fedavg", tmp_path / "a", rounds=1).server,
        simulate("fedavg", tmp_path / "b", rounds=1, private=None).server,
    )


def test_batches_fall_apart_by_patient() -> None:
    batch = {"image": torch.arange(5.0), "case": list("abcde"), "patient": torch.tensor([2, 0, 2, 0, 1])}
    parts = list(by_patient(batch))
    assert [part["case"] for part in parts] == [["b", "d"], ["e"], ["a", "c"]]
    assert [part["image"].tolist() for part in parts] == [[1, 3], [4], [0, 2]]
