"""Servers that answer sites with models of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Average, Site, Task
from fedseg.federation.state import State, Tensors, Update, add

REPLY, ROUNDS = "reply", "rounds"
SHARED = ("model", "buffers")


class SingleAnswers(FedAvg):
    """A server that makes for every site that trained what it starts from in its next round.

    The mean of what sites trained is the global model, and the start of sites that join later.
    """

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


class OwnAnswers(FedAvg):
    """A server that holds more models than the global one, and a site whose personal model is one of them.

    Such a model has running statistics of its own. A site trains what it is for; for scores it comes beside the global
    one. Sites keep a count of the rounds they trained in, which tells that they have a personal model.
    """

    views = ("global", "personal")
    answers_singly = True
    trained: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("trained", torch.zeros(()))
        self._answer: Sequence[nn.Module] = ()  # the personal model; in a tuple, as the site need not keep it

    @abstractmethod
    def own(self, server: State, site: str, task: Task) -> Tensors:
        """Parameters and running statistics that are a site's; none where these are the global ones."""

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """For training what is the site's; for scores the global model, and that beside it."""
        message, own = super().broadcast(server, site, task), self.own(server, site, task)
        if not own or task.kind == "train":
            return State({**message.tensors, **replaced(server, own).tensors}, message.scalars)
        return State({**message.tensors, REPLY: own}, message.scalars)

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came, and the personal model where that is another one."""
        super().receive(message, kept, site)
        self.take(message.get(REPLY))

    def take(self, own: Tensors) -> None:
        """Have the personal model ready, if another one than the global came for the site."""
        self._answer = (deepcopy(self.model),) if own else ()
        for network in self._answer:
            self._load(network, own)

    def send(self, site: Site) -> State:
        """The differences."""
        self.trained += site.examples > 0
        return super().send(site)

    def network(self, view: str) -> nn.Module:
        """The received model, or the personal one."""
        return self._answer[0].to(self.device) if view == "personal" and self._answer else self.model


def replaced(server: State, own: Tensors) -> State:
    """The shared tensors, those replaced that are given."""
    shared = {kind: server[kind] for kind in SHARED if kind in server.tensors}
    return State({kind: {name: own.get(name, t) for name, t in tensors.items()} for kind, tensors in shared.items()})


def joined(state: State) -> Tensors:
    """Parameters and running statistics under one roof; their names differ."""
    return {name: tensor for tensors in state.tensors.values() for name, tensor in tensors.items()}


def weighted(models: Sequence[Tensors], shares: Sequence[float]) -> Tensors:
    """The sum of models, each times its share."""
    pairs = list(zip(models, shares, strict=True))
    return {name: torch.stack([share * model[name] for model, share in pairs]).sum(dim=0) for name in models[0]}
