"""Label-free adaptation at test time: views with exact inverses, entropy, consistency and local smoothness.

The objective of IOP-FL's outside part (Jiang et al., IEEE TMI 2023), written for two classes there, in three forms that
agree for one region: softmax over background and regions (as published, entropy over log of the number of classes,
smoothness of the foreground channels) and sigmoid per region, where every region is a two-class problem of its own
(p, 1 - p) and the means run over the regions too.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from fedseg.algorithms.functional.routing import routed_layers
from fedseg.models.freeze import frozen

Activation = Literal["sigmoid", "softmax"]
LOG_FLOOR = 1e-6  # added inside the logarithm, as published


@dataclass(frozen=True)
class Views:
    """One of the eight flips and turns of the square for every image; both directions are exact.

    Attributes:
        quarter_turns: (B,) integers 0..3, counter-clockwise, after the flip.
        flips: (B,) booleans or 0/1: reverse the rows (up-down).
    """

    quarter_turns: Tensor
    flips: Tensor

    @staticmethod
    def draw(images: Tensor, generator: torch.Generator) -> "Views":
        """Draw a view per image (B, C, ..., H, W); without odd quarter turns when the images are not square."""
        batch, height, width = len(images), *images.shape[-2:]
        step = 1 if height == width else 2
        turns = step * torch.randint(0, 4 // step, (batch,), generator=generator, device=generator.device)
        return Views(turns, torch.randint(0, 2, (batch,), generator=generator, device=generator.device))

    def forward(self, images: Tensor) -> Tensor:
        """See (B, C, ..., H, W) images through their views; slices of a volume turn alike.

        Raises:
            ValueError: the number of images is not that of the views, or an odd quarter turn of images that are not
                square is asked for.
        """
        self._check(images)
        seen = []
        for image, turns, flip in zip(images, self.quarter_turns.tolist(), self.flips.tolist(), strict=True):
            seen.append(torch.rot90(image.flip(-2) if flip else image, turns, (-2, -1)))
        return torch.stack(seen)

    def inverse(self, maps: Tensor) -> Tensor:
        """Bring (B, C, H, W) maps from the views back to the images; raises as `forward`."""
        self._check(maps)
        back = []
        for each, turns, flip in zip(maps, self.quarter_turns.tolist(), self.flips.tolist(), strict=True):
            upright = torch.rot90(each, -turns, (-2, -1))
            back.append(upright.flip(-2) if flip else upright)
        return torch.stack(back)

    def _check(self, images: Tensor) -> None:
        if len(images) != len(self.quarter_turns):
            raise ValueError(f"{len(self.quarter_turns)} views do not fit {len(images)} images")
        if images.shape[-1] != images.shape[-2] and bool((self.quarter_turns % 2).any()):
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} are not square: draw their views without odd quarter turns"
            )


@dataclass(frozen=True)
class Objective:
    """Which terms are minimised, in which scaling, with which weights.

    Attributes:
        activation: how logits become probabilities.
        entropy_weight: of the entropy term.
        consistency_weight: of the mean squared difference between image and view.
        smoothness_weight: of the local range of the mask.
        entropy: ``per_pixel`` is the mean over images, pixels (and regions), in [0, 1]; ``released`` is that times
            B / C, the published program's reduction, which grows with the batch.
        smoothness: ``norm`` is the Euclidean norm of the local range over the whole batch, as published; ``mean`` its
            mean, in [0, 1], the same for any image size and batch.
        radius: of the window of the local range, in pixels; the window is 2 * radius + 1 wide.
    """

    activation: Activation
    entropy_weight: float
    consistency_weight: float
    smoothness_weight: float
    entropy: Literal["per_pixel", "released"]
    smoothness: Literal["norm", "mean"]
    radius: int

    def terms(self, logits: Tensor, first: Tensor, second: Tensor) -> "Terms":
        """The terms for one batch, each (B, C, H, W) logits.

        Args:
            logits: of the images; entropy and smoothness are measured on them.
            first: of the views, brought back to the images.
            second: of the images; the consistency compares ``first`` with it. May be ``logits`` itself.
        """
        entropy = normalized_entropy(logits, self.activation)
        if self.entropy == "released":
            classes = logits.shape[1] if self.activation == "softmax" else 2
            entropy = entropy * logits.shape[0] / classes
        spread = local_range(foreground(logits, self.activation), self.radius)
        smoothness = spread.mean() if self.smoothness == "mean" else torch.linalg.vector_norm(spread)
        return Terms(
            entropy=self.entropy_weight * entropy,
            consistency=self.consistency_weight * disagreement(first, second, self.activation),
            smoothness=self.smoothness_weight * smoothness,
        )


@dataclass(frozen=True)
class Terms:
    """Weighted terms of the objective, scalars."""

    entropy: Tensor
    consistency: Tensor
    smoothness: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.entropy + self.consistency + self.smoothness


def adaptation_terms(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    noise: Tensor,
    views: Views,
    objective: Objective,
    *,
    fresh_pass: bool,
) -> Terms:
    """Terms of the objective for one batch without labels.

    Args:
        network: images (B, C, H, W) -> logits (B, classes, H, W).
        images: (B, C, H, W), on the scale the network was trained on.
        noise: (B, C, H, W), added before the view is taken.
        views: one per image.
        objective: terms and weights.
        fresh_pass: compare the view with a second pass on the images, as published (it differs from the first by its
            dropout), instead of with the first one, which is a third cheaper.
    """
    logits = network(images)
    first = views.inverse(network(views.forward(images + noise)))
    return objective.terms(logits, first, network(images) if fresh_pass else logits)


def probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """All channels of the network (B, C, H, W) as probabilities, background included if there is one.

    Raises:
        ValueError: a softmax over a single channel.
    """
    if activation == "sigmoid":
        return logits.sigmoid()
    if logits.shape[1] < 2:
        raise ValueError("a softmax over one channel is always certain: use the sigmoid form for a single region")
    return logits.softmax(dim=1)


def foreground(logits: Tensor, activation: Activation) -> Tensor:
    """Probabilities of the regions (B, R, H, W), without the background."""
    chances = probabilities(logits, activation)
    return chances[:, 1:] if activation == "softmax" else chances


def normalized_entropy(logits: Tensor, activation: Activation) -> Tensor:
    """Mean entropy over images, pixels (and regions), over its largest value: a scalar in [0, 1]."""
    chances = probabilities(logits, activation)
    if activation == "softmax":
        per_pixel = -(chances * (chances + LOG_FLOOR).log()).sum(dim=1)
        return per_pixel.mean() / math.log(logits.shape[1])
    others = (-logits).sigmoid()
    per_region = -(chances * (chances + LOG_FLOOR).log() + others * (others + LOG_FLOOR).log())
    return per_region.mean() / math.log(2.0)


def disagreement(first: Tensor, second: Tensor, activation: Activation) -> Tensor:
    """Mean squared difference of the probabilities behind two (B, C, H, W) logits: a scalar in [0, 1]."""
    return functional.mse_loss(probabilities(first, activation), probabilities(second, activation))


def local_range(maps: Tensor, radius: int) -> Tensor:
    """Largest minus smallest value in the window of ``2 * radius + 1`` pixels around each pixel of (B, C, H, W) maps.

    Windows are cut off at the border; those of volumes (B, C, D, H, W) are cubes. Axes are pooled one after the other:
    the same extremes for a tenth of the comparisons.
    """
    window = 2 * radius + 1

    def largest(values: Tensor) -> Tensor:
        if values.ndim == 5:
            whole, beside = (window, 1, 1), (radius, 0, 0)
            values = functional.max_pool3d(values, whole, stride=1, padding=beside)
            values = functional.max_pool3d(values, (1, window, 1), stride=1, padding=(0, radius, 0))
            return functional.max_pool3d(values, (1, 1, window), stride=1, padding=(0, 0, radius))
        vertical = functional.max_pool2d(values, (window, 1), stride=1, padding=(radius, 0))
        return functional.max_pool2d(vertical, (1, window), stride=1, padding=(0, radius))

    return largest(maps) + largest(-maps)


def use_batch_statistics(model: nn.Module) -> None:
    """Let every batch normalisation take the statistics of the batch in any mode, as IOP-FL's program does.

    Changes the model in place; its running statistics are gone. Predictions then depend on the other images of a batch.
    """
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None


@torch.no_grad()
def with_running_statistics(model: nn.Module) -> list[_NormBase]:
    """Layers that normalise by statistics of earlier images: batch normalisation, and others that keep some.

    Not those of a frozen part: they use the statistics they came with.
    """
    fixed = frozen(model)
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _NormBase))
    return [layer for name, layer in layers if layer.running_mean is not None and not fixed & _own(name, layer)]


def running_statistics(model: nn.Module) -> frozenset[str]:
    """The tensors, by their names in the network, that `fit_statistics` fills, whatever they were."""
    layers = {id(layer) for layer in with_running_statistics(model)}
    found = (_own(name, layer) for name, layer in model.named_modules() if id(layer) in layers)
    return frozenset().union(*found)


def _own(name: str, layer: nn.Module) -> set[str]:
    """A layer's running statistics, by their names in the network."""
    return {f"{name}.{key}".lstrip(".") for key, _ in layer.named_buffers(recurse=False)}


