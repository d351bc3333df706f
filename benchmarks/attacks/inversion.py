"""Gradient inversion: training images rebuilt from one FedAvg update.

The server knows the model that it sent, the number of images in a batch, and the update; in the worst case also the
masks. It looks for images whose gradient points where the update does, layer by layer: mean of 1 - cosine over the
tensors, plus total variation (after Geiping et al., NeurIPS 2020), by L-BFGS in float64. All that the site does to a
batch is known to it; nothing is augmented, and the network has smooth activations, which favours the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from fedseg.datamodules.phantom.data import draw_case
from fedseg.datamodules.phantom.style import Dials
from fedseg.models.losses import build_loss

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
            flat = flat + self.noise * flat.norm() * torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
        if self.half:
            flat = flat.half().to(flat.dtype)
        sizes = [tensor.numel() for tensor in update]
        return [part.view_as(like) for part, like in zip(torch.split(flat, sizes), update, strict=True)]


@dataclass(frozen=True)
class Inversion:
    """The server's search.

    Attributes:
        evaluations: of the objective, at most.
        smoothness: weight of the total variation.
        bounds: weight of the mean squared excess over the range [0, 1].
    """

    evaluations: int = 500
    smoothness: float = 1e-5
    bounds: float = 10.0

    def run(self, victim: Victim, update: Gradient, shape: Sequence[int], masks: Tensor | None, seed: int) -> Tensor:
        """Images that explain the update.

        Args:
            victim: network and loss.
            update: trained minus received.
            shape: (B, C, H, W) of the images to look for.
            masks: (B, R, H, W); None looks for them too.
            seed: of the random start.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        generator = torch.Generator().manual_seed(seed)
        images = (0.4 + 0.2 * torch.rand(tuple(shape), generator=generator, dtype=torch.float64)).requires_grad_()
        regions = update[-1].numel()  # the last layer's bias
        guessed = torch.zeros((shape[0], regions, *shape[2:]), dtype=torch.float64).requires_grad_()
        searched = [images] if masks is not None else [images, guessed]
        optimizer: Any = torch.optim.LBFGS(
            searched,
            max_iter=self.evaluations,
            max_eval=self.evaluations,
            history_size=50,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
        )

        def objective() -> Tensor:
            slopes = victim.gradient(images, guessed.sigmoid() if masks is None else masks, differentiable=True)
            excess = (images - images.clamp(0, 1)).pow(2).mean()
            value = misfit(slopes, update) + self.smoothness * total_variation(images) + self.bounds * excess
            for tensor, slope in zip(searched, torch.autograd.grad(value, searched), strict=True):
                tensor.grad = slope
            return value.detach()

        optimizer.step(objective)
        return images.detach().clamp(0, 1)


def misfit(gradient: Gradient, update: Gradient) -> Tensor:
    """Mean over the tensors of 1 - cosine between a gradient and the opposite of the update; in [0, 2]."""
    cosines = [(a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30) for a, b in zip(gradient, update, strict=True)]
    return 1 + torch.stack(cosines).mean()


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
    psnr = [
        float(-10 * torch.log10((a - b).pow(2).mean().clamp(min=1e-10))) for a, b in zip(paired, truth, strict=True)
    ]
    ssim = [
        float(structural_similarity_index_measure(a[None], b[None], data_range=1.0))  # type: ignore[arg-type]
        for a, b in zip(paired, truth, strict=True)
    ]
    return Match(paired, psnr, ssim)


