"""Servers that hold what all sites have added up over their rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.parts import with_zeros, zeroed
from fedseg.federation.contract import Cohort, Site, Task
from fedseg.federation.state import State, add, filed

WEIGHT, TOTAL, AGAIN = "weight", "weight_of_all", "again"
"""Numbers at the server: ``weight/<site>`` of those heard of, what all weigh together, and whether sums began again."""


class SumsOverRounds(FedAvg):
    """A server that holds the mean over all sites of what each has added up over its rounds, and keeps at the site.

    A round's mean counts by the weight of its sites over that of all, so that what the server holds is always the mean
    of the sites' sums. A site that was not heard of yet has added up nothing, and is taken to weigh as the others do.
    When a site leaves or weighs otherwise than before (`data.arrives`), its part in the mean is not known any more: all
    sums begin again at 0, at a site when it is asked next.

    Attributes:
        summed: the server's group.
        own_sum: the site's network of numbers, by its name.
    """

    steady_weights = True
    summed: str
    own_sum: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setattr(self, self.own_sum, zeroed(self.model))

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; what the site has added up is 0 again if the server says so."""
        super().receive(message, kept, site)
        if AGAIN in message.scalars:
            for tensor in getattr(self, self.own_sum).state_dict().values():
                tensor.zero_()

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The model, and nothing added up."""
        return with_zeros(super().init_server(introductions), self.summed)

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model, and for training whether sums have begun again since the site was heard of."""
        message = super().broadcast(server, site, task)
        again = AGAIN in server.scalars and task.kind == "train" and f"{WEIGHT}/{site}" not in server.scalars
        return State(message.tensors, {**message.scalars, **({AGAIN: 1.0} if again else {})})

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """Newcomers have added up nothing; what those who left have is in the mean for ever, unless it begins again."""
        after = super().regrouped(server, arrived, left)
        return self.begun_again(after) if left else after

    def begun_again(self, server: State) -> State:
        """The state with nothing added up, and nobody heard of."""
        numbers = {n: x for n, x in server.scalars.items() if n != TOTAL and not n.startswith(f"{WEIGHT}/")}
        return State(with_zeros(server, self.summed).tensors, {**numbers, AGAIN: 1.0})

    def added_up(self, server: State, mean: State, group: str, cohort: Cohort) -> State:
        """The server's state with a round in its sum.

        Args:
            server: its state before.
            mean: of the round.
            group: of the mean, which is added.
            cohort: whose mean it is.
        """
        before = filed(server, WEIGHT)
        known = {**before, **cohort.weights}
        if any(before.get(site, weight) != weight for site, weight in cohort.weights.items()):
            return self.begun_again(server)
        if not any(known.values()):
            return server
        total = sum(known.values()) * (cohort.population / len(known))
        earlier = {name: t * (server.scalars.get(TOTAL, total) / total) for name, t in server[self.summed].items()}
        summed = add(earlier, mean.get(group), sum(cohort.weights.values()) / total) if mean.get(group) else earlier
        weights = {f"{WEIGHT}/{site}": weight for site, weight in known.items()}
        return State({**server.tensors, self.summed: summed}, {**server.scalars, **weights, TOTAL: total})
