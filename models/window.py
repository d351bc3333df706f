"""Answers for images of any size by a network that sees patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A sliding window (MONAI's), whose answers weigh less towards its edges, by a Gaussian.

    Attributes:
        size: of the window, in pixels or voxels.
        batch: how many windows the network sees at a time.
        overlap: of neighbouring windows, as a share of their size.
    """

    size: tuple[int, ...]
    batch: int
    overlap: float

    def __call__(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """(B, C, ...) of any size to what the network answers, on the same grid; smaller images are padded with 0."""
        from monai.inferers import sliding_window_inference

        found = sliding_window_inference(images, self.size, self.batch, network, self.overlap, mode="gaussian")
        assert isinstance(found, Tensor)
        return found
