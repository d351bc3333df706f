"""MOON."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.deepest import unmoved, with_deepest
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State
from fedseg.models.embedding import Embedding
from fedseg.models.select import require_parts

Features = Literal["bottleneck", "decoder"]
PARTS: dict[Features, str] = {"bottleneck": "encoder", "decoder": "segmentation_head"}
"""What a network needs for its features to be found."""


class Moon(FedAvg):
    """MOON (Li, He, Song, CVPR 2021): features stay near the received model's and away from the site's last one.

    Task loss + mu CE([cos(z, z_received), cos(z, negatives) ...] / temperature, 0), where z is a map averaged over the
    image, as a network for segmentation has no projection head. Other models are in evaluation mode and do not learn. A
    site that trains for the first time has no last model, hence no such term. A step costs two more passes forward; the
    last model stays at the site.

    With negatives=batch an image is contrasted with the others of its batch, as the received model sees them (NT-Xent):
    a reading of FedCL (Liu et al., Pattern Recognition 2023), of which only the abstract could be had. It needs no last
    model, and holds from the first round on, at one more pass.

    Args:
        mu: weight of the contrast; 0 is FedAvg.
        temperature: of the contrast.
        features: bottleneck, the encoder's deepest map; or decoder, what enters the segmentation head.
        negatives: previous, the site's last model; or batch, other images.
    """

    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self,
        *args: Any,
        mu: NonNegativeFloat = 1.0,
        temperature: FinitePositive = 0.5,
        features: Features = "bottleneck",
        negatives: Literal["previous", "batch"] = "previous",
        **kwargs: Any,
    ) -> None:
        self.compares_patients = negatives == "batch"
        self.adds_up = not self.compares_patients
        super().__init__(*args, **kwargs)
        require_features(self.model, features)
        self.mu, self.temperature, self.features = mu, temperature, features
        self.last = deepcopy(self.model).requires_grad_(False) if negatives == "previous" else None
        if mu and features == "bottleneck" and (why := unmoved(self.model)):
            self.adds_nothing = f"{why}; take algorithm.features=decoder"
        self._teachers: list[nn.Module] = []  # the received model and the last one, of this turn

    def check_site(self, site: Site) -> None:
        """Other images must be there.

        Raises:
            ValueError: batches of one image.
        """
        if self.last is None and site.examples and len(next(iter(site.train_batches(0, 1)))["image"]) < 2:
            raise ValueError(
                f"site {site.name!r} trains on batches of one image, which algorithm.negatives=batch can contrast with "
                "no other; take data.batch_size=2 or more, or algorithm.negatives=previous"
            )

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Teachers are those of this turn."""
        super().receive(message, kept, site)
        self._teachers = []

    def loss(self, batch: Batch) -> Tensor:
        """Task loss and contrast."""
        if not self.mu or (self.last is not None and not self.trained_here):
            return super().loss(batch)
        if not self._teachers:  # before the first step
            models = [self.model] if self.last is None else [self.model, self.last]
            self._teachers = [deepcopy(model).eval().requires_grad_(False) for model in models]
        images = self.normalize(batch["image"])
        logits, z = with_features(self.model, images, self.features)
        with torch.no_grad():
            received, *others = (with_features(teacher, images, self.features)[1] for teacher in self._teachers)
        negatives = others or [received.roll(step, dims=0) for step in range(1, len(received))]
        return self.task_loss(logits, batch) + self.mu * model_contrast(z, received, negatives, self.temperature)

    def send(self, site: Site) -> State:
        """The differences; the model itself becomes the last one."""
        if self.last is not None:
            self._load(self.last, self.model.state_dict())
        return super().send(site)


def require_features(network: nn.Module, features: Features) -> None:
    """Make sure that a network tells them.

    Raises:
        ValueError: it does not, with the other features where it tells these.
    """
    try:
        require_parts(network, "algorithm=moon", PARTS[features])
    except ValueError as error:
        there = [other for other, part in PARTS.items() if part in dict(network.named_children())]
        raise ValueError(f"{error}{''.join(f'; take algorithm.features={other}' for other in there)}") from None


def with_features(network: nn.Module, images: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """Logits, and a map on the way to them averaged over each image, (B, C)."""
    logits, found = with_deepest(network, images) if features == "bottleneck" else Embedding(network)(images)
    return logits, found.flatten(2).mean(dim=2)


def model_contrast(z: Tensor, positive: Tensor, negatives: Sequence[Tensor], temperature: float) -> Tensor:
    """Cross entropy of which model's features these are, by cosine.

    Args:
        z: (B, C) features that learn.
        positive: of the received model.
        negatives: of earlier models of the site, or of other images.
        temperature: of the softmax.
    """
    alike = torch.stack([cosine_similarity(z, other) for other in (positive, *negatives)], dim=1)
    return cross_entropy(alike / temperature, alike.new_zeros(len(alike), dtype=torch.long))
