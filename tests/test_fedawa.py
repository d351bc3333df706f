"""FedAWA: weights written down anew, and what they reduce to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.fedawa import learnt, products
from fedseg.algorithms.recipe import Training
from tests.lines import drawn_lines, federate_lines, trained
from tests.world import assert_same, simulate

LR, STEPS = 0.05, 4
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)


def descended(logits: Tensor, updates: Tensor, model: Tensor, steps: int, rate: float) -> Tensor:
    """The paper's objective of whole vectors, and Adam's rule by hand."""
    first = second = torch.zeros_like(logits)
    for count in range(1, steps + 1):
        here = logits.clone().requires_grad_()
        shares = torch.exp(here) / torch.exp(here).sum()
        spread = torch.stack([(row - shares @ updates).pow(2).sum().sqrt() for row in updates])
        apart = 1 - torch.cosine_similarity(model[None], model + updates, dim=1)
        (slope,) = torch.autograd.grad((shares * spread).sum() + (shares * apart).sum(), here)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        logits = logits - rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    return logits


@pytest.mark.parametrize("steps", [1, 5])
def test_rounds_are_the_papers_and_weights_go_on(steps: int, tmp_path: Path) -> None:
    examples = [10, 20, 40]
    sites, w = drawn_lines(STEPS, examples)
    logits = torch.tensor(examples, dtype=torch.float64).log()
    for server, _ in federate_lines("fedawa", tmp_path, sites, w, SGD, 3, server_steps=steps, server_rate=0.1):
        updates = torch.stack([trained(site, w, LR) - w for site in sites.values()])
        logits = descended(logits, updates, w, steps, 0.1)
        w = w + logits.softmax(dim=0) @ updates
        torch.testing.assert_close(server["model"]["w"], w, rtol=1e-8, atol=1e-10)
        kept = torch.tensor([server.scalars[f"logit/{name}"] for name in sites], dtype=torch.float64)
        torch.testing.assert_close(kept, logits, rtol=1e-8, atol=1e-10)


def test_without_a_step_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    schedule = {"dropout": 0.3}
    ours = simulate("fedawa", tmp_path / "a", 3, schedule=schedule, server_steps=0)
    assert_same(ours.server, simulate("fedavg", tmp_path / "b", 3, schedule=schedule).server)


def weights(rows: Sequence[Sequence[float]], steps: int, rate: float = 0.05) -> list[float]:
    inner = products([torch.tensor(row, dtype=torch.float64) for row in rows])
    found: list[float] = learnt([0.0] * len(rows), inner, [0.0] * len(rows), steps, rate).softmax(dim=0).tolist()
    return found


def test_a_site_that_goes_another_way_loses_weight() -> None:
    agree, likewise, other = weights([[1, 0.1], [1, -0.1], [-1, 0]], 5)
    assert other < 0.3 < 1 / 3 < agree
    assert agree == pytest.approx(likewise)


@pytest.mark.slow
def test_many_steps_leave_one_site_only() -> None:
    assert max(weights([[1, 0.2], [1, -0.1], [-1, 0]], 2000)) > 0.99


@pytest.mark.parametrize("rows", [[[3.0, 4.0]], [[1.0, 2.0]] * 3, [[0.0, 0.0]] * 2])
def test_equal_updates_keep_their_weights(rows: list[list[float]]) -> None:
    assert weights(rows, 3) == pytest.approx([1 / len(rows)] * len(rows))


def test_absent_sites_keep_their_numbers(tmp_path: Path) -> None:
    schedule = {"fraction": 0.7}
    before = simulate("fedawa", tmp_path, 2, schedule=schedule).server.scalars
    after = simulate("fedawa", tmp_path, 3, schedule=schedule)
    asked = {row["site"] for row in after.observer.rows("rounds") if row["round"] == 3 and row["task"] == "train"}
    for name in (name for name in before if name.startswith("logit/")):
        assert (before[name] == after.server.scalars[name]) == (name.removeprefix("logit/") not in asked)
