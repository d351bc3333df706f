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


def _stay_in_evaluation(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001  (the signature of a hook)
    module.eval()
