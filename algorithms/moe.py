"""Mixture of experts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.deepest import with_deepest
from fedseg.algorithms.functional.mixture import mixed_logits
from fedseg.federation.contract import PERSONAL_LOSS, Batch
from fedseg.models.heads import Activation
from fedseg.models.select import require_parts


class MixtureOfExperts(FedAvg):
    """Mixture of experts (Li et al., Medical Image Analysis 2020): a gate mixes shared and own model, image by image.

    p = g p_shared + (1 - g) p_own on probabilities, with g = sigmoid(u z + c) and z the deepest map of the shared
    model's encoder, averaged over the image. The shared model w travels as in FedAvg; the own model v, which begins as
    a copy, and the gate, which begins at 1/2 for every image, stay. One optimiser makes the steps of all three on
    L(p) + alone L(p_shared); as the mixture's loss reaches w, the global model is not FedAvg's. The gate reads z and
    does not teach the encoder. A local step trains two models.

    The authors' program classifies, and was read: there the gate sees the input, logarithms of probabilities are mixed,
    the own model has a loss by itself and a step first, and the shared one the mixture's alone, as with ``alone=0``. It
    also adds noise to weights that travel; for that see ``privacy``. No numbers were compared.

    Args:
        alone: weight of the shared model's loss by itself, which keeps it of use without the other; 0 leaves it to
            learn from mixtures.
    """

    views = ("global", "personal")
    models_per_step = 2
    leaves_out_unknown = True
    one_answer = "it mixes the answers of two models"
    adds_up = True

    def __init__(self, *args: Any, alone: NonNegativeFloat = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_parts(self.model, "algorithm=moe", "encoder")
        self.alone = alone
        self.twin = deepcopy(self.model)
        encoder: Any = self.model.get_submodule("encoder")
        self.gate = nn.Linear(encoder.out_channels[-1], 1, device="meta").to_empty(device="cpu")  # draws no numbers
        for parameter in self.gate.parameters():
            nn.init.zeros_(parameter)

    def loss(self, batch: Batch) -> Tensor:
        """Task losses of the mixture and of the shared model; each is told by itself."""
        answers, mixture = self._mixture.both(self.normalize(batch["image"]))
        shared, own = self.task_loss(answers, batch), self.task_loss(mixture, batch)
        self.note(shared)
        self.note(own, PERSONAL_LOSS)
        return own + self.alone * shared if self.alone else own

    def network(self, view: str) -> nn.Module:
        """The shared model, or the mixture."""
        return self._mixture if view == "personal" else self.model

    @property
    def _mixture(self) -> Mixture:
        return Mixture(self.model, self.twin, self.gate, self.recipe.activation)


class Mixture(nn.Module):
    """A network whose probabilities are those of two networks, mixed by a gate that sees the first one's features.

    Args:
        shared: with an ``encoder``.
        own: answers as it does.
        gate: of features (B, C) the score (B, 1) of the shared network.
        activation: of the regions.
    """

    def __init__(self, shared: nn.Module, own: nn.Module, gate: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.shared, self.own, self.gate = shared, own, gate
        self.activation = activation

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, ...) normalised images -> logits of the shared network, and of the mixture."""
        logits, deepest = with_deepest(self.shared, images)
        score = self.gate(deepest.detach().flatten(2).mean(dim=2))
        return logits, mixed_logits(logits, self.own(images), score, self.activation)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) normalised images -> logits of the mixture."""
        return self.both(images)[1]
