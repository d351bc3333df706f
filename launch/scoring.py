"""Scores of a run: validation in every round, and everything at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from fedseg.algorithms import Algorithm
from fedseg.algorithms.functional.adaptation import fit_statistics, minimise_entropy, with_running_statistics
from fedseg.datamodules import Regions, SiteData
from fedseg.evaluation import QUICK, CaseMasks, DivergedError, Grid, Predict, evaluate, predict_cases
from fedseg.federation.client import Images
from fedseg.federation.contract import VISITING, RoundRecord, Row, Task
from fedseg.federation.engine import Federation, RoundError
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.kept_masks import KeptMasks
from fedseg.reporting.overlays import Picture, aspect_of, judge_of, most_shown, pick_cases, reported_scores
from fedseg.reporting.reporter import Reporter
from fedseg.reporting.summary import ENCODER, ENTROPY, OWN_STATISTICS

DURING, LAST, BEST = "round", "last", "best"
ADAPTED = "adapted"


class Scorer:
    """Scores a worker's views at a site: rows for the table, means for the server.

    Args:
        experiment: metrics and regions.
        kept: takes the masks of test cases, if they are wanted.
    """

    def __init__(self, experiment: Experiment, kept: KeptMasks | None = None) -> None:
        self.kept = kept
        self.settings = experiment.evaluation
        self.regions = experiment.data.regions
        self.rows: list[Row] = []

    def __call__(self, algorithm: Algorithm, site: SiteData, task: Task) -> dict[str, float]:
        """Score the task's splits; the means over the cases that count go to the server."""
        means: dict[str, float] = {}
        for view in views(algorithm, site, task):
            for split in task.splits:
                rows = self._score(partial(predict, algorithm, view), site, task, view, split)
                self.rows += rows
                means |= {f"{split}/{view}/{metric}": mean for metric, mean in _means(rows).items()}
            if not site.seen and (fitted := with_own_statistics(algorithm, view, site)) is not None:
                answer = partial(_answers, algorithm, fitted)
                self.rows += self._score(answer, site, task, OWN_STATISTICS, "test")
            if not site.seen and (sure := with_least_entropy(algorithm, view, site, self.settings.entropy_passes)):
                self.rows += self._score(partial(_answers, algorithm, sure), site, task, ENTROPY, "test")
        if not task.views:
            means |= self._probe(algorithm, site, task)
        return means

    def take(self) -> list[Row]:
        """The rows since the last call."""
        rows, self.rows = self.rows, []
        return rows

    def _keep(self, site: SiteData, view: str, split: Any) -> Callable[[CaseMasks], None] | None:
        """What becomes of the masks of test cases."""
        return partial(self.kept.write, site.name, view) if self.kept is not None and split == "test" else None

    def _probe(self, algorithm: Algorithm, site: SiteData, task: Task) -> dict[str, float]:
        """What a pre-trained encoder is worth without labels, as rows of the view ``encoder``."""
        common = {"round": task.round, "checkpoint": task.checkpoint, "site": site.name, "seen": site.seen}
        common |= {"view": ENCODER, "region": "mean", "case": "", "unit": "", "grid": "network"}
        found: dict[str, float] = {}
        for split in task.splits:
            numbers = algorithm.probe(site, split)
            self.rows += [{**common, "split": split, "metric": name, "value": v} for name, v in numbers.items()]
            found |= {f"{split}/{ENCODER}/{name}": value for name, value in numbers.items()}
        return found

    def _score(self, answer: Predict, site: SiteData, task: Task, view: str, split: Any) -> list[Row]:
        during = task.checkpoint == DURING
        quick = during or task.topic == VISITING
        grid: Grid = "network" if during else self.settings.grid
        try:
            scores = evaluate(
                answer,
                site,
                split,
                self.regions,
                metrics=QUICK if quick else self.settings.metrics,
                tolerance=self.settings.tolerance,
                grid=grid,
                keep=None if quick else self._keep(site, view, split),
            )
        except DivergedError as error:
            cure = "lower the learning rate or clip gradients (trainer.gradient_clip)"
            raise RoundError(f"the {view} model cannot be scored: {error}; {cure}") from error
        common = {"round": task.round, "checkpoint": task.checkpoint, "site": site.name, "seen": site.seen}
        return [{**common, "split": split, "view": view, **score._asdict(), "grid": grid} for score in scores]


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Metric to the mean over cases of the means over regions; a metric that no case has is left out."""
    cases: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if not math.isnan(row["value"]):
            cases.setdefault(row["metric"], {}).setdefault(row["case"], []).append(row["value"])
    return {
        metric: sum(sum(values) / len(values) for values in of_metric.values()) / len(of_metric)
        for metric, of_metric in cases.items()
    }


class Painter:
    """Takes the place of a scorer: collects the masks of chosen test cases instead of scores, on the cases' own grid.

    Of a volume one slice is kept, that which shows most of the truth.

    Args:
        regions: what the networks outline.
        cases: site -> the cases to predict there; no other site is looked at.
    """

    def __init__(self, regions: Regions, cases: Mapping[str, Collection[str]]) -> None:
        self.regions = regions
        self.cases = cases
        self.masks: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, algorithm: Algorithm, site: SiteData, task: Task) -> dict[str, float]:
        """Predict the chosen cases."""
        if not (only := self.cases.get(site.name)):
            return {}
        for view in views(algorithm, site, task):
            answer = partial(predict, algorithm, view)
            for found in predict_cases(answer, site, "test", self.regions, only=only, grid="own"):
                shown = most_shown(found.truth)
                self.masks.setdefault((site.name, found.case.case), {})[view] = found.prediction[:, shown : shown + 1]
        return {}

    def picture(
        self, site: SiteData, case: str, scores: pd.DataFrame, role: str = "", checkpoint: str = BEST
    ) -> Picture:
        """What is to be drawn of one case, with its Dice as the run's table has it."""
        sample = site.at_own_size(next(known for known in site.cases("test") if known.case == case))
        truth = self.regions.encode(torch.tensor(sample.labels)).numpy().astype(bool).swapaxes(0, 1)
        shown = most_shown(truth)
        one = slice(shown, shown + 1)
        masks = self.masks.get((site.name, case), {})  # none where the method has no model for the site
        told = reported_scores(scores, site.name, case, checkpoint=checkpoint)
        return Picture(
            site.name, case, sample.image[one], truth[:, one], masks, told, role,
            aspect=aspect_of(sample.spacing), slices=truth.shape[1], number=shown,
        )  # fmt: skip


