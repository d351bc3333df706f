"""What happens to intensities before the first convolution.

Images arrive in [0, 1] and are normalised on the device, by a module without entries in `state_dict()`: constants of
the data are no part of a model, and must neither travel nor be averaged.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Normalization = Literal["imagenet", "zscore", "none"]

# channel statistics of ImageNet's training images in [0, 1], as torchvision publishes them
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Affine(nn.Module):
    """Subtract a mean and divide by a standard deviation, both fixed, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) or (B, C, D, H, W) in [0, 1] to the same shape."""
        channel = (-1, *[1] * (images.ndim - 2))
        return (images - self.mean.view(channel)) / self.std.view(channel)


class ZScore(nn.Module):
    """Give every channel of every image mean 0 and standard deviation 1.

    Standard deviations below 1e-3 (a quarter of a grey level of 8 bits) count as 1e-3: a constant channel becomes 0
    instead of amplified noise.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) or (B, C, D, H, W) to the same shape."""
        std, mean = torch.std_mean(images, dim=tuple(range(2, images.ndim)), keepdim=True, correction=0)
        return (images - mean) / std.clamp_min(1e-3)


class AbsentAsZero(nn.Module):
    """Give channels that are 0 everywhere in an image, as those of modalities that it lacks are, 0 after normalisation.

    Args:
        normalize: what happens to all others.
    """

    def __init__(self, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) or (B, C, D, H, W) in [0, 1] to the same shape."""
        there = images.amax(dim=list(range(2, images.ndim)), keepdim=True) > 0
        return torch.where(there, self.normalize(images), torch.zeros_like(images))


def build_normalizer(name: Normalization, in_channels: int, *, absent_as_zero: bool = False) -> nn.Module:
    """Build the module that normalises images.

    Args:
        name: "imagenet" (the constants of pre-trained encoders; for any other number of channels than three each
            channel is taken as grey and gets the average of the three), "zscore" (per image and channel; removes a
            site's brightness and contrast) or "none".
        in_channels: channels of an image.
        absent_as_zero: see `AbsentAsZero`.

    Returns:
        Module on (B, C, H, W) or (B, C, D, H, W) in [0, 1], without entries in `state_dict()`.

    Raises:
        ValueError: an unknown name.
    """
    if absent_as_zero:
        return AbsentAsZero(build_normalizer(name, in_channels))
    if name == "imagenet":
        if in_channels == len(IMAGENET_MEAN):
            return Affine(IMAGENET_MEAN, IMAGENET_STD)
        return Affine((sum(IMAGENET_MEAN) / 3,) * in_channels, (sum(IMAGENET_STD) / 3,) * in_channels)
    if name == "zscore":
        return ZScore()
    if name == "none":
        return nn.Identity()
    raise ValueError(f"normalization must be one of {get_args(Normalization)}, got {name!r}")
