"""Images of a site painted from masks: what its device makes of shapes (after Fed-Sim: Li et al., MICCAI 2020).

The painter takes a mask and maps of noise, and gives what it paints the mean and deviation of each channel of one of
the site's images, so that a mask can be painted in different ways. It learns to paint the site's images again, values
and edges at three scales, and to deceive a judge of patches, who knows the mask, so that what does not follow from a
mask is painted, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss

from fedseg.models.generative.networks import Painter, PatchJudge
from fedseg.models.generative.translation import fooled

NOISE = 4
"""Maps of noise."""
SCALES = 3


@dataclass(frozen=True)
class Painting:
    """How a painter is trained.

    Attributes:
        steps: of painter and judge.
        batch: images of a step.
        width: of the painter.
        edges: weight of the edges beside that of the values.
        deceit: weight of deceiving the judge.
        lr: of Adam with betas of 0.5 and 0.999.
    """

    steps: int = 300
    batch: int = 4
    width: int = 16
    edges: float = 1.0
    deceit: float = 0.3
    lr: float = 1e-3


def edge_loss(one: Tensor, other: Tensor) -> Tensor:
    """Mean size of the difference of neighbouring pixels' differences, at full, half and quarter size."""
    losses = []
    for _ in range(SCALES):
        losses += [l1_loss(one.diff(dim=axis), other.diff(dim=axis)) for axis in (2, 3)]
        one, other = avg_pool2d(one, 2), avg_pool2d(other, 2)
    return torch.stack(losses).mean()


def paint(painter: Painter, masks: Tensor, like: Tensor, random: torch.Generator) -> Tensor:
    """(B, C, H, W) images of (B, R, H, W) masks, each of the mean and deviation of one of the (B, C, H, W) others."""
    noise = torch.randn(len(masks), NOISE, *masks.shape[2:], generator=random)
    found: Tensor = painter(torch.cat([masks, noise], dim=1), like.mean(dim=(2, 3)), like.std(dim=(2, 3)))
    return found


def train_painter(images: Tensor, masks: Tensor, how: Painting, seed: int) -> Painter:
    """What paints masks as images of a site; a pure function of its arguments.

    Args:
        images: (N, C, H, W) in [0, 1].
        masks: (N, R, H, W) of them, {0, 1}.
        how: it is trained.
        seed: of weights, order and noise.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, regions = images.shape[1], masks.shape[1]
        painter, judge = Painter(regions + NOISE, channels, how.width), PatchJudge(channels + regions)
    paints, judges = (torch.optim.Adam(n.parameters(), how.lr, (0.5, 0.999), fused=True) for n in (painter, judge))
    for _ in range(how.steps):
        chosen = torch.randint(len(images), (how.batch,), generator=random)
        real, mask = images[chosen], masks[chosen]
        painted = paint(painter, mask, real, random)
        judge.requires_grad_(False)
        loss = l1_loss(painted, real) + how.edges * edge_loss(painted, real)
        loss = loss + how.deceit * fooled(judge(torch.cat([painted, mask], dim=1)))
        paints.zero_grad()
        torch.autograd.backward(loss)
        paints.step()
        judge.requires_grad_(True)
        judges.zero_grad()
        found, made = (judge(torch.cat([which, mask], dim=1)) for which in (real, painted.detach()))
        torch.autograd.backward((fooled(found) + (made**2).mean()) / 2)
        judges.step()
    return painter.eval()


@torch.no_grad()
def painted(painter: Painter, masks: Tensor, images: Tensor, seed: int) -> Tensor:
    """(M, C, H, W) images of masks.

    Args:
        painter: of the site.
        masks: (M, R, H, W), {0, 1}.
        images: (N, C, H, W) of the site; each mask takes the looks of one of them.
        seed: of looks and noise.
    """
    random = torch.Generator().manual_seed(seed)
    like = images[torch.randint(len(images), (len(masks),), generator=random)]
    parts = zip(torch.split(masks, 64), torch.split(like, 64), strict=True)
    return torch.cat([paint(painter, mask, other, random) for mask, other in parts]).clamp(0, 1)
