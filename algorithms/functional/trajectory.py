"""Exponential moving averages over state dicts and over networks.

IOP-FL's personal model is such an average: T_r = a T_(r-1) + (1 - a) w_r over everything in the state dict, running
statistics included (Jiang et al., IEEE TMI 2023). The momentum encoder of contrastive pre-training is another (He et
al., CVPR 2020).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def average_states(old: Mapping[str, Tensor], new: Mapping[str, Tensor], weight_of_old: float) -> dict[str, Tensor]:
    """One step of the moving average: ``weight_of_old * old + (1 - weight_of_old) * new``.

    Floating tensors are averaged; integer tensors (batch counters) are copied from ``new``. A weight of 0 gives
    ``new`` and a weight of 1 gives the floating tensors of ``old``, bit for bit.

    Args:
        old: the average so far.
        new: the latest state; it may lie on another device.
        weight_of_old: in [0, 1].

    Returns:
        A new state, on the devices and in the types of ``old``, aliasing neither input.

    Raises:
        ValueError: the weight is out of range, or the two states name tensors of other names or shapes.
    """
    check_fraction("weight_of_old", weight_of_old)
    if old.keys() != new.keys():
        raise ValueError(f"the two states name different tensors, for example {sorted(old.keys() ^ new.keys())[:3]}")
    averaged: dict[str, Tensor] = {}
    for name, before in old.items():
        after = new[name].detach().to(before.device)
        if before.shape != after.shape:
            raise ValueError(f"{name!r} changed its shape from {tuple(before.shape)} to {tuple(after.shape)}")
        if before.is_floating_point():
            averaged[name] = torch.lerp(before.detach(), after.to(before.dtype), 1.0 - weight_of_old)
        else:
            averaged[name] = after.clone()
    return averaged


@torch.no_grad()
def follow(follower: nn.Module, leader: nn.Module, momentum: float) -> None:
    """Let a momentum encoder follow in place: parameters are averaged, buffers copied.

    Args:
        follower: its parameters become ``momentum * own + (1 - momentum) * leader's``.
        leader: a network of the same architecture; unchanged.
        momentum: in [0, 1].

    Raises:
        ValueError: the momentum is out of range, or the architectures differ.
    """
    check_fraction("momentum", momentum)
    for kind, own, other in (
        ("parameters", dict(follower.named_parameters()), dict(leader.named_parameters())),
        ("buffers", dict(follower.named_buffers()), dict(leader.named_buffers())),
    ):
        if own.keys() != other.keys():
            raise ValueError(f"the two networks have different {kind}: {sorted(own.keys() ^ other.keys())[:3]}")
        for name, tensor in own.items():
            if kind == "parameters":
                tensor.lerp_(other[name].to(tensor), 1.0 - momentum)
            else:
                tensor.copy_(other[name])


def check_fraction(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")
