"""Routed layers: the kernels of several trained networks, mixed anew for every image (IOP-FL, outside part).

For each layer and each image: q = spatial mean of the layer's input, r = squash(F2(F1 q)) with one entry per expert,
kernel = sum_e r_e W_e, bias = sum_e r_e b_e, then the layer as before. The experts are frozen; only the routers learn
(Jiang et al., IEEE TMI 2023). The K personal models and, last, the global one are the experts of every routed layer.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fedseg.models.lora import adapted, merged

Squash = Literal["logistic", "softmax"]


class Router(nn.Module):
    """Mixing weights of the experts, one row per image.

    Args:
        channels: channels of the layer's input (C).
        experts: number of experts (E).
        expansion: width of the hidden layer over C; 2 in the paper's program, less makes wide layers cheaper.
        dropout: on the hidden layer, in [0, 1).
        squash: ``logistic`` gives weights in (0, 1) that need not sum to one, as published; ``softmax`` gives a convex
            mixture, so that the scale of kernels and biases stays that of the experts.
    """

    def __init__(self, channels: int, experts: int, *, expansion: float, dropout: float, squash: Squash) -> None:
        super().__init__()
        hidden = max(1, round(expansion * channels))
        self.hidden = nn.Linear(channels, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, experts)
        self.squash = squash

    def forward(self, pooled: Tensor) -> Tensor:
        """Mixing weights (B, E) from pooled features (B, C)."""
        scores: Tensor = self.output(self.dropout(self.hidden(pooled)))
        return scores.sigmoid() if self.squash == "logistic" else scores.softmax(dim=1)


class RoutedLayer(nn.Module):
    """The experts' tensors of one layer, stacked once as buffers, and the router that mixes them.

    Args:
        weight: (E, *shape of the layer's weight).
        bias: (E, out channels), or None.
        router: answers with (B, E).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, router: Router) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.router = router

    @property
    def experts(self) -> int:
        """How many experts this layer mixes."""
        return self.weight.shape[0]

    def mix(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (B, *shape) and bias (B, out) of every image, from pooled input features (B, C)."""
        mixture = self.router(pooled)
        weight = torch.tensordot(mixture, self.weight, dims=1)
        return weight, None if self.bias is None else mixture @ self.bias


class RoutedConvolution(RoutedLayer):
    """A convolution, plain or transposed, with the kernels of each image mixed from the experts.

    The images become groups: a batch (B, C, ...) is folded to (1, B * C, ...) and convolved once with B times the
    groups. The layer it replaces serves as template and runs its own ``forward``, so stride, padding modes, dilation,
    groups and the padding rules of its sub-classes ("same" padding of EfficientNets) hold without being copied here.

    Args:
        layer: the convolution to replace; its own weights are dropped.
        weight: (E, *kernel shape), in the order of ``layer.weight``.
        bias: (E, out channels), or None.
        router: answers with (B, E).
    """

    def __init__(self, layer: _ConvNd, weight: Tensor, bias: Tensor | None, router: Router) -> None:
        super().__init__(weight, bias, router)
        template = copy.copy(layer)
        template._parameters = {}
        self._template = (template,)  # in a tuple: not a sub-module, it has nothing to train, move or save

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *size) -> (B, out, *new size)."""
        batch = images.shape[0]
        weight, bias = self.mix(images.flatten(2).mean(2))
        layer = copy.copy(self._template[0])
        layer.groups *= batch
        layer.out_channels *= batch
        vars(layer).update(weight=weight.flatten(0, 1), bias=None if bias is None else bias.flatten())
        folded: Tensor = layer(images.flatten(0, 1).unsqueeze(0))
        return folded.reshape(batch, -1, *folded.shape[2:])


class RoutedLinear(RoutedLayer):
    """A linear layer on tokens (B, ..., C), mixed from the experts per leading entry.

    The leading dimension must be that of the images; in window attention it is that of the windows, which are then
    routed one by one.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., out)."""
        flat = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
        weight, bias = self.mix(flat.mean(1))
        mapped = flat @ weight.transpose(1, 2)
        if bias is not None:
            mapped = mapped + bias.unsqueeze(1)
        return mapped.reshape(*tokens.shape[:-1], weight.shape[1])


def route(
    model: nn.Module,
    personal: Sequence[Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    *,
    expansion: float,
    dropout: float,
    squash: Squash,
    linear: bool,
) -> nn.Module:
    """A copy of ``model`` in which every convolution is mixed from K personal models and the global one.

    What is not a convolution (normalisation, unrouted linear layers) holds the global model's tensors. Routers are
    initialised at random from torch's global generator. Memory: K + 1 times the convolutions' weights and, while a
    batch is in flight, one mixed kernel per image and layer.

    Args:
        model: any network; unchanged, it only gives the architecture.
        personal: K state dicts.
        shared: the global state dict; the last expert everywhere.
        expansion: see `Router`.
        dropout: see `Router`.
        squash: see `Router`.
        linear: route plain ``nn.Linear`` layers as well (transformer encoders).

    Raises:
        ValueError: no personal model; a state of another architecture; a convolution with further parameters; a
            sub-class of ``nn.Linear`` to be routed; no convolution at all.
    """
    if not personal:
        raise ValueError("routing needs at least one personal model besides the global one")
    states = [*personal, shared]
    expected = model.state_dict()
    for index, state in enumerate(states):
        _check_architecture(expected, state, f"expert {index}" if index < len(personal) else "the global model")
    if adapted(model):  # layers are mixed as a whole
        model, states = merged(model), [_merged_state(model, state) for state in states]
    routed = copy.deepcopy(model)
    routed.load_state_dict(dict(states[-1]))
    make_router = partial(Router, experts=len(states), expansion=expansion, dropout=dropout, squash=squash)
    kinds = (_ConvNd, nn.Linear) if linear else (_ConvNd,)
    replaced: dict[int, nn.Module] = {}  # a layer used in two places stays one layer
    for name, layer in list(routed.named_modules(remove_duplicate=False)):
        if isinstance(layer, kinds):
            if id(layer) not in replaced:
                replaced[id(layer)] = _routed_layer(name, layer, states, make_router).train(layer.training)
            if not name:
                return replaced[id(layer)]
            routed.set_submodule(name, replaced[id(layer)])
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no convolution to route")
    return routed


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The routed layers of a model by name, in the order of construction."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, RoutedLayer)}


def adaptable(model: nn.Module, also: Collection[str]) -> list[nn.Parameter]:
    """Freeze a routed model except for all its routers and the parameters named in ``also``.

    Args:
        model: what `route` returned.
        also: names of further tensors that shall learn, for example those of the normalisation layers; buffers among
            them are passed over.

    Returns:
        The parameters that learn, each once.

    Raises:
        ValueError: a name in ``also`` is no tensor of the model.
    """
    unknown = set(also) - model.state_dict().keys()
    if unknown:
        raise ValueError(f"the routed model has no tensors named {sorted(unknown)[:3]}")
    routers = {id(p) for layer in routed_layers(model).values() for p in layer.router.parameters()}
    learning = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in routers or name in also)
        if parameter.requires_grad:
            learning.append(parameter)
    return learning


@torch.no_grad()
def mixtures(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mixing weights (B, E) of every routed layer for a batch, in the model's current mode.

    A layer that runs several times in one pass gives those of its last run; a layer that does not run gives none.
    """
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _inputs, output: found.update({name: output.detach()})

    hooks = [layer.router.register_forward_hook(record(name)) for name, layer in routed_layers(model).items()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class RoutingSize:
    """What a routed model consists of.

    Attributes:
        layers: routed layers.
        experts: experts in each of them (K + 1).
        expert_values: numbers in all frozen expert tensors.
        router_values: parameters of all routers.
    """

    layers: int
    experts: int
    expert_values: int
    router_values: int


def routing_size(model: nn.Module) -> RoutingSize:
    """Count a routed model.

    Raises:
        ValueError: the model has no routed layer, or its layers mix different numbers of experts.
    """
    layers = list(routed_layers(model).values())
    counts = {layer.experts for layer in layers}
    if len(counts) != 1:
        raise ValueError(f"a routed model mixes one number of experts everywhere, this one {sorted(counts)}")
    return RoutingSize(
        layers=len(layers),
        experts=counts.pop(),
        expert_values=sum(tensor.numel() for layer in layers for tensor in layer.buffers()),
        router_values=sum(tensor.numel() for layer in layers for tensor in layer.router.parameters()),
    )


def _merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state of a network with adapters, as it is without them."""
    whole = copy.deepcopy(model)
    whole.load_state_dict(dict(state))
    return merged(whole).state_dict()


def _check_architecture(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], who: str) -> None:
    if expected.keys() != state.keys():
        raise ValueError(
            f"{who} is of another architecture; not on both sides: {sorted(expected.keys() ^ state.keys())[:3]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{who} is of another architecture: {name!r} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            )


def _routed_layer(
    name: str, layer: _ConvNd | nn.Linear, states: Sequence[Mapping[str, Tensor]], make_router: Callable[[int], Router]
) -> RoutedLayer:
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if not own.keys() <= {"weight", "bias"}:
        raise ValueError(f"{name!r} ({type(layer).__name__}) has tensors that cannot be mixed: {sorted(own)}")
    prefix = f"{name}." if name else ""
    stacks = {key: _stack(own[key], [state[prefix + key] for state in states]) for key in own}
    weight, bias = stacks["weight"], stacks.get("bias")
    if isinstance(layer, nn.Linear):
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name!r} is a {type(layer).__name__}: only plain linear layers can be routed")
        return RoutedLinear(weight, bias, make_router(layer.in_features).to(weight))
    return RoutedConvolution(layer, weight, bias, make_router(layer.in_channels).to(weight))


def _stack(like: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """(E, *shape) on the device and in the type of ``like``, filled one by one: no second copy of the experts."""
    stack = like.detach().new_empty((len(tensors), *like.shape))
    for row, tensor in zip(stack, tensors, strict=True):
        row.copy_(tensor.detach())
    return stack
