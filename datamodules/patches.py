"""Patches: windows of the network's size, cut of images and volumes that are not resized to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Patches:
    """How patches are cut.

    An axis on which an image is shorter than a patch is padded with 0 on both sides, as a sliding window does it.

    Attributes:
        size: Of a patch: (h, w), or (d, h, w).
        foreground: Share of training patches that are centred on a pixel of some region, where an image has any.
        ids: Label ids of regions.
    """

    size: tuple[int, ...]
    foreground: float
    ids: tuple[int, ...]

    def corner(self, shape: Sequence[int], labels: NDArray[np.uint8] | None, seed: int) -> tuple[int, ...]:
        """Where a training patch of an image begins: a pure function of its arguments.

        Args:
            shape: Of the image, without channels.
            labels: Its label ids; without them all places are alike.
            seed: Of this patch.
        """
        random = np.random.default_rng(seed)
        by_chance = [int(random.integers(max(own - side, 0) + 1)) for own, side in zip(shape, self.size, strict=True)]
        if labels is not None and random.random() < self.foreground:
            counts = np.bincount(labels.ravel(), minlength=256)
            if present := [label for label in self.ids if counts[label]]:  # small regions as often as large ones
                label = present[random.integers(len(present))]
                place = np.flatnonzero(labels == label)[random.integers(counts[label])]
                centre = np.unravel_index(place, labels.shape)
                by_chance = [int(middle) - side // 2 for middle, side in zip(centre, self.size, strict=True)]
        return tuple(self._within(*numbers) for numbers in zip(by_chance, shape, self.size, strict=True))

    def corners(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Beginnings of patches that cover an image, side by side; the last ones of an axis end with it."""
        axes = [
            sorted({self._within(first, own, side) for first in range(0, own, side)})
            for own, side in zip(shape, self.size, strict=True)
        ]
        return list(product(*axes))

    @staticmethod
    def _within(first: int, own: int, side: int) -> int:
        return min(max(first, 0), own - side) if own > side else -((side - own) // 2)

    def cut(self, array: NDArray[Any], corner: Sequence[int]) -> NDArray[Any]:
        """The patch of an image (*size, C) or of label ids (*size) that begins there."""
        reach: list[slice] = []
        padding: list[tuple[int, int]] = []
        for first, own, side in zip(corner, array.shape, self.size, strict=False):
            start, end = max(first, 0), min(first + side, own)
            reach.append(slice(start, end))
            padding.append((start - first, side - (end - start) - (start - first)))
        patch = array[tuple(reach)]
        if not any(map(any, padding)):
            return patch
        return np.pad(patch, [*padding, *[(0, 0)] * (array.ndim - len(padding))])
