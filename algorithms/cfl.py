"""Clustered federated learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.answers import ROUNDS, weighted
from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.parting import parting
from fedseg.algorithms.functional.rows import row_of
from fedseg.federation.contract import Average, Site, Task
from fedseg.federation.ranges import Share
from fedseg.federation.state import Mean, State, Tensors, Update

SHARED = ("model", "buffers")
GROUP, WEIGHT = "group", "weight"
"""``group/<site>``, a number: which group it is in; ``group/<number>``: a group's tensors, where there are several;
``group``, in a message: those of the site's group."""


class CFL(FedAvg):
    """CFL (Sattler, Mueller, Samek, TNNLS 2020): sites whose updates point apart part, and each group has its FedAvg.

    All sites begin in one group. When its updates nearly cancel out, the server looks for the two parts between which
    the largest cosine of two sites' updates is smallest; if that is small enough, they are groups from then on, and may
    part again. The personal model is that of the site's group; the global one is the mean of the groups' models, by
    their sites' last weights: whose group a site that took no part would be in, only labels could tell. Absent sites
    stay with the larger part; sites that join later begin in the first group.

    The paper's two bounds, of the norms of the mean and of the largest update, depend on network and learning rate:
    here they are one ratio. Its gamma is told as the cosine 1 - 2 gamma^2. After the paper, whose parting is the best
    one; no code was compared.

    Args:
        cancel: a group may part when the norm of its mean update is at most this share of the largest one's; 0 is
            FedAvg.
        cosine: largest cosine of updates across the parts.
        first_parting: the round in which groups part at the earliest.
    """

    views = ("global", "personal")
    reads_updates = True
    answers_singly = True
    trained: Tensor

    def __init__(
        self,
        *args: Any,
        cancel: Share = 0.5,
        cosine: Annotated[float, Field(ge=-1, le=1)] = 0.0,
        first_parting: PositiveInt = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cancel, self.cosine, self.first_parting = cancel, cosine, first_parting
        self.register_buffer("trained", torch.zeros(()))  # rounds of this site
        self._group: Sequence[nn.Module] = ()  # its group's model; in a tuple, as the site need not keep it

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came, and the model of the site's group where that is another one."""
        super().receive(message, kept, site)
        own = message.get(GROUP)
        self._group = (deepcopy(self.model),) if own else ()
        for network in self._group:
            self._load(network, own)

    def send(self, site: Site) -> State:
        """The differences."""
        self.trained += 1
        return super().send(site)

    def network(self, view: str) -> nn.Module:
        """The received model, or that of the site's group."""
        return self._group[0].to(self.device) if view == "personal" and self._group else self.model

    # ---------------------------------------------------------------- server half

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """All sites in one group."""
        server = super().init_server(introductions)
        return State(server.tensors, {**server.scalars, **{f"{GROUP}/{site}": 0.0 for site in introductions}})

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """For training the model of the site's group; for scores the global one, and that beside it."""
        message = super().broadcast(server, site, task)
        number = _number(server, site)
        if task.kind == "train":
            return State({**message.tensors, **_state(server, number).tensors}, message.scalars)
        own = server.get(f"{GROUP}/{number}") if f"{GROUP}/{site}" in server.scalars else {}
        return State({**message.tensors, GROUP: own}, message.scalars) if own else message

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Let groups part, then take the mean of each."""
        mean, cohort = average(self.weigh(server, updates))
        told = [update for update in updates if cohort.weights[update.site]]
        rounds = server.scalars.get(ROUNDS, 0.0) + 1
        before = {site: _number(server, site) for site in {**_named(server, GROUP), **cohort.weights}}
        now = self.parted(before, told, cohort.weights) if rounds >= self.first_parting else before
        start = {number: before[site] for site, number in now.items()}  # a part goes on from what it was a part of
        models = {number: _state(server, start[number]) for number in sorted(start)}
        for number in {now[update.site] for update in told}:
            members = [update for update in told if now[update.site] == number]
            change = mean if len(members) == len(told) else mean_of(members, cohort.weights)
            models[number] = super().advance(models[number], change, cohort)
        weights = {**_named(server, WEIGHT), **cohort.weights}
        shares = [sum(weights.get(site, 0.0) for site in now if now[site] == number) for number in models]
        scalars = {f"{GROUP}/{site}": float(number) for site, number in now.items()}
        scalars |= {f"{WEIGHT}/{site}": weight for site, weight in weights.items()}
        return State({**server.tensors, **_everybody(models, shares)}, {**server.scalars, **scalars, ROUNDS: rounds})

    def parted(self, groups: Mapping[str, int], told: Sequence[Update], weights: Mapping[str, float]) -> dict[str, int]:
        """The number of every site's group, after those that disagree have parted.

        Args:
            groups: site -> number, before.
            told: the updates of this round.
            weights: of these.
        """
        after = dict(groups)
        for number in sorted(set(groups.values())):
            members = [update for update in told if groups[update.site] == number]
            rows = [row_of(update["model"]) for update in members]
            leave = parting(rows, [weights[update.site] for update in members], self.cancel, self.cosine)
            after |= {members[index].site: max(after.values()) + 1 for index in leave}
        return after


def mean_of(updates: Sequence[Update], weights: Mapping[str, float]) -> State:
    """The mean of some of a round's updates."""
    mean = Mean()
    for update in updates:
        mean.add(update, weights[update.site])
    return mean.result()


def _named(server: State, kind: str) -> dict[str, float]:
    """Site -> a number of it."""
    return {key.removeprefix(f"{kind}/"): n for key, n in server.scalars.items() if key.startswith(f"{kind}/")}


def _number(server: State, site: str) -> int:
    return int(server.scalars.get(f"{GROUP}/{site}", 0.0))


def _state(server: State, number: int) -> State:
    """A group's shared tensors; everybody's, as long as there is one group."""
    own = server.get(f"{GROUP}/{number}")
    shared = {kind: server[kind] for kind in SHARED if kind in server.tensors}
    return State({kind: {name: own.get(name, t) for name, t in tensors.items()} for kind, tensors in shared.items()})


def _everybody(models: Mapping[int, State], shares: Sequence[float]) -> dict[str, Tensors]:
    """The mean of the groups' models, and these beside it where there are several."""
    first, *others = models.values()
    if not others:
        return first.tensors
    parts = [share / sum(shares) for share in shares]
    mean = {kind: weighted([model[kind] for model in models.values()], parts) for kind in first.tensors}
    groups = {
        f"{GROUP}/{number}": {n: t for ts in model.tensors.values() for n, t in ts.items()}
        for number, model in models.items()
    }
    return {**mean, **groups}
