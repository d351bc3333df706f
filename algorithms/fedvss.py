"""FedVSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.adaptation import Activation
from fedseg.federation.contract import Batch
from fedseg.federation.ranges import Fixed
from fedseg.federation.state import Tensors

LOOK = 1e-2  # root mean square of the change by which the worst direction is looked for
LEAST = 1e-30


class FedVSS(FedAvg):
    """FedVSS (Zhu, Luo, MICCAI 2022): virtual images, of which the local model is unsure and the received one sure.

    A local step on images x with masks y minimises L(f(x), y) + generalise KL(f(x) || f(x + r)) + align L(f(x'), y). r
    is the change of length `radius` along which the local model's answer f changes most, by one power iteration as in
    virtual adversarial training (Miyato et al., 2018); the first answer does not learn. x' is x after `passes` steps of
    that length down the gradient of the received model's loss, cut to [0, 1]: it is surer of y there. Masks stay as
    they are, since nothing is moved. Virtual images are normalised by their batch's statistics and leave no trace in
    running ones. After the abstract, which says what the images are for, and not how they are made; no code could be
    read. A step has five passes forward and back with `passes` 1.

    Args:
        generalise: weight of the images that the local model is unsure of.
        align: weight of the images that the received model is sure of; with both 0 it is FedAvg.
        radius: length of a change as the root of its mean square, of images in [0, 1].
        passes: steps towards what the received model is sure of.
    """

    leaves_out_unknown = True
    one_answer = "it compares answers to virtual images"

    def __init__(
        self,
        *args: Any,
        generalise: NonNegativeFloat = 1.0,
        align: NonNegativeFloat = 1.0,
        radius: NonNegativeFloat = 0.03,
        passes: Fixed[PositiveInt] = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.generalise, self.align = generalise, align
        self.radius, self.passes = radius, passes

    def loss(self, batch: Batch) -> Tensor:
        """Task loss, and those of the virtual images."""
        if not (self.generalise or self.align):
            return super().loss(batch)
        images, activation = batch["image"], self.recipe.activation
        logits = self.model(self.normalize(images))
        loss = self.task_loss(logits, batch)
        if self.generalise:
            unsure = images + self.unsure(images, logits.detach())
            loss = loss + self.generalise * divergence(logits.detach(), self.virtual(unsure), activation)
        if self.align:
            loss = loss + self.align * self.task_loss(self.virtual(self.sure(batch)), batch)
        return loss

    def unsure(self, images: Tensor, answer: Tensor) -> Tensor:
        """The change of images (B, C, ...) along which the local model leaves its answer fastest."""
        direction = of_length(torch.randn_like(images), LOOK).requires_grad_()
        apart = divergence(answer, self.virtual(images + direction), self.recipe.activation)
        return of_length(torch.autograd.grad(apart, direction)[0], self.radius)

    def sure(self, batch: Batch) -> Tensor:
        """Images of whose masks the received model is surer than of the batch's."""
        images: Tensor = batch["image"]
        for _ in range(self.passes):
            images = images.detach().requires_grad_()
            loss = self.task_loss(self.virtual(images, self.reference), batch)
            images = images - of_length(torch.autograd.grad(loss, images)[0], self.radius)
            images = images.detach().clamp(0, 1)
        return images

    def virtual(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits of the network, or with other weights, that leave its running statistics as they are."""
        buffers: Tensors = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = functional_call(self.model, {**buffers, **(weights or {})}, (self.normalize(images),))
        return logits


def of_length(changes: Tensor, radius: float) -> Tensor:
    """Each image's change (B, C, ...), with that root of its mean square; 0 stays 0."""
    flat = changes.float().flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=LEAST)  # squares of small gradients would vanish
    root = flat.square().mean(dim=1, keepdim=True).sqrt().clamp(min=LEAST)
    return (radius * flat / root).view_as(changes)


def divergence(first: Tensor, second: Tensor, activation: Activation) -> Tensor:
    """KL divergence of the second logits (B, C, ...) from the first, the mean over images and pixels.

    With the sigmoid every region is a matter of two, and the mean is over regions, too.
    """
    first, second = first.float(), second.float()
    if activation == "softmax":
        a, b = functional.log_softmax(first, dim=1), functional.log_softmax(second, dim=1)
        return (a.exp() * (a - b)).sum(dim=1).mean()
    there = first.sigmoid() * (functional.logsigmoid(first) - functional.logsigmoid(second))
    not_there = (-first).sigmoid() * (functional.logsigmoid(-first) - functional.logsigmoid(-second))
    return (there + not_there).mean()
