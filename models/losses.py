"""Losses on logits and region masks.

Dice is segmentation_models_pytorch's soft Dice: per region over all pixels of the batch, then the mean over regions.
It leaves out (counts as loss 0, gradient 0) a region without a true pixel in the batch: false positives there are
punished by the cross entropy alone, so prefer the sums on data with many empty masks. Background is no region and has
no Dice term; cross entropies see every pixel.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.heads import Activation, probabilities

LossName = Literal["dice_bce", "dice", "bce", "focal", "dice_ce", "ce"]
Loss = Callable[[Tensor, Tensor], Tensor]


def binary_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over images, regions and pixels; logits and mask (B, R, H, W)."""
    return F.binary_cross_entropy_with_logits(logits.float(), mask)


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over images and pixels; logits (B, R + 1, H, W), background first; mask (B, R, H, W) of disjoint regions."""
    background = 1 - mask.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits.float(), torch.cat([background, mask], dim=1).argmax(dim=1))


def focal(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary focal loss (Lin et al., ICCV 2017) with gamma 2 and no class weight; logits and mask (B, R, H, W)."""
    loss: Tensor = FocalLoss(mode="multilabel", gamma=2.0)(logits.float(), mask)
    return loss


def soft_dice(activation: Activation) -> Loss:
    """Build 1 - soft Dice, mean over regions, in [0, 1]."""
    criterion = DiceLoss(mode="multilabel", from_logits=False)

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        value: Tensor = criterion(probabilities(logits, activation), mask)
        return value

    return loss


def build_loss(name: LossName, activation: Activation) -> Loss:
    """Build a loss from its name.

    Args:
        name: "dice", "bce", "focal" or "dice_bce" (a sum) for sigmoid outputs; "dice", "ce" or "dice_ce" for softmax.
        activation: of the regions; "softmax" networks have one output more, the background, first.

    Returns:
        Function of logits (B, R or R + 1, H, W) and masks (B, R, H, W) float in {0, 1}; a scalar.

    Raises:
        ValueError: an unknown name, or one that does not fit the activation.
    """
    dice = soft_dice(activation)
    bce, ce = binary_cross_entropy, cross_entropy
    fitting: dict[Activation, dict[str, tuple[Loss, ...]]] = {
        "sigmoid": {"dice_bce": (dice, bce), "dice": (dice,), "bce": (bce,), "focal": (focal,)},
        "softmax": {"dice_ce": (dice, ce), "dice": (dice,), "ce": (ce,)},
    }
    if name not in get_args(LossName):
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(get_args(LossName))}")
    if name not in fitting[activation]:
        kind = "exclusive regions (softmax)" if activation == "softmax" else "regions that may overlap (sigmoid)"
        raise ValueError(f"loss {name!r} does not fit {kind}; use one of {', '.join(fitting[activation])}")
    terms = fitting[activation][name]

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([term(logits, mask) for term in terms]).sum()

    return loss
