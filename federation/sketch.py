"""How far apart the updates of one round are, without keeping them: a few thousand numbers stand for each.

A sketch is a random projection: coordinates get random signs and are added up in `SIZE` sums. Inner products survive
on average (Charikar, Chen, Farach-Colton, 2002): a cosine is met to about 1/sqrt(SIZE) = 0.016. Sketches are linear:
that of the mean is the mean of the sketches. The random signs are a stream of their own: training never sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedseg.federation.contract import Row
from fedseg.federation.state import Mean, Update

SIZE = 4096
BLOCK = 64 * SIZE
"""Coordinates at a time: one megabyte, which stays in a processor's cache."""

Vector = NDArray[np.float64]


class SketchedMean(Mean):
    """A mean that also notes how far each update is from the others. Memory: one sketch per update.

    Args:
        per_site: as of `Mean`.
        seed: of the random signs.
        uniform: as of `Mean`.
    """

    def __init__(self, per_site: Iterable[str], seed: int, uniform: Iterable[str] = ()) -> None:
        super().__init__(per_site, uniform)
        self.seed = seed
        self._seen: dict[str, tuple[float, float, Vector]] = {}  # site -> weight, norm, sketch

    def add(self, update: Update, weight: float) -> None:
        """Take one update in, and sketch its difference of shared parameters."""
        super().add(update, weight)
        if update.get("model"):
            self._seen[update.site] = (weight, *sketch(update["model"], self.seed))

    def differences(self, round: int) -> list[Row]:
        """One row per update: its norm, and its cosines to the weighted mean of all and of all others.

        A cosine with a vector of length zero is None, as is that to the others where there are none.
        """
        whole = sum((weight * seen for weight, _, seen in self._seen.values()), np.zeros(SIZE))
        return [
            {
                "round": round,
                "site": site,
                "norm": norm,
                "cosine": _cosine(seen, whole),
                "cosine_others": _cosine(seen, whole - weight * seen) if len(self._seen) > 1 else None,
            }
            for site, (weight, norm, seen) in self._seen.items()
        ]


def sketch(tensors: Mapping[str, Tensor], seed: int) -> tuple[float, Vector]:
    """Euclidean norm of all tensors together, exact, and their sketch.

    Args:
        tensors: name -> tensor on the CPU; the order of the names plays no part.
        seed: of the signs; only sketches of one seed can be compared.

    Returns:
        The norm, and (SIZE,) numbers.
    """
    signs = np.random.Generator(np.random.Philox(seed))
    sums = np.zeros(SIZE)
    squares = 0.0
    for block in _blocks(tensors):
        plus = np.unpackbits(np.frombuffer(signs.bytes(BLOCK // 8), np.uint8)).reshape(-1, SIZE)
        sums += 2 * (block * plus).sum(axis=0) - block.sum(axis=0)  # 2 bit - 1 is the sign
        squares += float(np.vdot(block, block))
    return squares**0.5, sums


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[NDArray[np.float32]]:
    """All coordinates one after the other, (BLOCK / SIZE, SIZE) at a time, the last block filled up with zeros."""
    block = np.zeros(BLOCK, np.float32)
    filled = 0
    for name in sorted(tensors):
        rest = tensors[name].detach().reshape(-1).float().numpy()
        while len(rest):
            taken = rest[: BLOCK - filled]
            block[filled : filled + len(taken)] = taken
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == BLOCK:
                yield block.reshape(-1, SIZE)
                filled = 0
    if filled:
        block[filled:] = 0
        yield block.reshape(-1, SIZE)


def _cosine(a: Vector, b: Vector) -> float | None:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    # what is left of the sum after taking the only update out of it is rounding, not a direction
    return float(np.clip(a @ b / lengths, -1, 1)) if lengths > 1e-12 * float(a @ a) else None
