"""SoftPull, the personal half of FedSM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedseg.algorithms.answers import REPLY, OwnAnswers, joined, replaced, weighted
from fedseg.federation.contract import Average, Task
from fedseg.federation.ranges import Share
from fedseg.federation.state import State, Tensors, Update


class SoftPull(OwnAnswers):
    """SoftPull (of FedSM: Xu et al., CVPR 2022): after a round a site's model is pulled to the mean of the others'.

    v_i <- lam v_i + (1 - lam) / (K - 1) sum of the v_j of the others, over the K sites of the round, in which each
    counts the same; running statistics too. The server holds every site's model. The global model is the mean of what
    sites trained, with FedAvg's weights, and the start of sites that join later; the paper trains one beside it, and a
    selector that takes each image of a new place to the model of the likeliest site (``algorithm=fedsm``). After the
    paper; NVIDIA's program, which was read and not compared, applies the same weights to differences.

    Args:
        lam: lambda, what a site keeps of its own model; 1 is local training, 1 / K is FedAvg of equal sites.
    """

    def __init__(self, *args: Any, lam: Share = 0.7, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lam = lam

    def own(self, server: State, site: str, task: Task) -> Tensors:
        """The site's model, once it has trained."""
        return server.get(f"{REPLY}/{site}")

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Pull the models of all sites that trained."""
        weights = self.weigh(server, updates)
        mean, cohort = average(weights)
        models = {}
        for update in (update for update, weight in zip(updates, weights, strict=True) if weight):
            before = replaced(server, server.get(f"{REPLY}/{update.site}"))
            models[update.site] = super().advance(before, State(update.tensors), cohort)
        shares = [weight / sum(weights) for weight in weights if weight]
        everybody = {kind: weighted([model[kind] for model in models.values()], shares) for kind in mean.tensors}
        pulled = self.pulled({site: joined(model) for site, model in models.items()})
        replies = {f"{REPLY}/{site}": tensors for site, tensors in pulled.items()}
        return State({**server.tensors, **everybody, **replies}, server.scalars)

    def pulled(self, models: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Every site's model after the pull; a site alone keeps its own."""
        others = max(len(models) - 1, 1)
        keeps = self.lam if len(models) > 1 else 1.0
        return {
            site: weighted(list(models.values()), [keeps if one == site else (1 - keeps) / others for one in models])
            for site in models
        }
