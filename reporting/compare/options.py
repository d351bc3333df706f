"""How runs are compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedseg.evaluation import METRICS, check_metrics
from fedseg.reporting.compare.clock import Clock
from fedseg.reporting.units import UNKNOWN


@dataclass(frozen=True)
class Options:
    """How runs are compared.

    Attributes:
        metric: that decides: dice, iou, hd95, assd, nsd, sensitivity, precision, rvd, lesion_f1, ece,
            brier, hd95_pooled or missed; the runs must have it.
        checkpoint: whose test scores are tested: best (chosen on validation) or last; tables show both.
        alpha: level of the tests, in (0, 1); intervals have the confidence 1 - alpha.
        draws: resamples of the bootstrap.
        target: share of FedAvg's best validation score, in (0, 1], that counts as reached.
        margin: how much worse still counts as not worse, and how far apart as equivalent: points of the metric (of 100
            for shares, mm or pixels for distances).
        personal: method whose personal model is asked about; null: the best on validation, mean over sites.
        global_: method whose global model it is held against; null: the best on validation, mean over sites.
        step_seconds: of a local step, for a simulated clock that tells the time until the target; null for none.
        megabits: per second of a site's line, each way, for that clock; null where it takes no time.
        slower: how many times longer a step takes at a site, for that clock, as in {hospital_b: 4}.
    """

    metric: str = "dice"
    checkpoint: Literal["best", "last"] = "best"
    alpha: float = 0.05
    draws: int = 2000
    target: float = 0.95
    margin: float = 2.0
    personal: str | None = None
    global_: str | None = None
    step_seconds: float | None = None
    megabits: float | None = None
    slower: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_metrics([self.metric], 0.0)
        if METRICS[self.metric].signed:
            raise ValueError(f"metric={self.metric} has no better end, so that no model wins by it; take assd or dice")
        for name, fine in (
            ("alpha", 0 < self.alpha < 1),
            ("draws", self.draws >= 100),
            ("target", 0 < self.target <= 1),
            ("margin", self.margin >= 0),
            ("step_seconds", self.step_seconds is None or 0 <= self.step_seconds < math.inf),
            ("megabits", self.megabits is None or 0 < self.megabits < math.inf),
            ("slower", all(0 < times < math.inf for times in (self.slower or {}).values())),
        ):
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; see compare.py --help")

        if self.step_seconds is None and (self.megabits, self.slower) != (None, None):
            raise ValueError("megabits and slower are of a simulated clock; take step_seconds=0.1 or so, too")

    @property
    def clock(self) -> Clock | None:
        """The simulated clock, if one is declared."""
        return None if self.step_seconds is None else Clock(self.step_seconds, self.megabits, self.slower or {})

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric points."""
        return METRICS[self.metric].higher_is_better

    @property
    def sign(self) -> int:
        """Times a score: more is better."""
        return 1 if self.higher_is_better else -1

    @property
    def title(self) -> str:
        """The metric's name for people."""
        return METRICS[self.metric].title

    @property
    def scale(self) -> float:
        """Shares are shown in points of 100, lengths as they are."""
        return 1.0 if METRICS[self.metric].is_length else 100.0

    @property
    def span(self) -> float:
        """The greatest difference that two scores can have; infinite where nothing bounds them."""
        return METRICS[self.metric].span

    @property
    def points(self) -> str:
        """What a margin is told in."""
        return UNKNOWN if METRICS[self.metric].is_length else "points"

    @property
    def unit(self) -> str:
        """What a shown number is."""
        return UNKNOWN if METRICS[self.metric].is_length else "points of 100"

    @property
    def on_grid(self) -> str:
        """The grid at the end of a title, where it is known."""
        return ""

    @property
    def confidence(self) -> float:
        """Of intervals."""
        return 1 - self.alpha


@dataclass(frozen=True)
class Stated(Options):
    """Options, and what the compared runs say of their numbers.

    Attributes:
        length: unit of the metric where it is a length.
        grid: that the scores stand on.
    """

    length: str = UNKNOWN
    grid: str = ""

    @property
    def points(self) -> str:
        """What a margin is told in."""
        return self.length if METRICS[self.metric].is_length else super().points

    @property
    def unit(self) -> str:
        """What a shown number is, and on which grid."""
        unit = self.length if METRICS[self.metric].is_length else super().unit
        return f"{unit}, {self.grid}" if self.grid else unit

    @property
    def on_grid(self) -> str:
        """The grid at the end of a title."""
        return f", {self.grid}" if self.grid else ""
