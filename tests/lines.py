"""Sites that fit a line, as the reference arrays of methods that are about optimisation have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Batch, Scored
from fedseg.federation.engine import Federation
from fedseg.federation.schedule import Schedule
from fedseg.federation.state import State
from fedseg.federation.transport import InProcess
from fedseg.models.losses import Loss
from tests.world import CPU, Quiet

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class Line(nn.Module):
    """A network whose weights are a line's."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@dataclass
class LineSite:
    """One batch, the rows of a matrix and their targets, in every step of a round."""

    name: str
    index: int
    rows: Tensor
    targets: Tensor
    examples: int = 10
    rounds_steps: int = 1
    seen: bool = True

    @property
    def training_images(self) -> int:
        return self.examples

    @property
    def patients(self) -> int:
        return self.examples

    def at(self, round: int) -> LineSite:
        return self

    def covered(self) -> Tensor:
        return torch.zeros(self.examples, 1)

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        return self.rounds_steps

    def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
        return [{"image": self.rows, "mask": self.targets}] * steps

    def input_batches(self, split: str) -> Iterator[Batch]:
        return self.eval_batches(split)

    def eval_batches(self, split: str) -> Iterator[Batch]:
        yield from self.train_batches(0, 1)


@dataclass
class ScriptedSite(LineSite):
    """One step a round, along the next of the rows: its targets and the network's loss are such that it ends there."""

    asked: int = 0

    def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
        self.asked += 1
        return [{"image": self.rows[self.asked - 1], "mask": self.targets}]


def along(out: Tensor, target: Tensor, _: Tensor | None = None) -> Tensor:
    """A loss whose plain step of size 1 is the image."""
    return -out.sum()


def squares(out: Tensor, target: Tensor, _: Tensor | None = None) -> Tensor:
    """Half the mean squared error."""
    return 0.5 * (out - target).pow(2).mean()


def slope(site: LineSite, w: Tensor) -> Tensor:
    """The gradient of `squares` at a site."""
    return site.rows.T @ (site.rows @ w - site.targets) / len(site.targets)


def trained(site: LineSite, w: Tensor, lr: float) -> Tensor:
    """Its model after a round of plain steps from w."""
    for _ in range(site.rounds_steps):
        w = w - lr * slope(site, w)
    return w


def lines(data: dict[str, Tensor], steps: Sequence[int], examples: Sequence[int]) -> dict[str, LineSite]:
    """Sites of an archive with the matrices ``A`` and the targets ``b``."""
    return {
        f"s{i}": LineSite(f"s{i}", i, data["A"][i], data["b"][i], examples[i], steps[i]) for i in range(len(data["A"]))
    }


def drawn_lines(steps: int, examples: Sequence[int]) -> tuple[dict[str, LineSite], Tensor]:
    """Sites whose lines are drawn, and weights to start from, where numbers are not held against an archive's."""
    rng, count = torch.Generator().manual_seed(3), len(examples)
    rows, targets, start = (
        torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((count, 10, 5), (count, 10), (5,))
    )
    return lines({"A": rows, "b": targets}, [steps] * count, examples), start


def federate_lines(
    name: str,
    folder: Path,
    sites: Mapping[str, Any],
    start: Tensor,
    training: Training,
    rounds: int,
    schedule: dict[str, Any] | None = None,
    loss: Loss = squares,
    stops: Sequence[int] = (),
    **knobs: Any,
) -> list[tuple[State, dict[str, State]]]:
    """The server's state and what the sites keep, after every round of a federation through the real engine.

    Or only after rounds at which it `stops`, the last of which need not be `rounds`.
    """
    after = []
    for round in stops or range(1, rounds + 1):  # each goes on from the checkpoint of the one before it

        def made(rounds: int = round) -> Any:
            recipe = Recipe(training, "sigmoid", nn.Identity(), loss, rounds=rounds)
            return ALGORITHMS[name](Line(start), recipe, **knobs).double()

        way = InProcess(made(), sites, CPU, lambda *_: Scored({"val/global/dice": 0.5}))
        plan = Schedule(rounds=round, local_steps=None, **(schedule or {}))
        federation = Federation(made(), way, list(sites), plan, 7, Checkpoint(folder), Quiet())
        after.append((federation.run(), dict(way.kept())))
    return after
