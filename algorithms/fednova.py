"""FedNova."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.fedopt import FIRST
from fedseg.algorithms.parts import with_zeros
from fedseg.federation.contract import Cohort, Site
from fedseg.federation.ranges import Fixed, ProperShare
from fedseg.federation.state import State, Tensors, add

PACE, STEPS, RATE = "pace", "effective_steps", "rate"


class FedNova(FedAvg):
    """FedNova (Wang et al., NeurIPS 2020): sites that take more local steps do not count more for it.

    A site sends its difference divided by a_i, the weight that its T steps give to its gradients; the server takes the
    mean of these, times tau, the mean of a_i (of T with a pull, as in the authors' program). With plain SGD a_i is T;
    with momentum (T - rho (1 - rho^T) / (1 - rho)) / (1 - rho); with a pull (1 - (1 - lr mu)^T) / (lr mu). FedAvg
    instead optimises an objective in which a site weighs by its steps, too. Equal steps make it FedAvg.

    Args:
        mu: strength of a pull to the received model, as in FedProx; `trainer.gradient_clip` leaves it alone. Not tuned:
            it is FedProx's part, and goes with no momentum of the sites.
        momentum: of the server (the program's gmf): m <- momentum m + step / lr, w <- w + lr m, where step is the above
            and lr the round's learning rate at the sites, so that a falling rate shortens what is remembered, too.
            `federation.server_lr` scales each step before it enters m. 0 remembers nothing; not tuned. That of the
            sites' local steps is `training.momentum`.
    """

    exact_groups = frozenset({PACE})

    def __init__(
        self, *args: Any, mu: Fixed[NonNegativeFloat] = 0.0, momentum: Fixed[ProperShare] = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        training = self.recipe.training
        training.require_sgd("fednova", "what steps weigh is known for SGD alone", momentum=mu == 0)
        if training.momentum and training.optimizer_state == "keep":
            raise ValueError(
                "algorithm=fednova: a round's momentum starts at 0, so take training.optimizer_state=reset"
            )
        self.mu, self.momentum = mu, momentum
        self._steps = 0

    def receive(self, message: State, kept: State, site: Site) -> None:
        """No step has been taken in this turn."""
        super().receive(message, kept, site)
        self._steps = 0

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient if so told, then pull."""
        super().configure_gradient_clipping(*args, **kwargs)
        self._steps += 1
        if not self.mu:
            return
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and name in self.reference:
                parameter.grad.add_(parameter.detach() - self.reference[name], alpha=self.mu)

    def send(self, site: Site) -> State:
        """The difference per effective step, and how many effective steps that was."""
        answer = super().send(site)
        lr = self.recipe.training.lr_in(self.round, self.recipe.rounds)
        weight = effective_steps(self._steps, self.recipe.training.momentum, lr * self.mu) if self._steps else 1.0
        answer.tensors["model"] = {name: tensor / weight for name, tensor in answer.get("model").items()}
        told = float(self._steps) if self.mu else weight
        answer.tensors[PACE] = self._pace(told, lr)
        return answer

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The model, before any step."""
        state = super().init_server(introductions)
        state.tensors[PACE] = self._pace(0.0, 0.0)
        return with_zeros(state, FIRST) if self.momentum else state

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """As many steps along the mean direction as sites took in the mean, and on with what is remembered."""
        steps = float(mean[PACE][STEPS])
        tensors = {**mean.tensors, "model": {name: tensor * steps for name, tensor in mean.get("model").items()}}
        if self.momentum and (rate := float(mean[PACE][RATE])):  # at a rate of 0 nothing moves
            step = {name: tensor / rate for name, tensor in tensors["model"].items()}
            tensors[FIRST] = add(step, server[FIRST], self.momentum)
            tensors["model"] = {name: tensor * rate for name, tensor in tensors[FIRST].items()}
        return super().advance(server, State(tensors, mean.scalars), cohort)

    def _pace(self, steps: float, rate: float) -> Tensors:
        """The numbers that travel; the learning rate only where the server needs it."""
        told = {STEPS: steps, RATE: rate} if self.momentum else {STEPS: steps}
        return {name: torch.tensor([number], dtype=torch.float64) for name, number in told.items()}


def effective_steps(steps: int, momentum: float = 0.0, pull: float = 0.0) -> float:
    """Sum of the weights that gradients have in the way of so many SGD steps, in units of the learning rate.

    Args:
        steps: how many.
        momentum: of SGD.
        pull: learning rate times strength of a pull to the start; one of the two must be 0.
    """
    if pull:
        return (1 - (1 - pull) ** steps) / pull
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
