"""A step's gradient computed piece by piece, in the memory of one piece (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedseg.algorithms.functional.private import Batch, take


def in_pieces(
    loss: Callable[[Batch], Tensor], batch: Batch, pieces: int, learning: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The mean of a loss over pieces of a batch, by their size.

    Args:
        loss: of a piece.
        batch: cut along its first axis.
        pieces: how many; no more than there are images.
        learning: the parameters.

    Returns:
        A linear function of the parameters that has this mean's gradient, and the mean.
    """
    count = len(batch["image"])
    mean, total = torch.zeros(()), dict[int, Tensor]()
    for places in torch.arange(count).chunk(pieces):
        share, value = len(places) / count, loss(take(batch, places))
        mean = mean.to(value.device) + share * value.detach()
        for index, gradient in enumerate(torch.autograd.grad(value, list(learning), allow_unused=True)):
            if gradient is not None:  # what no piece depends on gets no gradient, as in one step
                total[index] = total.get(index, 0) + share * gradient
    return torch.stack([(learning[index] * gradient).sum() for index, gradient in total.items()]).sum(), mean
