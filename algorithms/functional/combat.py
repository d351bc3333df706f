"""ComBat (Johnson, Li, Rabinovic, Biostatistics 2007) of grey-value quantiles, from sums that sites tell.

A feature is one quantile of one channel, a sample an image, a batch a site; there are no covariates. With n images,
mean m and variance v of a feature at a site, its mean a over all N images and its variance s^2 within the K sites, the
site differs from all by the location g = (m - a) / s and the scale d^2 = v / s^2. Both are drawn to what the site's
other features say (empirical Bayes: a normal prior of g, an inverse gamma of d^2, with the moments of both over the
features), to g* and d*^2. An image's feature y becomes (s / d*) ((y - a) / s - g*) + a.

Programs divide the sum of squares behind s^2 by N, here it is N - K: deviations are sqrt(N / (N - K)) times theirs,
and sites alike are left as they are. A feature that varies within no site is shifted to a.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.styles import FLAT, Histogram, quantile_matched
from fedseg.federation.state import Tensors

TOLERANCE, MOST_STEPS = 1e-10, 1000  # of the iteration between locations and scales


@dataclass(frozen=True)
class Combat:
    """Sums of the quantiles of images and of their squares.

    Attributes:
        features: what is measured of an image.
    """

    features: Histogram = field(default_factory=Histogram)

    def told(self, batches: Iterable[Tensor]) -> Tensors:
        """How many images, and both sums of (C, levels) quantiles; nothing of no images."""
        sums: Tensors = {}
        for images in batches:
            found = self.features.quantiles(images).double()
            new = {"images": torch.tensor(len(images)), "sum": found.sum(0), "squares": found.square().sum(0)}
            sums = {name: sums[name] + more for name, more in new.items()} if sums else new
        return sums

    def towards(self, target: Tensors) -> nn.Module:
        """Scale and shift the quantiles of an image."""
        return _Adjusted(self.features, target)


class _Adjusted(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, features: Histogram, target: Tensors) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("scale", target["scale"], persistent=False)
        self.register_buffer("shift", target["shift"], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        adjusted = self.features.quantiles(images) * self.scale + self.shift
        return quantile_matched(images, adjusted.cummax(dim=-1).values)  # quantiles that are adjusted singly may cross


def adjustments(told: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """What takes the differences between sites from their features.

    Args:
        told: site -> ``images`` n, ``sum`` and ``squares`` of its features over them.

    Returns:
        site -> ``scale`` and ``shift``: a feature y becomes scale * y + shift.

    Raises:
        ValueError: a site has a single image.
    """
    for site, sums in told.items():
        if int(sums["images"]) < 2:
            raise ValueError(
                f"site {site!r} has one training image, and ComBat (training.harmonise=combat) needs to see how images "
                "of a site differ; give it another one, or take training.harmonise=histogram"
            )
    counts = {site: int(sums["images"]) for site, sums in told.items()}
    means = {site: sums["sum"] / counts[site] for site, sums in told.items()}
    squares = {site: (sums["squares"] - counts[site] * means[site] ** 2).clamp_min(0) for site, sums in told.items()}
    every = sum(counts.values())
    centre = sum((sums["sum"] for sums in told.values()), torch.zeros(())) / every
    spread = (sum(squares.values(), torch.zeros(())) / (every - len(told))).sqrt()
    varies = spread >= FLAT
    found = {}
    for site, n in counts.items():
        scale, shift = torch.ones_like(centre), centre - means[site]
        location = (means[site] - centre)[varies] / spread[varies]
        variance = (squares[site][varies] / (n - 1)).clamp_min(FLAT**2) / spread[varies] ** 2
        location, variance = shrunk(location, variance, n)
        scale[varies] = variance.rsqrt()
        shift[varies] = centre[varies] - scale[varies] * (centre[varies] + location * spread[varies])
        found[site] = {"scale": scale.float(), "shift": shift.float()}
    return found


def shrunk(location: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A site's locations and scales, drawn to their means over its features as far as n images leave them uncertain.

    Args:
        location: (G,) of standardised features, as estimated.
        variance: (G,) likewise, the square of the scale.
        n: images behind both.

    Returns:
        The mode of both after the images were seen.
    """
    if len(location) < 2:
        return location, variance
    usual, between = location.mean(), location.var()
    typical, unequal = variance.mean(), variance.var()
    wanted, guess = location, variance
    for _ in range(MOST_STEPS):
        before = torch.stack([wanted, guess])
        wanted = (n * between * location + guess * usual) / (n * between + guess)
        residual = (n - 1) * variance + n * (location - wanted) ** 2
        # an inverse gamma of these moments, both sides times `unequal`, which is 0 where all scales are the same
        guess = (typical**3 + typical * unequal + unequal * residual / 2) / (unequal * n / 2 + typical**2 + unequal)
        if bool((torch.stack([wanted, guess]) - before).abs().max() <= TOLERANCE):
            break
    return wanted, guess
