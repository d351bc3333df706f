"""A simulated clock: seconds that rounds would have taken at sites of declared speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

TOGETHER = "together"


@dataclass(frozen=True)
class Clock:
    """How fast sites are. Nothing is measured: runs of one machine are held against each other as if sites were many.

    Attributes:
        step_seconds: of a local step of one model.
        megabits: per second of a site's line, each way; None where it takes no time.
        slower: site -> how many times longer a step takes there.
    """

    step_seconds: float
    megabits: float | None = None
    slower: Mapping[str, float] = field(default_factory=dict)

    def after(self, work: pd.DataFrame, traffic: pd.DataFrame, order: str) -> pd.Series:
        """Round -> seconds since the start.

        Sites of a round that train together wait for the slowest; where they take turns, their times add up.

        Args:
            work: (round, site, steps).
            traffic: (round, site, bytes).
            order: of turns, as `federation.order`.
        """
        steps = work.groupby(["round", "site"])["steps"].sum()
        factors = steps.index.get_level_values("site").map(lambda site: self.slower.get(str(site), 1.0))
        busy = steps * self.step_seconds * factors.to_numpy(dtype=float)
        if self.megabits is not None:
            line = traffic.groupby(["round", "site"])["bytes"].sum() * 8e-6 / self.megabits
            busy = busy.add(line, fill_value=0.0)
        rounds = busy.groupby("round")
        taken: pd.Series = rounds.max() if order == TOGETHER else rounds.sum()
        return taken.sort_index().cumsum()
