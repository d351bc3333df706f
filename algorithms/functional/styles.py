"""Styles of images that sites can tell in a few numbers, and modules that give images the style of a target.

All work image by image and channel by channel, so that a target is all that a new image needs; grey values of volumes,
too, and frequencies of slices alone. Targets are means over images, and over sites means of those. A module has no
entries in `state_dict()`: a target is no part of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedseg.federation.state import Tensors

FLAT = 1e-3  # a smaller deviation, a quarter of a grey level of 8 bits, is noise that must not be amplified


class Style(Protocol):
    """One way to say how images look."""

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """What a site tells of its images, (B, C, ...) in [0, 1]; nothing if it has none."""

    def towards(self, target: Tensors) -> nn.Module:
        """A module that gives (B, C, ...) images the style of a target."""


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


@dataclass(frozen=True)
class Histogram:
    """Quantiles of grey values, as histogram matching needs them; their mean over images has a mean's shape.

    A mean of quantiles is the barycentre of the histograms in the Wasserstein metric. Equal values stay equal, and the
    order of values stays.

    Attributes:
        levels: how many quantiles, from the smallest value to the largest.
    """

    levels: int = 256

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """Quantiles of every channel, mean over images."""
        return _mean_of(batches, lambda images: {"quantiles": self.quantiles(images)})

    def towards(self, target: Tensors) -> nn.Module:
        """Match histograms."""
        return _Quantiles(target["quantiles"])

    def quantiles(self, images: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, levels)."""
        ordered = images.flatten(2).sort(dim=-1).values
        places = torch.linspace(0, ordered.shape[-1] - 1, self.levels, dtype=torch.float64)
        return _between(ordered, places.to(ordered).expand(*ordered.shape[:2], -1))


class _Quantiles(nn.Module):
    target: Tensor

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.register_buffer("target", target, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return quantile_matched(images, self.target.expand(images.shape[0], -1, -1))  # a trace takes any number


def quantile_matched(images: Tensor, target: Tensor) -> Tensor:
    """Images (B, C, ...) whose quantiles are the target's (B, C, levels)."""
    values = images.flatten(2).contiguous()
    ordered = values.sort(dim=-1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    rank = (below + upto - 1).to(values.dtype) / (2 * max(values.shape[-1] - 1, 1))
    return _between(target.to(values), rank * (target.shape[-1] - 1)).view_as(images)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every channel (Reinhard et al., 2001, without its change of colour space)."""

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """Both, mean over images."""

        def moments(images: Tensor) -> Tensors:
            std, mean = _moments(images)
            return {"mean": mean, "std": std}

        return _mean_of(batches, moments)

    def towards(self, target: Tensors) -> nn.Module:
        """Shift and scale."""
        return _Moments(target)


class _Moments(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, target: Tensors) -> None:
        super().__init__()
        self.register_buffer("mean", target["mean"], persistent=False)
        self.register_buffer("std", target["std"], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        std, mean = _moments(images)
        return (images - mean) / std.clamp_min(FLAT) * self.std + self.mean


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of every image (B, C, ...) and channel, with axes of length one."""
    return torch.std_mean(images, dim=tuple(range(2, images.ndim)), keepdim=True, correction=0)


def _mean_of(batches: Iterable[Tensor], measure: Callable[[Tensor], Tensors]) -> Tensors:
    """The mean over all images of what is measured of each, in double precision while it is added up."""
    sums: Tensors = {}
    seen = 0
    for images in batches:
        seen += len(images)
        for name, values in measure(images).items():
            total = values.double().sum(dim=0)
            sums[name] = sums[name] + total if name in sums else total
    return {name: (total / seen).float() for name, total in sums.items()}


def _between(values: Tensor, places: Tensor) -> Tensor:
    """Values at fractional places of the last axis, linearly between neighbours."""
    lower = places.floor().clamp(max=values.shape[-1] - 1)
    upper = (lower + 1).clamp(max=values.shape[-1] - 1)
    share = places - lower
    return torch.lerp(values.gather(-1, lower.long()), values.gather(-1, upper.long()), share)
