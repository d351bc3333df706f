"""Ditto."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import PERSONAL_LOSS, Batch
from fedseg.federation.state import squared_distance


class Ditto(FedAvg):
    """Ditto (Li et al., ICML 2021): FedAvg, and beside it a personal model that is pulled to the received one.

    Personal step: v <- v - lr (grad F(v) + lam (v - w_received)). Both models step on the same batches; as their
    parameters are disjoint, one optimiser over the sum of the two losses makes both steps. Only with
    ``trainer.gradient_clip`` do they meet: the norm is then taken over both. A local step costs twice FedAvg's.

    Args:
        lam: strength of the pull; 0 makes the personal model a local one. The global model is FedAvg's always.
    """

    views = ("global", "personal")
    models_per_step = 2
    leaves_out_unknown = True
    adds_up = True

    def __init__(self, *args: Any, lam: NonNegativeFloat = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lam = lam
        self.twin = deepcopy(self.model)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the global model, plus loss and proximal term of the personal one; each loss is told by itself."""
        pull = squared_distance(dict(self.twin.named_parameters()), self.reference)
        shared, own = super().loss(batch), self.criterion(self.twin, batch)
        self.note(shared)
        self.note(own, PERSONAL_LOSS)
        return shared + own + self.lam / 2 * pull

    def network(self, view: str) -> nn.Module:
        """The received model, or the site's own."""
        return self.twin if view == "personal" else self.model
