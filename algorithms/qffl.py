"""q-FFL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Average, Site
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State, Tensors, Update

BEFORE = "loss_received"
LEAST = 1e-12


class QFFL(FedAvg):
    """q-FFL by q-FedAvg (Li, Sanjabi, Beirami, Smith, ICLR 2020): sites on which the received model is bad weigh more.

    With F_k the loss of the received model on a site's training images, D_k its update and p_k FedAvg's weight, the
    server steps by sum p_k F_k^q D_k / sum p_k (F_k^q + q F_k^(q-1) L |D_k|^2), bounded as in the paper. L is
    one over the local learning rate of plain SGD. Running statistics take the mean by p_k F_k^q. After the paper; no
    code was compared.

    Args:
        q: strength; 0 is FedAvg.
        lipschitz: L; null takes 1 / training.lr, for plain SGD of one rate. With another optimiser or a rate that moves
            over rounds it is a scale, and has to be said.
    """

    def __init__(
        self, *args: Any, q: NonNegativeFloat = 1.0, lipschitz: FinitePositive | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        training = self.recipe.training
        if q and lipschitz is None:
            told = f", or algorithm.lipschitz={1 / training.lr} (in an older run's config.yaml that is what null was)"
            why = "without algorithm.lipschitz its bound is one over the rate of plain SGD"
            training.require_sgd("qffl", why, instead=told)
            if training.warmup or training.schedule != "constant":
                raise ValueError(
                    "algorithm=qffl: without algorithm.lipschitz its bound is one over a rate that stays the same, so "
                    f"take training.schedule=constant and training.warmup=0, not {training.schedule} and "
                    f"{training.warmup}{told}"
                )
        self.q, self.lipschitz = q, lipschitz or 1 / training.lr
        self._before = 0.0

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; its loss is not known yet."""
        super().receive(message, kept, site)
        self._before = 0.0

    @torch.no_grad()
    def on_train_start(self) -> None:
        """The loss of the received model, which nothing of it is changed by."""
        super().on_train_start()
        if not self.q or self.turn_site is None:
            return
        self.model.eval()
        losses: list[tuple[Tensor, int]] = []
        for batch in self.turn_site.input_batches("train"):
            there = self.trainer.strategy.batch_to_device(batch)
            losses.append((self.criterion(self.model, there), len(batch["image"])))
        self.model.train()
        self._before = float(sum(loss * count for loss, count in losses)) / max(sum(c for _, c in losses), 1)

    def send(self, site: Site) -> State:
        """The differences, and that loss."""
        answer = super().send(site)
        answer.scalars[BEFORE] = self._before
        return answer

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """The paper's step."""
        losses = [max(update.scalars.get(BEFORE, 0.0), LEAST) for update in updates]
        shares = self.weigh(server, updates)
        weights = [share * loss**self.q for share, loss in zip(shares, losses, strict=True)]
        bends = [
            share * self.q * loss ** (self.q - 1) * self.lipschitz * squared_norm(update.get("model"))
            for share, loss, update in zip(shares, losses, updates, strict=True)
        ]
        mean, cohort = average(weights)
        scale = sum(weights) / (sum(weights) + sum(bends))
        model = {name: tensor * scale for name, tensor in mean.get("model").items()}
        return super().advance(server, State({**mean.tensors, "model": model}, mean.scalars), cohort)


def squared_norm(tensors: Tensors) -> float:
    """Of all tensors together, in the order of the numbers, not in that of memory."""
    return sum(float(tensor.flatten().double().pow(2).sum()) for tensor in tensors.values())
