"""All numbers of a model or an update in a row, as norms and angles are taken of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedseg.federation.state import Tensors


def row_of(tensors: Tensors) -> Tensor:
    """In double precision, and in the order of the names, so that what was read from a file gives the same sums."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two rows; 0 where one of them is zero."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0
