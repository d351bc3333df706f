"""Adapters: a network begins as its frozen one, only they and the decoder travel, and merged it answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import export
from fedseg.algorithms.functional.deepest import with_deepest
from fedseg.algorithms.functional.routing import route, routed_layers
from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.pretrained import PretrainedEncoder
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_model, create_monai_model, named
from fedseg.models.freeze import frozen
from fedseg.models.lora import LowRank, adapted, merged
from fedseg.reporting.folder import RunFolder
from tests.test_laws import Recording
from tests.tiny_run import phantom_run
from tests.world import build, simulate, toy_sites

BOTH: Any = (2, "both")
UP: Any = (2, "up")
TINY: dict[str, Any] = {"encoder": "tu-resnet10t", "encoder_depth": 2, "decoder_channels": [16, 8]}
VIT: dict[str, Any] = {
    "architecture": "dpt",
    "encoder": "tu-vit_tiny_patch16_224",
    "options": {
        "decoder_readout": "ignore",
        "decoder_intermediate_channels": [8] * 4,
        "decoder_fusion_channels": 8,
    },
}


def moved(network: nn.Module) -> nn.Module:
    """The network after some training of its adapters."""
    for module in network.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up, std=0.3)
    return network


@pytest.mark.parametrize(
    ("make", "settings", "sides"),
    [
        (create_model, TINY, [32, 32]),
        (create_model, VIT, [64, 32]),
        (create_monai_model, {"architecture": "segresnet", "width": 4}, [16, 8, 8]),
    ],
    ids=["tiny", "vit", "volumes"],
)
def test_a_network_begins_as_its_frozen_one_and_answers_the_same_when_merged(
    make: Any, settings: dict[str, Any], sides: list[int]
) -> None:
    images = torch.rand(2, 1, *sides)

    def made(**more: Any) -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = make(1, 2, len(sides), **settings, **more).eval()
        return network

    def answer(network: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(images)
        return found

    plain, low = made(freeze_encoder=True), made(lora_rank=2)
    assert torch.equal(answer(low), answer(plain))
    of_adapters = named("lora")(low)
    assert low.state_dict().keys() - of_adapters == plain.state_dict().keys()
    assert frozen(low) == frozen(plain)
    assert torch.equal(answer(merged(moved(low))), answer(low))
    assert not torch.equal(answer(low), answer(plain))
    assert merged(low).state_dict().keys() == plain.state_dict().keys()
    assert merged(plain) is plain
    low.train()(images).sum().backward()
    learns = {name for name, p in low.named_parameters() if p.requires_grad and p.grad is not None}
    assert {name for name in learns if name.startswith("encoder.")} <= of_adapters
    assert all(layer.lora.up.grad is not None for layer in adapted(low))  # the classifier of a transformer has none
    assert not adapted(made(lora_rank=0))


def test_layers_are_chosen_by_what_they_lie_in() -> None:
    network = create_model(1, 1, **VIT, lora_rank=2, lora_layers=["attn", "fc1"])
    names = {name.split(".")[-2] for name in named("lora")(network)}
    assert names == {"lora"}
    assert {name.split(".")[-3] for name in named("lora")(network)} == {"qkv", "proj", "fc1"}
    assert not any("patch_embed" in name for name in named("lora")(network))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 500}, r"lora_rank=500: none of 5 layers .* take model\.lora_rank=\d+ or less"),
        ({"lora_rank": 2, "lora_layers": ["attn"]}, r"no linear or convolutional layer .* 'attn'; .*conv1"),
        ({"lora_layers": ["conv1"]}, r"lora_layers=\['conv1'\] is of adapters, .* take model\.lora_rank=8"),
        ({"lora_learns": "up"}, r"lora_learns=up is of adapters"),
        ({"lora_rank": 2, "lora_learns": "down"}, r"lora_learns=down: one of both, up"),
        ({"architecture": "dpt", "encoder": "tu-vit_small_patch14_dinov2"}, r"patches of 14 pixels.*dinov3"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_model(1, 1, **TINY | settings if "architecture" not in settings else settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("model=vit_lora", "data.size=80"), r"multiples of 32; take data\.size=\[64, 64\]"),
        (
            ("model=vit_lora", "model.encoder=tu-hiera_tiny_224", "data.size=64"),
            r"positions for images of \[224, 224\] only .* take data\.size=\[224, 224\]",
        ),
        (("algorithm.personal=lora",), r"'lora' matches no tensor .* take model\.lora_rank=8"),
        (("algorithm=lgfedavg", "model.freeze_encoder=true"), r"algorithm\.personal=lora"),
    ],
)
def test_what_does_not_fit_is_refused_before_images_are_read(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Experiment(compose(["data=folder", "data.root=nowhere", *settings], SCHEMA)).check()


@pytest.mark.parametrize("name", ["fedavg", "apfl", "iopfl", "feddg"])
def test_only_adapters_and_decoder_travel_and_the_rest_stays_as_it_was(name: str, tmp_path: Path) -> None:
    outcome = simulate(name, tmp_path, transport=Recording, adapters=BOTH)
    network = build(name, adapters=BOTH).model
    travels = named("lora")(network) | {n for n in network.state_dict() if not n.startswith("encoder.")}
    way: Any = outcome.federation.transport
    for _, message, update in way.travelled:
        for state in (message, update):
            sent = {key for group in ("model", "buffers") for key in state.get(group)}
            assert sent <= travels
    begun = build(name, seed=0, adapters=BOTH)
    assert all(torch.equal(t, begun.frozen[key]) for key, t in outcome.server["frozen/model"].items())
    ups = [t for key, t in outcome.server["model"].items() if key.endswith("lora.up")]
    assert ups
    assert all(t.abs().max() > 0 for t in ups)


@pytest.mark.parametrize(("adapters", "equal"), [(UP, True), (BOTH, False)])
def test_the_mean_of_products_is_the_product_of_means_where_one_matrix_is_shared(
    adapters: Any, equal: bool, tmp_path: Path
) -> None:
    """Not so where both learn, which is why the fixed one exists."""
    outcome = simulate("fedavg", tmp_path, transport=Recording, adapters=adapters, rounds=1)
    start = build("fedavg", adapters=adapters).model
    way: Any = outcome.federation.transport
    updates = [update for _, _, update in way.travelled if "model" in update.tensors]
    weights = [update.examples for update in updates]

    def product(changes: dict[str, Tensor]) -> Tensor:
        state = {k: t + changes.get(k, 0) for k, t in start.state_dict().items() if ".lora." in k}
        return state["encoder.0.lora.up"] @ state["encoder.0.lora.down"]

    products = [product(update["model"]) for update in updates]
    mean = sum(w * p for w, p in zip(weights, products, strict=True)) / sum(weights)
    server = outcome.server["model"]
    down = server.get("encoder.0.lora.down", start.get_parameter("encoder.0.lora.down").detach())
    assert torch.allclose(server["encoder.0.lora.up"] @ down, mean, atol=1e-7) is equal


@pytest.mark.parametrize(("personal", "kept"), [("lora", {"up", "down"}), ("lora_up", {"up"})])
def test_adapters_can_be_a_sites_own(personal: str, kept: set[str], tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, transport=Recording, adapters=BOTH, personal=personal)
    own = outcome.kept["s1"]["model"]
    assert {f"encoder.0.lora.{name}" for name in kept} == {n for n in own if "num_batches" not in n}
    assert not any(n.endswith(tuple(kept)) for n in outcome.server["model"] if ".lora." in n)
    other = outcome.kept["s2"]["model"]
    assert not torch.equal(own["encoder.0.lora.up"], other["encoder.0.lora.up"])
    assert build("fedavg", adapters=BOTH, personal=personal).views == ("personal",)


def test_an_encoder_of_an_earlier_run_begins_with_new_adapters_or_goes_on_with_its_own() -> None:
    def network(rank: int) -> nn.Module:
        return moved(create_model(1, 1, **TINY, lora_rank=rank))

    def of(rank: int) -> tuple[PretrainedEncoder, dict[str, Tensor]]:
        tensors = network(rank).get_submodule("encoder").state_dict()
        shared = {name: t for name, t in tensors.items() if t.is_floating_point()}
        return PretrainedEncoder(Path("before"), 1, shared, settings(rank), "phantom"), shared

    def settings(rank: int) -> Any:
        words = ["model=tiny", f"model.lora_rank={rank}", "model.lora_layers=[conv1]"] if rank else ["model=tiny"]
        return compose(words, SCHEMA).model

    for before, after in ((0, 2), (2, 2)):
        earlier, shared = of(before)
        earlier.check(settings(after))
        later = network(after).get_submodule("encoder")
        assert earlier.load_into(nn.ModuleDict({"encoder": later})) == len(shared)
        assert all(torch.equal(t, later.state_dict()[name]) for name, t in shared.items())
    with pytest.raises(ConfigError, match=r"take model\.lora_rank=2 model\.lora_layers=\['conv1'\] as that run did"):
        of(2)[0].check(settings(0))


def test_a_mixture_of_networks_with_adapters_is_one_of_their_weights_as_a_whole() -> None:
    """A router that takes the last expert alone answers as that one does."""
    network = build("fedavg", adapters=BOTH).model.eval()
    states = [moved(network).state_dict() for _ in range(2)]
    states = [{name: t.clone() for name, t in state.items()} for state in states]
    routed = route(network, states[:1], states[1], expansion=1.0, dropout=0.0, squash="softmax", linear=True).eval()
    for layer in routed_layers(routed).values():
        nn.init.zeros_(layer.router.output.weight)
        layer.router.output.bias.data = torch.tensor([-1e4, 1e4])
    images = toy_sites()["s1"].images
    network.load_state_dict(states[1])
    assert torch.allclose(routed(images), network(images), atol=1e-6)


def test_features_of_a_transformer_are_its_deepest_map() -> None:
    network = create_model(1, 1, **VIT).eval()
    images = torch.rand(2, 1, 32, 32)
    logits, deepest = with_deepest(network, images)
    assert torch.equal(logits, network(images))
    assert torch.equal(deepest, network.get_submodule("encoder")(images)[0][-1])


@pytest.mark.slow
def test_a_run_with_personal_adapters_is_exported_merged(tmp_path: Path) -> None:
    """What is written runs without adapters, fits as a file of weights, and goes on learning in Lightning with them."""
    small = ("model.encoder_depth=2", "model.decoder_channels=[16,8]", "model.lora_rank=2", "algorithm.personal=lora")
    execute(phantom_run(3, tmp_path / "run", *small))
    table = OmegaConf.load(RunFolder(tmp_path / "run").config_path)
    assert table.model.lora_rank == 2
    assert export.main([str(tmp_path / "run"), "--site", "site_01", "--out", str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "personal-site_01.safetensors")
    assert not any(".lora." in name for name in written)
    file = str(tmp_path / "out" / "personal-site_01.safetensors")
    again = create_model(3, 1, **TINY, encoder_weights=file, freeze_encoder=True)
    state = again.state_dict()
    assert all(torch.equal(state[n], t) for n, t in written.items() if n.startswith("encoder.") and t.ndim)
    assert any(".lora." in name for name in torch.load(tmp_path / "out" / "personal-site_01.ckpt")["state_dict"])
