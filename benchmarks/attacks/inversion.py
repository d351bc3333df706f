"""Gradient inversion: training images rebuilt from one FedAvg update.

    python -m benchmarks.attacks inversion OUT

The server knows the model that it sent, the learning rate's sign, the number of images in the batch, and the update. It
looks for images and masks whose gradient points where the update does: 1 - cosine, plus total variation of the image,
by Adam on the sign of the gradient (after Geiping et al., NeurIPS 2020). Masks are unknown to it and are fitted along.
Everything the site does to a batch besides (normalisation) is known to the server; augmentation is not applied, which
favours the attack. The network is small (smp's Unet with a resnet10t, group normalisation) and so are the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = list[Tensor]


@dataclass(frozen=True)
class Victim:
    """What both the site and the server know of a local training.

    Attributes:
        network: (B, C, H, W) images in [0, 1] -> (B, R, H, W) logits.
        loss: (logits, masks) -> scalar.
    """

    network: nn.Module
    loss: Loss

    def gradient(self, images: Tensor, masks: Tensor, *, differentiable: bool = False) -> Gradient:
        """Gradient of the loss by the network's parameters."""
        parameters = list(self.network.parameters())
        loss = self.loss(self.network(images), masks)
        return list(torch.autograd.grad(loss, parameters, create_graph=differentiable))

    def update(self, images: Tensor, masks: Tensor, *, batch: int, steps: int, optimizer: str, lr: float) -> Gradient:
        """Trained minus received after some local steps over the images in order, wrapping around.

        Args:
            images: (N, C, H, W) in [0, 1].
            masks: (N, R, H, W).
            batch: images per step.
            steps: local steps.
            optimizer: sgd or adam.
            lr: learning rate.
        """
        start = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        parameters = list(self.network.parameters())
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](parameters, lr)
        for step in range(steps):
            places = torch.arange(step * batch, (step + 1) * batch) % len(images)
            for parameter, slope in zip(parameters, self.gradient(images[places], masks[places]), strict=True):
                parameter.grad = slope
            kind.step()
        names = [name for name, _ in self.network.named_parameters()]
        moved = [p.detach() - start[name] for name, p in zip(names, parameters, strict=True)]
        self.network.load_state_dict(start)
        return moved


@dataclass(frozen=True)
class Shield:
    """What is done to an update before it leaves the site.

    Attributes:
        noise: standard deviation of Gaussian noise on every number, as a multiple of the norm to which the update is
            clipped (the noise multiplier of differential privacy at the site's level); 0 adds none.
        top: share of the numbers that travel, those of largest magnitude.
        half: travel as float16.
    """

    noise: float = 0.0
    top: float = 1.0
    half: bool = False

    def __call__(self, update: Gradient, seed: int) -> Gradient:
        """The update as it travels."""
        flat = torch.cat([tensor.flatten() for tensor in update])
        if self.top < 1:
            kept = flat.abs().topk(max(1, int(self.top * flat.numel()))).indices
            flat = torch.zeros_like(flat).scatter(0, kept, flat[kept])
        if self.noise:
            generator = torch.Generator().manual_seed(seed)
            flat = flat + self.noise * flat.norm() * torch.randn(flat.shape, generator=generator)
        if self.half:
            flat = flat.half().float()
        sizes = [tensor.numel() for tensor in update]
        return [part.view_as(like) for part, like in zip(flat.split(sizes), update, strict=True)]


@dataclass(frozen=True)
class Inversion:
    """The server's search.

    Attributes:
        steps: of Adam.
        lr: of Adam, for pixels in [0, 1]; falls to a tenth after half of the steps, and again after three quarters.
        smoothness: weight of the total variation.
        starts: searches from different random images, run side by side; the one with the lowest objective counts.
    """

    steps: int = 600
    lr: float = 0.05
    smoothness: float = 1e-3
    starts: int = 1

    def run(self, victim: Victim, update: Gradient, shape: Sequence[int], regions: int, seed: int) -> Tensor:
        """Images that explain the update.

        Args:
            victim: network and loss.
            update: trained minus received.
            shape: (B, C, H, W) of the images to look for.
            regions: of a mask.
            seed: of the random starts.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        found = [self._search(victim, update, shape, regions, seed + start) for start in range(self.starts)]
        return min(found, key=lambda result: result[1])[0]

    def _search(
        self, victim: Victim, update: Gradient, shape: Sequence[int], regions: int, seed: int
    ) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(tuple(shape), generator=generator).requires_grad_()
        masks = torch.zeros((shape[0], regions, *shape[2:])).requires_grad_()
        optimizer = torch.optim.Adam([{"params": [images]}, {"params": [masks], "lr": 4 * self.lr}], lr=self.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.steps // 2, self.steps * 3 // 4], gamma=0.1)
        objective = torch.tensor(torch.inf)
        for _ in range(self.steps):
            guess = victim.gradient(images, masks.sigmoid(), differentiable=True)
            objective = 1 + cosine(guess, update) + self.smoothness * total_variation(images)
            slopes = torch.autograd.grad(objective, [images, masks])
            images.grad, masks.grad = slopes[0].sign(), slopes[1].sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return images.detach(), float(objective)


def cosine(a: Gradient, b: Gradient) -> Tensor:
    """Cosine of the angle between two lists of tensors, taken as one vector each; 0 if one of them is 0."""
    product = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
    lengths = [torch.stack([x.pow(2).sum() for x in side]).sum().sqrt() for side in (a, b)]
    return product / (lengths[0] * lengths[1]).clamp(min=1e-20)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, times the number of directions."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return down + (images[..., 1:] - images[..., :-1]).abs().mean()


@dataclass
class Match:
    """Rebuilt images beside the true ones that they resemble most.

    Attributes:
        rebuilt: (B, C, H, W), in the order of the true images.
        psnr: per image, in dB; 20 dB is a root mean squared error of a tenth of the range.
        ssim: per image, at most 1.
    """

    rebuilt: Tensor
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)


def match(rebuilt: Tensor, truth: Tensor) -> Match:
    """Pair rebuilt and true images so that the squared error is least, and score the pairs."""
    errors = (rebuilt[:, None] - truth[None]).pow(2).mean((2, 3, 4))
    _, order = linear_sum_assignment(errors.T.numpy())
    paired = rebuilt[torch.as_tensor(order)]
    psnr = [float(-10 * torch.log10((a - b).pow(2).mean().clamp(min=1e-10))) for a, b in zip(paired, truth, strict=True)]
    ssim = [
        float(structural_similarity_index_measure(a[None], b[None], data_range=1.0))  # type: ignore[arg-type]
        for a, b in zip(paired, truth, strict=True)
    ]
    return Match(paired, psnr, ssim)
