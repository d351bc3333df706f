"""Scaling of magnetic resonance slices as LC-Fed's prostate data were prepared."""

from torch import Tensor


def scale_slices(slices: Tensor, quantile: float = 0.99) -> Tensor:
    """(clip(v, lo, hi) - lo) / hi of each slice; the divisor is hi, as released.

    Args:
        slices: (..., H, W), non-negative intensities; lo is the smallest of a slice's n values, hi the one at place
            floor(quantile * n) in ascending order.
        quantile: in [0, 1).

    Returns:
        Of the same shape, at most 1 - lo / hi; a slice of zeros stays zero.

    Raises:
        ValueError: if the quantile is outside of [0, 1).
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile = {quantile}: must lie in [0, 1)")
    ascending = slices.flatten(-2).sort(dim=-1).values
    lowest = ascending[..., :1, None]
    highest = ascending[..., int(quantile * ascending.shape[-1]), None, None]
    scaled = (slices.clamp(lowest, highest) - lowest) / highest
    return scaled.masked_fill(highest == 0, 0.0)
