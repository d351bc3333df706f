"""FedProx."""

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Batch
from fedseg.federation.state import squared_distance


class FedProx(FedAvg):
    """FedProx (Li et al., MLSys 2020): a proximal term pulls the local model to the received one.

    Objective: loss + mu/2 ||w - w_received||^2 over the shared parameters, in every step. Released code of others
    skips the term in the first round, where it starts at zero anyway, and in the first step of each epoch.

    Args:
        mu: strength of the pull; 0 is FedAvg.
    """

    leaves_out_unknown = True
    adds_up = True

    def __init__(self, *args: Any, mu: NonNegativeFloat = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mu = mu

    def loss(self, batch: Batch) -> Tensor:
        """Task loss and proximal term."""
        return super().loss(batch) + self.mu / 2 * squared_distance(dict(self.model.named_parameters()), self.reference)
