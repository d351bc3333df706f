"""Which sides of images a network takes."""

from collections.abc import Sequence
from itertools import chain

import torch
from segmentation_models_pytorch.base import SegmentationModel
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from torch import nn
from torch.func import functional_call
from torch.nn.modules.instancenorm import _InstanceNorm

from fedseg.models.volumes import PartedNetwork


def check_sides(model: nn.Module, size: Sequence[int]) -> None:
    """Refuse images that a network cannot halve as often as it does, or halves to one voxel, which has no spread.

    Args:
        model: any network; people's own take what they are given.
        size: sides of what it sees.

    Raises:
        ValueError: with the nearest sides that will do.
    """
    steps = _steps(model, len(size))
    if steps is None:
        return
    nearest = [max(1, round(side / step)) * step for side, step in zip(size, steps, strict=True)]
    fits, more, other = list(size) == nearest, "", ""
    parted = isinstance(model, PartedNetwork)
    if parted and nearest == list(steps) and any(isinstance(module, _InstanceNorm) for module in model.modules()):
        longest = max(range(len(steps)), key=lambda axis: (size[axis] / steps[axis], axis))
        nearest[longest] *= 2
        more = ", with model.norm=instance one of them twice as long or longer"
        other = ", or model.norm=group" if fits else ""
    if list(size) != nearest:
        of = str(steps[0]) if len(set(steps)) == 1 else " x ".join(map(str, steps))
        raise ValueError(
            f"data.size={list(size)}: the network needs sides that are multiples of {of}{more}; take "
            f"data.size={nearest}{other}"
        )
    if isinstance(encoder := dict(model.named_children()).get("encoder"), TimmViTEncoder):
        _check_tokens(encoder, size)


def _steps(model: nn.Module, axes: int) -> Sequence[int] | None:
    """What sides must be multiples of, by axis; None where any will do, or nobody knows."""
    if isinstance(model, PartedNetwork):
        return model.steps
    if not isinstance(model, SegmentationModel) or not model.requires_divisible_input_shape:
        return None
    strides = [model.encoder.output_stride]
    if isinstance(model.encoder, TimmViTEncoder):  # whose maps the decoder brings to strides of 4, 8, ...
        strides = [4 * 2**level for level in range(len(model.encoder.output_strides))] + model.encoder.output_strides
    return [max(strides)] * axes


def _check_tokens(encoder: TimmViTEncoder, size: Sequence[int]) -> None:
    """Refuse images for which a transformer has no positions: some take those of one size only."""
    native = list(encoder.input_size[1:])
    if vars(encoder.model).get("dynamic_img_size") or list(size) == native:
        return
    tensors = {name: t.to("meta") for name, t in chain(encoder.named_parameters(), encoder.named_buffers())}
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    try:  # computes shapes only
        functional_call(encoder, tensors, (torch.empty(1, first.in_channels, *size, device="meta"),))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"data.size={list(size)}: model.encoder=tu-{encoder.name} has positions for images of {native} only "
            f"({error}); take data.size={native}, or an encoder that interpolates them, such as "
            "tu-vit_small_patch16_dinov3"
        ) from error
