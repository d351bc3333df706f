"""Generalisation adjustment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Average, Site
from fedseg.federation.ranges import Fixed, Share
from fedseg.federation.state import State, Update

GAP, SHARE, ROUNDS = "gap", "share", "rounds"


class GA(FedAvg):
    """Generalisation adjustment (FedDG-GA: Zhang et al., CVPR 2023): sites that lose most by averaging gain weight.

    A site's gap is the validation Dice of its model after its last training minus that of the model received since;
    c_i += s gap_i / max |gap| / K, cut to [0, 1], and normalised over the sites of the round. Weights begin as
    `weighting` says; s falls linearly from `step` over `step_rounds`. A site that has no gap yet, or no validation
    images, keeps its weight. The released program's rule, with K sites for the 3 it was run with; its arrays were not
    compared.

    Args:
        step: s of the first round; 0 is FedAvg.
        step_rounds: rounds over which s falls to 0; null takes the run's.
    """

    last_dice: Tensor

    def __init__(
        self, *args: Any, step: Share = 0.2, step_rounds: Fixed[PositiveInt | None] = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.step, self.step_rounds = step, step_rounds or self.recipe.rounds
        if step and step_rounds is None:
            self.over_rounds = "algorithm.step falls over them, as no algorithm.step_rounds was said when it began"
        self.register_buffer("last_dice", torch.full((), -1.0))  # of the site's model; below 0 where there is none
        self._gap: float | None = None

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; nothing is scored yet."""
        super().receive(message, kept, site)
        self._gap = None

    def on_train_start(self) -> None:
        """The gap between the site's last model and the received one."""
        super().on_train_start()
        found = self.validation_dice()
        if found is not None and self.last_dice >= 0:
            self._gap = float(self.last_dice) - found

    def on_train_end(self) -> None:
        """Score the site's model, where the network still computes."""
        super().on_train_end()
        found = self.validation_dice()
        if found is not None:
            self.last_dice.fill_(found)

    def validation_dice(self) -> float | None:
        """Of the model as it is; None without validation images."""
        return self.mean_dice(self.model, self.turn_site.eval_batches("val")) if self.step and self.turn_site else None

    def send(self, site: Site) -> State:
        """The differences, and the gap."""
        answer = super().send(site)
        if self._gap is not None:
            answer.scalars[GAP] = self._gap
        return answer

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Move the weights, and take the mean."""
        if not self.step:
            return super().aggregate(server, updates, average)
        sizes = {u.site: size for u, size in zip(updates, self.weigh(server, updates), strict=True) if size}
        weights = {site: server.scalars.get(f"{SHARE}/{site}", size) for site, size in sizes.items()}
        weights = weights if any(weights.values()) else sizes
        whole = sum(weights.values())  # what is remembered is on the scale of sizes, whoever was there
        past = {site: weight / whole for site, weight in weights.items()}
        gaps = {u.site: min(max(u.scalars[GAP], -1.0), 1.0) for u in updates if GAP in u.scalars and u.site in past}
        rounds = server.scalars.get(ROUNDS, 0.0)
        found = adjusted(past, gaps, self.step * max(0.0, 1 - rounds / self.step_rounds))
        after = super().advance(server, *average([found.get(update.site, 0.0) for update in updates]))
        told = {f"{SHARE}/{site}": share * whole for site, share in found.items()}
        return State(after.tensors, {**after.scalars, **told, ROUNDS: rounds + 1})


def adjusted(shares: Mapping[str, float], gaps: Mapping[str, float], step: float) -> dict[str, float]:
    """Weights of the sites, moved towards those with large gaps.

    Args:
        shares: of the sites so far.
        gaps: of those that have one.
        step: s, how far the site with the largest gap goes, times the number of sites.
    """
    largest = max((abs(gap) for gap in gaps.values()), default=0.0)
    if not largest or not step:
        return dict(shares)
    moved = {
        site: min(max(share + step * gaps.get(site, 0.0) / largest / len(shares), 0.0), 1.0)
        for site, share in shares.items()
    }
    total = sum(moved.values())
    return {site: share / total * sum(shares.values()) for site, share in moved.items()} if total else dict(shares)
