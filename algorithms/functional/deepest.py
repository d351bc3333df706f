"""What a network makes of images, and the map that its encoder makes of them on the way."""

from __future__ import annotations

from torch import Tensor, nn


def with_deepest(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the deepest map of the network's encoder, (B, C, ...)."""
    maps: list[Tensor] = []
    hook = network.get_submodule("encoder").register_forward_hook(lambda _module, _args, out: maps.append(out[-1]))
    logits: Tensor = network(images)
    hook.remove()
    return logits, maps[0]