def small_network(width: int = 24) -> nn.Module:
    """Two strided convolutions, one more, and a head at a quarter of the resolution; group normalisation; float64."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=4), nn.Conv2d(2 * width, 2, 3, padding=1)).double()


@dataclass(frozen=True)
class Situation:
    """One row of the table.

    Attributes:
        name: what it is.
        batch: images of a step, and images looked for.
        steps: local steps, all on the same batch.
        optimizer: of the site.
        shield: on the way to the server.
        masks_known: whether the server knows the masks.
        trained: steps of training on other images before the round.
    """

    name: str
    batch: int = 1
    steps: int = 1
    optimizer: str = "sgd"
    shield: Shield = Shield()
    masks_known: bool = True
    trained: int = 0


SITUATIONS = [
    Situation("1 image, 1 step, masks known"),
    Situation("masks unknown", masks_known=False),
    Situation("after 200 steps of training", trained=200),
    Situation("5 steps", steps=5),
    Situation("20 steps", steps=20),
    Situation("2 images", batch=2),
    Situation("4 images", batch=4),
    Situation("1 step of Adam", optimizer="adam"),
    Situation("float16", shield=Shield(half=True)),
    Situation("largest 10 %", shield=Shield(top=0.1)),
    Situation("noise 0.0001", shield=Shield(noise=1e-4)),
    Situation("noise 0.001", shield=Shield(noise=1e-3)),
    Situation("noise 0.01", shield=Shield(noise=1e-2)),
]
LR = 0.1
DRAWN = 64
DIALS = Dials(appearance=0.5, annotation=0.5, structure=0.3, amount=0.5)


def phantom_images(count: int, size: int, site: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in [0, 1] of one site of the phantom and masks (N, 2, H, W), float64, drawn at 64 pixels."""
    drawn = [draw_case("fundus", 0, site, index, DIALS, resolution=DRAWN) for index in range(count)]
    images = torch.stack([torch.from_numpy(sample.image[0]).permute(2, 0, 1) for sample in drawn]).double() / 255
    labels = torch.stack([torch.from_numpy(sample.labels[0]) for sample in drawn if sample.labels is not None])
    masks = torch.stack([labels >= 1, labels == 2], dim=1).double()
    return avg_pool2d(images, DRAWN // size), avg_pool2d(masks, DRAWN // size).round()


def attack(situation: Situation, size: int, seed: int, inversion: Inversion) -> tuple[Match, Tensor]:
    """One situation with images of its own for every seed.

    Returns:
        The match, and the true images.
    """
    torch.manual_seed(seed)
    victim = Victim(small_network(), build_loss("dice_bce", "sigmoid"))
    if situation.trained:
        others, masks = phantom_images(16, size, site=1)
        learnt = victim.update(others, masks, batch=4, steps=situation.trained, optimizer="sgd", lr=LR)
        with torch.no_grad():
            for parameter, step in zip(victim.network.parameters(), learnt, strict=True):
                parameter.add_(step)
    first = seed * situation.batch
    images, masks = (tensor[first:] for tensor in phantom_images(first + situation.batch, size))
    chosen: Any = {"batch": situation.batch, "steps": situation.steps, "optimizer": situation.optimizer}
    update = victim.update(images, masks, lr=LR if situation.optimizer == "sgd" else LR / 100, **chosen)
    told = masks if situation.masks_known else None
    rebuilt = inversion.run(victim, situation.shield(update, seed), images.shape, told, seed)
    return match(rebuilt, images), images


def main(folder: Path, seeds: int = 2, size: int = 16) -> None:
    """Print the table and draw the reconstructions."""
    print(f"Gradient inversion, {size} x {size} pixels, {seeds} seeds: PSNR (dB) and SSIM, mean over images")
    others, _ = phantom_images(9, size)
    guess = match(others[1:].mean(0, keepdim=True), others[:1])
    print(f"  {'the mean of 8 other images, as a guess':34}{guess.psnr[0]:8.1f}{guess.ssim[0]:8.2f}", flush=True)
    shown: list[tuple[str, Tensor]] = []
    for situation in SITUATIONS:
        found = [attack(situation, size, seed, Inversion()) for seed in range(seeds)]
        psnr = [value for one, _ in found for value in one.psnr]
        ssim = [value for one, _ in found for value in one.ssim]
        print(f"  {situation.name:34}{sum(psnr) / len(psnr):8.1f}{sum(ssim) / len(ssim):8.2f}", flush=True)
        shown = shown or [("true image", found[0][1][0])]
        shown.append((f"{situation.name}\n{found[0][0].psnr[0]:.1f} dB", found[0][0].rebuilt[0]))
    draw(shown).savefig(folder / "attacks_inversion.png", dpi=130)


def draw(shown: Sequence[tuple[str, Tensor]]) -> Figure:
    """A sheet of images (3, H, W) with their titles."""
    columns = (len(shown) + 1) // 2
    figure = Figure(figsize=(1.55 * columns, 4.1), layout="constrained")
    for place, (title, image) in enumerate(shown):
        axis = figure.add_subplot(2, columns, place + 1)
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    return figure
