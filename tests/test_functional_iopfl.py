"""IOP-FL's mathematics: trajectory, routed layers, label-free adaptation; against reference arrays and by property."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedseg.algorithms.functional.adaptation import (
    Objective,
    Views,
    adaptation_terms,
    disagreement,
    fit_statistics,
    foreground,
    local_range,
    normalized_entropy,
    probabilities,
    set_router_dropout,
    use_batch_statistics,
)
from fedseg.algorithms.functional.routing import (
    RoutedConvolution,
    RoutedLinear,
    Router,
    adaptable,
    mixtures,
    route,
    routed_layers,
    routing_size,
)
from fedseg.algorithms.functional.trajectory import average_states
from fedseg.models.select import normalisation

pytestmark = pytest.mark.filterwarnings("ignore:.timm-. encoders are deprecated:DeprecationWarning")
GOLDEN = Path(__file__).parent / "golden"
RELEASED = Objective(
    activation="softmax",
    entropy_weight=10.0,
    consistency_weight=0.1,
    smoothness_weight=1e-6,
    entropy="released",
    smoothness="norm",
    radius=10,
)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"iopfl_{name}.npz") as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


# Trajectory


def test_trajectory_equals_the_reference_for_every_alpha() -> None:
    reference = golden("federation")
    for a, alpha in enumerate(reference["alpha"].tolist()):
        for client in range(3):
            states = [
                {"weight": reference["local_weight"][client, r], "running_mean": reference["local_buffer"][client, r]}
                for r in range(5)
            ]
            trajectory = snapshot(states[0])
            for r, state in enumerate(states):
                trajectory = trajectory if r == 0 else average_states(trajectory, state, alpha)
                close(trajectory["weight"], reference["traj_weight"][a, client, r])
                close(trajectory["running_mean"], reference["traj_buffer"][a, client, r])


def test_trajectory_of_a_network_averages_floats_and_copies_counters() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = snapshot(network.state_dict())
    network(torch.randn(4, 1, 8, 8))
    with torch.no_grad():
        network[0].weight.add_(1.0)
    after = average_states(before, network.state_dict(), 0.25)
    close(after["0.weight"], before["0.weight"] + 0.75, 1e-6)
    close(after["1.running_mean"], 0.75 * network[1].running_mean, 1e-6)
    assert after["1.num_batches_tracked"].dtype == torch.int64
    assert int(after["1.num_batches_tracked"]) == 1


def test_trajectory_extremes_are_exact() -> None:
    old, new = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    assert torch.equal(average_states(old, new, 0.0)["w"], new["w"])
    assert torch.equal(average_states(old, new, 1.0)["w"], old["w"])
    assert torch.equal(average_states(old, old, 0.3)["w"], old["w"])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_trajectory_never_aliases_the_live_model(alpha: float) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first = snapshot(network.state_dict())
    second = average_states(first, network.state_dict(), alpha)
    live = {tensor.data_ptr() for tensor in network.state_dict().values()}
    old = {tensor.data_ptr() for tensor in first.values()}
    assert live.isdisjoint(old)
    assert {t.data_ptr() for t in second.values()}.isdisjoint(live | old)
    assert not any(t.requires_grad for t in second.values())


def test_trajectory_refuses_what_does_not_fit() -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="weight_of_old"):
        average_states(state, state, 1.5)
    with pytest.raises(ValueError, match="'extra'"):
        average_states(state, {"w": torch.zeros(2), "extra": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match="'w' changed its shape"):
        average_states(state, {"w": torch.zeros(3)}, 0.5)


# Routed layers


class Chosen(Router):
    """A router that ignores its input: the mixture is given."""

    def __init__(self, mixture: Tensor) -> None:
        super().__init__(1, mixture.shape[1], expansion=1, dropout=0, squash="logistic")
        self.mixture = mixture

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mixture.expand(len(pooled), -1)


def router_from(first: Tensor, bias: Tensor, second: Tensor, second_bias: Tensor) -> Router:
    router = Router(first.shape[1], len(second), expansion=2, dropout=0.2, squash="logistic").double()
    router.load_state_dict(
        {"hidden.weight": first, "hidden.bias": bias, "output.weight": second, "output.bias": second_bias}
    )
    return router.eval()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("c3", nn.Conv2d(3, 4, 3, padding=1, bias=False)),
        ("c1", nn.Conv2d(4, 2, 1)),
        ("up", nn.ConvTranspose2d(4, 3, 2, stride=2)),
    ],
)
def test_routed_convolution_equals_the_reference(name: str, layer: nn.Conv2d) -> None:
    data = {key.removeprefix(f"{name}_"): value for key, value in golden("routing").items() if key.startswith(name)}
    router = router_from(data["fc1_weight"], data["fc1_bias"], data["fc2_weight"], data["fc2_bias"])
    routed = RoutedConvolution(layer, data["expert_weight"], data.get("expert_bias"), router).eval()
    close(router(data["x"].mean((2, 3))), data["route"])
    close(routed(data["x"]), data["y"])


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), bias=False),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "grouped dilated": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular same": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False),
    "one dimension": lambda: nn.Conv1d(4, 6, 3),
    "three dimensions": lambda: nn.Conv3d(4, 6, 3, padding=1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_one_grouped_convolution_equals_the_loop_over_images_and_the_mixture_of_outputs(kind: str) -> None:
    torch.manual_seed(0)
    layers = [CONVOLUTIONS[kind]().double() for _ in range(3)]
    routed = route(
        nn.Sequential(layers[0]),
        [nn.Sequential(layer).state_dict() for layer in layers[:2]],
        nn.Sequential(layers[2]).state_dict(),
        expansion=2,
        dropout=0.2,
        squash="logistic",
        linear=False,
    ).eval()
    dimensions = layers[0].weight.ndim - 2
    images = torch.randn(5, 4, *([9] * dimensions), dtype=torch.float64)
    outputs = routed(images)
    alone = torch.cat([routed(image[None]) for image in images])
    close(outputs, alone, 1e-12)
    mixture = mixtures(routed, images)["0"]
    assert mixture.shape == (5, 3)
    by_output = sum(
        mixture[:, e].reshape(-1, *([1] * (dimensions + 1))) * layer(images) for e, layer in enumerate(layers)
    )
    close(outputs, by_output, 1e-12)


def test_one_hot_mixture_is_that_expert_and_equal_experts_are_the_plain_layer() -> None:
    experts = [nn.Conv2d(2, 3, 3).double() for _ in range(3)]
    weight, bias = torch.stack([e.weight.detach() for e in experts]), torch.stack([e.bias.detach() for e in experts])
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for index, expert in enumerate(experts):
        one_hot = Chosen(torch.eye(3, dtype=torch.float64)[index : index + 1])
        close(RoutedConvolution(experts[0], weight, bias, one_hot)(images), expert(images), 1e-13)
    convex = Chosen(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64))
    same = RoutedConvolution(experts[0], weight[:1].repeat(3, 1, 1, 1, 1), bias[:1].repeat(3, 1), convex)
    close(same(images), experts[0](images), 1e-12)


def test_a_batch_takes_exactly_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = functional.conv2d

    def counted(*args: Tensor, **kwargs: int) -> Tensor:
        calls.append(args[6])
        return original(*args, **kwargs)

    state = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).state_dict()
    routed = small_route(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), [state], state)
    monkeypatch.setattr(functional, "conv2d", counted)
    routed(torch.randn(5, 4, 8, 8))
    assert calls == [10]
    routed(torch.randn(3, 4, 8, 8))
    assert calls == [10, 6], "one batch's groups must not leak into the next"


def test_softmax_mixture_is_convex_and_logistic_one_is_not() -> None:
    pooled = torch.randn(6, 8)
    rows = {s: Router(8, 5, expansion=2, dropout=0, squash=s)(pooled) for s in ("softmax", "logistic")}
    close(rows["softmax"].sum(1), torch.ones(6), 1e-6)
    assert not torch.allclose(rows["logistic"].sum(1), torch.ones(6))
    assert all(bool(((row > 0) & (row < 1)).all()) for row in rows.values())


def test_routed_linear_mixes_per_image() -> None:
    layers = [nn.Linear(5, 3).double() for _ in range(2)]
    weight, bias = torch.stack([x.weight.detach() for x in layers]), torch.stack([x.bias.detach() for x in layers])
    router = Router(5, 2, expansion=2, dropout=0, squash="logistic").double()
    routed = RoutedLinear(weight, bias, router)
    tokens = torch.randn(4, 7, 5, dtype=torch.float64)
    mixture = router(tokens.mean(1))
    expected = mixture[:, 0, None, None] * layers[0](tokens) + mixture[:, 1, None, None] * layers[1](tokens)
    close(routed(tokens), expected, 1e-12)
    assert routed(tokens[:, 0]).shape == (4, 3)


# Surgery on whole networks


def small_route(model: nn.Module, personal: list[dict[str, Tensor]], shared: dict[str, Tensor]) -> nn.Module:
    return route(model, personal, shared, expansion=0.5, dropout=0.2, squash="softmax", linear=False)


def siblings(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(make().eval())
    return models


def unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=2, decoder_channels=(32, 16, 8, 8, 4))


def depthwise() -> nn.Module:
    return smp.Unet("timm-mobilenetv3_small_100", encoder_weights=None, classes=1, decoder_channels=(32, 16, 8, 8, 4))


def same_padding() -> nn.Module:
    return smp.Unet("efficientnet-b0", encoder_weights=None, classes=1, decoder_channels=(32, 16, 8, 8, 4))


@pytest.mark.slow
@pytest.mark.parametrize("make", [unet, depthwise, same_padding])
def test_every_convolution_of_an_smp_network_is_routed_with_all_experts(make: Callable[[], nn.Module]) -> None:
    models = siblings(make, 4)
    states = [model.state_dict() for model in models]
    routed = small_route(models[0], states[:3], states[3]).eval()
    convolutions = [name for name, layer in models[0].named_modules() if isinstance(layer, nn.Conv2d)]
    assert list(routed_layers(routed)) == convolutions
    assert not any(isinstance(layer, nn.Conv2d) for layer in routed.modules())
    size = routing_size(routed)
    assert (size.layers, size.experts) == (len(convolutions), 4)
    assert {layer.experts for layer in routed_layers(routed).values()} == {4}
    assert size.expert_values == 4 * sum(
        p.numel() for layer in models[0].modules() if isinstance(layer, nn.Conv2d) for p in layer.parameters()
    )
    learning = adaptable(routed, normalisation(routed))
    routers = [p for layer in routed_layers(routed).values() for p in layer.router.parameters()]
    assert {id(p) for p in routers} <= {id(p) for p in learning}
    assert sum(p.numel() for p in routers) == size.router_values
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = routed(images)
        close(together[1:2], routed(images[1:2]), 1e-4)
    assert together.shape == models[0](images).shape


@pytest.mark.slow
@pytest.mark.parametrize("make", [unet, depthwise, same_padding])
def test_a_network_of_equal_experts_is_the_network(make: Callable[[], nn.Module]) -> None:
    (model,) = siblings(make, 1)
    model.double()
    state = model.state_dict()
    routed = small_route(model, [state, state], state).eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        close(routed(images), model(images), 1e-9)


@pytest.mark.slow
def test_one_hot_routing_of_a_network_is_that_model_with_global_normalisation() -> None:
    models = siblings(unet, 3)
    routed = small_route(models[0], [m.state_dict() for m in models[:2]], models[2].state_dict()).eval()
    for layer in routed_layers(routed).values():
        nn.init.zeros_(layer.router.output.weight)
        layer.router.output.bias.data = torch.tensor([-1e4, 0.0, -1e4])
    images = torch.rand(2, 3, 32, 32)
    mixed = copy.deepcopy(models[1])
    norms = normalisation(mixed)
    mixed.load_state_dict(
        {k: models[2 if k in norms else 1].state_dict()[k] for k in norms | mixed.state_dict().keys()}
    )
    with torch.no_grad():
        close(routed(images), mixed(images), 1e-5)


@pytest.mark.slow
def test_routing_leaves_its_sources_alone_and_shares_nothing_with_them() -> None:
    models = siblings(unet, 3)
    before = [snapshot(model.state_dict()) for model in models]
    routed = small_route(models[0], [m.state_dict() for m in models[:2]], models[2].state_dict())
    sources = {t.data_ptr() for model in models for t in model.state_dict().values()}
    assert sources.isdisjoint(t.data_ptr() for t in routed.state_dict().values())
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_layer_used_twice_stays_one_layer() -> None:
    shared = nn.Conv2d(2, 2, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    routed = small_route(model, [model.state_dict()], model.state_dict())
    assert routed["a"] is routed["b"]
    assert isinstance(routed["a"], RoutedConvolution)


def test_a_single_convolution_can_be_routed_and_copied() -> None:
    layer = nn.Conv2d(2, 3, 3)
    routed = small_route(layer, [layer.state_dict()], layer.state_dict()).eval()
    images = torch.rand(2, 2, 5, 5)
    close(routed(images), layer(images), 1e-5)
    twin = copy.deepcopy(routed)
    assert torch.equal(twin(images), routed(images))


def test_linear_layers_are_routed_on_request_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    state = model.state_dict()
    assert list(routed_layers(small_route(model, [state], state))) == ["0"]
    both = route(model, [state], state, expansion=1, dropout=0, squash="softmax", linear=True)
    assert list(routed_layers(both)) == ["0", "2"]
    images = torch.rand(2, 3, 2, 2)
    close(both(images), model(images), 1e-5)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="only plain linear"):
        route(
            attention,
            [attention.state_dict()],
            attention.state_dict(),
            expansion=1,
            dropout=0,
            squash="softmax",
            linear=True,
        )


def test_routing_refuses_what_it_cannot_mix() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    state = model.state_dict()
    with pytest.raises(ValueError, match="at least one personal"):
        small_route(model, [], state)
    with pytest.raises(ValueError, match=r"expert 1 is of another architecture.*'0.bias'"):
        small_route(model, [state, {"0.weight": state["0.weight"]}], state)
    with pytest.raises(ValueError, match="the global model is of another architecture"):
        small_route(model, [state], nn.Sequential(nn.Conv2d(1, 2, 5)).state_dict())
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no convolution"):
        small_route(plain, [plain.state_dict()], plain.state_dict())
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="cannot be mixed"):
        small_route(normed, [normed.state_dict()], normed.state_dict())
    with pytest.raises(ValueError, match="no tensors named"):
        adaptable(small_route(model, [state], state), ["1.weight"])
    with pytest.raises(ValueError, match="one number of experts everywhere"):
        routing_size(model)


# Views


def test_views_equal_the_reference_and_invert_exactly() -> None:
    reference = golden("views")
    views = Views(reference["quarter_turns"], reference["flip"])
    assert torch.equal(views.forward(reference["image"]), reference["image_view"])
    assert torch.equal(views.inverse(reference["map_view"]), reference["map_back"])
    assert torch.equal(views.inverse(views.forward(reference["image"])), reference["image"])
    assert torch.equal(reference["round_trip"], reference["image"])


def test_all_eight_views_differ_and_invert_exactly() -> None:
    image = torch.rand(1, 2, 5, 5).expand(8, -1, -1, -1)
    views = Views(torch.arange(8) % 4, torch.arange(8) // 4)
    seen = views.forward(image)
    assert len(torch.unique(seen, dim=0)) == 8
    assert torch.equal(views.inverse(seen), image)
    assert torch.equal(views.forward(views.inverse(image)), image)


def test_drawn_views_repeat_with_their_seed_and_cover_all_pairs() -> None:
    images = torch.rand(200, 1, 4, 4)
    one, again = (Views.draw(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.quarter_turns, again.quarter_turns)
    assert torch.equal(one.flips, again.flips)
    pairs = set(zip(one.quarter_turns.tolist(), one.flips.tolist(), strict=True))
    assert pairs == {(turns, flip) for turns in range(4) for flip in range(2)}


def test_images_that_are_not_square_are_turned_by_half_only() -> None:
    images = torch.rand(60, 2, 4, 6)
    views = Views.draw(images, torch.Generator().manual_seed(0))
    assert set(views.quarter_turns.tolist()) == {0, 2}
    assert torch.equal(views.inverse(views.forward(images)), images)
    with pytest.raises(ValueError, match="not square"):
        Views(torch.tensor([1]), torch.tensor([0])).forward(images[:1])
    with pytest.raises(ValueError, match="60 views do not fit 2 images"):
        views.forward(images[:2])


# Objective


def test_losses_equal_the_reference() -> None:
    reference = golden("losses")
    logits = reference["logits"].requires_grad_()
    other = reference["logits_other"].requires_grad_()
    terms = RELEASED.terms(logits, other, logits)
    close(terms.entropy, 10 * reference["entropy_released"], 1e-6)
    close(terms.consistency, 0.1 * reference["consistency_mean"])
    close(terms.smoothness, reference["smooth_norm"][0])
    close(terms.total, reference["tta_total"], 1e-6)
    close(normalized_entropy(logits, "softmax"), reference["entropy_per_pixel_mean"], 1e-6)
    terms.total.backward()
    close(logits.grad, reference["tta_grad_logits"], 1e-8)
    close(other.grad, reference["tta_grad_other"], 1e-12)
    for d, radius in enumerate(reference["smooth_radius"].tolist()):
        close(1e-6 * local_range(foreground(logits, "softmax"), radius), reference["smooth_map"][d], 1e-15)


def objective(**changes: object) -> Objective:
    plain: dict[str, object] = dict.fromkeys(("entropy_weight", "consistency_weight", "smoothness_weight"), 1.0)
    plain |= {"activation": "softmax", "entropy": "per_pixel", "smoothness": "mean", "radius": 2, **changes}
    return Objective(**plain)


@pytest.mark.parametrize(("activation", "channels"), [("softmax", 3), ("sigmoid", 3)])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_released_entropy_is_the_per_pixel_one_times_batch_over_classes(
    activation: str, channels: int, batch: int
) -> None:
    logits = torch.randn(batch, channels, 6, 5, dtype=torch.float64)
    chances = probabilities(logits, activation)
    if activation == "sigmoid":
        chances = torch.stack([chances, 1 - chances], 1)
    classes = chances.shape[1]
    entries = chances[0].numel()
    summed = -(chances * (chances + 1e-6).log()).sum() / (np.log(classes) * entries)
    released, mean = (
        objective(activation=activation, entropy=kind).terms(logits, logits, logits).entropy
        for kind in ("released", "per_pixel")
    )
    close(released, summed, 1e-9)
    close(released, mean * batch / classes, 1e-12)


def test_one_sigmoid_region_is_the_softmax_of_two_classes() -> None:
    region, other = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    pairs = [torch.cat([torch.zeros_like(z), z], 1) for z in (region, other)]
    for entropy in ("released", "per_pixel"):
        one = objective(activation="sigmoid", entropy=entropy).terms(region, other, region)
        two = objective(activation="softmax", entropy=entropy).terms(pairs[0], pairs[1], pairs[0])
        for name in ("entropy", "consistency", "smoothness"):
            close(getattr(one, name), getattr(two, name), 1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_entropy_is_largest_where_nothing_is_known_and_zero_where_all_is(activation: str) -> None:
    assert float(normalized_entropy(torch.zeros(2, 4, 3, 3), activation)) == pytest.approx(1.0, abs=1e-4)
    certain = torch.full((2, 4, 3, 3), -100.0)
    certain[:, 1] = 100.0
    assert float(normalized_entropy(certain, activation)) == pytest.approx(0.0, abs=1e-5)


def test_local_range_equals_the_direct_window_and_vanishes_for_constant_maps() -> None:
    maps = torch.rand(2, 3, 17, 13, dtype=torch.float64)
    for radius in (1, 4, 10):
        padded = [functional.pad(m, [radius] * 4, value=-torch.inf) for m in (maps, -maps)]
        windows = [p.unfold(2, 2 * radius + 1, 1).unfold(3, 2 * radius + 1, 1).amax((-2, -1)) for p in padded]
        assert torch.equal(local_range(maps, radius), windows[0] + windows[1])
    constant = torch.full((2, 2, 9, 9), 0.7, requires_grad=True)
    terms = RELEASED.terms(constant, constant, constant)
    assert terms.smoothness.item() == 0.0
    assert terms.consistency.item() == 0.0
    terms.total.backward()
    assert bool(constant.grad.isfinite().all())


def test_a_softmax_over_one_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="softmax over one channel"):
        disagreement(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), "softmax")


# Adaptation


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn1, self.o = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.o(self.bn1(self.c(images)).relu())


REFERENCE_NAMES = {"router.hidden": "_routing_fn.fc1", "router.output": "_routing_fn.fc2"}


def reference_name(name: str) -> str:
    for ours, theirs in REFERENCE_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def reference_network(data: dict[str, Tensor]) -> nn.Module:
    def state(expert: int) -> dict[str, Tensor]:
        experts = {key: data[f"w_{key}"][expert] for key in ("c.weight", "o.weight", "o.bias")}
        norm = {key: data[f"w_{key}"] for key in ("bn1.weight", "bn1.bias")}
        return {**Small().double().state_dict(), **experts, **norm}

    network = route(
        Small().double(),
        [state(e) for e in range(4)],
        state(4),
        expansion=2,
        dropout=0.0,
        squash="logistic",
        linear=False,
    )
    routers = {name: data[f"w_{reference_name(name)}"] for name in network.state_dict() if "router" in name}
    network.load_state_dict({**network.state_dict(), **routers})
    use_batch_statistics(network)
    return network.train()


def test_one_adaptation_step_equals_the_reference() -> None:
    data = golden("tta_step")
    network = reference_network(data)
    learning = adaptable(network, ["bn1.weight", "bn1.bias"])
    frozen = {name: tensor.clone() for name, tensor in network.named_buffers()}
    close(network(data["image"]), data["logits"])
    views = Views(data["quarter_turns"], data["flip"])
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    terms = adaptation_terms(network, data["image"], data["noise"], views, RELEASED, fresh_pass=True)
    expected = data["losses"]
    close(terms.entropy / 10, expected[0], 1e-6)
    close(terms.consistency / 0.1, expected[1], 1e-6)
    close(terms.smoothness, expected[2], 1e-6)
    close(terms.total, expected[3], 1e-6)
    terms.total.backward()
    learnt = dict(network.named_parameters())
    assert {reference_name(name) for name in learnt} == {k[2:] for k in data if k.startswith("g_")}
    for name, parameter in learnt.items():
        close(parameter.grad, data[f"g_{reference_name(name)}"], 1e-6)
    optimizer.step()
    for name, parameter in learnt.items():
        close(parameter.detach(), data[f"after_{reference_name(name)}"], 1e-6)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in network.named_buffers())


def adapted(network: nn.Module, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(adaptable(network, normalisation(network)), lr=1e-2)
    images = torch.rand(4, 3, 32, 32)
    for _ in range(2):
        noise = 0.5 * torch.randn(images.shape, generator=generator)
        views = Views.draw(images, generator)
        terms = adaptation_terms(network, images, noise, views, objective(activation="sigmoid"), fresh_pass=True)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    return snapshot(network.state_dict())


@pytest.mark.slow
def test_adaptation_repeats_and_moves_only_routers_and_normalisation() -> None:
    models = siblings(depthwise, 3)
    sources = [snapshot(model.state_dict()) for model in models]
    start = small_route(models[0], [m.state_dict() for m in models[:2]], models[2].state_dict()).train()
    before = snapshot(start.state_dict())
    runs = [adapted(copy.deepcopy(start), seed) for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in before)
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in before)
    moved = {name for name in before if not torch.equal(before[name], runs[0][name])}
    allowed = normalisation(start) | {name for name in before if ".router." in name}
    assert moved <= allowed
    assert {name for name in before if ".router.output" in name} <= moved
    assert all(torch.equal(start.state_dict()[name], before[name]) for name in before), "the copy adapts, not the start"
    for model, source in zip(models, sources, strict=True):
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_a_fresh_pass_is_a_third_one_and_what_the_view_is_compared_with() -> None:
    images = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    views = Views(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    outputs = torch.randn(3, 2, 2, 4, 4, dtype=torch.float64)
    for fresh_pass, expected in ((True, outputs[2]), (False, outputs[0])):
        answers = iter(outputs)
        terms = adaptation_terms(
            lambda _, answers=answers: next(answers),
            images,
            torch.zeros_like(images),
            views,
            objective(),
            fresh_pass=fresh_pass,
        )
        close(terms.consistency, disagreement(outputs[1], expected, "softmax"))
        close(terms.entropy, normalized_entropy(outputs[0], "softmax"))
        assert len(list(answers)) == (0 if fresh_pass else 1)


def test_adaptation_lowers_its_objective() -> None:
    data = golden("tta_step")
    network = reference_network(data)
    optimizer = torch.optim.Adam(adaptable(network, ["bn1.weight", "bn1.bias"]), lr=1e-2)
    views = Views(data["quarter_turns"], data["flip"])
    values = []
    for _ in range(10):
        total = adaptation_terms(network, data["image"], data["noise"], views, objective(), fresh_pass=False).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.9 * values[0]


def test_router_dropout_and_batch_statistics_are_switches() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    routed = route(
        model, [model.state_dict()], model.state_dict(), expansion=4, dropout=0.5, squash="logistic", linear=False
    )
    images = torch.rand(3, 2, 6, 6) + 1.0
    routed.train()
    assert not torch.equal(routed[0](images), routed[0](images))
    set_router_dropout(routed, active=False)
    assert torch.equal(routed[0](images), routed[0](images))
    routed.eval()
    close(routed(images)[:1], routed(images[:1]), 1e-5)
    use_batch_statistics(routed)
    assert not torch.allclose(routed(images)[:1], routed(images[:1]), atol=1e-3)
    close(routed(images).mean((0, 2, 3)), torch.zeros(4), 1e-5)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1)])
def test_fitted_statistics_are_the_mean_of_the_batches_own(sizes: tuple[int, ...]) -> None:
    layer = nn.BatchNorm2d(2)
    layer(torch.rand(8, 2, 4, 4))  # it has statistics of other images
    layer.eval()
    batches = [torch.rand(size, 2, 5, 5) + place for place, size in enumerate(sizes)]
    fit_statistics(layer, batches)
    own = [batch if len(batch) > 1 else torch.cat([batch, batch.flip(-1)]) for batch in batches]
    close(layer.running_mean, torch.stack([batch.mean((0, 2, 3)) for batch in own]).mean(0), 1e-6)
    close(layer.running_var, torch.stack([batch.var((0, 2, 3)) for batch in own]).mean(0), 1e-6)
    assert layer.momentum == 0.1
    assert not layer.training
    close(layer(batches[0])[:1], layer(batches[0][:1]), 1e-6)


def test_without_images_or_batch_normalisation_statistics_stay() -> None:
    layer = nn.BatchNorm2d(2)
    layer(torch.rand(8, 2, 4, 4))
    before = {name: t.clone() for name, t in layer.eval().state_dict().items()}
    fit_statistics(layer, [])
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    fit_statistics(nn.GroupNorm(1, 2), iter([torch.rand(1, 2, 4, 4)]))


def test_one_image_whose_deepest_map_is_one_pixel_has_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 4, stride=4), nn.BatchNorm2d(3)).eval()
    fit_statistics(network, [torch.rand(1, 2, 4, 4)])
    assert all(t.isfinite().all() for t in network.state_dict().values())
