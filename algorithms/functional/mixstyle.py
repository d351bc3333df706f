"""MixStyle (Zhou, Yang, Qiao, Xiang, ICLR 2021): images of a batch take some of each other's statistics."""

import torch
from torch import Tensor

EPS = 1e-6  # of the paper's program, added to a variance


def mixed(features: Tensor, probability: float, alpha: float) -> Tensor:
    """Feature maps, or images, whose means and deviations are mixed with those of another one of the batch.

    Statistics are of one image and channel, over its pixels, and gradients do not go through them. All is drawn from
    PyTorch's global generator: whether the batch is mixed at all, who is mixed with whom, and how much.

    Args:
        features: (B, C, ...).
        probability: that the batch is mixed; at 0 nothing is drawn.
        alpha: an image keeps a share drawn from Beta(alpha, alpha) of its own statistics.
    """
    if not probability or torch.rand(()) >= probability:
        return features
    count, pixels = len(features), tuple(range(2, features.ndim))
    partner = torch.randperm(count).to(features.device)
    own = torch.distributions.Beta(alpha, alpha).sample((count, *[1] * (features.ndim - 1))).to(features.device)
    values = features.float()
    with torch.no_grad():
        variance, mean = torch.var_mean(values, dim=pixels, keepdim=True, correction=0)
        deviation = (variance + EPS).sqrt()
        new_mean, new_deviation = (torch.lerp(x[partner], x, own) for x in (mean, deviation))
    return ((values - mean) / deviation * new_deviation + new_mean).to(features.dtype)
