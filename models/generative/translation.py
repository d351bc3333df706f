"""Images of a site translated to another style, with no pairs of images, such that outlines stay where they are.

CycleGAN (Zhu et al., ICCV 2017) with a term for outlines: judges of patches tell whether a translated image is of the
style (least squares), what is translated there and back is the image again, and an image of the style stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, smooth_l1_loss

from fedseg.models.generative.networks import PatchJudge, Translator

PATCH = 7
ROUND = 0.1
STABLE = 0.01
"""Added to means and variances of gradients, whose mean over an image is 1."""


@dataclass(frozen=True)
class Translation:
    """How a translator is trained.

    Attributes:
        steps: of all networks.
        batch: images of each side in a step.
        width: of the translators.
        blocks: of each.
        cycle: weight of coming back.
        identity: weight of leaving images of the style alone.
        outlines: weight of outlines that stay.
        lr: of Adam with betas of 0.5 and 0.999.
    """

    steps: int = 200
    batch: int = 4
    width: int = 12
    blocks: int = 3
    cycle: float = 10.0
    identity: float = 5.0
    outlines: float = 5.0
    lr: float = 1e-3


def outlines(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): size of the gradient of the mean over channels, over its mean in the image."""
    grey = images.mean(dim=1, keepdim=True)
    rows = grey[:, :, 1:, :-1] - grey[:, :, :-1, :-1]
    columns = grey[:, :, :-1, 1:] - grey[:, :, :-1, :-1]
    size = (rows**2 + columns**2 + 1e-8).sqrt()
    return size / size.mean(dim=(2, 3), keepdim=True)


def moved(one: Tensor, other: Tensor) -> Tensor:
    """1 less the structural similarity (Wang et al., 2004) of two batches' outlines, in patches of 7: 0 if equal."""
    a, b = outlines(one), outlines(other)
    means = [avg_pool2d(x, PATCH, 1) for x in (a, b)]
    variances = [avg_pool2d(x * x, PATCH, 1) - m * m for x, m in zip((a, b), means, strict=True)]
    together = avg_pool2d(a * b, PATCH, 1) - means[0] * means[1]
    alike = (2 * means[0] * means[1] + STABLE) * (2 * together + STABLE)
    most = (means[0] ** 2 + means[1] ** 2 + STABLE) * (variances[0] + variances[1] + STABLE)
    return 1 - (alike / most).mean()


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Mean size of the difference, less half of `ROUND`; below that a parabola.

    With the paper's L1 a translator that begins as the identity would be held there by the kink.
    """
    return smooth_l1_loss(one, other, beta=ROUND)


def fooled(judged: Tensor) -> Tensor:
    """Least squares of a judge's answers from those for the style (Mao et al., ICCV 2017)."""
    return ((judged - 1) ** 2).mean()


def train_translator(own: Tensor, style: Tensor, how: Translation, seed: int) -> Translator:
    """What translates a site's images to a style; a pure function of its arguments.

    Args:
        own: (N, C, H, W) in [0, 1], images of the site.
        style: (M, C, H, W) in [0, 1], images of the style.
        how: it is trained.
        seed: of weights and order.
    """
    channels = own.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        there, back = (Translator(channels, how.width, how.blocks) for _ in range(2))
        judges = nn.ModuleList([PatchJudge(channels), PatchJudge(channels)])
        moves = torch.optim.Adam([*there.parameters(), *back.parameters()], how.lr, betas=(0.5, 0.999), fused=True)
        judging = torch.optim.Adam(judges.parameters(), how.lr, betas=(0.5, 0.999), fused=True)
        for _ in range(how.steps):
            x, y = (images[torch.randint(len(images), (how.batch,))] for images in (own, style))
            for network in judges:
                network.requires_grad_(False)
            made, remade = there(x), back(y)
            loss = fooled(judges[0](made)) + fooled(judges[1](remade))
            loss = loss + how.cycle * (apart(back(made), x) + apart(there(remade), y))
            loss = loss + how.identity * (apart(there(y), y) + apart(back(x), x))
            loss = loss + how.outlines * (moved(made, x) + moved(remade, y))
            moves.zero_grad()
            torch.autograd.backward(loss)
            moves.step()
            for network in judges:
                network.requires_grad_(True)
            judging.zero_grad()
            for judge, real, false in ((judges[0], y, made), (judges[1], x, remade)):
                torch.autograd.backward((fooled(judge(real)) + (judge(false.detach()) ** 2).mean()) / 2)
            judging.step()
    return there.eval()


@torch.no_grad()
def translated(translator: nn.Module, images: Tensor) -> Tensor:
    """(B, C, H, W) images in [0, 1] in the style."""
    return torch.cat([translator(part) for part in torch.split(images, 64)])
