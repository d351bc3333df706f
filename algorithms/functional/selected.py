"""A network that tells sites apart by their images, and one that answers each image with a model chosen by it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

GROUPS = 4
"""Of the normalisation: over parts of one image, as a batch is of one site only."""


class SiteClassifier(nn.Module):
    """Four convolutions that halve their input, the mean over space, and a layer with a row for each site.

    That layer is zero at first, so that at any number of sites each is as likely, and nothing is drawn for it.

    Args:
        channels: of an image.
        dimensions: 2 or 3.
        width: channels after the first convolution, a multiple of 4; then twice, and twice four times that many.
    """

    def __init__(self, channels: int, dimensions: int, width: int) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        widths = [channels, width, 2 * width, 4 * width, 4 * width]
        stages: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            stages += [convolution(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, wide), nn.ReLU()]
        self.body = nn.Sequential(*stages)
        self._features = widths[-1]
        self.set_sites(0)

    def set_sites(self, count: int) -> None:
        """Tell so many sites apart, from none on."""
        self.weight = nn.Parameter(torch.zeros(count, self._features))
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) normalised images -> (B, sites) logits."""
        features = self.body(images).flatten(start_dim=2).mean(dim=2)
        return nn.functional.linear(features, self.weight, self.bias)


class Selected(nn.Module):
    """Each image is answered by the model of the site that it is likeliest from, or by the shared one.

    Args:
        classifier: images -> (B, sites) logits.
        shared: answers where no site is likelier than ``gamma``, or the likeliest one's model is not there.
        own: place of a site -> its model.
        gamma: in [0, 1]; at 1 the shared model always answers, at 0 the likeliest site's.
    """

    def __init__(self, classifier: nn.Module, shared: nn.Module, own: Mapping[int, nn.Module], gamma: float) -> None:
        super().__init__()
        self.classifier, self.shared, self.gamma = classifier, shared, gamma
        self.own = nn.ModuleDict({str(place): network for place, network in own.items()})

    def chosen(self, images: Tensor) -> list[int | None]:
        """(B, C, ...) -> for each image the place of the site whose model answers; None for the shared one."""
        likeliest = self.classifier(images).softmax(dim=1).max(dim=1)
        pairs = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        return [place if share > self.gamma and str(place) in self.own else None for share, place in pairs]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) normalised images -> logits, each image's from its own model."""
        places = self.chosen(images)
        answers: dict[int, Tensor] = {}
        for place in dict.fromkeys(places):
            network = self.shared if place is None else self.own[str(place)]
            rows = [row for row, other in enumerate(places) if other == place]
            answers |= dict(zip(rows, network(images[rows]), strict=True))
        return torch.stack([answers[row] for row in range(len(places))])