class Scores(Protocol):
    """Where the scores of a run arrive: a `Scorer` in this process, or the way to sites on other machines."""

    def take(self) -> list[Row]:
        """The rows since the last call."""


class Notes:
    """The engine's observer: hands a round's scores to the reporter together with its record."""

    def __init__(self, reporter: Reporter, scorer: Scores) -> None:
        self.reporter = reporter
        self.scorer = scorer
        self.round_started = reporter.round_started
        self.site_done = reporter.site_done

    def round_done(self, record: RoundRecord) -> None:
        """One write for all sites."""
        rows = self.scorer.take()
        if rows:
            self.reporter.scores(rows)
        self.reporter.round_done(record)


def views(algorithm: Algorithm, site: SiteData, task: Task) -> Iterable[str]:
    """The views of the task that exist at a site; one that never trained has no personal model."""
    if task.topic == VISITING:  # another site's model, wherever it is
        return task.views if algorithm.trained_here else ()
    there = algorithm.views if site.seen else algorithm.unseen_views
    fitted = algorithm.trained_here or (task.personalise and algorithm.personalises)
    if site.seen and not (site.examples and fitted):
        there = tuple(view for view in there if view != "personal")
    return [view for view in there if not task.views or view in task.views]


def predict(algorithm: Algorithm, view: str, images: Any) -> Any:
    """Probabilities on the device of the worker."""
    return algorithm.predict(images.to(algorithm.device), view)


def _answers(algorithm: Algorithm, network: nn.Module, images: Any) -> Any:
    """Probabilities of a network beside the method's own."""
    return algorithm.answers(network, images.to(algorithm.device))


