"""How complex the images of a site are, in two numbers that it can tell."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedseg.federation.state import Tensors

BINS = 256


def complexity(batches: Iterable[Tensor]) -> Tensors:
    """Mean entropy of the images' histograms, and the variance of the images' means.

    Args:
        batches: (B, C, ...) in [0, 1].

    Returns:
        ``entropy``, in bits, the mean over channels and images; ``spread``; nothing of no images.
    """
    entropies, means = [], []
    for images in batches:
        entropies.append(histogram_entropy(images))
        means.append(images.double().mean(dim=tuple(range(1, images.ndim))))
    if not means:
        return {}
    return {"entropy": torch.cat(entropies).mean(), "spread": torch.cat(means).var(correction=0)}


def histogram_entropy(images: Tensor) -> Tensor:
    """(B, C, ...) in [0, 1] -> (B,) Shannon entropy of grey values in 256 bins, in bits, mean over channels."""
    bins = (images * BINS).long().clamp(0, BINS - 1).flatten(2)
    counts = torch.zeros(*bins.shape[:2], BINS, dtype=torch.float64, device=images.device)
    counts.scatter_add_(-1, bins, torch.ones_like(bins, dtype=torch.float64))
    nats: Tensor = torch.special.entr(counts / bins.shape[-1]).sum(dim=-1)
    return nats.mean(dim=1) / math.log(2)
