"""MOON."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.deepest import with_deepest
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State
from fedseg.models.select import require_parts


class Moon(FedAvg):
    """MOON (Li, He, Song, CVPR 2021): features stay near the received model's and away from the site's last one.

    Task loss + mu CE([cos(z, z_received), cos(z, z_last)] / temperature, 0), where z is the deepest map of the encoder,
    averaged over the image, as a network for segmentation has no projection head. Both teachers are in evaluation mode
    and do not learn. A site that trains for the first time has no last model, hence no such term. A step costs two
    more passes forward; the last model stays at the site.

    Args:
        mu: weight of the contrast; 0 is FedAvg.
        temperature: of the contrast.
    """

    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self, *args: Any, mu: NonNegativeFloat = 1.0, temperature: FinitePositive = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        require_parts(self.model, "algorithm=moon", "encoder")
        self.mu = mu
        self.temperature = temperature
        self.last = deepcopy(self.model).requires_grad_(False)
        self._teachers: list[nn.Module] = []  # the received model and the last one, of this turn

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Teachers are those of this turn."""
        super().receive(message, kept, site)
        self._teachers = []

    def loss(self, batch: Batch) -> Tensor:
        """Task loss and contrast."""
        if not self.mu or not self.trained_here:
            return super().loss(batch)
        if not self._teachers:  # before the first step
            self._teachers = [deepcopy(model).eval().requires_grad_(False) for model in (self.model, self.last)]
        images = self.normalize(batch["image"])
        logits, z = with_features(self.model, images)
        with torch.no_grad():
            received, last = (with_features(teacher, images)[1] for teacher in self._teachers)
        return self.task_loss(logits, batch) + self.mu * model_contrast(z, received, [last], self.temperature)

    def send(self, site: Site) -> State:
        """The differences; the model itself becomes the last one."""
        self._load(self.last, self.model.state_dict())
        return super().send(site)


def with_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the deepest map of the network's encoder averaged over each image, (B, C)."""
    logits, deepest = with_deepest(network, images)
    return logits, deepest.flatten(2).mean(dim=2)


def model_contrast(z: Tensor, positive: Tensor, negatives: Sequence[Tensor], temperature: float) -> Tensor:
    """Cross entropy of which model's features these are, by cosine.

    Args:
        z: (B, C) features that learn.
        positive: of the received model.
        negatives: of earlier models of the site.
        temperature: of the softmax.
    """
    alike = torch.stack([cosine_similarity(z, other) for other in (positive, *negatives)], dim=1)
    return cross_entropy(alike / temperature, alike.new_zeros(len(alike), dtype=torch.long))
