"""Weights by what a site reaches: validation Dice, or its loss over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import LOSS, Average, Site
from fedseg.federation.ranges import ReadBy, Share, check_read
from fedseg.federation.state import State, Update

DICE, COST, KEPT = "validation/dice", "cost", 5
LEAST = 1e-12  # of a loss
PID = (0.45, 0.45, 0.1)  # images, fall of the loss, losses of the last rounds


class FedCost(FedAvg):
    """Sites weigh by validation Dice (Nalawade, 2021), or as in FedCostWAvg and FedPIDAvg (Maechler, 2021 and 2022).

    dice: c ~ v^power, v the Dice of the site's model on its validation images after training; a site without any counts
    as the median of the others. ratio (FedCostWAvg): c = a n + (1 - a) before / now. pid (FedPIDAvg): c = .45 n +
    .45 max(0, before - now) + .1 sum of the last 5. n is the number of images, before and now are the site's mean
    training losses of the last round that it took part in and of this one; each part is divided by its sum over sites,
    and left out where that is 0. All favour sites that do well; FedCE and GA favour those that do not. After the
    papers; no code was compared.

    FedPIDAvg's abstract speaks of the drop of the loss alone; that a loss which rose counts as no drop is as in a third
    party's program, and keeps weights from being negative. The paper's other part, numbers of iterations from a Poisson
    model of the sites' sizes, is not here.

    Args:
        cost: dice, ratio or pid.
        power: of cost=dice; 0 weighs all sites alike.
        images: a of cost=ratio, the part of the number of images; 1 is FedAvg.
    """

    read_by: ClassVar[ReadBy] = {"power": ("cost", ("dice",)), "images": ("cost", ("ratio",))}

    def __init__(
        self,
        *args: Any,
        cost: Literal["dice", "ratio", "pid"] = "dice",
        power: NonNegativeFloat = 1.0,
        images: Share = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cost, self.power, self.images = cost, power, images
        check_read(self, "algorithm", self.read_by)
        self._dice: float | None = None

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; nothing is scored yet."""
        super().receive(message, kept, site)
        self._dice = None

    def on_train_end(self) -> None:
        """Score the trained model, where the network still computes."""
        super().on_train_end()
        if self.cost == "dice" and self.turn_site is not None:
            self._dice = self.mean_dice(self.model, self.turn_site.eval_batches("val"))

    def send(self, site: Site) -> State:
        """The differences, and the score."""
        answer = super().send(site)
        if self._dice is not None:
            answer.scalars[DICE] = self._dice
        return answer

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Weigh the updates, and remember losses."""
        usable = [u for u in updates if u.examples and (self.cost == "dice" or LOSS in u.scalars)]
        sizes = dict(zip([u.site for u in updates], super().weigh(server, updates), strict=True))
        found = by_dice(usable, self.power) if self.cost == "dice" else self.by_loss(server.scalars, usable, sizes)
        after = super().advance(server, *average([found.get(update.site, 0.0) for update in updates]))
        told = {} if self.cost == "dice" else dict(_remembered(server.scalars, usable))
        return State(after.tensors, {**after.scalars, **told})

    def by_loss(
        self, past: Mapping[str, float], updates: Sequence[Update], sizes: Mapping[str, float]
    ) -> dict[str, float]:
        """Weights from losses.

        Args:
            past: the server's numbers.
            updates: of this round.
            sizes: site -> images, or 1 for all.
        """
        series = {u.site: [max(u.scalars[LOSS], LEAST), *past_losses(past, u.site)] for u in updates}
        images = {site: sizes[site] for site in series}
        now_before = {site: (losses[0], losses[min(1, len(losses) - 1)]) for site, losses in series.items()}
        if self.cost == "ratio":
            ratios = {site: before / now for site, (now, before) in now_before.items()}
            return mixed((self.images, images), (1 - self.images, ratios))
        falls = {site: max(0.0, before - now) for site, (now, before) in now_before.items()}
        sums = {site: sum(losses[:KEPT]) for site, losses in series.items()}
        return mixed(*zip(PID, (images, falls, sums), strict=True))


def by_dice(updates: Sequence[Update], power: float) -> dict[str, float]:
    """Weights from validation scores; all alike where nobody has one above 0."""
    scores = {u.site: min(max(u.scalars[DICE], 0.0), 1.0) for u in updates if DICE in u.scalars}
    middle = median(scores.values()) if scores else 1.0
    found: dict[str, float] = {u.site: scores.get(u.site, middle) ** power for u in updates}
    return found if sum(found.values()) else dict.fromkeys(found, 1.0)


def mixed(*parts: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    """Weights of sites as a sum of parts, each normalised; a part that is nothing is left out."""
    totals = [(weight, part, sum(part.values())) for weight, part in parts]
    there = [(weight / total, part) for weight, part, total in totals if total]
    return {site: sum(scale * part[site] for scale, part in there) for site in parts[0][1]}


def past_losses(scalars: Mapping[str, float], site: str) -> list[float]:
    """What the server remembers of a site, latest first."""
    names = [f"{COST}/{back}/{site}" for back in range(1, KEPT)]
    return [scalars[name] for name in names if name in scalars]


def _remembered(scalars: Mapping[str, float], updates: Sequence[Update]) -> list[tuple[str, float]]:
    rows = []
    for update in updates:
        losses = [max(update.scalars[LOSS], LEAST), *past_losses(scalars, update.site)][: KEPT - 1]
        rows += [(f"{COST}/{back}/{update.site}", loss) for back, loss in enumerate(losses, 1)]
    return rows
