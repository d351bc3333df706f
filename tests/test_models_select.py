"""Selectors find tensors by type and by part, on every kind of encoder."""

import pytest
from torch import nn

from fedseg.models import complement, create_model, everything, named, normalisation, nothing, part, statistics, union

COUNTS = {  # measured with an independent count over smp 0.6
    ("unet", "resnet18"): 150,
    ("unet", "resnet34"): 230,
    ("unet", "efficientnet-b0"): 295,
    ("unet", "mobilenet_v2"): 310,
    ("unetplusplus", "resnet18"): 210,
    ("unet", "mit_b0"): 110,
}
SMALL = {"decoder_channels": [64, 32, 16, 16, 8]}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return create_model(1, 2, **SMALL)


@pytest.mark.parametrize(("names", "count"), COUNTS.items())
def test_normalisation_finds_every_norm_tensor(names: tuple[str, str], count: int) -> None:
    model = create_model(3, 1, architecture=names[0], encoder=names[1], **SMALL)
    assert len(normalisation(model)) == count


def test_normalisation_holds_what_a_name_would_miss(unet: nn.Module) -> None:
    keys = normalisation(unet)
    assert "encoder.layer2.0.downsample.1.weight" in keys
    assert sum("bn" in key for key in keys) == 85
    assert not any("conv1.weight" in key for key in keys)


def test_normalisation_sees_timm_layers_but_not_their_activation() -> None:
    model = create_model(1, 1, encoder="tu-mobilenetv3_small_100", **SMALL)
    keys = normalisation(model)
    assert "encoder.model.bn1.running_var" in keys
    assert len(keys) == 5 * sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_norm_layer_alone_and_a_transformer_norm() -> None:
    assert normalisation(nn.BatchNorm2d(2)) == nn.BatchNorm2d(2).state_dict().keys()
    assert normalisation(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == {"1.weight", "1.bias"}


def test_statistics_are_the_buffers(unet: nn.Module) -> None:
    assert statistics(unet) == {key for key, _ in unet.named_buffers()}
    assert statistics(unet) < normalisation(unet)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_statistics_of_a_network_without_them_raise(norm: str) -> None:
    model = create_model(1, 1, norm=norm, **SMALL)
    with pytest.raises(ValueError, match="no running statistics"):
        statistics(model)
    assert len(normalisation(model)) == 60  # 30 layers, weight and bias


def test_a_network_without_normalisation_is_not_asked_for_another_one() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 1, 1))
    for selector in (statistics, normalisation):
        with pytest.raises(ValueError, match="no normalisation layers; take another network, or another method"):
            selector(plain)


def test_part_takes_a_sub_module_and_nothing_beside_it(unet: nn.Module) -> None:
    assert part("segmentation_head")(unet) == {"segmentation_head.0.weight", "segmentation_head.0.bias"}
    deep = part("encoder.layer1", "decoder.blocks.0")(unet)
    assert {key.split(".")[1] for key in deep} == {"layer1", "blocks"}
    assert not any(key.startswith("encoder.layer10") for key in deep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("part:segmentation_haed", "did you mean 'segmentation_head'.*encoder, decoder, segmentation_head"),
        ("part:decoder,nowhere.at.all", "no part 'nowhere.at.all'"),
        ("part:segmentation_head.1", "matches no tensor"),
    ],
)
def test_a_part_that_is_not_there_raises(unet: nn.Module, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        named(text)(unet)


def test_nothing_and_everything(unet: nn.Module) -> None:
    assert nothing(unet) == frozenset()
    assert everything(unet) == unet.state_dict().keys()
    assert complement(nothing)(unet) == everything(unet)
    with pytest.raises(ValueError, match="matches no tensor"):
        complement(everything)(unet)
    with pytest.raises(ValueError, match="matches no tensor"):
        normalisation(nn.Linear(2, 2))


def test_complement_and_union_divide_the_network(unet: nn.Module) -> None:
    head = part("segmentation_head")
    assert complement(head)(unet) | head(unet) == everything(unet)
    assert not complement(head)(unet) & head(unet)
    assert union(part("encoder", "decoder"), head)(unet) == everything(unet)


def test_names_of_a_config_are_the_selectors(unet: nn.Module) -> None:
    assert named("normalisation")(unet) == normalisation(unet)
    assert named("statistics")(unet) == statistics(unet)
    assert named("nothing") is nothing
    assert named("everything") is everything
    assert named("part:decoder, segmentation_head")(unet) == part("decoder", "segmentation_head")(unet)
    mixed = named("normalisation+part:segmentation_head")(unet)
    assert mixed == normalisation(unet) | part("segmentation_head")(unet)


@pytest.mark.parametrize(
    ("text", "words"),
    [("normalization", "did you mean 'normalisation'"), ("part", "part:PATH"), ("part:", "paths"), ("bn", "Known")],
)
def test_unknown_names_raise(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        named(text)
