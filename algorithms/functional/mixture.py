"""Mixtures of two models: their weight (APFL: Deng, Kamani, Mahdavi, 2020), and logits of mixed probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedseg.algorithms.functional.trajectory import check_fraction
from fedseg.models.heads import Activation

SHRINKAGE = 0.02  # the authors' program pulls alpha to zero with this factor


def alpha_step(
    alpha: float,
    personal: Sequence[Tensor],
    local: Sequence[Tensor],
    gradient_personal: Sequence[Tensor],
    gradient_local: Sequence[Tensor],
    eta: float,
) -> float:
    """One step of the mixing weight.

    alpha <- clip(alpha - eta (<w_p - w_l, alpha g_p + (1 - alpha) g_l> + 0.02 alpha), 0, 1)

    Args:
        alpha: weight of the personal model, in [0, 1].
        personal: parameters w_p.
        local: the shared model's parameters w_l at this site, in the same order.
        gradient_personal: g_p, gradients of the personal parameters.
        gradient_local: g_l, gradients of the shared ones.
        eta: step size.

    Raises:
        ValueError: alpha is out of range, the four lists differ in length, or hold other shapes.
    """
    products = []
    check_fraction("alpha", alpha)
    for w_p, w_l, g_p, g_l in zip(personal, local, gradient_personal, gradient_local, strict=True):
        if not w_p.shape == w_l.shape == g_p.shape == g_l.shape:
            raise ValueError(f"the shapes {[tuple(t.shape) for t in (w_p, w_l, g_p, g_l)]} should be one")
        gradient = alpha * g_p.detach() + (1.0 - alpha) * g_l.detach()
        products.append(((w_p.detach() - w_l.detach()) * gradient).sum())
    slope = float(torch.stack(products).sum()) + SHRINKAGE * alpha
    return min(max(alpha - eta * slope, 0.0), 1.0)


def mixed_logits(one: Tensor, other: Tensor, score: Tensor, activation: Activation) -> Tensor:
    """Logits of ``g p_one + (1 - g) p_other`` with g = sigmoid(score), p being what `models.heads` makes of logits.

    log p = g log p_one + (1 - g) log p_other + log(g e^((1 - g) d) + (1 - g) e^(-g d)), d = log p_one - log p_other.
    The first two terms mix the logits themselves, so that a gate of 1 or 0 gives those of one expert, bit for bit, and
    its gradients; nothing is clamped.

    Args:
        one: (B, C, ...) logits.
        other: of the same shape.
        score: (B,) of the images; finite.
        activation: of the regions.

    Returns:
        (B, C, ...) in single precision at least; with "softmax" up to a constant that all channels share.
    """
    wide = torch.promote_types(one.dtype, torch.float32)
    one, other, score = one.to(wide), other.to(wide), score.to(wide).view(-1, *[1] * (one.ndim - 1))
    gate, rest = score.sigmoid(), (-score).sigmoid()

    def convexity(ahead: Tensor) -> Tensor:
        return torch.logaddexp(logsigmoid(score) + rest * ahead, logsigmoid(-score) - gate * ahead)

    between = gate * one + rest * other
    if activation == "softmax":
        return between + convexity(one.log_softmax(dim=1) - other.log_softmax(dim=1))
    there = convexity(logsigmoid(one) - logsigmoid(other))
    return between + there - convexity(logsigmoid(-one) - logsigmoid(-other))