def fit_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let the running statistics of normalisation be the mean of these batches' own (Li et al., 2016: AdaBN).

    In place, and for good: predictions do not depend on the other images of a batch afterwards. Without batches, or
    running statistics, nothing changes.

    Args:
        model: in evaluation mode, in which it stays.
        batches: what the network takes, (B, C, H, W); a single image comes with its mirror image, for a variance.
    """
    layers = with_running_statistics(model)
    momenta = [layer.momentum for layer in layers]
    for place, batch in enumerate(batches if layers else ()):
        for layer in layers:
            if place == 0:
                layer.reset_running_stats()
            layer.momentum = 1 / (place + 1)  # the plain mean over all batches
            layer.train()
        model(batch if len(batch) > 1 else torch.cat([batch, batch.flip(-1)]))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def affine_weights(model: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of all normalisation layers."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    layers = (layer for layer in model.modules() if isinstance(layer, kinds))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def minimise_entropy(
    model: nn.Module, batches: Iterable[Tensor], activation: Activation, passes: int, lr: float
) -> None:
    """Let scales and shifts of normalisation learn to be sure of these images (TENT: Wang et al., ICLR 2021).

    In place, and for good; all other weights and the running statistics stay. Adam on the mean entropy of a batch.

    Args:
        model: in evaluation mode, in which it stays.
        batches: what the network takes, (B, C, H, W), read again in every pass.
        activation: of the answer.
        passes: over the batches.
        lr: of Adam; the paper's is 1e-3.
    """
    learning, before = affine_weights(model), [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learning, lr)
    with torch.enable_grad():
        for _ in range(passes):
            for batch in batches:
                optimizer.zero_grad()
                torch.autograd.backward(normalized_entropy(model(batch).float(), activation))
                optimizer.step()
    optimizer.zero_grad()
    for parameter, learns in before:
        parameter.requires_grad_(learns)


def set_router_dropout(model: nn.Module, active: bool) -> None:
    """Switch the dropout of all routers on or off, whatever the mode of the rest of the model."""
    for layer in routed_layers(model).values():
        layer.router.train(active)
