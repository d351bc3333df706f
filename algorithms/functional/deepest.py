"""What a network makes of images, and the map that its encoder makes of them on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def with_deepest(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the deepest map of the network's encoder, (B, C, ...)."""
    maps: list[Tensor] = []
    hook = network.get_submodule("encoder").register_forward_hook(
        lambda _module, _args, out: maps.append(deepest_of(out))
    )
    logits: Tensor = network(images)
    hook.remove()
    return logits, maps[0]


def unmoved(network: nn.Module) -> str:
    """Why no loss can change that map; empty where one can."""
    learns = any(p.requires_grad for p in network.get_submodule("encoder").parameters())
    return "" if learns else "the encoder, whose deepest map it is about, does not learn (model.freeze_encoder=true)"


def deepest_of(answer: Any) -> Tensor:
    """The deepest map of what an encoder answers: maps, or of smp's vision transformers these and class tokens."""
    maps: Sequence[Tensor] = answer[0] if isinstance(answer[0], list) else answer
    return maps[-1]
