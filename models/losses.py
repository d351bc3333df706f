"""Losses on logits and region masks.

Dice is segmentation_models_pytorch's soft Dice: per region over all pixels of the batch, then the mean over regions.
It leaves out (counts as loss 0, gradient 0) a region without a true pixel in the batch: false positives there are
punished by the cross entropy alone, so prefer the sums on data with many empty masks. Background is no region and has
no Dice term; cross entropies see every pixel.

Where a label is not known (``known`` is 0 there), a region's pixel is in no sum: Dice sums run over known pixels,
cross entropies are means over them. Under softmax a pixel of which only some regions are known is not nothing: where
livers were not outlined, a pixel outside of all tumours is liver or background. Its cross entropy is that of this union
(the marginal loss of Shi et al., Medical Image Analysis 2021). With nothing known a loss is 0, and so is its gradient.
"""

from typing import Literal, Protocol, get_args

import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fedseg.models.dice import soft_dice_loss
from fedseg.models.heads import Activation, probabilities

LossName = Literal["dice_bce", "dice", "smooth_dice", "bce", "focal", "dice_ce", "ce"]


class Loss(Protocol):
    """Of logits (B, R or R + 1, H, W) and masks (B, R, H, W) in {0, 1}; a scalar.

    Where labels are not known, ``known`` (B, R, H, W) is 0, else 1: what the mask says there makes no difference.
    """

    def __call__(self, logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss."""


def binary_cross_entropy(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean over images, regions and pixels; logits and mask (B, R, H, W)."""
    if known is None:
        return F.binary_cross_entropy_with_logits(logits.float(), mask)
    terms = F.binary_cross_entropy_with_logits(logits.float(), mask * known, reduction="none")
    return _mean(terms, known)


def cross_entropy(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean over images and pixels; logits (B, R + 1, H, W), background first; mask (B, R, H, W) of disjoint regions."""
    if known is not None:
        return _marginal_cross_entropy(logits, mask, known)
    background = 1 - mask.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits.float(), torch.cat([background, mask], dim=1).argmax(dim=1))


def _marginal_cross_entropy(logits: Tensor, mask: Tensor, known: Tensor) -> Tensor:
    """Mean over pixels of which some region is known: of the region that is there, or of all that is not ruled out."""
    mask = mask * known
    elsewhere = mask.sum(dim=1, keepdim=True) == 0  # no known region is here
    possible = torch.cat([elsewhere, torch.where(elsewhere, known == 0, mask > 0)], dim=1)
    weight = known.amax(dim=1)
    possible = possible | (weight == 0).unsqueeze(1)
    scores = logits.float().log_softmax(dim=1).masked_fill(~possible, torch.finfo(torch.float32).min)
    return _mean(-scores.logsumexp(dim=1), weight)


def focal(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """Binary focal loss (Lin et al., ICCV 2017) with gamma 2 and no class weight; logits and mask (B, R, H, W)."""
    if known is None:
        loss: Tensor = FocalLoss(mode="multilabel", gamma=2.0)(logits.float(), mask)
        return loss
    terms = F.binary_cross_entropy_with_logits(logits.float(), mask * known, reduction="none")
    return _mean((1 - torch.exp(-terms)) ** 2 * terms, known)


def soft_dice(activation: Activation) -> Loss:
    """Build 1 - soft Dice, mean over regions, in [0, 1]."""
    criterion = DiceLoss(mode="multilabel", from_logits=False)

    def loss(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        predicted = probabilities(logits, activation)
        if known is not None:
            predicted, mask = predicted * known, mask * known
        value: Tensor = criterion(predicted, mask)
        return value

    return loss


def smooth_dice(activation: Activation) -> Loss:
    """Build 1 - soft Dice that is smoothed by 1e-5; the background is a class of its own under softmax.

    A class that is nowhere in the batch has a term, too: it costs nearly 1 while anything is predicted to be it.
    """

    def loss(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        if activation == "sigmoid":
            return soft_dice_loss(logits.float().sigmoid(), mask, known=known)
        if known is not None:  # the background is known where all regions are
            known = torch.cat([known.amin(dim=1, keepdim=True), known], dim=1)
        background = 1 - mask.sum(dim=1, keepdim=True)
        return soft_dice_loss(logits.float().softmax(dim=1), torch.cat([background, mask], dim=1), known=known)

    return loss


def _mean(terms: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0 where that is nothing."""
    return (terms * known).sum() / known.sum().clamp(min=1)


def build_loss(name: LossName, activation: Activation) -> Loss:
    """Build a loss from its name.

    Args:
        name: "dice", "smooth_dice", "bce", "focal" or "dice_bce" (a sum) for sigmoid outputs; "dice", "smooth_dice",
            "ce" or "dice_ce" for softmax.
        activation: of the regions; "softmax" networks have one output more, the background, first.

    Returns:
        See `Loss`.

    Raises:
        ValueError: an unknown name, or one that does not fit the activation.
    """
    dice = soft_dice(activation)
    smooth, bce, ce = smooth_dice(activation), binary_cross_entropy, cross_entropy
    fitting: dict[Activation, dict[str, tuple[Loss, ...]]] = {
        "sigmoid": {
            "dice_bce": (dice, bce),
            "dice": (dice,),
            "smooth_dice": (smooth,),
            "bce": (bce,),
            "focal": (focal,),
        },
        "softmax": {"dice_ce": (dice, ce), "dice": (dice,), "smooth_dice": (smooth,), "ce": (ce,)},
    }
    if name not in get_args(LossName):
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(get_args(LossName))}")
    if name not in fitting[activation]:
        kind = "exclusive regions (softmax)" if activation == "softmax" else "regions that may overlap (sigmoid)"
        raise ValueError(f"loss {name!r} does not fit {kind}; use one of {', '.join(fitting[activation])}")
    terms = fitting[activation][name]

    def loss(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        return torch.stack([term(logits, mask, known) for term in terms]).sum()

    return loss
