"""ConDistFL."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.conditional import conditional_dice_loss
from fedseg.algorithms.semi import finest
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import FinitePositive, Fixed, Share
from fedseg.federation.state import State


class ConDistFL(FedAvg):
    """ConDistFL (Wang et al., DeCaF 2023; IEEE JBHI 2025): the received model teaches what a site did not annotate.

    Task loss, which leaves open what was not annotated (marginal under softmax), + weight times 1 - Dice of the chances
    that the local model and the received one give to the regions without annotation, given that no annotated region is
    there. The weight rises linearly over the run's rounds. The received model is frozen and in evaluation mode; a step
    costs its pass forward. Sites that annotated everything train as with FedAvg. The losses are the release's; of its
    groups of regions (an organ and its tumour as one) each region is one here, and regions that may overlap, which it
    does not have, are taught by their own chances.

    Args:
        weight: of the distillation in the last round; 0 is FedAvg.
        first_weight: share of it in the first round.
        temperature: divides the logits of both models.
    """

    leaves_out_unknown = True
    teaches_unannotated = True

    def __init__(
        self,
        *args: Any,
        weight: NonNegativeFloat = 1.0,
        first_weight: Fixed[Share] = 0.01,
        temperature: Fixed[FinitePositive] = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.first_weight, self.temperature = weight, first_weight, temperature
        if weight and first_weight < 1:
            self.over_rounds = "algorithm.weight rises over them"
        self._teacher: list[nn.Module] = []  # of this turn

    def receive(self, message: State, kept: State, site: Site) -> None:
        """The teacher is that of this turn."""
        super().receive(message, kept, site)
        self._teacher = []

    def on_train_start(self) -> None:
        """The teacher is copied before any hook for a step hangs on the model."""
        super().on_train_start()
        if self.weight:
            self._teacher = [deepcopy(self.model).eval().requires_grad_(False)]

    def weight_in(self, round: int) -> float:
        """Of the distillation in a round; outside of rounds (0) it is whole."""
        done = (round - 1) / max(1, self.recipe.rounds - 1) if round else 1.0
        return self.weight * (self.first_weight + (1 - self.first_weight) * done)

    def loss(self, batch: Batch) -> Tensor:
        """Task loss, and distillation where a region of an image is not annotated."""
        known = batch.get("known")
        if not self._teacher or known is None or bool(known.flatten(2).any(dim=2).all()):
            return super().loss(batch)
        images = self.normalize(batch["image"])
        answer = self.model(images)
        with torch.no_grad():
            taught = finest(self._teacher[0](images))
        apart = conditional_dice_loss(
            finest(answer), taught, batch["mask"], known, self.recipe.activation, self.temperature
        )
        return self.task_loss(answer, batch) + self.weight_in(self.round) * apart
