"""Per-FedAvg."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from fedseg.algorithms.fedsam import SecondGradient
from fedseg.algorithms.finetune import FineTune
from fedseg.algorithms.repeated import Paired
from fedseg.federation.contract import Batch, Site

SECOND = "second"


class PerFedAvg(FineTune, SecondGradient):
    """Per-FedAvg (Fallah, Mokhtari, Ozdaglar, NeurIPS 2020), first order: one step from the model personalises it.

    A local step takes the gradient g at w on one batch, goes to w - alpha g, takes the gradient there on another batch,
    comes back, and lets the optimiser step with the second gradient (the paper's FO variant: no second derivatives).
    The personal model takes `finetune_steps` plain gradient steps of size alpha from the global one. A step costs two
    passes and two batches. After the paper; no code was compared.

    Args:
        alpha: size of the step that personalises; 0 is FedAvg.
        finetune_steps: of the personal model, each on a batch.
    """

    def __init__(
        self, *args: Any, alpha: NonNegativeFloat = 0.01, finetune_steps: PositiveInt = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, finetune_steps=finetune_steps, **kwargs)
        self.alpha = alpha

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """Two for every local step; one where it personalises."""
        if self._tuning or not self.alpha:
            return super().batches(site, seed, steps)
        return Paired(super().batches(site, seed, 2 * steps), SECOND, steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's, but plain steps of size alpha where it personalises."""
        plain = super().configure_optimizers()
        return torch.optim.SGD(plain.param_groups[0]["params"], self.alpha) if self._tuning else plain

    @property
    def looks_elsewhere(self) -> bool:
        """Not where it personalises."""
        return bool(self.alpha) and not self._tuning

    def way(self, norm: Tensor) -> float:
        """Down the gradient, by alpha times it."""
        return -self.alpha

    def second(self, batch: Batch) -> Batch:
        """The batch that came along, where one did."""
        found: Batch = batch.get(SECOND, batch)
        return found
