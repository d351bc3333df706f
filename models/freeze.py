"""Parts of a network that do not learn."""

from typing import Any

from torch import nn


def freeze(module: nn.Module) -> None:
    """Let a part neither learn nor follow the images: normalisation and dropout work as in evaluation, always.

    Modes are set right before each use, so that a `train()` of the whole network does not thaw running statistics.
    Deep copies stay frozen.
    """
    module.requires_grad_(False)
    module.register_forward_pre_hook(_stay_in_evaluation)


def frozen(model: nn.Module) -> frozenset[str]:
    """Keys of `state_dict()` that never change: all below a part given to `freeze`, and parameters that do not learn.

    Parameters that learn all the same in such a part, its adapters, are not among them.

    A network must have been built for this: running statistics beside parameters that do not learn may still move.
    """
    parts = [
        name for name, module in model.named_modules() if _stay_in_evaluation in module._forward_pre_hooks.values()
    ]
    below = tuple(f"{name}." if name else "" for name in parts)
    learns = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    return frozenset(name for name in model.state_dict() if not learns.get(name, not name.startswith(below)))


def _stay_in_evaluation(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001  (the signature of a hook)
    module.eval()
