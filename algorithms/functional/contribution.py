"""What a site contributes to a mean of updates (FedCE: Jiang et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fedseg.algorithms.functional.rows import cosine, row_of
from fedseg.federation.state import Tensors

Version = Literal["2023", "nvflare"]
LEAST: dict[Version, float] = {"2023": 1e-3, "nvflare": 1e-6}  # of a weight


def cosines_to_others(updates: Sequence[Tensors], weights: Sequence[float]) -> list[float]:
    """Cosine of each update and the weighted sum of all others; 0 where one of them is zero.

    Args:
        updates: differences of trainable parameters.
        weights: of the updates in the sums.
    """
    rows = [row_of(update) for update in updates]
    whole = torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(dim=0)
    return [cosine(row, whole - weight * row) for weight, row in zip(weights, rows, strict=True)]


def shares(
    away: Sequence[float], alone: Sequence[float], join: Literal["plus", "times"], version: Version
) -> list[float]:
    """Weights of the sites.

    Args:
        away: by how much each update points away from the others.
        alone: how bad the model without the site is.
        join: both by adding or multiplying.
        version: 2023 raises small values to 1e-3 after normalising, nvflare to 1e-6 before.
    """
    a, b = (_normalised(part, version) for part in (away, alone))
    joined = [x + y if join == "plus" else x * y for x, y in zip(a, b, strict=True)]
    return _normalised(joined, version)


def _normalised(values: Sequence[float], version: Version) -> list[float]:
    least = LEAST[version]
    before = [max(value, least) for value in values] if version == "nvflare" else list(values)
    total = sum(before)
    found = [value / total if total else 1 / len(before) for value in before]
    return found if version == "nvflare" else [max(value, least) for value in found]
