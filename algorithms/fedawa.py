"""FedAWA."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.rows import cosine, row_of
from fedseg.federation.contract import Average
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State, Update

LOGIT = "logit"
LEAST = 1e-24  # of a squared distance


class FedAWA(FedAvg):
    """FedAWA (Shi et al., CVPR 2025): the server learns what sites weigh; those whose updates go with the mean gain.

    With p the softmax of a number for each site, which begins as FedAvg's weights say and is kept from round to round,
    the server goes some steps down sum_i p_i |d_i - sum_j p_j d_j| + sum_i p_i (1 - cos(w, w + d_i)), d_i the updates
    of the parameters and w the model before them. The first sum is 0 where one site has all weight: only few steps keep
    it from that. Adam is made anew in every round. After the paper's formula; no code was compared.

    Args:
        server_steps: of Adam in a round; 0 is FedAvg.
        server_rate: its step size.
    """

    def __init__(
        self, *args: Any, server_steps: NonNegativeInt = 1, server_rate: FinitePositive = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.server_steps, self.server_rate = server_steps, server_rate

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Learn the weights, and take the mean."""
        if not self.server_steps:
            return super().aggregate(server, updates, average)
        sizes = {update.site: size for update, size in zip(updates, self.weigh(server, updates), strict=True) if size}
        told = [update for update in updates if update.site in sizes]
        rows, model = [row_of(update["model"]) for update in told], row_of(server["model"])
        start = [server.scalars.get(f"{LOGIT}/{site}", log(size)) for site, size in sizes.items()]
        away = [1 - cosine(model, model + row) for row in rows]
        logits = learnt(start, products(rows), away, self.server_steps, self.server_rate)
        found = dict(zip(sizes, logits.softmax(dim=0).tolist(), strict=True))
        after = super().advance(server, *average([found.get(update.site, 0.0) for update in updates]))
        kept = {f"{LOGIT}/{site}": number for site, number in zip(sizes, logits.tolist(), strict=True)}
        return State(after.tensors, {**after.scalars, **kept})


def products(rows: Sequence[Tensor]) -> Tensor:
    """(K, K) inner products, which distances from any mean of the rows follow from."""
    return torch.stack([torch.stack([a @ b for b in rows]) for a in rows])


def learnt(start: Sequence[float], inner: Tensor, away: Sequence[float], steps: int, rate: float) -> Tensor:
    """The numbers whose softmax is what sites weigh.

    Args:
        start: these numbers before.
        inner: (K, K) inner products of the updates.
        away: distance of each model from the one before.
        steps: of Adam.
        rate: its step size.
    """
    logits = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    distances = torch.tensor(away, dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        shares = logits.softmax(dim=0)
        squared = inner.diagonal() - 2 * inner @ shares + shares @ inner @ shares
        optimizer.zero_grad()
        torch.autograd.backward((shares * (squared.clamp_min(LEAST).sqrt() + distances)).sum())
        optimizer.step()
    return logits.detach()
