"""One episodic step: a virtual gradient step on one batch, judged on another (FedDG, Liu et al., CVPR 2021)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Output = TypeVar("Output")


@dataclass(frozen=True)
class Episode(Generic[Output]):
    """Outcome of ``episode``: the caller forms the total loss and back-propagates once, onto the network's weights.

    Attributes:
        inner_output: the network's answer to the inner images, with its own weights.
        inner_loss: loss of that answer.
        outer_output: answer to the outer images, with the fast weights.
    """

    inner_output: Output
    inner_loss: Tensor
    outer_output: Output


def fast_weights(
    loss: Tensor, weights: Mapping[str, Tensor], *, step: float, clip: float, second_order: bool
) -> dict[str, Tensor]:
    """Weights after one virtual gradient step, ``w - step * clamp(gradient, -clip, clip)``; w itself stays.

    Args:
        loss: scalar that depends on the weights. Its graph is kept.
        weights: by name. Frozen ones, and those that the loss does not depend on, are passed through.
        step: size of the step.
        clip: bound of each gradient entry.
        second_order: keep the graph through the gradient; otherwise it is a constant (as released).

    Returns:
        Fast weights by name, differentiable with respect to the weights.
    """
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    gradients = torch.autograd.grad(
        loss, list(trained.values()), create_graph=second_order, retain_graph=True, allow_unused=True
    )
    fast = dict(weights)
    for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
        if gradient is not None:
            fast[name] = weight - step * gradient.clamp(-clip, clip)
    return fast


def episode(
    network: nn.Module,
    inner_images: Tensor,
    outer_images: Tensor,
    inner_loss: Callable[[Output], Tensor],
    *,
    step: float,
    clip: float,
    second_order: bool,
    outer_updates_statistics: bool = False,
) -> Episode[Output]:
    """Forward pass, virtual step, forward pass with the fast weights.

    Args:
        network: called as ``network(images)``; may return anything (logits, or logits and features).
        inner_images: (B, C, H, W), meta-train.
        outer_images: (B, C, H, W), meta-test.
        inner_loss: scalar loss of the network's answer to the inner images.
        step: alpha, size of the virtual step.
        clip: c, bound of each entry of the inner gradient.
        second_order: see ``fast_weights``.
        outer_updates_statistics: whether the outer pass moves running statistics (buffers), too; otherwise it works on
            copies, and the statistics come from the inner images only.

    Returns:
        Both answers and the inner loss. The network's weights are unchanged.
    """
    inner_output: Output = network(inner_images)
    loss = inner_loss(inner_output)
    replaced = fast_weights(loss, dict(network.named_parameters()), step=step, clip=clip, second_order=second_order)
    if not outer_updates_statistics:
        replaced |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    outer_output: Output = functional_call(network, replaced, (outer_images,))
    return Episode(inner_output, loss, outer_output)
