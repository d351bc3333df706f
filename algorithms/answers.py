"""Servers that answer every site with a model of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Average, Task
from fedseg.federation.state import State, Tensors, Update, add

REPLY, ROUNDS = "reply", "rounds"


class SingleAnswers(FedAvg):
    """A server that makes for every site that trained what it starts from in its next round.

    The mean of what sites trained is the global model, and the start of sites that join later.
    """

    reads_updates = True
    answers_singly = True

    @abstractmethod
    def replies(self, trained: Mapping[str, Tensors], shares: Sequence[float], rounds: int) -> dict[str, Tensors]:
        """What every site receives next.

        Args:
            trained: site -> the shared parameters as it sent them.
            shares: of the sites in a mean; they sum to one.
            rounds: done before this one.
        """

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """To a site that trains, the model that was made for it."""
        message = super().broadcast(server, site, task)
        own = server.get(f"{REPLY}/{site}") if task.kind == "train" else {}
        return State({**message.tensors, "model": own}, message.scalars) if own else message

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """The mean, and a model for every site that trained."""
        weights = self.weigh(server, updates)
        after = super().advance(server, *average(weights))
        trained = {
            update.site: add(server.get(f"{REPLY}/{update.site}") or server["model"], update["model"])
            for update, weight in zip(updates, weights, strict=True)
            if weight
        }
        shares = [weight / sum(weights) for weight in weights if weight]
        rounds = server.scalars.get(ROUNDS, 0.0)
        made = self.replies(trained, shares, int(rounds))
        groups = {f"{REPLY}/{site}": tensors for site, tensors in made.items()}
        model = weighted(list(trained.values()), shares)
        return State({**after.tensors, "model": model, **groups}, {**after.scalars, ROUNDS: rounds + 1})


def weighted(models: Sequence[Tensors], shares: Sequence[float]) -> Tensors:
    """The sum of models, each times its share."""
    pairs = list(zip(models, shares, strict=True))
    return {name: torch.stack([share * model[name] for model, share in pairs]).sum(dim=0) for name in models[0]}
