"""What becomes of a network's tensors in a federation."""

from __future__ import annotations

from copy import deepcopy

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fedseg.federation.state import State
from fedseg.models.select import Selector


class Parts:
    """A model's tensors by what becomes of them.

    Integer buffers (batch counters) have no mean: they stay at the site.

    Attributes:
        parameters: shared parameters.
        buffers: shared running statistics.
        stays: everything else.
        variances: running variances, which must not become negative.
    """

    def __init__(self, model: nn.Module, personal: Selector) -> None:
        state = model.state_dict()
        stays = personal(model) | {name for name, tensor in state.items() if not tensor.is_floating_point()}
        parameters = dict(model.named_parameters())
        self.parameters = [name for name in state if name in parameters and name not in stays]
        self.buffers = [name for name in state if name not in parameters and name not in stays]
        self.stays = [name for name in state if name in stays]
        norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
        self.variances = frozenset(f"{name}.running_var" for name in norms)

    def rows(self, model: nn.Module) -> list[dict[str, object]]:
        """One row per tensor of the model: its name, kind, numbers, bytes, and whether it is averaged or stays."""
        parameters = dict(model.named_parameters())
        stays = set(self.stays)
        return [
            {
                "tensor": name,
                "kind": "parameter" if name in parameters else "buffer" if tensor.is_floating_point() else "counter",
                "numbers": tensor.numel(),
                "bytes": tensor.numel() * tensor.element_size(),
                "policy": "stays at the site" if name in stays else "averaged",
            }
            for name, tensor in model.state_dict().items()
        ]


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
