"""Networks by name: every architecture, every norm, weights from a file, and clear refusals."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedseg.models import create_model, create_monai_model, create_nca_model
from tests.tiers import every

SMALL: dict[str, Any] = {"decoder_channels": [32, 16, 16, 8, 8]}
CONFIGS = Path(__file__).parent.parent / "configs" / "model"


@pytest.mark.parametrize("architecture", sorted(set(smp.MODEL_ARCHITECTURES_MAPPING) - {"dpt"}))
def test_every_architecture_has_the_three_parts_and_maps_pixels(architecture: str) -> None:
    model = create_model(1, 3, architecture=architecture, encoder="tu-resnet10t").eval()
    assert {"encoder", "decoder", "segmentation_head"} <= {name for name, _ in model.named_children()}
    with torch.no_grad():
        assert model(torch.rand(1, 1, 128, 128)).shape == (1, 3, 128, 128)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_state_departures_only_and_build(file: Path) -> None:
    departures = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(departures, dict)
    build, dimensions = {
        "smp": (create_model, 2),
        "monai": (create_monai_model, 3),
        "nca": (create_nca_model, 2),
    }[departures.pop("name")]
    parameters = inspect.signature(build).parameters
    assert all(parameters[str(key)].default != value for key, value in departures.items())
    model = build(3, 2, dimensions, **{str(key): value for key, value in departures.items()}).eval()
    sides = [{2: 64, 3: 32}[dimensions]] * dimensions
    with torch.no_grad():
        assert model(torch.rand(2, 3, *sides)).shape == (2, 2, *sides)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_100", "efficientnet-b0"])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_norm_leaves_no_batch_normalisation_and_keeps_keys_and_activations(encoder: str, norm: Any) -> None:
    torch.manual_seed(0)
    batch = create_model(1, 1, encoder=encoder, **SMALL)
    for key, parameter in batch.named_parameters():
        if "bn" in key or "downsample.1" in key:
            nn.init.normal_(parameter)
    torch.manual_seed(0)
    other = create_model(1, 1, encoder=encoder, norm=norm, **SMALL)
    assert not any(isinstance(module, _BatchNorm) for module in other.modules())
    assert dict(other.named_parameters()).keys() == dict(batch.named_parameters()).keys()
    acts = [type(module) for module in batch.modules() if isinstance(module, (nn.ReLU, nn.Hardswish, nn.SiLU))]
    assert acts == [type(module) for module in other.modules() if isinstance(module, (nn.ReLU, nn.Hardswish, nn.SiLU))]
    other.train()(torch.rand(2, 1, 64, 64)).sum().backward()


def test_conversion_keeps_affine_weights_and_applies_the_activation() -> None:
    from timm.layers import BatchNormAct2d

    from fedseg.models.norm import convert_norm

    net = nn.Sequential(BatchNormAct2d(4), nn.BatchNorm2d(6, eps=0.5))
    nn.init.constant_(net[0].weight, 3.0)
    nn.init.constant_(net[0].bias, -1.0)
    assert convert_norm(net, "instance", groups=8) == 2
    x = torch.randn(2, 4, 5, 5)
    expected = (3 * nn.functional.instance_norm(x) - 1).relu()
    torch.testing.assert_close(net[0](x), expected)
    assert net[1].eps == 0.5


def test_groups_divide_the_channels() -> None:
    from fedseg.models.norm import convert_norm

    net = nn.Sequential(*(nn.BatchNorm2d(channels) for channels in (64, 12, 7)))
    convert_norm(net, "group", groups=8)
    assert [layer.num_groups for layer in net] == [8, 4, 1]
    x = torch.randn(2, 12, 3, 3)
    grouped = x.view(2, 4, -1)
    expected = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(net[1](x), expected.view_as(x))


def test_group_norm_makes_images_of_a_batch_independent() -> None:
    model = create_model(1, 1, norm="group", **SMALL).train()
    images = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-5, rtol=1e-4)


def test_norms_that_cannot_work_are_refused() -> None:
    from fedseg.models.norm import convert_norm

    with pytest.raises(ValueError, match="no effect"):
        convert_norm(nn.Linear(2, 2), "group", groups=8)
    with pytest.raises(TypeError, match="BatchNorm1d"):
        convert_norm(nn.Sequential(nn.BatchNorm1d(2)), "group", groups=8)
    for architecture in ("deeplabv3", "deeplabv3plus", "pan", "upernet"):  # all have a global pooling branch
        with pytest.raises(ValueError, match="norm=group"):
            create_model(1, 1, architecture=architecture, encoder="tu-resnet10t", norm="instance")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "Unett"}, "nearest: unet"),
        ({"encoder": "resnet81"}, "nearest: .*resnet18"),
        ({"encoder": "tu-no_such_network_at_all"}, "model.encoder=tu-no_such_network_at_all: unknown"),
        ({"options": {"decoder_atention_type": "scse"}}, "nearest: decoder_attention_type"),
        ({"architecture": "fpn", "decoder_channels": [64]}, "decoder_pyramid_channels"),
        ({"architecture": "deeplabv3plus", "decoder_channels": [64, 32]}, "one number"),
        ({"decoder_channels": [64, 32]}, "decoder_channels"),
        ({"classes": 0}, "positive"),
        ({"norm": "layer"}, "norm"),
    ],
)
def test_wrong_names_and_values_raise(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_model(**({"in_channels": 1, "classes": 1} | arguments))


def test_options_and_old_encoder_names_reach_smp() -> None:
    scse = create_model(1, 1, options={"decoder_attention_type": "scse"})
    assert any("attention" in name and "SCSE" in repr(module) for name, module in scse.named_modules())
    old = create_model(1, 1, encoder="timm-mobilenetv3_small_100", **SMALL)
    assert type(old.encoder).__name__ == "TimmUniversalEncoder"


def encoder_state(channels: int, encoder: str = "resnet18") -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = create_model(channels, 1, encoder=encoder, **SMALL).encoder.state_dict()
    return state


@pytest.mark.parametrize("wrapper", ["bare", "state_dict", "prefix", "safetensors", "classifier"])
@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_100"])
def test_local_weights_are_loaded(tmp_path: Path, wrapper: str, encoder: str) -> None:
    state = encoder_state(1, encoder)
    path = tmp_path / ("weights.safetensors" if wrapper == "safetensors" else "weights.pt")
    match wrapper:
        case "safetensors":
            save_file(state, path)
        case "prefix":
            torch.save({f"module.encoder.{key}": value for key, value in state.items()}, path)
        case "state_dict":
            torch.save({"epoch": 3, "state_dict": state}, path)
        case "classifier":  # as timm and torchvision publish them
            bare = {key.removeprefix("model."): value for key, value in state.items()}
            torch.save(bare | {"fc.weight": torch.zeros(10, 512)}, path)
        case _:
            torch.save(state, path)
    torch.manual_seed(6)
    loaded = create_model(1, 1, encoder=encoder, encoder_weights=str(path), **SMALL).encoder.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_local_weights_survive_norm_conversion(tmp_path: Path) -> None:
    state = encoder_state(1)
    state["bn1.weight"] = torch.full_like(state["bn1.weight"], 7.0)
    torch.save(state, tmp_path / "w.pt")
    model = create_model(1, 1, norm="group", encoder_weights=str(tmp_path / "w.pt"), **SMALL)
    assert (model.state_dict()["encoder.bn1.weight"] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_first_convolution_is_adapted_as_smp_does(tmp_path: Path, channels: int) -> None:
    torch.save(encoder_state(3), tmp_path / "w.pt")
    ours = create_model(channels, 1, encoder_weights=str(tmp_path / "w.pt"), **SMALL).encoder
    theirs = smp.encoders.get_encoder("resnet18", in_channels=3, weights=None)
    theirs.load_state_dict(encoder_state(3))
    theirs.set_in_channels(channels, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
def test_grey_weights_in_a_colour_network_answer_alike_to_grey_images(tmp_path: Path) -> None:
    torch.save(encoder_state(1), tmp_path / "w.pt")
    colour = create_model(3, 1, encoder_weights=str(tmp_path / "w.pt"), **SMALL).encoder.conv1
    grey = create_model(1, 1, encoder_weights=str(tmp_path / "w.pt"), **SMALL).encoder.conv1
    image = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(colour(image.expand(1, 3, 8, 8)), grey(image))


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = encoder_state(1)
    del state["layer1.0.conv1.weight"], state["bn1.weight"]
    torch.save(state, tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"2 of 100 tensors are missing \(bn1.weight, layer1.0.conv1.weight\)"):
        create_model(1, 1, encoder_weights=str(tmp_path / "missing.pt"), **SMALL)
    torch.save(encoder_state(1) | {"layer1.0.conv1.weight": torch.zeros(64, 64, 5, 5)}, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight of .*shape.pt has shape"):
        create_model(1, 1, encoder_weights=str(tmp_path / "shape.pt"), **SMALL)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        create_model(1, 1, encoder_weights=str(tmp_path / "list.pt"), **SMALL)


TWINS = {
    "query and key": ("encoder_q.", "encoder_k."),
    "student and teacher": ("student.", "teacher."),
    "online and target": ("online.", "target."),
    "model and average": ("model.", "model_ema."),
    "bare and average": ("", "ema."),
    "in a module": ("module.encoder_q.", "module.encoder_k."),
}


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("twins", every(TWINS, ["student and teacher"]))
def test_of_two_encoders_that_fit_none_is_taken_in_silence(twins: str, nested: bool, tmp_path: Path) -> None:
    """Of smp's encoders and of timm's in turn: each meets every pair of names, and files of both kinds."""
    encoder = ["resnet18", "tu-mobilenetv3_small_100"][(list(TWINS).index(twins) + nested) % 2]
    one = encoder_state(1, encoder)
    other = {key: value + 1 if value.is_floating_point() else value for key, value in one.items()}
    path, content = tmp_path / "weights.pt", {}
    for prefix, state in zip(TWINS[twins], (one, other), strict=True):
        named = {f"{prefix}{key}": value for key, value in state.items()}
        content |= {prefix.strip("."): state} if nested and prefix else named
    torch.save({"state_dict": content, "epoch": 3}, path)
    with pytest.raises(ValueError, match=f"{path} holds 2 encoders that fit") as told:
        create_model(1, 1, encoder=encoder, encoder_weights=str(path), **SMALL)
    said = re.findall(r"model\.encoder_weights_key=(\S+)", str(told.value))
    assert len(said) == 2
    for key in said:  # the cure is one
        wanted = one if key == f"state_dict.{TWINS[twins][0]}" else other
        settings = {"encoder": encoder, "encoder_weights": str(path), "encoder_weights_key": key}
        loaded = create_model(1, 1, **settings, **SMALL).encoder.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    if key_alone := TWINS[twins][1].removeprefix("module."):
        settings = {"encoder": encoder, "encoder_weights": str(path), "encoder_weights_key": key_alone}
        loaded = create_model(1, 1, **settings, **SMALL).encoder.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in other.items())


@pytest.mark.slow
def test_two_names_of_the_same_encoder_are_one(tmp_path: Path) -> None:
    state = encoder_state(1)
    torch.save({f"{prefix}{key}": value for prefix in ("a.", "b.") for key, value in state.items()}, tmp_path / "w.pt")
    create_model(1, 1, encoder_weights=str(tmp_path / "w.pt"), **SMALL)


@pytest.mark.slow
def test_a_key_without_an_encoder_is_refused(tmp_path: Path) -> None:
    torch.save({f"q.{key}": value for key, value in encoder_state(1).items()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"no encoder resnet18 under model\.encoder_weights_key=k\.; .* holds q\."):
        create_model(1, 1, encoder_weights=str(tmp_path / "w.pt"), encoder_weights_key="k.", **SMALL)
    with pytest.raises(ValueError, match="belongs to encoder_weights=FILE"):
        create_model(1, 1, encoder_weights_key="k.", **SMALL)
    torch.save({"unlike": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"100 of 100 tensors are missing .*the file holds unlike"):
        create_model(1, 1, encoder_weights=str(tmp_path / "other.pt"), **SMALL)


def test_names_of_weights_say_how_to_fetch_them() -> None:
    with pytest.raises(FileNotFoundError, match=r"get_encoder\('resnet18', weights='imagenet'\)"):
        create_model(1, 1, encoder_weights="imagenet")
    with pytest.raises(FileNotFoundError, match="weights=True"):
        create_model(1, 1, encoder="tu-mobilenetv3_small_100", encoder_weights="imagenet")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        create_model(1, 1, encoder_weights="nowhere/weights.pt")


def test_the_same_seed_builds_the_same_network() -> None:
    torch.manual_seed(3)
    first = create_model(1, 1, **SMALL).state_dict()
    torch.manual_seed(3)
    second = create_model(1, 1, **SMALL).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_network_that_tests_copy_is_what_smp_builds_and_what_is_learnt_stays_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Networks of tests are copied from the first of their kind (conftest)."""
    networks, numbers = [], []
    for anew in (False, False, True):
        if anew:
            monkeypatch.setattr(timm, "create_model", inspect.unwrap(timm.create_model))
        torch.manual_seed(21)
        network = create_model(3, 2, encoder="tu-resnet10t", encoder_depth=2, decoder_channels=[16, 8])
        networks.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        numbers.append(torch.rand(3))
        for weight in network.parameters():
            weight.data.add_(1)
    for state, more in zip(networks, numbers, strict=True):
        assert state.keys() == networks[-1].keys()
        assert all(torch.equal(tensor, networks[-1][name]) for name, tensor in state.items())
        assert torch.equal(more, numbers[-1])


def test_a_file_that_is_no_weights_is_named_with_the_cure(tmp_path: Path) -> None:
    for name, content in (("w.pt", b"\x89PNG no weights"), ("w.safetensors", b"neither")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no file of weights that can be read safely"):
            create_model(1, 1, encoder_weights=str(tmp_path / name), **SMALL)
