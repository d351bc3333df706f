"""Which made images may leave a site: those that are no nearer to its training images than other patients' images are.

A generator of few images may give them back. How near is near is told by images of the same site that it was not
trained on: a made image that lies as near to some training image, or its mirror image, as only the nearest twentieth of
those does is held back; where that happens to more than half of them, the generator remembers its images, and nothing
leaves. Distances are cosines between the answers of a random network, so that what was blurred, noised or brightened is
still near. A made image that is like none is never near: the test says nothing of quality, and it is no proof of
privacy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

NEAR = 0.05
"""Quantile of the distances of held-out images, up to which a made image is too near."""
MOST = 0.5
"""Share of made images that may be too near."""
FEWEST = 5
"""Held-out images, of which a distance can be told."""
SIDE = 32
WIDTHS = (32, 64, 64)
SEED = 20
PIECE = 256


class MemorisedError(ValueError):
    """Made images are too near to those of patients to leave the site."""


class Likeness:
    """How far images are from a set of images.

    Args:
        images: (N, C, H, W) in [0, 1], of patients; mirrored ones count, too.
    """

    def __init__(self, images: Tensor) -> None:
        self._network = _random_network(images.shape[1])
        sides = [images, images.flip(3), images.flip(2), images.flip(2, 3)]
        known = [self._answers(part) for part in sides]
        self._middle = known[0].mean(dim=0)
        self._known = [self._directions(part) for part in known]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(M, C, H, W) -> (M, D) of norm 1: away from the mean of the set."""
        return self._directions(self._answers(images))

    def distances(self, images: Tensor) -> Tensor:
        """(M, C, H, W) -> (M,): 1 less the largest cosine with any of the set."""
        found = self.features(images)
        return 1 - torch.stack([(found @ side.T).amax(dim=1) for side in self._known]).amax(dim=0)

    def _directions(self, answers: Tensor) -> Tensor:
        return normalize(answers - self._middle, dim=1)

    @torch.no_grad()
    def _answers(self, images: Tensor) -> Tensor:
        small = interpolate(images, (SIDE, SIDE), mode="area")
        return torch.cat([self._network(part) for part in torch.split(small, PIECE)])


def may_leave(made: Tensor, training: Tensor, held_out: Tensor, wanted: int) -> Tensor:
    """Which of the made images may leave: the most representative of those that are far enough from training images.

    Args:
        made: (K, C, H, W) in [0, 1].
        training: (N, C, H, W): what the generator was trained on.
        held_out: (M, C, H, W): other images of the same site, none of whose patients it was trained on.
        wanted: how many are to leave.

    Returns:
        (wanted,) places in `made`, in order: medoids of those that are far enough.

    Raises:
        MemorisedError: the generator remembers its images, or too few are far enough.
        ValueError: there are too few held-out images to tell.
    """
    if len(held_out) < FEWEST:
        raise ValueError(
            f"{len(held_out)} held-out images are too few to tell whether made ones are copies; {FEWEST} are needed: "
            "raise the share of validation cases in data.split"
        )
    likeness = Likeness(training)
    least = likeness.distances(held_out).quantile(NEAR)
    far = (likeness.distances(made) > least).nonzero().flatten()
    near = len(made) - len(far)
    if near > MOST * len(made):
        raise MemorisedError(
            f"{near} of {len(made)} made images lie as near to a training image as hardly any held-out image does: the "
            "generator remembers its images, and nothing leaves; train it in fewer steps, or of more images"
        )
    if len(far) < wanted:
        raise MemorisedError(
            f"{len(far)} of {len(made)} made images are far enough from all training images, and {wanted} are to "
            "leave; ask for fewer"
        )
    return far[medoids(likeness.features(made[far]), wanted)].sort().values


def medoids(features: Tensor, count: int, steps: int = 20) -> Tensor:
    """Places of so many rows that stand for all: each is the one with the least sum of distances to its own.

    Args:
        features: (N, D) of norm 1; distances are 1 less cosines.
        count: at most N.
        steps: of turns between choosing rows' medoids and medoids' rows, at most.
    """
    far = 1 - features @ features.T
    chosen = _spread(far, count)
    for _ in range(steps):
        owner = far[:, chosen].argmin(dim=1)
        owner[chosen] = torch.arange(count)  # of equal rows each is its own
        moved = chosen.clone()
        for place in range(count):
            own = (owner == place).nonzero().flatten()
            moved[place] = own[far[own][:, own].sum(dim=1).argmin()]
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen


def _spread(far: Tensor, count: int) -> Tensor:
    """Where to begin: the most central row, then always the one that is farthest from those chosen."""
    chosen = [int(far.sum(dim=1).argmin())]
    nearest = far[chosen[0]].clone()
    nearest[chosen[0]] = -1
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, far[chosen[-1]])
        nearest[chosen] = -1
    return torch.tensor(chosen)


def _random_network(channels: int) -> nn.Sequential:
    """Convolutions whose weights are drawn once and for all."""
    random = torch.Generator().manual_seed(SEED)
    layers: list[nn.Module] = []
    for before, after in zip((channels, *WIDTHS), WIDTHS, strict=False):
        layer = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * (2 / (9 * before)) ** 0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())
