"""Normalised tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Batch, Cohort, Site
from fedseg.federation.state import State, Tensors

LENGTHS = "lengths"
LEAST = 1e-12  # of a difference that is divided by its norm


class TensorNorm(FedAvg):
    """Normalised tensors (Yin et al., BrainLes 2021): tensor by tensor, no site counts more for the size of its update.

    A site sends each tensor's difference d divided by its length, and the lengths; the server takes the mean of both,
    and goes along the mean direction by the mean length. norm: the length is ||d||, so that a site which moved far
    turns the mean no more than the others; steps: it is the number of local steps, plain FedNova with whatever
    optimiser. Equal lengths make it FedAvg. Running statistics take the plain mean. After the abstract, which does not
    say how tensors are normalised: both are readings of it.

    Args:
        by: norm or steps.
    """

    exact_groups = frozenset({LENGTHS})

    def __init__(self, *args: Any, by: Literal["norm", "steps"] = "norm", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.by = by
        self._steps = 0

    def receive(self, message: State, kept: State, site: Site) -> None:
        """No step has been taken in this turn."""
        super().receive(message, kept, site)
        self._steps = 0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """One more."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._steps += 1

    def send(self, site: Site) -> State:
        """Every tensor's difference per length, and the lengths, in the order of the tensors' names."""
        answer = super().send(site)
        model = answer.get("model")
        steps = torch.tensor(float(max(self._steps, 1)), dtype=torch.float64)
        lengths = {name: length(tensor) if self.by == "norm" else steps for name, tensor in sorted(model.items())}
        if lengths:
            answer.tensors["model"] = scaled(model, {name: 1 / own for name, own in lengths.items()})
            answer.tensors[LENGTHS] = {LENGTHS: torch.stack(list(lengths.values()))}
        return answer

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The model, before any step."""
        state = super().init_server(introductions)
        if count := len(state.get("model")):
            state.tensors[LENGTHS] = {LENGTHS: torch.zeros(count, dtype=torch.float64)}
        return state

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Every tensor goes along its mean direction, by the mean length."""
        model = mean.get("model")
        lengths = dict(zip(sorted(model), mean.get(LENGTHS).get(LENGTHS, ()), strict=True))
        return super().advance(server, State({**mean.tensors, "model": scaled(model, lengths)}, mean.scalars), cohort)


def length(difference: Tensor) -> Tensor:
    """Euclidean norm, above 0, in double precision."""
    norm: Tensor = torch.linalg.vector_norm(difference.double())
    return norm + LEAST


def scaled(tensors: Tensors, factors: Mapping[str, Tensor]) -> Tensors:
    """Each tensor times its factor."""
    return {name: tensor * factors[name].to(tensor.dtype) for name, tensor in tensors.items()}
