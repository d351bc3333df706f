"""Networks of MONAI for volumes and images, with the parts that methods ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from fedseg.models.budget import keep_within
from fedseg.models.lora import Learns, encoder_learns
from fedseg.models.losses import Answer
from fedseg.models.norm import Norm, convert_norm
from fedseg.models.weights import load_encoder

Architecture = Literal["unet", "segresnet", "dynunet", "swin_unetr"]
WIDEST = 320  # channels of a DynUNet's deepest levels, as in nnU-Net
WIDTHS: dict[str, int] = {"unet": 16, "segresnet": 16, "dynunet": 16, "swin_unetr": 12}
"""Of networks without a width of their own."""
LEVELS = 4  # of a DynUNet; beside another network or strides this value says nothing, as in folders of older runs
HALVINGS = 5  # of Swin UNETR: its patches and four levels
RELATIVE = "relative_position_index"
MLP = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
"""Names in files of MONAI's self-supervised Swin transformers, and what its networks call the same."""


class PartedNetwork(nn.Module):
    """Encoder, decoder and head in a row, as in segmentation-models-pytorch.

    Args:
        encoder: normalised images -> feature maps, from fine to deep.
        decoder: these -> the finest feature map.
        segmentation_head: this -> logits.
        steps: by axis, what the sides of an image must be multiples of; None where any will do.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        segmentation_head: nn.Module,
        steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = encoder, decoder, segmentation_head
        self.steps = None if steps is None else tuple(steps)

    def forward(self, images: Tensor) -> Answer:
        """(B, C, ...) to logits (B, classes, ...); in training also those of auxiliary heads, from fine to coarse."""
        logits: Answer = self.segmentation_head(self.decoder(self.encoder(images)))
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
        coarser: how many maps beside the finest one it answers with.
    """

    def __init__(self, *stages: nn.Module, coarser: int = 0) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.coarser = coarser

    def forward(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Feature maps from fine to deep, to the finest one, or to a list of it and the next coarser ones."""
        *finer, found = features
        made = []
        for stage, skipped in zip(self.stages, reversed(finer), strict=True):
            found = stage(found, skipped)
            made.append(found)
        return [*reversed(made)][: self.coarser + 1] if self.coarser else found


class Heads(nn.Module):
    """A head, and auxiliary ones that answer in training only (deep supervision).

    Args:
        main: of the finest map.
        auxiliary: of coarser ones, from fine to coarse.
    """

    def __init__(self, main: nn.Module, auxiliary: Sequence[nn.Module]) -> None:
        super().__init__()
        self.main, self.auxiliary = main, nn.ModuleList(auxiliary)

    def forward(self, maps: list[Tensor]) -> Answer:
        """Feature maps from fine to coarse, to logits of each; in evaluation of the finest alone."""
        finest, *coarser = maps
        logits: Tensor = self.main(finest)
        if not self.training:
            return logits
        return logits, *(head(found) for head, found in zip(self.auxiliary, coarser, strict=True))


def auxiliary_heads(model: nn.Module) -> int:
    """How many heads of a network answer in training only."""
    return sum(len(module.auxiliary) for module in model.modules() if isinstance(module, Heads))


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


class SwinDescent(nn.Module):
    """A Swin transformer as an encoder.

    Args:
        transformer: images -> token maps, from fine to deep.
        channels: of the images and of the maps.
    """

    def __init__(self, transformer: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.transformer = transformer
        self.out_channels = tuple(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, ...) to the images themselves and feature maps, from fine to deep."""
        return [images, *self.transformer(images)]


class SwinAscent(nn.Module):
    """Swin UNETR's decoder: residual blocks on most of the encoder's maps, and the way up.

    Args:
        blocks: by map, from fine to deep; where there is none the map is taken as it is.
        ascent: of what they make.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], ascent: Ascent) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(place): block for place, block in blocks.items()})
        self.ascent = ascent

    def forward(self, features: list[Tensor]) -> Tensor:
        """Images and feature maps from fine to deep, to a feature map of the images' size."""
        found = list(features)
        for place, block in self.blocks.items():
            found[int(place)] = block(found[int(place)])
        result: Tensor = self.ascent(found)
        return result


def create_monai_model(
    in_channels: int,
    classes: int,
    dimensions: int = 3,
    *,
    architecture: Architecture = "unet",
    width: PositiveInt | None = None,
    levels: PositiveInt = LEVELS,
    strides: list[list[int]] | None = None,
    deep_supervision: NonNegativeInt = 0,
    norm: Norm = "instance",
    groups: int = 8,
    encoder_weights: str | None = None,
    encoder_weights_key: str | None = None,
    freeze_encoder: bool = False,
    lora_rank: NonNegativeInt = 0,
    lora_layers: list[str] | None = None,
    lora_learns: Learns = "both",
    max_parameters: PositiveInt | None = None,
) -> nn.Module:
    """Build a network of MONAI for images or volumes with the parts `encoder`, `decoder` and `segmentation_head`.

    Random weights come from torch's global generator.

    Args:
        in_channels: channels of an image.
        classes: outputs per voxel (logits).
        dimensions: 2 for images, 3 for volumes.
        architecture: unet (Falk et al., Nature Methods 2019; five levels: sides of 32, 48, ...), segresnet
            (Myronenko, BrainLes 2018; four levels), dynunet (nnU-Net's, Isensee et al., Nature Methods 2021),
            swin_unetr (Hatamizadeh et al., BrainLes 2021; sides are multiples of 32).
        width: channels of the finest level; each deeper one has twice as many. Null is 16, of swin_unetr 12, whose
            widths are multiples of that (48 in its paper).
        levels: of dynunet without strides, the finest one included: 3 or more.
        strides: of dynunet, by level, instead of 2 along every axis: [[1, 1, 1], [1, 2, 2], [2, 2, 2]] for volumes of
            thick slices.
        deep_supervision: of dynunet, heads beside the main one, on the next coarser maps of the decoder: up to
            levels - 2 (nnU-Net has levels - 3). In training their losses count 1/2, 1/4, ... of the main one's; outside
            of it there is one answer. They belong to the head.
        norm: batch, instance or group normalisation, everywhere but in the transformer of swin_unetr, which normalises
            layers.
        groups: wanted number of groups for norm=group; layers use gcd(channels, groups).
        encoder_weights: path of a local file with the encoder's weights (.pt, .pth, .safetensors), such as a model that
            was exported, or null for random. Of swin_unetr also MONAI's, of the whole network or of its transformer.
        encoder_weights_key: how names of the wanted tensors begin, in a file with several encoders that fit.
        freeze_encoder: the encoder does not learn, and its normalisation works as in evaluation. It neither travels nor
            is kept by sites, which must start from the same one.
        lora_rank: of products of two small matrices that learn beside the encoder's linear and convolutional layers
            (LoRA), while the encoder itself is frozen as above; 0 is none.
        lora_layers: the layers that have one, by their names or those of what they lie in; null for all that have more
            weights than their product.
        lora_learns: both matrices, or only up, the one that begins at 0, beside a random one that all sites share.
        max_parameters: the network is refused if it has more, adapters included; null for no limit.

    Returns:
        Normalised images (B, in_channels, ...) to logits (B, classes, ...) of the same size; with auxiliary heads, in
        training, to a tuple of these and of theirs.

    Raises:
        ValueError: values that do not fit each other.
        FileNotFoundError: `encoder_weights` is no local file.
    """
    dynunet = partial(_dynunet, strides=strides or _twice(levels, dimensions), heads=deep_supervision)
    build: dict[str, Callable[[int, int, int, int], PartedNetwork]] = {
        "unet": _unet,
        "segresnet": _segresnet,
        "dynunet": dynunet,
        "swin_unetr": _swin_unetr,
    }
    if architecture not in build:
        raise ValueError(f"model.architecture={architecture}: one of {', '.join(build)}")
    if levels != LEVELS and architecture != "dynunet":
        raise ValueError(
            f"model.levels={levels} belongs to model.architecture=dynunet; {architecture} has its own: take "
            f"model.levels={LEVELS}, which is the default"
        )
    if strides is not None and levels not in (LEVELS, len(strides)):
        raise ValueError(
            f"model.levels={levels}: model.strides={strides} are {len(strides)} levels; take "
            f"model.levels={len(strides)}"
        )
    if strides is not None and architecture != "dynunet":
        raise ValueError(f"model.strides={strides} belongs to model.architecture=dynunet")
    if deep_supervision and architecture != "dynunet":
        raise ValueError(
            f"model.deep_supervision={deep_supervision} belongs to model.architecture=dynunet; {architecture} has no "
            "auxiliary heads: take model.deep_supervision=0"
        )
    model = build[architecture](in_channels, classes, dimensions, width or WIDTHS[architecture])
    convert_norm(model, norm, groups)
    if encoder_weights is None and encoder_weights_key is not None:
        raise ValueError(f"encoder_weights_key={encoder_weights_key} belongs to encoder_weights=FILE; give both")
    if encoder_weights is not None:
        if not Path(encoder_weights).is_file():
            raise FileNotFoundError(f"encoder_weights={encoder_weights} is no file; nothing is downloaded here")
        learnt = model.encoder.transformer if isinstance(model.encoder, SwinDescent) else model.encoder
        load_encoder(learnt, encoder_weights, architecture, encoder_weights_key, MLP)
    encoder_learns(model, freeze_encoder, lora_rank, lora_layers, lora_learns)
    keep_within(model, max_parameters)
    return model


def _twice(levels: int, dimensions: int) -> list[list[int]]:
    return [[1] * dimensions, *[[2] * dimensions] * (levels - 1)]


def _unet(channels: int, classes: int, dimensions: int, width: int) -> PartedNetwork:
    from monai.networks.nets import BasicUNet

    features = [width, width, 2 * width, 4 * width, 8 * width, width]
    net = BasicUNet(dimensions, channels, classes, features, norm="batch")
    encoder = Descent(net.conv_0, net.down_1, net.down_2, net.down_3, net.down_4, channels=features[:-1])
    return PartedNetwork(encoder, Ascent(net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1), net.final_conv)


def _segresnet(channels: int, classes: int, dimensions: int, width: int) -> PartedNetwork:
    from monai.networks.nets import SegResNet

    net = SegResNet(dimensions, width, channels, classes, norm="batch")
    first, *deeper = net.down_layers
    ascent = Ascent(*(Added(up, block) for up, block in zip(net.up_samples, net.up_layers, strict=True)))
    widths = [width * 2**level for level in range(len(net.down_layers))]
    encoder = Descent(nn.Sequential(net.convInit, first), *deeper, channels=widths)
    return PartedNetwork(encoder, ascent, net.conv_final, [2 ** (len(widths) - 1)] * dimensions)


def _dynunet(
    channels: int, classes: int, dimensions: int, width: int, strides: list[list[int]], heads: int
) -> PartedNetwork:
    from monai.networks.nets import DynUNet

    if len(strides) < 3 or any(len(steps) != dimensions or min(steps) < 1 for steps in strides):
        raise ValueError(
            f"model.strides={strides} (model.levels={len(strides)}): three levels or more, each with "
            f"{dimensions} steps of 1 or more"
        )
    if heads > (most := len(strides) - 2):
        raise ValueError(f"model.deep_supervision={heads}: {len(strides)} levels have at most {most} auxiliary heads")
    kernels = [[3] * dimensions for _ in strides]
    filters = [min(width * 2**level, max(WIDEST, width)) for level in range(len(strides))]
    supervision: dict[str, Any] = {"deep_supervision": True, "deep_supr_num": heads} if heads else {}
    net: Any = DynUNet(
        dimensions, channels, classes, kernels, strides, strides[1:], filters, norm_name="batch", **supervision
    )
    encoder = Descent(net.input_block, *net.downsamples, net.bottleneck, channels=filters)
    steps = [prod(along) for along in zip(*strides, strict=True)]
    head = Heads(net.output_block, net.deep_supervision_heads) if heads else net.output_block
    return PartedNetwork(encoder, Ascent(*net.upsamples, coarser=heads), head, steps)


def _swin_unetr(channels: int, classes: int, dimensions: int, width: int) -> PartedNetwork:
    from monai.networks.nets import SwinUNETR

    if width % WIDTHS["swin_unetr"]:
        nearest = max(1, round(width / WIDTHS["swin_unetr"])) * WIDTHS["swin_unetr"]
        raise ValueError(
            f"model.width={width}: model.architecture=swin_unetr takes multiples of {WIDTHS['swin_unetr']}, for its "
            f"heads of attention; take model.width={nearest}"
        )
    net: Any = SwinUNETR(channels, classes, feature_size=width, norm_name="batch", spatial_dims=dimensions)
    for module in net.modules():
        if RELATIVE in module._buffers:  # follows from the size of its windows, so that it need not be kept
            module.register_buffer(RELATIVE, module.get_buffer(RELATIVE), persistent=False)
    encoder = SwinDescent(net.swinViT, [channels, *(width * 2**level for level in range(HALVINGS))])
    blocks = {0: net.encoder1, 1: net.encoder2, 2: net.encoder3, 3: net.encoder4, 5: net.encoder10}
    ascent = Ascent(net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
    return PartedNetwork(encoder, SwinAscent(blocks, ascent), net.out, [2**HALVINGS] * dimensions)
