"""Noise that is chosen anew for every private step, by a mechanism that is private itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedseg.algorithms.functional.private import Batch, Loss, PrivateStep, by_patient, move, returning, take
from fedseg.common.seeds import derive_seed
from fedseg.federation.contract import Site

SCORED = "scored"
"""Of a batch: the patients whose loss chooses the noise of its step, drawn independently of the step's own."""


@dataclass(frozen=True)
class ChosenNoise(PrivateStep):
    """A private step whose noise is chosen by what it does to a loss, as in P3SGD (Wu et al., CVPR 2019).

    The exponential mechanism (McSherry and Talwar, FOCS 2007): with the loss of patient k under trial noise of size s,
    cut to [0, bound],

        P(s) ~ exp(-epsilon * sum_k loss_k(s) / bound).

    A patient more makes every sum larger by 0 to bound, all in one direction, so that the choice is epsilon-DP (not
    2 epsilon: Dwork and Roth, 2014, section 3.4). Trial noise is drawn for the choice only, so that the noise of the
    step itself is Gaussian whatever was chosen; and the patients are drawn anew, so that the choice does not tell which
    patients the step has. With the step's own noise and patients neither would hold.

    Attributes:
        noises: to choose from; ``noise`` is the one that a step took.
        epsilon: of one choice, for a patient whose loss is read.
        bound: losses above it count as it.
    """

    noises: tuple[float, ...] = ()
    epsilon: float = 0.1
    bound: float = 1.0

    @property
    def needs_sgd(self) -> bool:
        """Trial noise moves the parameters as SGD would move them by the step's."""
        return True

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """Beside the patients of every step those of its choice."""
        return Pairs(super().batches(site, seed, steps), super().batches(site, derive_seed(seed, SCORED), steps))

    def settled(self, score: Loss, batch: Batch, learning: Sequence[Tensor], rate: float) -> PrivateStep:
        """The step with the noise that was chosen for it."""
        source = self.source()
        chances = self.log_weights(score, batch[SCORED], learning, rate, source).softmax(dim=0)
        return replace(self, noise=self.noises[int(torch.multinomial(chances, 1, generator=source))])

    def objective(self, loss: Loss, batch: Batch, learning: Sequence[Tensor], rate: float = 0.0) -> Tensor:
        """That of the step's own patients."""
        return super().objective(loss, {name: part for name, part in batch.items() if name != SCORED}, learning, rate)

    def log_weights(
        self, score: Loss, batch: Batch, learning: Sequence[Tensor], rate: float, source: torch.Generator | None
    ) -> Tensor:
        """(S,) float64: every noise's chance, as a logarithm and up to a constant."""
        trial = [torch.randn(p.shape, generator=source).to(p.device) for p in learning]
        size = rate * self.clip / self.patients
        sums = []
        for noise in self.noises:
            with returning(learning), torch.no_grad():
                move(learning, trial, noise * size)
                sums.append(sum(self.bounded(score, slices) for slices in by_patient(batch)))
        return torch.tensor(sums, dtype=torch.float64) * (-self.epsilon / self.bound)

    def bounded(self, score: Loss, slices: Batch) -> float:
        """A patient's loss, the mean over its slices, in [0, bound]; one that is no number is the bound."""
        count = len(slices["patient"])
        parts = [take(slices, places) for places in torch.split(torch.arange(count), self.piece)]
        loss = sum(float(score(part)) * len(part["patient"]) / count for part in parts)
        return self.bound if math.isnan(loss) else min(max(loss, 0.0), self.bound)


@dataclass(frozen=True)
class Pairs:
    """Batches of steps, each with that of its choice."""

    own: Iterable[Batch]
    scored: Iterable[Batch]

    def __len__(self) -> int:
        return len(cast(Any, self.own))

    def __iter__(self) -> Iterator[Batch]:
        return ({**own, SCORED: scored} for own, scored in zip(self.own, self.scored, strict=True))
