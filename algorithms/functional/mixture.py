"""The weight of the mixture of a personal and a shared model (APFL: Deng, Kamani, Mahdavi, 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedseg.algorithms.functional.trajectory import check_fraction

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
