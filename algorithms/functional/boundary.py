"""Bands along the boundary of structures: just inside (boundary) and just outside (background); FedDG."""

from torch import Tensor
from torch.nn.functional import pad


def inner_band(masks: Tensor, steps: int) -> Tensor:
    """Pixels of a structure that erosion takes away.

    Args:
        masks: (..., H, W), {0, 1} of any dtype.
        steps: iterations of the 4-neighbour cross; what lies outside of the image counts as background.

    Returns:
        (..., H, W) bool: pixels of the structure within city-block distance ``steps`` of the background.

    Raises:
        ValueError: if ``steps`` is negative.
    """
    structure = masks > 0.5
    background = pad(~structure, (1, 1, 1, 1), value=True)
    return structure & grow(background, steps)[..., 1:-1, 1:-1]


def outer_band(masks: Tensor, steps: int) -> Tensor:
    """Pixels around a structure that dilation adds.

    Args:
        masks: (..., H, W), {0, 1} of any dtype.
        steps: iterations of the 4-neighbour cross.

    Returns:
        (..., H, W) bool: background pixels within city-block distance ``steps`` of the structure (a diamond).

    Raises:
        ValueError: if ``steps`` is negative.
    """
    structure = masks > 0.5
    return grow(structure, steps) & ~structure


def grow(masks: Tensor, steps: int) -> Tensor:
    """Binary dilation of (..., H, W) bool masks with the 4-neighbour cross, ``steps`` times."""
    if steps < 0:
        raise ValueError(f"steps = {steps}: a band cannot have a negative width")
    for _ in range(steps):
        grown = masks.clone()
        grown[..., 1:, :] |= masks[..., :-1, :]
        grown[..., :-1, :] |= masks[..., 1:, :]
        grown[..., :, 1:] |= masks[..., :, :-1]
        grown[..., :, :-1] |= masks[..., :, 1:]
        masks = grown
    return masks
