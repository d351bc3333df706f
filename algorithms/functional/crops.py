"""Random views of images, made where the network is."""

import torch
from torch import Tensor
from torch.nn import functional


def random_crops(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Show a random part of each image at full size, mirrored at random along both axes.

    Contrast needs two views of an image that differ in geometry; here each call draws anew.

    Args:
        images: (B, C, H, W).
        smallest: least share of the image's area that is shown, in (0, 1]; 1 returns the images as they are.
        generator: of the draws, which are made on its device whatever the images' device.

    Returns:
        (B, C, H, W), resampled bilinearly.

    Raises:
        ValueError: a share out of range.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"a crop shows a share in (0, 1] of the image, not {smallest}")
    if smallest == 1:
        return images
    area, across, down, *mirrored = torch.rand(5, len(images), generator=generator, device=generator.device)
    side = (smallest + (1 - smallest) * area).sqrt()
    sign_x, sign_y = (1 - 2 * (draw < 0.5).float() for draw in mirrored)
    zero = torch.zeros_like(side)
    # affine_grid speaks in coordinates from -1 to 1: a window of half-width `side` fits with its centre in +-(1 - side)
    rows = [
        torch.stack([side * sign_x, zero, (2 * across - 1) * (1 - side)], dim=1),
        torch.stack([zero, side * sign_y, (2 * down - 1) * (1 - side)], dim=1),
    ]
    window = torch.stack(rows, dim=1).to(images)
    grid = functional.affine_grid(window, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
