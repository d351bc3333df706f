"""Styles of images that sites can tell in a few numbers, and modules that give images the style of a target.

All work image by image and channel by channel, so that a target is all that a new image needs. Targets are means over
images, and over sites means of those. A module has no entries in `state_dict()`: a target is no part of a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedseg.federation.state import Tensors

FLAT = 1e-3  # a smaller deviation, a quarter of a grey level of 8 bits, is noise that must not be amplified


class Style(Protocol):
    """One way to say how images look."""

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """What a site tells of its images, (B, C, H, W) in [0, 1]; nothing if it has none."""

    def towards(self, target: Tensors) -> nn.Module:
        """A module that gives (B, C, H, W) images the style of a target."""


@dataclass(frozen=True)
class Amplitude:
    """Amplitudes of low spatial frequencies (FDA: Yang and Soatto, CVPR 2020; HarmoFL: Jiang, Wang, Dou, AAAI 2022).

    Amplitudes are those of the transform divided by the number of pixels; phases stay.

    Attributes:
        fraction: L: frequencies up to floor(L * min(H, W)) in both directions are replaced, 0 is the mean grey alone;
            None replaces all.
        momentum: m of the running mean A <- (1 - m) A + m A_batch, which begins with the first batch; None is the mean
            over all images.
    """

    fraction: float | None
    momentum: float | None = None

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """Amplitudes inside the window, mean over images or running over batches."""
        running, seen = None, 0
        for images in batches:
            rows, columns = self._window(images)
            mean = torch.fft.rfft2(images, norm="forward")[..., rows, :columns].abs().mean(dim=0)
            seen += len(images)
            share = len(images) / seen if self.momentum is None else self.momentum
            running = mean if running is None else torch.lerp(running, mean, share)
        return {} if running is None else {"amplitude": running}

    def towards(self, target: Tensors) -> nn.Module:
        """Replace amplitudes inside the window."""
        return _Amplitudes(self, target["amplitude"])

    def _window(self, images: Tensor) -> tuple[Tensor, int]:
        """Rows of the real transform within the window, and how many of its columns."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)
        if self.fraction is None:
            return rows, width // 2 + 1
        half_width = math.floor(self.fraction * min(height, width))
        return rows[torch.minimum(rows, height - rows) <= half_width], min(half_width, width // 2) + 1


class _Amplitudes(nn.Module):
    target: Tensor

    def __init__(self, style: Amplitude, target: Tensor) -> None:
        super().__init__()
        self.style = style
        self.register_buffer("target", target, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.style._window(images)
        spectrum = torch.fft.rfft2(images, norm="forward")
        phases = spectrum[..., rows, :columns].angle()
        spectrum[..., rows, :columns] = torch.polar(self.target.to(phases).expand_as(phases), phases)
        restyled: Tensor = torch.fft.irfft2(spectrum, s=images.shape[-2:], norm="forward")
        return restyled
