"""Local steps that learn from a gradient taken elsewhere: weight perturbation, towards flat minima."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Batch


class SecondGradient(FedAvg):
    """A local step that takes a first gradient, goes some way along it, and learns from the gradient there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch: Batch = {}  # of the step at hand, which Lightning gives to training_step alone

    @property
    @abstractmethod
    def looks_elsewhere(self) -> bool:
        """Whether there is a second gradient."""

    @abstractmethod
    def way(self, norm: Tensor) -> Tensor | float:
        """What the first gradient, of this norm, is multiplied with."""

    def second(self, batch: Batch) -> Batch:
        """The batch of the second gradient."""
        return batch

    @property
    def mixes_patients(self) -> str:
        """Where the second gradient is taken follows from the first one."""
        return super().mixes_patients or "its step takes a second gradient, of patients unclipped (perturbation)"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The first gradient."""
        self._batch = batch
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Put the second gradient in the first one's place, then clip it if so told."""
        if self.looks_elsewhere:
            self._perturb()
        super().configure_gradient_clipping(*args, **kwargs)

    def _perturb(self) -> None:
        learning = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in learning if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        before = [p.detach().clone() for p in learning]
        statistics = [buffer.clone() for buffer in self.model.buffers()]  # the second pass leaves no trace in them
        with torch.no_grad():
            for parameter, gradient in zip(learning, gradients, strict=True):
                parameter.add_(gradient * self.way(norm))
        with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
            loss = self.loss(self.second(self._batch))
        second = torch.autograd.grad(loss, learning)
        with torch.no_grad():
            for parameter, value, gradient in zip(learning, before, second, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
            for buffer, value in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(value)


class FedSAM(SecondGradient):
    """Weight perturbation (HarmoFL: Jiang, Wang, Dou, AAAI 2022; FedSAM: Qu et al., ICML 2022), without its amplitudes.

    A local step takes the gradient g at w, goes to w + rho g / |g| with the norm over all parameters, takes the
    gradient there, comes back, and lets the optimiser step with the second gradient: sharpness-aware minimisation.
    HarmoFL shares amplitudes of images beside it, which this method does not.

    Args:
        rho: length of the perturbation (HarmoFL's alpha); 0 is FedAvg.
    """

    def __init__(self, *args: Any, rho: NonNegativeFloat = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rho = rho

    @property
    def looks_elsewhere(self) -> bool:
        """Not without perturbation."""
        return bool(self.rho)

    def way(self, norm: Tensor) -> Tensor | float:
        """Up the gradient, by rho in all."""
        return self.rho / (norm + 1e-12)
