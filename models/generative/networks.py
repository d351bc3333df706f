"""A generator and its critic (as of WGAN-GP), a translator of images and a judge of their patches (as of CycleGAN)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, interpolate

SLOPE = 0.2
SMALLEST, LARGEST = 32, 128
"""Sides that images may have; between them powers of two."""
START = 4
"""Side of a generator's first map."""


def check_side(height: int, width: int) -> None:
    """Refuse images that these networks cannot make.

    Raises:
        ValueError: they are not square, or of another side.
    """
    sides = [SMALLEST << k for k in range(int(math.log2(LARGEST // SMALLEST)) + 1)]
    if height != width or height not in sides:
        raise ValueError(f"{height} x {width} pixels: generative networks make square images of {sides} pixels")


class Generator(nn.Sequential):
    """(B, latent) noise -> (B, C, S, S) images in [0, 1].

    Args:
        channels: of an image.
        side: of an image, in pixels.
        width: channels of the last map; they double with every halving of the side, up to eight times.
        latent: numbers of which an image is made.
    """

    def __init__(self, channels: int, side: int, width: int = 16, latent: int = 64) -> None:
        check_side(side, side)
        self.latent = latent
        widths = [width * 2 ** min(k, 3) for k in range(int(math.log2(side // START)), -1, -1)]
        layers: list[nn.Module] = [
            nn.Linear(latent, widths[0] * START**2),
            nn.Unflatten(1, (widths[0], START, START)),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for before, after in pairwise(widths):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())
        self.latent = latent


class Critic(nn.Sequential):
    """(B, C, S, S) images -> (B,) numbers, higher for real ones; no image is normalised by others of its batch.

    Args:
        channels: of an image.
        side: of an image, in pixels.
        width: channels of the first map.
    """

    def __init__(self, channels: int, side: int, width: int = 16) -> None:
        check_side(side, side)
        layers: list[nn.Module] = []
        before = channels
        for level in range(int(math.log2(side // START))):
            after = width * 2 ** min(level, 3)
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            before = after
        super().__init__(*layers, nn.Flatten(), nn.Linear(before * START**2, 1), nn.Flatten(0))


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*convolved(width, width), *convolved(width, width)[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return torch.as_tensor(maps + self.branch(maps))


class Translator(nn.Module):
    """(B, C, H, W) images in [0, 1] -> the same in another style; before it is trained it changes nothing.

    Args:
        channels: of an image.
        width: channels at full size; twice as many at half of it.
        blocks: residual blocks, at half size.
    """

    def __init__(self, channels: int, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.settings = {"channels": channels, "width": width, "blocks": blocks}
        self.path = nn.Sequential(
            *convolved(channels, width),
            *convolved(width, 2 * width, stride=2),
            *(Residual(2 * width) for _ in range(blocks)),
            nn.Upsample(scale_factor=2),
            *convolved(2 * width, width),
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(torch.as_tensor(self.last.bias))

    def forward(self, images: Tensor) -> Tensor:
        """Translate; in logits, so that values stay in [0, 1]."""
        return torch.sigmoid(torch.logit(images, eps=1e-3) + self.last(self.path(images)))


class PatchJudge(nn.Sequential):
    """(B, C, H, W) images -> (B, 1, h, w): how much each patch looks like those of the style.

    Nothing is normalised: how bright an image is belongs to its style.
    """

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )


class Painter(nn.Module):
    """Masks and maps of noise -> images of a given mean and deviation in each channel: a U-Net of three levels.

    Args:
        taken: maps that it takes, of masks and noise.
        channels: of an image.
        width: of the first level; the others have twice as many.
    """

    def __init__(self, taken: int, channels: int, width: int = 16) -> None:
        super().__init__()
        wide = 2 * width
        self.down = nn.ModuleList(
            [
                nn.Sequential(*convolved(taken, width)),
                nn.Sequential(*convolved(width, wide, stride=2), *convolved(wide, wide)),
                nn.Sequential(*convolved(wide, wide, stride=2), *convolved(wide, wide)),
            ]
        )
        self.up = nn.ModuleList(
            [nn.Sequential(*convolved(2 * wide, wide)), nn.Sequential(*convolved(wide + width, width))]
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, maps: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
        """Paint.

        Args:
            maps: (B, taken, H, W).
            means: (B, C) of the images to be.
            deviations: (B, C) of them.

        Returns:
            (B, C, H, W), mostly in [0, 1].
        """
        levels = [maps]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        found = levels.pop()
        for layer in self.up:
            found = layer(torch.cat([interpolate(found, scale_factor=2), levels.pop()], dim=1))
        plain = instance_norm(self.last(found))
        return means[:, :, None, None] + deviations[:, :, None, None] * plain


def convolved(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, normalised image by image, and its activation."""
    return [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.InstanceNorm2d(after, affine=True), nn.ReLU()]
