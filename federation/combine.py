"""How updates become one: the weighted mean, or a rule that bounds what a few hostile sites can do to it.

The rules need every update of a round at once, so that the server's memory grows with the sites; they exclude
aggregation that shows the server sums only. Distances and norms are those of the group ``model``, where there is one:
running statistics have units of their own. None of them detects everything, and all cost accuracy where honest sites
differ (docs/hardening.md has a table).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedseg.federation.contract import Row, event
from fedseg.federation.sketch import SketchedMean
from fedseg.federation.state import State, Tensors, Update, squared_distance

Rule = Literal["mean", "norm_bound", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"]
COUNTING: tuple[Rule, ...] = ("trimmed_mean", "krum", "multi_krum")
"""Rules that are told how many sites may be hostile."""
FAR = 3.0
"""An update is noted that lies so many times as far from the combined one as the median update does."""
SMOOTHING, PASSES, SETTLED = 1e-6, 100, 1e-7


@dataclass(frozen=True)
class Combination:
    """A rule and what it assumes.

    Attributes:
        rule: see `federation.schedule.Schedule`.
        hostile: how many sites of a round may be hostile.
    """

    rule: Rule
    hostile: int

    @property
    def least(self) -> int:
        """Fewest updates that the rule can work with."""
        if self.rule == "trimmed_mean":
            return 2 * self.hostile + 1
        return 2 * self.hostile + 3 if self.rule in ("krum", "multi_krum") else 1


class RobustMean(SketchedMean):
    """Updates of a round, combined by a rule when all have come.

    Args:
        combination: the rule.
        per_site: as of `Mean`.
        seed: as of `SketchedMean`.
        uniform: as of `Mean`.
    """

    def __init__(
        self, combination: Combination, per_site: Iterable[str], seed: int, uniform: Iterable[str] = ()
    ) -> None:
        super().__init__(per_site, seed, uniform)
        self.combination = combination
        self._updates: list[tuple[Update, float]] = []

    def add(self, update: Update, weight: float) -> None:
        """Take one update in; one without weight has no say in any rule."""
        super().add(update, weight)
        if weight > 0:
            self._updates.append((update, weight))

    def result(self) -> State:
        """What the rule makes of the updates; scalars and groups of single sites are those of the mean.

        Raises:
            ValueError: nothing was taken in, or fewer updates than the rule needs.
        """
        plain = super().result()
        if len(self._updates) < self.combination.least:
            raise ValueError(
                f"federation.combine={self.combination.rule} with federation.hostile={self.combination.hostile} needs "
                f"{self.combination.least} updates, {len(self._updates)} came"
            )
        combined = {group: self._combined(group) for group in self._shared}
        return State({**plain.tensors, **combined}, plain.scalars)

    def far(self, combined: State, round: int) -> list[Row]:
        """Events that name the sites whose updates lie far from the combined one.

        Args:
            combined: what `result` returned.
            round: of the run.
        """
        groups = self._measured()
        squares = (sum(float(squared_distance(u[g], combined[g])) for g in groups) for u in self._all)
        away = [math.sqrt(square) for square in squares]
        usual = float(torch.tensor(away).median()) if away else 0.0
        detail = "its update lies {:.1f} times as far from the combined one as the median's"
        return [
            event(round, update.site, "far", detail.format(distance / usual))
            for (update, _), distance in zip(self._updates, away, strict=True)
            if usual and distance > FAR * usual
        ]

    def _combined(self, group: str) -> Tensors:
        updates = self._all
        if self.combination.rule in ("median", "trimmed_mean"):
            cut = self.combination.hostile if self.combination.rule == "trimmed_mean" else (len(updates) - 1) // 2
            return {name: _trimmed([u[group][name] for u in updates], cut) for name in updates[0][group]}
        shares = torch.tensor(self._shares(group in self.uniform), dtype=torch.float64)
        return {name: _weighted([u[group][name] for u in updates], shares) for name in updates[0][group]}

    def _shares(self, uniform: bool) -> list[float]:
        """What each update is multiplied by; of a bounded norm they need not sum to one."""
        rows = [torch.cat([t.double().flatten() for g in self._measured() for t in u[g].values()]) for u in self._all]
        weights = [1.0 if uniform else weight for _, weight in self._updates]
        total = sum(weights)
        weights = [weight / total for weight in weights]
        if self.combination.rule == "norm_bound":
            return [weight * scale for weight, scale in zip(weights, bounds(rows), strict=True)]
        if self.combination.rule == "geometric_median":
            return geometric_median_weights(rows, weights)
        chosen = krum(rows, self.combination.hostile, 1 if self.combination.rule == "krum" else None)
        return [float(index in chosen) / len(chosen) for index in range(len(rows))]

    @property
    def _all(self) -> list[Update]:
        return [update for update, _ in self._updates]

    def _measured(self) -> list[str]:
        """Groups that distances run over."""
        return ["model"] if "model" in self._shared else self._shared

    @property
    def _shared(self) -> list[str]:
        return [group for group in self._all[0].tensors if group not in self.per_site] if self._all else []


def bounds(rows: Sequence[Tensor]) -> list[float]:
    """Factors that bring every row to the median norm at most (norm thresholding: Sun et al., 2019)."""
    norms = torch.stack([row.norm() for row in rows])
    return [float(norms.median() / norm) if norm > norms.median() else 1.0 for norm in norms]


def krum(rows: Sequence[Tensor], hostile: int, keep: int | None = None) -> list[int]:
    """The rows nearest to their neighbours (Blanchard et al., NeurIPS 2017).

    A row's score is the sum of squared distances to its n - f - 2 nearest others, where f are hostile.

    Args:
        rows: n of one length.
        hostile: f; n must be at least 2 f + 3.
        keep: how many of the lowest scores (Krum: 1); None takes n - f (multi-Krum).
    """
    stacked = torch.stack(list(rows))
    squared = torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = squared.sort(dim=1).values[:, 1 : len(rows) - hostile - 1]
    order = nearest.sum(dim=1).argsort(stable=True).tolist()
    return sorted(order[: len(rows) - hostile if keep is None else keep])


def geometric_median_weights(rows: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
    """Weights whose mean of the rows is their geometric median (RFA: Pillutla, Kakade, Harchaoui, 2022).

    The smoothed Weiszfeld algorithm: a row's weight is divided by its distance to the point at hand, which is at least
    1e-6, until the point stands still.

    Args:
        rows: of one length.
        weights: of the rows; they sum to one.
    """
    given = torch.tensor(weights, dtype=torch.float64)
    stacked = torch.stack(list(rows))
    shares = given
    point = shares @ stacked
    for _ in range(PASSES):
        shares = given / (stacked - point).norm(dim=1).clamp(min=SMOOTHING)
        shares = shares / shares.sum()
        moved = shares @ stacked
        done = (moved - point).norm() <= SETTLED * moved.norm()
        point = moved
        if done:
            break
    return [float(share) for share in shares]


def _trimmed(tensors: Sequence[Tensor], cut: int) -> Tensor:
    """Mean, coordinate by coordinate, without the ``cut`` largest and smallest (Yin et al., ICML 2018)."""
    kept = torch.stack(list(tensors)).sort(dim=0).values[cut : len(tensors) - cut]
    return kept.double().mean(dim=0).to(tensors[0].dtype)


def _weighted(tensors: Sequence[Tensor], shares: Tensor) -> Tensor:
    stacked = torch.stack(list(tensors))
    mean: Tensor = torch.tensordot(shares, stacked.double(), dims=1)
    return mean.to(stacked.dtype)
