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

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from pydantic import NonNegativeFloat
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, JaccardLoss, LovaszLoss, MCCLoss, TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fedseg.models.dice import soft_dice_loss
from fedseg.models.heads import Activation, probabilities

LossName = Literal[
    "dice_bce", "dice", "smooth_dice", "bce", "focal", "dice_ce", "ce", "tversky", "jaccard", "lovasz", "mcc"
]
Criterion = Callable[[Tensor, Tensor], Tensor]
"""Of predictions and masks of one region, both (1, 1, N); a scalar."""


Answer = Tensor | tuple[Tensor, ...]
"""What a network says in training: logits, or those of its head and of auxiliary ones, from fine to coarse."""


class Loss(Protocol):
    """Of logits (B, R or R + 1, H, W) and masks (B, R, H, W) in {0, 1}; a scalar.

    Where labels are not known, ``known`` (B, R, H, W) is 0, else 1: what the mask says there makes no difference.
    """

    def __call__(self, logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss."""


def supervised(loss: Loss, answer: Answer, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """The loss of a network's answer; of several the weighted mean (deep supervision).

    Weights are 1, 1/2, 1/4, ... over their sum, from fine to coarse, as in nnU-Net (Isensee et al., Nature Methods
    2021). A coarse answer is held against the nearest pixels of the mask.

    Args:
        loss: of logits and masks of one size.
        answer: logits of the mask's size, or a tuple of these and of coarser ones.
        mask: (B, R, ...) in {0, 1}.
        known: of the same shape, 0 where a label is not known.
    """
    if isinstance(answer, Tensor):
        return loss(answer, mask, known)
    terms = [
        0.5**place
        * loss(logits, _nearest(mask, logits.shape[2:]), None if known is None else _nearest(known, logits.shape[2:]))
        for place, logits in enumerate(answer)
    ]
    return torch.stack(terms).sum() / sum(0.5**place for place in range(len(terms)))


def _nearest(mask: Tensor, size: Sequence[int]) -> Tensor:
    return mask if mask.shape[2:] == tuple(size) else F.interpolate(mask, tuple(size), mode="nearest-exact")


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
    """Mean over pixels of which some region is known."""
    return _mean(_marginal_terms(logits, mask * known, known), known.amax(dim=1))


def _marginal_terms(logits: Tensor, mask: Tensor, known: Tensor) -> Tensor:
    """Of each pixel: of the region that is there, or of all that is not ruled out."""
    elsewhere = mask.sum(dim=1, keepdim=True) == 0  # no known region is here
    possible = torch.cat([elsewhere, torch.where(elsewhere, known == 0, mask > 0)], dim=1)
    possible = possible | (known.amax(dim=1) == 0).unsqueeze(1)
    scores = logits.float().log_softmax(dim=1).masked_fill(~possible, torch.finfo(torch.float32).min)
    return -scores.logsumexp(dim=1)


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

    def of_regions(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        return soft_dice_loss(logits.float().sigmoid(), mask, known=known)

    def of_classes(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        return soft_dice_loss(logits.float().softmax(dim=1), mask, known=known)

    return of_regions if activation == "sigmoid" else _of_all_classes(of_classes)


def _mean(terms: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0 where that is nothing."""
    return (terms * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class OverRegions:
    """A loss of each region alone, over all pixels of the batch whose label is known; then the mean over regions.

    Attributes:
        criterion: of one region; it may be none of a mean over pixels, so that pixels are left out and not set to 0.
        predicted: logits -> (B, R, H, W), a channel for each of the regions.
        weights: of the regions in the mean; None counts all alike.
    """

    criterion: Criterion
    predicted: Callable[[Tensor], Tensor]
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss."""
        found = self.predicted(logits)
        terms = [
            self._of_region(found[:, r], mask[:, r], None if known is None else known[:, r])
            for r in range(mask.shape[1])
        ]
        weights = torch.ones(len(terms)) if self.weights is None else self.weights
        weights = weights.to(found.device)
        return (torch.stack(terms) * weights).sum() / weights.sum()

    def _of_region(self, predicted: Tensor, mask: Tensor, known: Tensor | None) -> Tensor:
        seen = slice(None) if known is None else known.flatten() > 0
        predicted, mask = predicted.flatten()[seen], mask.flatten()[seen]
        if not len(mask):
            return predicted.sum()  # nothing is known: 0, and so is its gradient
        return self.criterion(predicted.view(1, 1, -1), mask.view(1, 1, -1))


def tversky(*, alpha: NonNegativeFloat = 0.5, beta: NonNegativeFloat = 0.5) -> Criterion:
    """1 - Tversky index (Salehi et al., MLMI 2017), which says what missed and invented pixels cost; absent regions 0.

    Args:
        alpha: cost of a pixel that is invented (false positive); 0.5 and 0.5 are Dice.
        beta: cost of a pixel that is missed (false negative).
    """
    if not alpha + beta:
        raise ValueError(
            "training.loss_options: alpha and beta are 0, so that nothing costs; make one of them positive"
        )
    made: Criterion = TverskyLoss("binary", from_logits=False, alpha=alpha, beta=beta)
    return made


def jaccard() -> Criterion:
    """1 - soft Jaccard index (intersection over union); a region that is absent from the batch counts as 0."""
    made: Criterion = JaccardLoss("binary", from_logits=False)
    return made


def mcc() -> Criterion:
    """1 - Matthews correlation (Abhishek and Hamarneh, ISBI 2021), in which background counts as much as the region."""
    made: Criterion = MCCLoss()
    return made


def lovasz() -> Criterion:
    """Lovasz extension of the Jaccard loss (Berman et al., CVPR 2018): hinge on logits, or of softmax probabilities.

    Of exclusive regions one that is absent from the batch counts as 0.
    """
    made: Criterion = LovaszLoss("binary")
    return made


LOSSES: dict[str, Callable[..., Criterion]] = {"tversky": tversky, "jaccard": jaccard, "lovasz": lovasz, "mcc": mcc}
"""Losses of one region, with settings of their own."""


def _lovasz_softmax(predicted: Tensor, mask: Tensor) -> Tensor:
    """The class's term of Lovasz-Softmax, as the hinge of a number that lies as far off the right side as p errs."""
    value: Tensor = LovaszLoss("binary")(predicted + mask - 1, mask)
    return value * mask.any()


FITTING: dict[Activation, dict[str, tuple[str, ...]]] = {
    "sigmoid": {
        "dice_bce": ("dice", "bce"),
        **{name: (name,) for name in ("dice", "smooth_dice", "bce", "focal", *LOSSES)},
    },
    "softmax": {"dice_ce": ("dice", "ce"), **{name: (name,) for name in ("dice", "smooth_dice", "ce", *LOSSES)}},
}
"""Names of losses, and the terms that they are the sum of."""


def build_loss(
    name: LossName,
    activation: Activation,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
) -> Loss:
    """Build a loss from its name.

    Args:
        name: "dice", "smooth_dice", "bce", "focal" or "dice_bce" (a sum) for sigmoid outputs; "dice", "smooth_dice",
            "ce" or "dice_ce" for softmax; "tversky", "jaccard", "lovasz" and "mcc" for both.
        activation: of the regions; "softmax" networks have one output more, the background, first.
        options: own settings of the loss, by the signatures in `LOSSES`.
        weights: of the background and then of every region, in means over regions and classes; None counts all alike.
            Only the cross entropies and smooth_dice of "softmax" know the background.

    Returns:
        See `Loss`.

    Raises:
        ValueError: an unknown name, or one that does not fit the activation.
    """
    if name not in get_args(LossName):
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(get_args(LossName))}")
    if name not in FITTING[activation]:
        kind = "exclusive regions (softmax)" if activation == "softmax" else "regions that may overlap (sigmoid)"
        raise ValueError(f"loss {name!r} does not fit {kind}; use one of {', '.join(FITTING[activation])}")
    counted = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    known = _alike(activation) if counted is None else _weighted(activation, counted)
    if name in LOSSES:
        known[name] = _of_regions(name, activation, options or {}, counted)
    terms = [known[term] for term in FITTING[activation][name]]

    def loss(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        return torch.stack([term(logits, mask, known) for term in terms]).sum()

    return loss


def _alike(activation: Activation) -> dict[str, Loss]:
    return {
        "dice": soft_dice(activation),
        "smooth_dice": smooth_dice(activation),
        "bce": binary_cross_entropy,
        "focal": focal,
        "ce": cross_entropy,
    }


def _weighted(activation: Activation, weights: Tensor) -> dict[str, Loss]:
    """The same losses with weights of background and regions."""
    shares, regions = partial(probabilities, activation=activation), weights[1:]
    smooth: Loss = OverRegions(soft_dice_loss, shares, regions)
    if activation == "softmax":
        smooth = _of_all_classes(OverRegions(soft_dice_loss, lambda logits: logits.float().softmax(dim=1), weights))
    return {
        "dice": OverRegions(DiceLoss("binary", from_logits=False), shares, regions),
        "smooth_dice": smooth,
        "bce": OverRegions(F.binary_cross_entropy_with_logits, Tensor.float, regions),
        "focal": OverRegions(FocalLoss("binary", gamma=2.0), Tensor.float, regions),
        "ce": partial(_weighted_cross_entropy, weights=weights),
    }


def _of_regions(name: str, activation: Activation, options: Mapping[str, Any], weights: Tensor | None) -> Loss:
    regions = None if weights is None else weights[1:]
    if name == "lovasz" and activation == "sigmoid":
        return OverRegions(LOSSES[name](**options), Tensor.float, regions)
    criterion = _lovasz_softmax if name == "lovasz" else LOSSES[name](**options)
    return OverRegions(criterion, partial(probabilities, activation=activation), regions)


def _of_all_classes(loss: Loss) -> Loss:
    """A loss of regions, of background and regions; the background is known where all regions are."""

    def wrapped(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        if known is not None:
            known = torch.cat([known.amin(dim=1, keepdim=True), known], dim=1)
        return loss(logits, torch.cat([1 - mask.sum(dim=1, keepdim=True), mask], dim=1), known)

    return wrapped


def _weighted_cross_entropy(logits: Tensor, mask: Tensor, known: Tensor | None = None, *, weights: Tensor) -> Tensor:
    """The mean over pixels, each by the weight of what is there; where no known region is, of the background."""
    mask = mask if known is None else mask * known
    classes = torch.cat([1 - mask.sum(dim=1, keepdim=True), mask], dim=1)
    weight = torch.einsum("bc...,c->b...", classes, weights.to(mask.device))
    if known is None:
        terms = F.cross_entropy(logits.float(), classes.argmax(dim=1), reduction="none")
    else:
        terms, weight = _marginal_terms(logits, mask, known), weight * known.amax(dim=1)
    return (terms * weight).sum() / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


class OwnLoss:
    """A loss from outside the suite: a class, made with its settings, or a function that takes them by keyword.

    Args:
        part: of logits and mask, and of `known` if it has an argument of that name, a scalar.
        options: its settings.
        name: for messages.
    """

    def __init__(self, part: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
        self._loss = part(**options) if isinstance(part, type) else partial(part, **options)
        self.name = name
        called = self._loss.forward if isinstance(self._loss, nn.Module) else self._loss
        if not callable(called):
            raise ValueError(f"training.loss={name}: what it makes cannot be called; give it __call__(logits, mask)")
        self.leaves_out_unknown = "known" in inspect.signature(called).parameters

    def __call__(self, logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss."""
        if known is not None and not self.leaves_out_unknown:
            raise ValueError(f"training.loss={self.name} has no argument `known`: it cannot leave out unknown pixels")
        value = self._loss(logits, mask) if known is None else self._loss(logits, mask, known=known)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"training.loss={self.name} returned {what}, not a scalar; take its mean")
        return value
