"""Networks of segmentation-models-pytorch by name."""

import inspect
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from fedseg.common.names import similar
from fedseg.models.budget import keep_within
from fedseg.models.lora import Learns, encoder_learns
from fedseg.models.norm import Norm, convert_norm
from fedseg.models.weights import load_encoder

# arguments of smp's constructors that create_model owns, or that other parts of the suite do
RESERVED = {"encoder_name", "encoder_weights", "encoder_depth", "decoder_channels", "in_channels", "classes"}
RESERVED |= {"activation", "aux_params", "kwargs", "self"}
VOLUMES = "take model=unet3d with data.dimensions=3, or data.dimensions=2"


def create_model(
    in_channels: int,
    classes: int,
    dimensions: int = 2,
    *,
    architecture: str = "unet",
    encoder: str = "resnet18",
    encoder_weights: str | None = None,
    encoder_weights_key: str | None = None,
    encoder_depth: int | None = None,
    decoder_channels: list[int] | None = None,
    norm: Norm = "batch",
    groups: int = 8,
    freeze_encoder: bool = False,
    lora_rank: NonNegativeInt = 0,
    lora_layers: list[str] | None = None,
    lora_learns: Learns = "both",
    max_parameters: PositiveInt | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a segmentation network with the parts `encoder`, `decoder` and `segmentation_head`.

    Random weights come from torch's global generator; nothing is downloaded.

    Args:
        in_channels: channels of an image.
        classes: outputs per pixel (logits).
        dimensions: 2; volumes need another network.
        architecture: smp's name in lower case: unet, unetplusplus, manet, linknet, fpn, pspnet, deeplabv3,
            deeplabv3plus, pan, upernet, segformer, dpt (the last with vision transformers of timm only, such as
            tu-vit_tiny_patch16_224).
        encoder: smp's name (resnet18, efficientnet-b0, mobilenet_v2, mit_b0 ...) or tu-NAME for timm's networks.
        encoder_weights: path of a local file with the encoder's weights (.pt, .pth, .safetensors), or null for random.
        encoder_weights_key: how names of the wanted tensors begin, in a file with several encoders that fit (query and
            key, student and teacher): "encoder_q."; "." for names that begin with nothing; null where one alone fits.
        encoder_depth: number of encoder stages, or null for the architecture's own. With fewer stages timm's encoders
            (tu-NAME) drop the deeper layers; smp's own keep them, unused.
        decoder_channels: channels of the decoder's blocks, deep to fine, one per encoder stage (one number alone for
            deeplabv3, deeplabv3plus, pan, upernet), or null for the architecture's own.
        norm: replaces batch normalisation by instance or group normalisation, in encoder and decoder.
        groups: wanted number of groups for norm=group; layers use gcd(channels, groups).
        freeze_encoder: the encoder does not learn, and its normalisation uses the running statistics it came with; for
            probing a pre-trained encoder. It neither travels nor is kept by sites, which must start from the same one.
        lora_rank: of products of two small matrices that learn beside the encoder's linear and convolutional layers
            (LoRA), while the encoder itself is frozen as above; 0 is none.
        lora_layers: the layers that have one, by their names or those of what they lie in, such as [attn]; null for
            all that have more weights than their product.
        lora_learns: both matrices, or only up, the one that begins at 0, beside a random one that all sites share
            (FFA-LoRA): half of what travels, and the mean of the sites' products is the product of the mean.
        max_parameters: the network is refused if it has more, adapters included; null for no limit.
        options: further arguments of the architecture, by smp's names, as in {decoder_attention_type: scse}.

    Returns:
        An smp `SegmentationModel`: images (B, in_channels, H, W), normalised, to logits (B, classes, H, W).

    Raises:
        ValueError: an unknown or unfitting name or value, with the nearest known name.
        FileNotFoundError: `encoder_weights` is no local file.
    """
    if dimensions != 2:
        raise ValueError(f"networks of segmentation-models-pytorch see images, not volumes: {VOLUMES}")
    if min(in_channels, classes) < 1:
        raise ValueError(f"in_channels={in_channels} and classes={classes} must be positive")
    if groups < 1:
        raise ValueError(f"model.groups={groups}: at least 1")
    known = smp.MODEL_ARCHITECTURES_MAPPING
    build = known[_known(architecture, list(known), "architecture")]
    encoder = _encoder_name(encoder)
    arguments = _checked_options(build, options or {})
    if encoder_depth is not None:
        arguments["encoder_depth"] = encoder_depth
    if decoder_channels is not None:
        arguments["decoder_channels"] = _decoder_channels(architecture, build, decoder_channels)
    if architecture == "dpt":
        arguments |= _any_size(encoder)
    try:
        model: nn.Module = build(
            encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=classes, **arguments
        )
    except (ValueError, IndexError, TypeError) as error:  # smp says what does not fit, in names of its own
        said = {"encoder_depth": encoder_depth, "decoder_channels": decoder_channels, "options": options}
        given = "".join(f", model.{name}={value}" for name, value in said.items() if value is not None)
        raise ValueError(f"model.architecture={architecture}, model.encoder={encoder}{given}: {error}") from error
    if encoder_weights is None and encoder_weights_key is not None:
        raise ValueError(f"encoder_weights_key={encoder_weights_key} belongs to encoder_weights=FILE; give both")
    if encoder_weights is not None:
        load_encoder(model.get_submodule("encoder"), encoder_weights, encoder, encoder_weights_key)
    convert_norm(model, norm, groups)
    encoder_learns(model, freeze_encoder, lora_rank, lora_layers, lora_learns)
    keep_within(model, max_parameters)
    return model


def _known(name: str, names: list[str], setting: str) -> str:
    if name in names:
        return name
    near = similar(name, names)
    raise ValueError(
        f"model.{setting}={name}: unknown; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}")
    )


def _encoder_name(name: str) -> str:
    """The name under which smp builds an encoder: its own, or "tu-" and timm's."""
    ours: list[str] = smp.encoders.get_encoder_names()
    if name in ours:
        return name
    # smp dropped its copies of some timm encoders ("timm-mobilenetv3...") in favour of timm's own
    modern = name.replace("timm-mobilenetv3", "tu-tf_mobilenetv3").replace("timm-", "tu-")
    if modern.startswith("tu-") and timm.is_model(modern.removeprefix("tu-")):
        return modern
    return _known(name, ours + [f"tu-{model}" for model in timm.list_models()], "encoder")