def with_own_statistics(algorithm: Algorithm, view: str, site: SiteData) -> nn.Module | None:
    """The global network with running statistics of the site's own images, without labels, instead of the federation's.

    The least that a site which took no part can do: what a method adapts for it must be better than this. None for
    another view, and for networks that normalise without running statistics.
    """
    if view != "global" or not with_running_statistics(algorithm.network(view)):
        return None
    fitted = deepcopy(algorithm.network(view)).eval()
    take_statistics(algorithm, fitted, Images(site, "test"))
    return fitted


def with_least_entropy(algorithm: Algorithm, view: str, site: SiteData, passes: int) -> nn.Module | None:
    """The global network, sure of the site's own images; None for another view, and where nobody asked for it."""
    if view != "global" or not passes:
        return None
    fitted = deepcopy(algorithm.network(view)).eval()
    become_sure(algorithm, fitted, Images(site, "test"), passes)
    return fitted


def become_sure(algorithm: Algorithm, network: nn.Module, images: Iterable[Tensor], passes: int) -> None:
    """Let a worker's network, in place, take statistics of images and minimise its entropy on them, without labels."""
    take_statistics(algorithm, network, images)
    minimise_entropy(network, Prepared(algorithm, images), algorithm.recipe.activation, passes)


class Prepared:
    """Images as a method's network takes them, anew in every pass.

    Args:
        algorithm: a worker.
        images: (B, C, h, w) in [0, 1].
    """

    def __init__(self, algorithm: Algorithm, images: Iterable[Tensor]) -> None:
        self._algorithm, self._images = algorithm, images

    def __iter__(self) -> Iterator[Tensor]:
        return (self._algorithm.normalize(batch.to(self._algorithm.device)) for batch in self._images)


@torch.no_grad()
def take_statistics(algorithm: Algorithm, network: nn.Module, images: Iterable[Tensor]) -> None:
    """Let a worker's network, in place, normalise by the running statistics of images, (B, C, h, w) in [0, 1]."""
    fit_statistics(network, Prepared(algorithm, images))


def score_checkpoints(
    federation: Federation, scorer: Scores, server: State, splits: Sequence[str] = ("val", "test")
) -> list[Row]:
    """Score the last model and the best ones on validation and test cases of every site, or on some splits only.

    The best global model is chosen by its mean validation Dice over seen sites, a site's best personal model by the
    site's own; without validation cases the last one stands in. What unseen sites adapt is, accordingly, the last
    models of all sites or the best ones: never is anything chosen by an unseen site's scores.

    Returns:
        Rows of the scores' table.
    """
    score_sites(federation, server, federation.checkpoint.round, splits=splits, checkpoint=LAST)
    last = scorer.take()
    rows = list(last)
    for name in best_models(federation):
        view, _, site = name.partition("/")
        if last_serves(federation, name):
            shown = (view, OWN_STATISTICS, ENTROPY) if view == "global" else (view,)
            rows += [{**row, "checkpoint": BEST} for row in last if row["view"] in shown and site in ("", row["site"])]
        else:
            show_best(federation, name, splits)
            rows += scorer.take()
    return rows


def never_trained(federation: Federation, rounds: pd.DataFrame) -> list[Row]:
    """Events of sites that have no personal model, since none of their updates was ever taken.

    Args:
        federation: at its end.
        rounds: the run's rounds.csv.
    """
    algorithm: Any = federation.algorithm
    if "personal" not in algorithm.views or algorithm.personalises:
        return []
    trained = set(rounds.loc[rounds["task"] == "train", "site"])
    detail = "it took part in no round, so it has no personal model: none is scored, and means are over other sites"
    common = {"round": federation.checkpoint.round, "event": "never trained", "detail": detail}
    return [{**common, "site": site} for site in federation.sites if site not in trained]


def paint_overlays(federation: Federation, experiment: Experiment, scores: pd.DataFrame) -> dict[str, list[Picture]]:
    """Pictures of the best models' worst, median and best test case of every site, worst case first."""
    roles = {name: pick_cases(scores, name) for name in all_sites(federation)}
    painter = paint_best(federation, Painter(experiment.data.regions, roles))

    def drawn(site: str, case: str, role: str) -> Picture:
        return replace(painter.picture(experiment.data.site(site), case, scores, role), judge=judge_of(scores, site))

    return {name: [drawn(name, case, role) for case, role in chosen.items()] for name, chosen in roles.items()}


