"""An optimiser's state as named tensors, for sites that keep it from round to round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedseg.federation.state import Tensors


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> Tensors:
    """An optimiser's state as ``parameter/slot`` tensors; ``names`` in the optimiser's order of parameters.

    Raises:
        ValueError: an optimiser from outside keeps something else.
    """
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    for slot, value in (pair for slots in state.values() for pair in slots.items()):
        if not isinstance(value, Tensor | None):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {slot} as {type(value).__name__}, not as a tensor, so that it "
                "cannot be stored at the site; take training.optimizer_state=reset"
            )
    return {
        f"{names[index]}/{slot}": value.detach().cpu().clone()
        for index, slots in state.items()
        for slot, value in slots.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], packed: Tensors) -> None:
    """Undo `pack_optimizer`.

    Fused steps pair a parameter with its state by place in memory, so the state takes the parameter's memory layout,
    which is lost on disk.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        slots = {key.rpartition("/")[2]: value for key, value in packed.items() if key.rpartition("/")[0] == name}
        if slots:
            state[index] = {
                slot: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
                for slot, value in slots.items()
            }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
