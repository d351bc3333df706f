"""Steps that hide every patient: DP-SGD with patients as units (Abadi et al., CCS 2016), by gradients or by passes.

A pass is the large step that P3SGD (Wu et al., CVPR 2019) builds on each patient.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedseg.federation.contract import NOISE, Site
from fedseg.federation.seeds import forget, unforeseeable

Batch = dict[str, Any]
Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class PrivateStep:
    """How a local step is made private.

    Attributes:
        clip: largest L2 norm of a patient's gradient, or of the sum of gradients along its pass.
        noise: deviation of the noise over clip.
        patients: patients in a step, on average; the noised sum is divided by it.
        randomness: seeded noise and patients for simulation, secret ones for deployment.
        piece: slices in a forward pass; a patient with more comes in pieces, and its gradient is their mean.
        pass_steps: steps of every patient's own pass; 1 is its gradient.
    """

    clip: float
    noise: float
    patients: float
    randomness: Literal["seeded", "secret"] = "seeded"
    piece: int = 8
    pass_steps: int = 1

    @property
    def needs_sgd(self) -> bool:
        """Whether it counts on local steps that go against what they are given, by the learning rate."""
        return self.pass_steps > 1

    def rate(self, patients: int) -> float:
        """Probability that one of so many patients is in a step."""
        return min(1.0, self.patients / max(1, patients))

    def seed(self, seed: int) -> int:
        """Of the patients that are drawn."""
        return seed if self.randomness == "seeded" else secrets.randbits(62)

    def source(self) -> torch.Generator | None:
        """Of noise; None for PyTorch's own.

        A secret one makes secret, too, what the network draws from here on, which a turn seeds from what the server
        knows. A patient more shifts the draws of all patients after it: the bound on what one patient moves is for
        those who do not know these draws.
        """
        if self.randomness == "seeded":
            return None
        forget()
        return unforeseeable()

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """What local steps read: whole patients, each drawn by chance."""
        return site.patient_batches(self.seed(seed), steps, self.rate(site.patients))

    def settled(self, score: Loss, batch: Batch, learning: Sequence[Tensor], rate: float) -> PrivateStep:
        """This step with the noise that it takes; arguments as of `objective`, ``score`` is the task's loss alone."""
        return self

    def told(self, patients: int, noises: Mapping[float, int]) -> dict[str, float]:
        """What the account must know of a turn: of how many patients, and noise -> private gradients."""
        return {"rate": self.rate(patients), **{f"{NOISE}{noise!r}": float(n) for noise, n in noises.items()}}

    def objective(self, loss: Loss, batch: Batch, learning: Sequence[Tensor], rate: float = 0.0) -> Tensor:
        """A linear function of the parameters whose gradient is the private one.

        The sum over patients of clipped gradients (or passes), with noise, over the average number of patients; over
        the number drawn, which tells who is there, one patient would move the shares of all. A step in which no
        patient was drawn is noise only.

        Args:
            loss: of some of a patient's slices: their mean.
            batch: slices of the patients drawn, ``patient`` tells them apart.
            learning: the parameters.
            rate: learning rate of the steps of a pass.
        """
        source, total = self.source(), [torch.zeros_like(p) for p in learning]
        for slices in by_patient(batch):
            gradient = self.way(loss, slices, learning, rate)
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradient]))
            factor = min(1.0, self.clip / max(float(norm), 1e-12)) if torch.isfinite(norm) else 0.0
            if factor:
                torch._foreach_add_(total, gradient, alpha=factor)
        private = [self._noised(g, source) / self.patients for g in total]
        return torch.stack([(p * g).sum() for p, g in zip(learning, private, strict=True)]).sum()

    def way(self, loss: Loss, slices: Batch, learning: Sequence[Tensor], rate: float) -> list[Tensor]:
        """One patient's pass, over the rate: the sum of the gradients along it. The parameters come back.

        Its slices are dealt out to the steps, each of which sees the whole depth of the volume; a patient with fewer
        slices than steps goes over them again.
        """
        if self.pass_steps == 1:
            return self.gradient(loss, slices, learning)
        count, total = len(slices["patient"]), [torch.zeros_like(p) for p in learning]
        parts = min(self.pass_steps, count)
        with returning(learning):
            for step in range(self.pass_steps):
                gradient = self.gradient(loss, take(slices, torch.arange(step % parts, count, parts)), learning)
                torch._foreach_add_(total, gradient)
                move(learning, gradient, -rate)
        return total

    def gradient(self, loss: Loss, slices: Batch, learning: Sequence[Tensor]) -> list[Tensor]:
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


@contextmanager
def returning(learning: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that are moved inside are afterwards what they were."""
    start = [p.detach().clone() for p in learning]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(learning), start)
        torch.clear_autocast_cache()


def move(learning: Sequence[Tensor], along: Sequence[Tensor], size: float) -> None:
    """Add to parameters between two forward passes of one step, where autocast would take the old ones from memory."""
    with torch.no_grad():
        torch._foreach_add_(list(learning), list(along), alpha=size)
    torch.clear_autocast_cache()


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
