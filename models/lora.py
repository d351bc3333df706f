"""Low-rank adapters (LoRA, Hu et al., ICLR 2022): what learns of a part whose own weights do not.

A layer's weights W, seen as a matrix of its outputs by all that each of them reads, become W + up down, with `up`
(outputs x rank) and `down` (rank x read) far smaller than W. `up` starts at 0, so that the network begins as it was.
Their strength (alpha / rank there) is left at 1: it does what a learning rate does.

The layer keeps its class, its names and the way it computes; only what it finds under `weight` is the sum. So networks
that call a layer's weights themselves, as some of timm's transformers do, are adapted too, and every tensor keeps its
name.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, get_args

import torch
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from torch import Tensor, nn

from fedseg.models.freeze import freeze

Learns = Literal["both", "up"]
Layer = nn.Linear | nn.Conv2d | nn.Conv3d


class LowRank(nn.Module):
    """A product of two small matrices, beside the weights of a layer.

    Args:
        weight: of the layer, (outputs, ...).
        rank: of the product.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a linear layer begins

    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weights and the product."""
        return weight + (self.up @ self.down).view(weight.shape)


class Adapted(nn.Module):
    """What a layer's class is mixed with: under `weight` is what it computes with, in its state what it began with."""

    lora: LowRank

    @property
    def weight(self) -> Tensor:
        """Its own weights, which do not learn, and the product, which does."""
        found: Tensor = self.lora(self._parameters["weight"])  # the name itself would lead back here
        return found


def encoder_learns(
    model: nn.Module, freeze_encoder: bool, lora_rank: int, lora_layers: Sequence[str] | None, lora_learns: Learns
) -> None:
    """Decide what of a network's encoder learns, in place: all, nothing, or adapters.

    Raises:
        ValueError: settings of adapters without any, or such as `adapt` refuses.
    """
    encoder = model.get_submodule("encoder")
    if lora_rank:
        adapt(encoder, lora_rank, lora_layers, lora_learns)
        return
    if lora_layers is not None or lora_learns != "both":
        given = f"lora_learns={lora_learns}" if lora_layers is None else f"lora_layers={[*lora_layers]}"
        raise ValueError(f"model.{given} is of adapters, and model.lora_rank=0 makes none; take model.lora_rank=8")
    if freeze_encoder:
        freeze(encoder)


def adapt(part: nn.Module, rank: int, layers: Sequence[str] | None, learns: Learns) -> int:
    """Freeze a part, and put an adapter beside its linear and convolutional layers.

    Layers of which a product would have no fewer numbers stay without.

    Args:
        part: changed in place.
        rank: of the products.
        layers: names of layers or of what they lie in, as pieces of dotted paths; None for all.
        learns: both matrices, or only `up` beside a random `down` that all sites share: then the mean of products is
            the product of means (FFA-LoRA, Sun et al., ICLR 2024).

    Returns:
        Number of layers that are adapted.

    Raises:
        ValueError: a name that no such layer has, no layer is left, or one of the words is unknown.
    """
    if learns not in get_args(Learns):
        raise ValueError(f"model.lora_learns={learns}: one of {', '.join(get_args(Learns))}")
    unread = _unread(part)
    found = {name: m for name, m in part.named_modules() if isinstance(m, Layer) and m not in unread}
    chosen = _chosen(found, layers)
    fits = {name: layer for name, layer in chosen.items() if rank * _sides(layer) < layer.weight.numel()}
    if not fits:
        most = max(((layer.weight.numel() - 1) // _sides(layer) for layer in chosen.values()), default=0)
        raise ValueError(
            f"model.lora_rank={rank}: none of {len(chosen)} layers is larger than its product would be; "
            + (f"take model.lora_rank={most} or less" if most else "take model.lora_rank=0, or another network")
        )
    freeze(part)
    for layer in fits.values():
        product = LowRank(layer.weight.detach(), rank)
        product.down.requires_grad_(learns == "both")
        _mix_in(layer, product)
    return len(fits)


def adapted(network: nn.Module) -> list[Adapted]:
    """The layers of a network that have adapters."""
    return [module for module in network.modules() if isinstance(module, Adapted)]


def merged(network: nn.Module) -> nn.Module:
    """A network that answers the same without adapters, their products being added to the weights.

    Returns:
        A copy; where there are no adapters the network itself.
    """
    if not adapted(network):
        return network
    copy = deepcopy(network)
    for layer in adapted(copy):
        with torch.no_grad():
            weight = layer.weight
        del layer.lora
        layer.__class__ = type(layer).__bases__[1]
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return copy


def _unread(part: nn.Module) -> set[nn.Module]:
    """Layers whose answers a decoder does not see: the classifier that smp leaves on a vision transformer."""
    return {*part.model.get_classifier().modules()} if isinstance(part, TimmViTEncoder) else set()


def _sides(layer: Layer) -> int:
    """Numbers of a product of rank 1."""
    return len(layer.weight) + layer.weight[0].numel()


def _chosen(found: dict[str, Layer], layers: Sequence[str] | None) -> dict[str, Layer]:
    if layers is None:
        return found
    for wanted in layers:
        if not any(f".{wanted}." in f".{name}." for name in found):
            names = sorted({piece for name in found for piece in name.split(".") if not piece.isdigit()})
            raise ValueError(
                f"model.lora_layers={[*layers]}: no linear or convolutional layer of the encoder is or lies in "
                f"{wanted!r}; they are or lie in {', '.join(names)}"
            )
    return {name: m for name, m in found.items() if any(f".{wanted}." in f".{name}." for wanted in layers)}


def _mix_in(layer: nn.Module, product: LowRank) -> None:
    kind = type(layer)
    layer.add_module("lora", product)
    layer.__class__ = type(f"LowRank{kind.__name__}", (Adapted, kind), {})
