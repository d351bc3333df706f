"""Conversion of batch normalisation, found by module type.

Networks hide their batch normalisation behind many names (`bn1`, `downsample.1`, `conv1.1`) and, in timm, behind a
subclass that also applies the activation. Types do not lie, so conversion goes by type and keeps every key of the
`state_dict()` that the new layer still has: affine weights survive, running statistics disappear.

Group normalisation (Wu & He, ECCV 2018) uses gcd(channels, groups) groups: always a divisor, `groups` itself wherever
the channel number is a multiple of it. Layers that are no batch normalisation (LayerNorm of transformers, GroupNorm of
FPN's decoder) stay as they are.
"""

from math import gcd
from typing import Any, Literal, get_args

from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = Literal["batch", "instance", "group"]
CONVERTIBLE: dict[type[nn.Module], type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
    BatchNormAct2d: nn.InstanceNorm2d,
}


class InstanceNormAct2d(nn.InstanceNorm2d):
    """Instance normalisation, then the dropout and activation of the timm layer it replaces."""

    def __init__(self, *args: Any, drop: nn.Module, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


class GroupNormAct(nn.GroupNorm):
    """Group normalisation, then the dropout and activation of the timm layer it replaces."""

    def __init__(self, *args: Any, drop: nn.Module, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def convert_norm(model: nn.Module, norm: Norm, groups: int) -> int:
    """Replace every batch normalisation of `model` in place.

    Args:
        model: network; its batch normalisation must be of images or volumes.
        norm: "batch" changes nothing; "instance" normalises every channel of every image, in training and evaluation
            alike, with affine weights and without running statistics; "group" does so for groups of channels.
        groups: wanted number of groups of "group".

    Returns:
        Number of layers replaced.

    Raises:
        ValueError: an unknown norm, nothing to convert, or instance normalisation would meet a single pixel (global
            pooling branches).
        TypeError: a kind of batch normalisation that this function does not know.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if norm == "batch":
        return 0
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError(f"norm={norm} has no effect: {type(model).__name__} has no batch normalisation to convert")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _converted(name, module, norm, groups))
    if norm == "instance":
        _refuse_single_pixels(model)
    return len(found)


def _converted(name: str, old: _BatchNorm, norm: Norm, groups: int) -> nn.Module:
    if type(old) not in CONVERTIBLE:
        raise TypeError(f"cannot convert {name}, a {type(old).__name__}; known: {[t.__name__ for t in CONVERTIBLE]}")
    rest = {"drop": old.drop, "act": old.act} if isinstance(old, BatchNormAct2d) else {}
    settings = {"eps": old.eps, "affine": old.affine, **rest}
    new: nn.Module
    if norm == "instance":
        new = (InstanceNormAct2d if rest else CONVERTIBLE[type(old)])(old.num_features, **settings)
    else:
        new = (GroupNormAct if rest else nn.GroupNorm)(gcd(old.num_features, groups), old.num_features, **settings)
    new.load_state_dict({key: value for key, value in old.state_dict().items() if key in new.state_dict()})
    return new.train(old.training)


def _refuse_single_pixels(model: nn.Module) -> None:
    """An instance normalised over one pixel is zero whatever the image: the branch would be dead."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or not len(module):
            continue
        pooled = isinstance(module[0], nn.AdaptiveAvgPool2d) and module[0].output_size in (1, (1, 1))
        if pooled and any(isinstance(layer, nn.InstanceNorm2d) for layer in module.modules()):
            raise ValueError(f"norm=instance cannot follow the global pooling of {name}; use norm=group")
