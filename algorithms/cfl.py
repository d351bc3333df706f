"""Clustered federated learning."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from fedseg.algorithms.answers import ROUNDS, OwnAnswers, joined, replaced, weighted
from fedseg.algorithms.functional.parting import parting
from fedseg.algorithms.functional.rows import row_of
from fedseg.federation.contract import Average, Task
from fedseg.federation.ranges import Fixed, Share
from fedseg.federation.state import Mean, State, Tensors, Update, filed

GROUP, WEIGHT = "group", "weight"
"""``group/<site>``, a number: which group it is in; ``group/<number>``: a group's tensors, where there are several."""


class CFL(OwnAnswers):
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

    def __init__(
        self,
        *args: Any,
        cancel: Share = 0.5,
        cosine: Annotated[float, Field(ge=-1, le=1)] = 0.0,
        first_parting: Fixed[PositiveInt] = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cancel, self.cosine, self.first_parting = cancel, cosine, first_parting
        if cancel and first_parting > (rounds := self.recipe.rounds):
            why = f"groups part in round {first_parting} at the earliest, and there are {rounds}"
            self.adds_nothing = f"{why}; take a smaller algorithm.first_parting"

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """All sites in one group."""
        server = super().init_server(introductions)
        return State(server.tensors, {**server.scalars, **{f"{GROUP}/{site}": 0.0 for site in introductions}})

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """Groups have numbers, which are no names of sites; whoever joins is in the first one."""
        after, prefix = super().regrouped(server, arrived, left), f"{GROUP}/"
        models = {group: ts for group, ts in server.tensors.items() if group.startswith(prefix)}
        return State({**after.tensors, **models}, {**after.scalars, **{f"{prefix}{site}": 0.0 for site in arrived}})

    def own(self, server: State, site: str, task: Task) -> Tensors:
        """The model of the site's group, where there are several; whoever joins trains that of the first one."""
        member = task.kind == "train" or f"{GROUP}/{site}" in server.scalars
        return server.get(f"{GROUP}/{_number(server, site)}") if member else {}

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Let groups part, then take the mean of each."""
        mean, cohort = average(self.weigh(server, updates))
        told = [update for update in updates if cohort.weights[update.site]]
        rounds = server.scalars.get(ROUNDS, 0.0) + 1
        before = {site: _number(server, site) for site in {**filed(server, GROUP), **cohort.weights}}
        now = self.parted(before, told, cohort.weights) if rounds >= self.first_parting else before
        start = {number: before[site] for site, number in now.items()}  # a part goes on from what it was a part of
        models = {number: replaced(server, server.get(f"{GROUP}/{start[number]}")) for number in sorted(start)}
        for number in {now[update.site] for update in told}:
            members = [update for update in told if now[update.site] == number]
            change = mean if len(members) == len(told) else mean_of(members, cohort.weights)
            models[number] = super().advance(models[number], change, cohort)
        weights = {**filed(server, WEIGHT), **cohort.weights}
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


def _number(server: State, site: str) -> int:
    return int(server.scalars.get(f"{GROUP}/{site}", 0.0))


def _everybody(models: Mapping[int, State], shares: Sequence[float]) -> dict[str, Tensors]:
    """The mean of the groups' models, and these beside it where there are several."""
    first, *others = models.values()
    if not others:
        return first.tensors
    parts = [share / sum(shares) for share in shares]
    mean = {kind: weighted([model[kind] for model in models.values()], parts) for kind in first.tensors}
    return {**mean, **{f"{GROUP}/{number}": joined(model) for number, model in models.items()}}
