"""Networks of MONAI for volumes and images, with the parts that methods ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from fedseg.models.freeze import freeze
from fedseg.models.norm import Norm, convert_norm

Architecture = Literal["unet", "segresnet", "dynunet"]
WIDEST = 320  # channels of a DynUNet's deepest levels, as in nnU-Net


class PartedNetwork(nn.Module):
    """Encoder, decoder and head in a row, as in segmentation-models-pytorch.

    Args:
        encoder: normalised images -> feature maps, from fine to deep.
        decoder: these -> the finest feature map.
        segmentation_head: this -> logits.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, segmentation_head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = encoder, decoder, segmentation_head

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) to logits (B, classes, ...)."""
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(images)))
        return logits


class Descent(nn.Module):
    """Stages one after the other; every one's output is told.

    Args:
        stages: from fine to deep.
        channels: of their outputs.
    """

    def __init__(self, *stages: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.out_channels = tuple(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, ...) to feature maps, from fine to deep."""
        found = []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found


class Ascent(nn.Module):
    """Stages from deep to fine, each of which also takes the encoder's map of its size.

    Args:
        stages: modules of two feature maps.
    """

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Feature maps from fine to deep, to the finest one."""
        *finer, found = features
        for stage, skipped in zip(self.stages, reversed(finer), strict=True):
            found = stage(found, skipped)
        return found


class Added(nn.Module):
    """A stage of SegResNet's decoder.

    Args:
        up: makes a map larger.
        block: works on its sum with the encoder's.
    """

    def __init__(self, up: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.up, self.block = up, block

    def forward(self, deeper: Tensor, skipped: Tensor) -> Tensor:
        """Both maps to one of the second one's size."""
        found: Tensor = self.block(self.up(deeper) + skipped)
        return found


def create_monai_model(
    in_channels: int,
    classes: int,
    dimensions: int = 3,
    *,
    architecture: Architecture = "unet",
    width: PositiveInt = 16,
    levels: PositiveInt = 4,
    strides: list[list[int]] | None = None,
    norm: Norm = "instance",
    groups: int = 8,
    freeze_encoder: bool = False,
) -> nn.Module:
    """Build a network of MONAI for images or volumes with the parts `encoder`, `decoder` and `segmentation_head`.

    Random weights come from torch's global generator.

    Args:
        in_channels: channels of an image.
        classes: outputs per voxel (logits).
        dimensions: 2 for images, 3 for volumes.
        architecture: unet (Falk et al., Nature Methods 2019; five levels: sides of 32, 48, ...), segresnet
            (Myronenko, BrainLes 2018; four levels), dynunet (nnU-Net's, Isensee et al., Nature Methods 2021).
        width: channels of the finest level; each deeper one has twice as many.
        levels: of dynunet, the finest one included: 3 or more.
        strides: of dynunet, by level, instead of 2 along every axis: [[1, 1, 1], [1, 2, 2], [2, 2, 2]] for volumes of
            thick slices.
        norm: batch, instance or group normalisation, everywhere.
        groups: wanted number of groups for norm=group; layers use gcd(channels, groups).
        freeze_encoder: the encoder does not learn, and its normalisation works as in evaluation. It neither travels nor
            is kept by sites, which must start from the same one.

    Returns:
        Normalised images (B, in_channels, ...) to logits (B, classes, ...) of the same size.

    Raises:
        ValueError: values that do not fit each other.
    """
    build = {"unet": _unet, "segresnet": _segresnet, "dynunet": _dynunet}
    if architecture not in build:
        raise ValueError(f"model.architecture={architecture}: one of {', '.join(build)}")
    if strides is not None and architecture != "dynunet":
        raise ValueError(f"model.strides={strides} belongs to model.architecture=dynunet")
    model = build[architecture](in_channels, classes, dimensions, width, strides or _twice(levels, dimensions))
    convert_norm(model, norm, groups)
    if freeze_encoder:
        freeze(model.encoder)
    return model


def _twice(levels: int, dimensions: int) -> list[list[int]]:
    return [[1] * dimensions, *[[2] * dimensions] * (levels - 1)]


def _unet(channels: int, classes: int, dimensions: int, width: int, _: list[list[int]]) -> PartedNetwork:
    from monai.networks.nets import BasicUNet

    features = [width, width, 2 * width, 4 * width, 8 * width, width]
    net = BasicUNet(dimensions, channels, classes, features, norm="batch")
    encoder = Descent(net.conv_0, net.down_1, net.down_2, net.down_3, net.down_4, channels=features[:-1])
    return PartedNetwork(encoder, Ascent(net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1), net.final_conv)


def _segresnet(channels: int, classes: int, dimensions: int, width: int, _: list[list[int]]) -> PartedNetwork:
    from monai.networks.nets import SegResNet

    net = SegResNet(dimensions, width, channels, classes, norm="batch")
    first, *deeper = net.down_layers
    ascent = Ascent(*(Added(up, block) for up, block in zip(net.up_samples, net.up_layers, strict=True)))
    widths = [width * 2**level for level in range(len(net.down_layers))]
    encoder = Descent(nn.Sequential(net.convInit, first), *deeper, channels=widths)
    return PartedNetwork(encoder, ascent, net.conv_final)


def _dynunet(channels: int, classes: int, dimensions: int, width: int, strides: list[list[int]]) -> PartedNetwork:
    from monai.networks.nets import DynUNet

    if len(strides) < 3 or any(len(steps) != dimensions or min(steps) < 1 for steps in strides):
        raise ValueError(
            f"model.strides={strides} (model.levels={len(strides)}): three levels or more, each with "
            f"{dimensions} steps of 1 or more"
        )
    kernels = [[3] * dimensions for _ in strides]
    filters = [min(width * 2**level, max(WIDEST, width)) for level in range(len(strides))]
    net = DynUNet(dimensions, channels, classes, kernels, strides, strides[1:], filters, norm_name="batch")
    encoder = Descent(net.input_block, *net.downsamples, net.bottleneck, channels=filters)
    return PartedNetwork(encoder, Ascent(*net.upsamples), net.output_block)
