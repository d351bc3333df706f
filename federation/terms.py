"""What a site agrees to: its own terms, which hold whatever the server asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedseg.federation.contract import VISITING, Task, TrainTask
from fedseg.federation.heterogeneity import LABELS
from fedseg.federation.ranges import check_ranges


@dataclass(frozen=True)
class Terms:
    """A site's own terms (terms.yaml); a site without a file has these defaults.

    Attributes:
        least_sites: sites behind every mean; with masked sums the site itself sees to it, else it holds the run's
            settings and what each training task says of its round to it, which is the server's word.
        masked: single updates leave masked only (privacy.aggregation=masked).
        max_epsilon: what leaves has passed differential privacy whose noise is drawn at the site (privacy.mechanism
            patient or sparse), and all runs of a site on its own machine together spend at most this (in one place:
            each run); null asks for none.
        max_delta: largest probability with which that bound may fail.
        methods: the site takes part in, by their names (fedavg) or import paths; empty for all.
        views: of models that may be made there (global, personal, adapted); empty for all.
        publishes_model: whether its personal model may be published to sites that took no part.
        model_scored_elsewhere: whether its personal model may be scored at the other sites, which the server and they
            then have.
        scores_others: whether other sites' personal models may be scored on its images.
        case_scores: whether scores of single cases may leave, under pseudonyms.
        label_counts: whether shares of its cases by the size of their regions may leave, for choosing sites.
    """

    least_sites: PositiveInt = 1
    masked: bool = False
    max_epsilon: PositiveFloat | None = None
    max_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    methods: tuple[str, ...] = ()
    views: tuple[Literal["global", "personal", "adapted"], ...] = ()
    publishes_model: bool = True
    model_scored_elsewhere: bool = False
    scores_others: bool = False
    case_scores: bool = True
    label_counts: bool = True

    def __post_init__(self) -> None:
        check_ranges(Terms, vars(self), "terms")

    def forbids(self, task: Task, tells: bool = True) -> str:
        """Which term stands against a task, whatever was said before the run; empty if none does.

        Args:
            task: what is asked.
            tells: whether the run's method tells of a site's training at all.
        """
        if isinstance(task, TrainTask):
            few = tells and max(task.sites, 1) < self.least_sites
            return f"least_sites: {self.least_sites}, and this round is of {max(task.sites, 1)}" if few else ""
        visiting = task.topic == VISITING
        if task.kind == "introduce" and task.topic == LABELS and (why := self._against_counts()):
            return why
        if task.kind == "publish" and visiting and not self.model_scored_elsewhere:
            return "model_scored_elsewhere: false"
        if task.kind == "publish" and not visiting and not self.publishes_model:
            return "publishes_model: false"
        if task.kind == "evaluate" and visiting and not self.scores_others:
            return "scores_others: false"
        if task.kind == "evaluate" and self.views and (odd := sorted(set(task.views) - set(self.views))):
            return f"views: [{', '.join(self.views)}], without {odd[0][:40]!r}"
        return ""

    def _against_counts(self) -> str:
        """Which term stands against telling how labels spread: such counts are neither masked nor private."""
        if not self.label_counts:
            return "label_counts: false"
        if self.masked:
            return "masked: true"
        return "" if self.max_epsilon is None else f"max_epsilon: {self.max_epsilon:g}"
