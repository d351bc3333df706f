"""What a stock Lightning Trainer asks of a method, beside training: a forward pass, validating, testing, predicting."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedseg.algorithms.recipe import Recipe
from fedseg.federation.contract import Batch
from fedseg.models.heads import decide, probabilities
from fedseg.models.losses import Answer, supervised

View = str
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory layout, by number of axes of images or volumes."""


class StockModule(pl.LightningModule):
    """The steps of `Trainer.validate`, `test` and `predict`, with the model that a site would use.

    That is its personal model where the method has one, else the global one. The scores are a quick look; those that a
    run reports come case by case from `fedseg.evaluation`.
    """

    recipe: Recipe
    views: tuple[View, ...]

    @abstractmethod
    def network(self, view: View) -> nn.Module:
        """The network that answers for a view."""

    @property
    @abstractmethod
    def preparation(self) -> nn.Module:
        """What happens to images in [0, 1] before the network, as a module without entries in `state_dict()`."""

    def task_loss(self, logits: Answer, batch: Batch) -> Tensor:
        """The recipe's loss of what a network answers for a batch, over the pixels whose label is known."""
        return supervised(self.recipe.loss, logits, batch["mask"], batch.get("known"))

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, ...) images in [0, 1] -> the network's input, in the chosen memory layout."""
        return self.in_layout(self.preparation.to(images.device)(images))

    def in_layout(self, images: Tensor) -> Tensor:
        """Images in the chosen memory layout."""
        return images.contiguous(memory_format=LAST[images.ndim]) if self.recipe.training.channels_last else images

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, C, ...) images in [0, 1], of any size where patches are cut -> logits of the same size."""
        window = self.recipe.window
        found: Tensor = (
            network(self.normalize(images))
            if window is None
            else window(lambda patches: network(self.normalize(patches)), images)
        )
        return found

    @torch.no_grad()
    def predict(self, images: Tensor, view: View) -> Tensor:
        """(B, C, ...) images in [0, 1] -> (B, R, ...) probabilities of the regions; nothing is changed."""
        return self.answers(self.network(view), images)

    @torch.no_grad()
    def answers(self, network: nn.Module, images: Tensor) -> Tensor:
        """What a network of this method makes of images, as `predict` does of a view's."""
        training = network.training
        network.eval()
        logits = self.logits(network, images)
        network.train(training)
        return probabilities(logits, self.recipe.activation)

    @property
    def own_view(self) -> View:
        """The view that serves a site best: its personal model, where there is one.

        Raises:
            ValueError: the method has no model that segments.
        """
        if not self.views:
            raise ValueError(f"{type(self).__name__} pre-trains an encoder; it has no model that segments")
        return "personal" if "personal" in self.views else self.views[0]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) images in [0, 1] -> (B, outputs, ...) logits; of exclusive regions the background is first."""
        return self.logits(self.network(self.own_view), images)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_dice``."""
        self._score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_dice``."""
        self._score("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(B, R, H, W) probabilities of the regions."""
        return self.predict(batch["image"], self.own_view)

    def _score(self, stage: str, batch: Batch) -> None:
        logits = self(batch["image"])
        self.log(f"{stage}_loss", self.task_loss(logits, batch), batch_size=len(logits))
        answer = decide(probabilities(logits, self.recipe.activation), self.recipe.activation)
        defined = dice(answer, batch["mask"], batch.get("known"))
        if len(defined):
            self.log(f"{stage}_dice", defined.mean(), batch_size=len(defined))


def dice(answer: Tensor, mask: Tensor, known: Any = None) -> Tensor:
    """Dice of every image and region in which there is anything.

    Args:
        answer: (B, R, ...) bool.
        mask: of the same shape, {0, 1}.
        known: of the same shape: 0 where the label is not known; None where all are.

    Returns:
        (N,) in [0, 1]; pairs of which both sides are empty are left out.
    """
    weight = torch.ones_like(mask) if known is None else known
    overlap = (answer * mask * weight).flatten(2).sum(dim=2)
    size = ((answer + mask) * weight).flatten(2).sum(dim=2)
    return (2 * overlap / size.clamp(min=1))[size > 0]
