"""How far a network's answers are from those it is taught."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fedseg.models.heads import Activation

LEAST = 1e-6  # of a probability, so that its logarithm exists


def divergence(logits: Tensor, taught: Tensor, activation: Activation, temperature: float) -> Tensor:
    """T^2 KL(taught^(1/T) || answers^(1/T)) (Hinton, Vinyals, Dean, 2015), the mean over images and pixels.

    With "sigmoid" each region is a distribution of its own, and the mean runs over regions, too. With "softmax" the
    background has what is missing to 1; probabilities that were agreed on pixel by pixel and region by region need not
    sum to 1, and are divided by their sum.

    Args:
        logits: (B, R, ...) or, with "softmax", (B, R + 1, ...), background first.
        taught: (B, R, ...) probabilities of the regions.
        activation: what makes probabilities of logits.
        temperature: T, above 0; a high one compares how sure both are where neither is in doubt.

    Returns:
        A scalar from 0; 0 where the answers are those that are taught.
    """
    taught, logits = taught.float(), logits.float() / temperature
    if activation == "sigmoid":
        told = taught.clamp(LEAST, 1 - LEAST).logit() / temperature  # kept, as its sigmoid may round to 1
        softened = told.sigmoid()
        entropy = binary_cross_entropy_with_logits(told, softened)
        return temperature**2 * (binary_cross_entropy_with_logits(logits, softened) - entropy)
    whole = torch.cat([1 - taught.sum(dim=1, keepdim=True), taught], dim=1).clamp(min=LEAST)
    told = (whole.log() / temperature).log_softmax(dim=1)
    return temperature**2 * (told.exp() * (told - logits.log_softmax(dim=1))).sum(dim=1).mean()
