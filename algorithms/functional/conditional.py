"""What networks say of regions that a site did not annotate, given that none of the annotated ones is there."""

from __future__ import annotations

import torch
from torch import Tensor

from fedseg.models.heads import Activation

SMALL = 1e-5  # added to denominators


def conditional_dice_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, known: Tensor, activation: Activation, temperature: float
) -> Tensor:
    """1 - soft Dice of a student's and a teacher's chances of what was not annotated.

    Under "softmax" chances are conditional: those of the background and of each region without annotation, over their
    sum. Pixels count where neither the mask nor the teacher's decision is an annotated region. Regions that may overlap
    ("sigmoid") do not exclude each other: their own chances are compared, over all pixels. Sums run over the images,
    the mean over what is compared.

    Args:
        student: logits (B, R + 1, ...), background first, or (B, R, ...).
        teacher: of the same images.
        mask: (B, R, ...) in {0, 1}.
        known: of the same shape, 0 where a label is not known. A region is annotated in an image where any of its
            pixels is known; a pixel of which nothing is known does not count.
        activation: of both.
        temperature: divides the logits.

    Returns:
        A scalar, 0 where all regions of all images are annotated.
    """
    annotated = known.flatten(2).amax(dim=2) > 0  # (B, R)
    compared, counts = ~annotated, known.amax(dim=1, keepdim=True) > 0
    chances = [(logits.float() / temperature).sigmoid() for logits in (student, teacher)]
    if activation == "softmax":
        own = torch.cat([annotated.new_zeros(len(annotated), 1), annotated], dim=1)
        compared = torch.cat([compared.any(dim=1, keepdim=True), compared], dim=1)
        chances = [_given_none_of(own, (logits.float() / temperature).softmax(dim=1)) for logits in (student, teacher)]
        decided = own.gather(1, teacher.argmax(dim=1).flatten(1)).view(counts.shape)
        counts = counts & ~decided & ((mask * known).amax(dim=1, keepdim=True) == 0)
    weights = _over_pixels(compared, mask) & counts
    told, taught = (chance * weights for chance in chances)
    axes = [axis for axis in range(mask.ndim) if axis != 1]
    dice = 2 * (told * taught).sum(axes) / (told.sum(axes) + taught.sum(axes) + SMALL)
    terms = (1 - dice)[compared.any(dim=0)]
    return terms.mean() if len(terms) else student.sum() * 0


def _given_none_of(own: Tensor, chances: Tensor) -> Tensor:
    """Chances (B, C, ...) given that it is none of the classes own (B, C)."""
    own = _over_pixels(own, chances)
    return chances * ~own / (1 - (chances * own).sum(dim=1, keepdim=True) + SMALL)


def _over_pixels(flags: Tensor, like: Tensor) -> Tensor:
    """(B, C) as (B, C, 1, ...), to be spread over the pixels of another tensor."""
    return flags.view(*flags.shape, *[1] * (like.ndim - 2))
