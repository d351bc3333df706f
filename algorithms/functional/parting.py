"""When a group of sites parts, and how (CFL: Sattler, Mueller, Samek, TNNLS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fedseg.algorithms.functional.rows import cosine


def parting(rows: Sequence[Tensor], weights: Sequence[float], cancel: float, largest: float) -> list[int]:
    """The sites that leave a group, the smaller part of it; none where it stays together.

    Args:
        rows: the sites' updates; groups of two stay together.
        weights: of the updates in the mean.
        cancel: largest norm of the mean, as a share of the largest update's.
        largest: cosine between updates of the two parts.
    """
    if len(rows) <= 2:
        return []
    mean = torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(dim=0) / sum(weights)
    if float(mean.norm()) > cancel * max(float(row.norm()) for row in rows):
        return []
    cosines = {(i, j): cosine(rows[i], rows[j]) for i, j in combinations(range(len(rows)), 2)}
    _, leaves = parts(cosines, len(rows))
    apart = max(value for (i, j), value in cosines.items() if (i in leaves) != (j in leaves))
    return sorted(leaves) if apart <= largest else []


def parts(cosines: dict[tuple[int, int], float], count: int) -> tuple[set[int], set[int]]:
    """The two parts between which the largest cosine is smallest, the larger one first.

    Whoever is most alike is joined, until two parts are left.
    """
    found = [{i} for i in range(count)]
    for i, j in sorted(cosines, key=lambda pair: -cosines[pair]):
        ours, theirs = (next(part for part in found if k in part) for k in (i, j))
        if len(found) > 2 and ours is not theirs:
            found.remove(theirs)
            ours |= theirs
    larger, smaller = sorted(found, key=lambda part: (-len(part), min(part)))
    return larger, smaller
