"""From logits to probabilities, and from probabilities to masks."""

from typing import Literal

import torch
from torch import Tensor

Activation = Literal["sigmoid", "softmax"]


def probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """Turn the network's output into one probability per region.

    Args:
        logits: (B, R, H, W) for "sigmoid"; (B, R + 1, H, W), background first, for "softmax".
        activation: "sigmoid" for regions that may nest or overlap, "softmax" for exclusive ones.

    Returns:
        (B, R, H, W) float32 in [0, 1]; with "softmax" the background's probability is what is missing to 1.

    Raises:
        ValueError: an unknown activation.
    """
    if activation == "sigmoid":
        return logits.float().sigmoid()
    if activation == "softmax":
        return logits.float().softmax(dim=1)[:, 1:]
    raise ValueError(f"activation must be 'sigmoid' or 'softmax', got {activation!r}")


def decide(probabilities: Tensor, activation: Activation) -> Tensor:
    """Turn probabilities into masks.

    Args:
        probabilities: (B, R, H, W) in [0, 1].
        activation: as above. "sigmoid" takes a region where its probability exceeds 1/2; "softmax" takes the most
            probable of background and regions (the first of equals, so background wins a tie).

    Returns:
        (B, R, H, W) bool.

    Raises:
        ValueError: an unknown activation.
    """
    if activation == "sigmoid":
        return probabilities > 0.5
    if activation == "softmax":
        background = 1 - probabilities.sum(dim=1, keepdim=True)
        winner = torch.cat([background, probabilities], dim=1).argmax(dim=1, keepdim=True)
        regions = torch.arange(1, probabilities.shape[1] + 1, device=probabilities.device)
        return winner == regions.view(1, -1, *[1] * (probabilities.ndim - 2))
    raise ValueError(f"activation must be 'sigmoid' or 'softmax', got {activation!r}")