def paint_best(federation: Federation, painter: Painter) -> Painter:
    """Let the best models predict the painter's cases."""
    transport: Any = federation.transport
    transport.evaluate = painter
    for name in best_models(federation):
        show_best(federation, name)
    return painter


def paint_last(federation: Federation, painter: Painter, server: State) -> Painter:
    """Let the last models predict the painter's cases; the transport holds what their sites kept."""
    transport: Any = federation.transport
    transport.evaluate = painter
    score_sites(federation, server, federation.checkpoint.round, checkpoint=LAST)
    return painter


def best_models(federation: Federation) -> list[str]:
    """Names of the models of which there is a best one: ``global``, ``personal/<site>``, ``adapted``."""
    algorithm: Any = federation.algorithm
    names = ["global"] if "global" in algorithm.views else []
    if "personal" in algorithm.views:
        names += [f"personal/{site}" for site in federation.sites]
    return [*names, ADAPTED] if algorithm.adapts and unseen_sites(federation) else names


def last_serves(federation: Federation, name: str) -> bool:
    """Whether the best model of a name is the last one; an adapted one mixes all others."""
    checkpoint = federation.checkpoint
    mixed = [other for other in best_models(federation) if other != ADAPTED] if name == ADAPTED else [name]
    return all(checkpoint.chosen(other).round == checkpoint.round for other in mixed)


def show_best(federation: Federation, name: str, splits: Sequence[str] = ("val", "test")) -> None:
    """Evaluate one best model where it serves."""
    if name == ADAPTED:
        return show_best_adapted(federation) if "test" in splits else None
    view, _, site = name.partition("/")
    checkpoint, best = federation.checkpoint, federation.checkpoint.chosen(name)
    kept = {site: checkpoint.read(best.kept)} if site and best.kept else {}
    federation.transport.restore(kept, {site: best.round} if site else {})
    sites, server = [site] if site else None, checkpoint.read(best.server)
    score_sites(federation, server, best.round, sites=sites, splits=splits, views=(view,), checkpoint=BEST)
    return None


def show_best_adapted(federation: Federation) -> None:
    """Evaluate, at unseen sites, what they adapt from the best global model and every site's best personal one."""
    checkpoint, shared = federation.checkpoint, federation.checkpoint.chosen("global")
    own = {site: checkpoint.chosen(f"personal/{site}") for site in federation.sites}
    kept = {site: checkpoint.read(best.kept) for site, best in own.items() if best.kept}
    federation.transport.restore(kept, {site: best.round for site, best in own.items()})
    score_unseen(federation, checkpoint.read(shared.server), shared.round, views=(ADAPTED,), checkpoint=BEST)


def score_sites(
    federation: Federation,
    server: State,
    round: int,
    *,
    sites: Sequence[str] | None = None,
    splits: Sequence[str] = ("val", "test"),
    **options: Any,
) -> None:
    """Ask for scores on these splits of seen sites, and on test cases of unseen ones where test is among the splits."""
    seen = federation.sites if sites is None else sites
    if sites is None and "test" in splits:
        # first: what is published counts as traffic of the run, and must not be taken for the end of a scored round
        score_unseen(federation, server, round, **options)
    federation.evaluate(server, round, seen, tuple(splits), **options)


def score_unseen(federation: Federation, server: State, round: int, **options: Any) -> None:
    """Ask unseen sites for scores on test cases; where the method adapts, the seen sites publish their models first."""
    outside = unseen_sites(federation)
    published = None
    if outside and federation.algorithm.adapts and ADAPTED in options.get("views", (ADAPTED,)):
        published = federation.publish(round)
        if options["checkpoint"] == LAST:
            federation.record_publication(server, round, published, outside)
    federation.evaluate(server, round, outside, ("test",), published, **options)


def unseen_sites(federation: Federation) -> list[str]:
    """Sites that only test."""
    transport: Any = federation.transport
    return [name for name, site in transport.sites.items() if not site.seen]


def all_sites(federation: Federation) -> list[str]:
    """Seen and unseen sites."""
    return [*federation.sites, *unseen_sites(federation)]
