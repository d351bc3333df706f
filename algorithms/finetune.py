"""Methods whose personal model is the global one, fine-tuned at the site."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

from pydantic import PositiveInt
from torch import nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Site
from fedseg.models.select import Selector, complement, everything, part


class FineTune(FedAvg):
    """FedAvg with local fine-tuning (baseline): before it is scored, the global model takes some local steps.

    The fine-tuned model is the personal view. It is made anew from the current global model at every evaluation, with
    a fresh optimiser, and never influences the federation.

    Args:
        finetune_steps: local optimiser steps of the fine-tuning.
    """

    views = ("global", "personal")
    _tuning = False  # whether the fit at hand is the fine-tuning

    def __init__(self, *args: Any, finetune_steps: PositiveInt = 20, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finetune_steps = finetune_steps
        self.tuned = deepcopy(self.model).requires_grad_(False)

    def personalise(self, site: Site, fit: Callable[[int], None]) -> None:
        """Fine-tune the received model, take it aside, and put the received one back."""
        received = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        kept_optimizer, self._optimizer_state = self._optimizer_state, {}
        recipe, self.recipe = self.recipe, replace(self.recipe, private=None)  # the tuned model stays at the site
        self._tuning = True
        fit(self.finetune_steps)
        self._tuning = False
        self.recipe = recipe
        self.tuned.load_state_dict(self.model.state_dict())
        self.model.load_state_dict(received)
        self._optimizer_state = kept_optimizer

    def network(self, view: str) -> nn.Module:
        """The received model, or the fine-tuned one."""
        return self.tuned if view == "personal" else self.model


class FedBABU(FineTune):
    """FedBABU (Oh et al., ICLR 2022): the head stays at its common random start; only the body is trained and averaged.

    The personal view fine-tunes body and head. Because the head never moves before that, it costs a few bytes of
    traffic and nothing else. The paper averages uniformly: ``algorithm.weighting=uniform``.
    """

    _body = staticmethod(complement(part("segmentation_head")))

    def learns(self, step: int) -> Selector:
        """The body, and the head only when fine-tuning."""
        return everything if self._tuning else self._body
