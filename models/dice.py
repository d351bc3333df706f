"""Soft Dice loss in the form that the programs of FedDG, LC-Fed and IOP-FL train with."""

from torch import Tensor


def soft_dice_loss(
    probabilities: Tensor, target: Tensor, smoothing: float = 1e-5, known: Tensor | None = None
) -> Tensor:
    """1 - mean over channels of (2 sum s g + e) / (sum s + sum g + e); sums run over the batch and all pixels.

    Args:
        probabilities: s, (B, R, ...), in [0, 1].
        target: g, of the same shape, {0, 1}.
        smoothing: e.
        known: of the same shape, {0, 1}; sums run over pixels where it is 1. None: all.

    Returns:
        Scalar in [0, 1]. A channel that is empty in both counts as perfect.

    Raises:
        ValueError: if the shapes differ.
    """
    if probabilities.shape != target.shape:
        raise ValueError(f"probabilities {tuple(probabilities.shape)} and target {tuple(target.shape)} differ in shape")
    target = target.to(probabilities.dtype)
    if known is not None:
        probabilities, target = probabilities * known, target * known
    pixels = [axis for axis in range(probabilities.ndim) if axis != 1]
    overlap = (probabilities * target).sum(pixels)
    size = probabilities.sum(pixels) + target.sum(pixels)
    return 1.0 - ((2.0 * overlap + smoothing) / (size + smoothing)).mean()
