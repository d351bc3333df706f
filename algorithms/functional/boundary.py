"""Bands along the boundary of structures: just inside (boundary) and just outside (background); FedDG.

Where the label of a pixel is not known, it is neither structure nor background: it lies in no band and bounds nothing.
"""

from torch import Tensor
from torch.nn.functional import pad


def inner_band(masks: Tensor, steps: int, known: Tensor | None = None) -> Tensor:
    """Pixels of a structure that erosion takes away.

    Args:
        masks: (..., H, W), {0, 1} of any dtype.
        steps: iterations of the 4-neighbour cross; what lies outside of the image counts as background.
        known: (..., H, W), 1 where the label is known; None: everywhere.

    Returns:
        (..., H, W) bool: pixels of the structure within city-block distance ``steps`` of the background.

    Raises:
        ValueError: if ``steps`` is negative.
    """
    structure, background = _told_apart(masks, known)
    return structure & grow(pad(background, (1, 1, 1, 1), value=True), steps)[..., 1:-1, 1:-1]


def outer_band(masks: Tensor, steps: int, known: Tensor | None = None) -> Tensor:
    """Pixels around a structure that dilation adds.

    Args:
        masks: (..., H, W), {0, 1} of any dtype.
        steps: iterations of the 4-neighbour cross.
        known: as above.

    Returns:
        (..., H, W) bool: background pixels within city-block distance ``steps`` of the structure (a diamond).

    Raises:
        ValueError: if ``steps`` is negative.
    """
    structure, background = _told_apart(masks, known)
    return grow(structure, steps) & background


def _told_apart(masks: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """Structure and background."""
    structure = masks > 0.5
    if known is None:
        return structure, ~structure
    return structure & (known > 0.5), ~structure & (known > 0.5)


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
