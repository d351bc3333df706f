"""FedDyn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedseg.algorithms.sums import SumsOverRounds
from fedseg.federation.contract import Batch, Cohort, Site
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State, add, squared_distance


class FedDyn(SumsOverRounds):
    """FedDyn (Acar et al., ICLR 2021): each site's objective is bent so that its optimum is the federation's.

    A local step descends F(w) - <g_i, w> + alpha / 2 |w - w_received|^2, where g_i <- g_i - alpha (w_i - w_received)
    after each round, which at a local optimum is the gradient of F there. The server adds to the mean difference the
    sum of all so far, each times its sites' part of the weight of all (the paper's -h / alpha, where all weigh the
    same). Nothing else travels.

    There is no strength at which it is FedAvg: the server's sum does not depend on alpha. A site's number of steps does
    not matter as long as it gets near its optimum; with few steps g_i is too small, not wrong in direction.

    Args:
        alpha: strength of the pull, and of what g_i learns.
    """

    leaves_out_unknown = True
    adds_up = True
    exact_groups = frozenset({"model"})
    summed, own_sum = "drift/mean", "slope"  # the group stays at the server
    slope: nn.Module

    def __init__(self, *args: Any, alpha: FinitePositive = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = alpha

    def loss(self, batch: Batch) -> Tensor:
        """Task loss, less its linear part at the site, and a proximal term."""
        parameters, slope = dict(self.model.named_parameters()), dict(self.slope.named_parameters())
        bent = super().loss(batch) + self.alpha / 2 * squared_distance(parameters, self.reference)
        for name in self.reference:
            bent = bent - (slope[name] * parameters[name]).sum()
        return bent

    def send(self, site: Site) -> State:
        """The difference; what the site remembers of its gradient follows it."""
        answer = super().send(site)
        slope = {name: tensor.cpu() for name, tensor in self.slope.named_parameters()}
        moved = answer.get("model")
        self._load(self.slope, add({name: slope[name] for name in moved}, moved, -self.alpha))
        return answer

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Take the mean difference, and all before it."""
        after = self.added_up(server, mean, "model", cohort)
        drifted = {"model": add(mean["model"], after[self.summed])} if "model" in mean.tensors else {}
        return super().advance(after, State({**mean.tensors, **drifted}, mean.scalars), cohort)
