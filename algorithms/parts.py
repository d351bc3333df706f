"""What becomes of a network's tensors in a federation."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedseg.algorithms.functional.adaptation import running_statistics
from fedseg.federation.state import State
from fedseg.models.freeze import frozen
from fedseg.models.select import Selector

FROZEN = "frozen/model"
"""Group of a server's state, and number of its messages: what never changes, and the mark that tells it from others."""


class Parts:
    """A model's tensors by what becomes of them.

    Integer buffers (batch counters) have no mean: they stay at the site. What never changes (`models.freeze.frozen`)
    is the same everywhere: it neither travels nor is kept, whatever is personal.

    Args:
        model: the network.
        personal: what is to stay at each site.
        trains: whether what stays is a part that learns, as in every method but one that pre-trains the rest.

    Attributes:
        parameters: shared parameters.
        buffers: shared running statistics.
        frozen: what never changes.
        stays: everything else.
        learnt: what of it is no running statistic: no images of a site can give it anew.
        taken: what of it peers take all the same, in a method without a server.
        variances: running variances, which must not become negative.

    Raises:
        ValueError: nothing is left of what is personal, since none of it ever changes.
    """

    def __init__(self, model: nn.Module, personal: Selector, *, trains: bool = True) -> None:
        state, fixed = model.state_dict(), frozen(model)
        own = personal(model)
        if trains and own and own <= fixed:
            raise ValueError(
                "all that this method keeps at a site belongs to a part of the network that does not learn "
                "(model.freeze_encoder=true, model.lora_rank), so that no site could differ from the others; take "
                "model.freeze_encoder=false, another part (algorithm.personal=lora), or another method"
            )
        stays = (own | {name for name, tensor in state.items() if not tensor.is_floating_point()}) - fixed
        parameters = dict(model.named_parameters())
        travels = [name for name in state if name not in stays | fixed]
        self.parameters = [name for name in travels if name in parameters]
        self.buffers = [name for name in travels if name not in parameters]
        self.stays = [name for name in state if name in stays]
        given = running_statistics(model)
        self.learnt = [name for name in self.stays if name in own and name not in given]
        self.taken: list[str] = []
        self.frozen = [name for name in state if name in fixed]
        norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
        self.variances = frozenset(f"{name}.running_var" for name in norms)

    def rows(self, model: nn.Module) -> list[dict[str, object]]:
        """One row per tensor of the model: its name, kind, numbers, bytes, and what becomes of it."""
        parameters = dict(model.named_parameters())
        policies = dict.fromkeys(self.stays, "stays at the site") | dict.fromkeys(self.frozen, "never changes")
        policies |= dict.fromkeys(self.taken, "taken by peers")
        return [
            {
                "tensor": name,
                "kind": "parameter" if name in parameters else "buffer" if tensor.is_floating_point() else "counter",
                "numbers": tensor.numel(),
                "bytes": tensor.numel() * tensor.element_size(),
                "policy": policies.get(name, "averaged"),
            }
            for name, tensor in model.state_dict().items()
        ]


def mark(tensors: Mapping[str, Tensor]) -> float:
    """A whole number that tells tensors from others by names, types, shapes and bits."""
    digest = blake2b(digest_size=6)
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return float(int.from_bytes(digest.digest(), "big"))


def copies(whole: nn.Module, model: nn.Module, names: list[str]) -> dict[str, str]:
    """Tensors of second models beside `model` which hold the same as these of its own, by their names there.

    A second model is a child that has all of them, equal.
    """
    state = model.state_dict()
    found: dict[str, str] = {}
    for child, module in whole.named_children():
        theirs = module.state_dict() if module is not model else {}
        if names and all(name in theirs and torch.equal(theirs[name], state[name]) for name in names):
            found |= {f"{child}.{name}": name for name in names}
    return found


def without(state: State, names: frozenset[str]) -> State:
    """A state without some tensors, in whatever group of all sites they are."""
    shared = {
        group: {name: t for name, t in ts.items() if "/" in group or name not in names}
        for group, ts in state.tensors.items()
    }
    return State(shared, state.scalars)


def zeroed(model: nn.Module) -> nn.Module:
    """A module like this one whose tensors are 0 and do not learn: a memory of one number for each of the model's."""
    memory = deepcopy(model).requires_grad_(False)
    for tensor in memory.state_dict().values():
        tensor.zero_()
    return memory


def with_zeros(state: State, *groups: str) -> State:
    """A state and beside it groups of zeros: a memory of one number for each of the shared parameters."""
    zeros = {group: {name: tensor * 0 for name, tensor in state.get("model").items()} for group in groups}
    return State({**state.tensors, **zeros}, state.scalars)