def _any_size(encoder: str) -> dict[str, bool]:
    """The argument by which a vision transformer takes images of other sizes than its own, if it has one.

    Raises:
        ValueError: its patches are of a size from which a DPT decoder cannot get to halves.
    """
    name = encoder.removeprefix("tu-")
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):
        try:
            found, takes = timm.create_model(name, dynamic_img_size=True), {"dynamic_img_size": True}
        except TypeError:
            found, takes = timm.create_model(name), {}
    stride = min(stage["reduction"] for stage in found.feature_info)
    if stride & (stride - 1):
        raise ValueError(
            f"model.encoder={encoder} cuts images into patches of {stride} pixels, and model.architecture=dpt needs a "
            "power of two; take an encoder with patches of 16, such as tu-vit_small_patch16_dinov3"
        )
    return takes


def _checked_options(build: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """Copy of the options; smp itself passes unknown ones on to the encoder, or ignores them."""
    allowed = _option_names(build)
    return {_known(name, allowed, "options"): value for name, value in options.items()}


def _decoder_channels(architecture: str, build: type[nn.Module], channels: list[int]) -> list[int] | int:
    parameter = inspect.signature(build.__init__).parameters.get("decoder_channels")
    if parameter is None:
        raise ValueError(
            f"{architecture} has no decoder_channels; its options are {', '.join(_option_names(build))} "
            "(model.options={name: value})"
        )
    if isinstance(parameter.default, int):
        if len(channels) != 1:
            raise ValueError(f"{architecture} has one number of decoder channels, got {channels}")
        return channels[0]
    return list(channels)


def _option_names(build: type[nn.Module]) -> list[str]:
    return sorted(inspect.signature(build.__init__).parameters.keys() - RESERVED)
