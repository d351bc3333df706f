"""Gradients that hide every patient: DP-SGD with patients as units (Abadi et al., CCS 2016)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedseg.federation.seeds import unforeseeable

Batch = dict[str, Any]


@dataclass(frozen=True)
class PrivateStep:
    """How a local step is made private.

    Attributes:
        clip: largest L2 norm of a patient's gradient.
        noise: deviation of the noise over clip.
        patients: patients in a step, on average; the noised sum is divided by it.
        randomness: seeded noise and patients for simulation, secret ones for deployment.
        piece: slices in a forward pass; a patient with more comes in pieces, and its gradient is their mean.
    """

    clip: float
    noise: float
    patients: float
    randomness: Literal["seeded", "secret"] = "seeded"
    piece: int = 8

    def rate(self, patients: int) -> float:
        """Probability that one of so many patients is in a step."""
        return min(1.0, self.patients / max(1, patients))

    def seed(self, seed: int) -> int:
        """Of the patients that are drawn."""
        return seed if self.randomness == "seeded" else secrets.randbits(62)

    def objective(self, loss: Callable[[Batch], Tensor], batch: Batch, learning: Sequence[Tensor]) -> Tensor:
        """A linear function of the parameters whose gradient is the private one.

        The sum over patients of clipped gradients, with noise, over the average number of patients. A step in which
        no patient was drawn is noise only.

        Args:
            loss: of some of a patient's slices: their mean.
            batch: slices of the patients drawn, ``patient`` tells them apart.
            learning: the parameters.
        """
        total = [torch.zeros_like(p) for p in learning]
        for slices in by_patient(batch):
            gradient = self.gradient(loss, slices, learning)
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradient]))
            factor = min(1.0, self.clip / max(float(norm), 1e-12)) if torch.isfinite(norm) else 0.0
            if factor:
                torch._foreach_add_(total, gradient, alpha=factor)
        source = unforeseeable() if self.randomness == "secret" else None
        private = [self._noised(g, source) / self.patients for g in total]
        return torch.stack([(p * g).sum() for p, g in zip(learning, private, strict=True)]).sum()

    def gradient(self, loss: Callable[[Batch], Tensor], slices: Batch, learning: Sequence[Tensor]) -> list[Tensor]:
        """One patient's gradient: the mean over the slices."""
        count = len(slices["patient"])
        total = [torch.zeros_like(p) for p in learning]
        for start in range(0, count, self.piece):
            part = take(slices, torch.arange(start, min(start + self.piece, count)))
            found = torch.autograd.grad(loss(part), list(learning), allow_unused=True)
            share = len(part["patient"]) / count
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_.add_(gradient, alpha=share)
        return total

    def _noised(self, gradient: Tensor, source: torch.Generator | None) -> Tensor:
        noise = torch.randn(gradient.shape, generator=source) * (self.noise * self.clip)
        return gradient + noise.to(gradient.device)


def by_patient(batch: Batch) -> Iterator[Batch]:
    """The slices of every patient in a batch, patient after patient."""
    for patient in batch["patient"].unique():
        yield take(batch, (batch["patient"] == patient).nonzero().flatten())


def take(batch: Batch, places: Tensor) -> Batch:
    """Some entries of a batch."""
    return {
        name: value[places.to(value.device)] if isinstance(value, Tensor) else [value[int(i)] for i in places]
        for name, value in batch.items()
    }
