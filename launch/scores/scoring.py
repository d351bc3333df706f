"""Scores of a run: validation in every round, and everything at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fedseg.algorithms import Algorithm
from fedseg.algorithms.functional.adaptation import fit_statistics, minimise_entropy, with_running_statistics
from fedseg.datamodules import Regions, SiteData
from fedseg.evaluation import QUICK, CaseMasks, DivergedError, Grid, Predict, evaluate, predict_cases
from fedseg.federation.client import Images
from fedseg.federation.contract import VISITING, EvaluateTask, Row, Scored, Split, event
from fedseg.federation.engine import Federation, RoundError
from fedseg.federation.state import State, Update
from fedseg.launch.experiment import Experiment, Way
from fedseg.launch.folders.kept_masks import KeptMasks
from fedseg.launch.settings import Evaluation
from fedseg.reporting.folder import DURING_TRAINING
from fedseg.reporting.overlays import Picture, aspect_of, judge_of, most_shown, pick_cases, reported_scores
from fedseg.reporting.summary import BEST, ENCODER, ENTROPY, LAST, OWN_STATISTICS

ADAPTED = "adapted"
SERVED_ELSEWHERE = ("global", OWN_STATISTICS)
"""Views at sites that took no part of a network that is shared as a whole, or but for its running statistics."""
PAINTED: tuple[Split, ...] = ("test",)
"""Whose cases are drawn."""


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

    def __call__(self, algorithm: Algorithm, site: SiteData, task: EvaluateTask) -> Scored:
        """Score the task's splits; the means over the cases that count go to the server."""
        found = Scored()
        for view in views(algorithm, site, task):
            for split in task.splits if view != OWN_STATISTICS else ():
                rows = self._score(partial(predict, algorithm, view), site, task, view, split)
                found.rows += rows
                found.means |= {f"{split}/{view}/{metric}": mean for metric, mean in _means(rows).items()}
            for made in fitted_views(algorithm, view, self.settings) if not site.seen else ():
                for network, part in fitted(algorithm, made, site, self.settings):
                    found.rows += self._score(partial(_answers, algorithm, network), part, task, made, "test")
        if not task.views:
            self._probe(algorithm, site, task, found)
        return found

    def _keep(self, site: SiteData, view: str, split: Split) -> Callable[[CaseMasks], None] | None:
        """What becomes of the masks of test cases."""
        return partial(self.kept.write, site.name, view) if self.kept is not None and split == "test" else None

    def _probe(self, algorithm: Algorithm, site: SiteData, task: EvaluateTask, found: Scored) -> None:
        """Add what a pre-trained encoder is worth without labels, as rows of the view ``encoder``."""
        common = {"round": task.round, "checkpoint": task.checkpoint, "site": site.name, "seen": site.seen}
        common |= {"view": ENCODER, "region": "mean", "case": "", "unit": "", "grid": "network"}
        for split in task.splits:
            numbers = algorithm.probe(site, split)
            found.rows += [{**common, "split": split, "metric": name, "value": v} for name, v in numbers.items()]
            found.means |= {f"{split}/{ENCODER}/{name}": value for name, value in numbers.items()}

    def _score(self, answer: Predict, site: SiteData, task: EvaluateTask, view: str, split: Split) -> list[Row]:
        during = task.checkpoint == DURING_TRAINING
        quick = during or task.topic == VISITING
        few = tuple(dict.fromkeys((*QUICK, self.settings.choose_by))) if during else QUICK
        grid: Grid = "network" if during else self.settings.grid
        try:
            scores = evaluate(
                answer,
                site,
                split,
                self.regions,
                metrics=few if quick else self.settings.metrics,
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
        settings: whose images a model is fitted to.
    """

    def __init__(self, regions: Regions, cases: Mapping[str, Collection[str]], settings: Evaluation) -> None:
        self.regions = regions
        self.cases = cases
        self.settings = settings
        self.masks: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, algorithm: Algorithm, site: SiteData, task: EvaluateTask) -> Scored:
        """Predict the chosen cases."""
        if not (only := self.cases.get(site.name)):
            return Scored()
        for view in views(algorithm, site, task):
            answering: Iterable[tuple[Predict, SiteData]] = [(partial(predict, algorithm, view), site)]
            if view == OWN_STATISTICS:
                models = fitted(algorithm, view, site, self.settings, only)
                answering = ((partial(_answers, algorithm, network), part) for network, part in models)
            for answer, part in answering:
                for found in predict_cases(answer, part, "test", self.regions, only=only, grid="own"):
                    shown = most_shown(found.truth)
                    masks = self.masks.setdefault((site.name, found.case.case), {})
                    masks[view] = found.prediction[:, shown : shown + 1]
        return Scored()

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


def views(algorithm: Algorithm, site: SiteData, task: EvaluateTask) -> Iterable[str]:
    """The views of the task that exist at a site; one that never trained has no personal model."""
    if task.topic == VISITING:  # another site's model, wherever it is
        return task.views if algorithm.trained_here else ()
    there = algorithm.views if site.seen else algorithm.unseen_views
    has_own = algorithm.trained_here or (task.personalise and algorithm.personalises)
    if site.seen and not (algorithm.examples_at(site) and has_own):
        there = tuple(view for view in there if view != "personal")
    return [view for view in there if not task.views or view in task.views]


def predict(algorithm: Algorithm, view: str, images: Any) -> Any:
    """Probabilities on the device of the worker."""
    return algorithm.predict(images.to(algorithm.device), view)


def _answers(algorithm: Algorithm, network: nn.Module, images: Any) -> Any:
    """Probabilities of a network beside the method's own."""
    return algorithm.answers(network, images.to(algorithm.device))


def fitted_views(algorithm: Algorithm, view: str, settings: Evaluation) -> tuple[str, ...]:
    """The views that a site which took no part makes of another one and its own images, without labels.

    They are the least that it can do: what a method adapts for it must be better. One with running statistics of these
    images instead of the federation's, if the network keeps any, and on request one that is sure of them.
    """
    if view not in SERVED_ELSEWHERE:
        return ()
    statistics = (OWN_STATISTICS,) if with_running_statistics(algorithm.network("global")) else ()
    return (*statistics, ENTROPY) if settings.entropy_passes else statistics


def per_case(view: str, settings: Evaluation) -> bool:
    """Whether a view is fitted to every case by itself."""
    return {OWN_STATISTICS: settings.statistics_per, ENTROPY: settings.entropy_per}.get(view) == "case"


def fitted(
    algorithm: Algorithm, view: str, site: SiteData, settings: Evaluation, only: Collection[str] | None = None
) -> Iterator[tuple[nn.Module, SiteData]]:
    """The shared network, fitted to a site's test images: to all of them, or to those of each case anew.

    Args:
        algorithm: a worker that has received.
        view: one of `fitted_views`.
        site: that took no part.
        settings: of the run.
        only: names of the cases that are looked at, if not all are; others need no network of their own.

    Returns:
        Each network, and the site with the cases that it is for.
    """
    for part in site.singly("test") if per_case(view, settings) else [site]:
        if only is not None and not any(case.case in only for case in part.cases("test")):
            continue
        network = deepcopy(algorithm.network("global")).eval()
        fit_to(algorithm, view, network, Images(part, "test"), settings)
        yield network, part


def fit_to(algorithm: Algorithm, view: str, network: nn.Module, images: Iterable[Tensor], settings: Evaluation) -> None:
    """Let a worker's network, in place, take statistics of images and, for the view entropy, become sure of them.

    Args:
        algorithm: the worker.
        view: one of `fitted_views`.
        network: in evaluation mode, in which it stays.
        images: (B, C, h, w) in [0, 1], without labels, read again in every pass.
        settings: of the run.
    """
    take_statistics(algorithm, network, images)
    if view == ENTROPY:
        prepared = Prepared(algorithm, images)
        minimise_entropy(network, prepared, algorithm.recipe.activation, settings.entropy_passes, settings.entropy_lr)


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


def score_checkpoints(federation: Federation, server: State, splits: Sequence[Split]) -> list[Row]:
    """Score the last model and the best ones on validation and test cases of every site, or on some splits only.

    The best global model is chosen by its mean validation score (`evaluation.choose_by`) over seen sites, a site's best
    personal model by the site's own; without validation cases the last one stands in. What unseen sites adapt is,
    accordingly, the last models of all sites or the best ones: never is anything chosen by an unseen site's scores. A
    network that is shared but for its statistics has no validation score at any site: there the last one is the best.

    Returns:
        Rows of the scores' table.
    """
    last = score_sites(federation, server, federation.checkpoint.round, splits=splits, checkpoint=LAST)
    rows = list(last)
    for name in best_models(federation):
        view, _, site = name.partition("/")
        if last_serves(federation, name):
            shown = (view, OWN_STATISTICS, ENTROPY) if view in SERVED_ELSEWHERE else (view,)
            rows += [{**row, "checkpoint": BEST} for row in last if row["view"] in shown and site in ("", row["site"])]
        else:
            rows += show_best(federation, name, splits)
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
    sites = [site for site in members(federation) if site not in trained]
    return [event(federation.checkpoint.round, site, "never trained", detail) for site in sites]


def not_served(federation: Federation, settings: Evaluation) -> list[str]:
    """What was asked for at sites that took no part, of a method that has no model for them.

    It is said and not refused: comparisons ask the same of all methods.
    """
    algorithm: Any = federation.algorithm
    if not (why := algorithm.none_elsewhere):
        return []
    asked = {"data.unseen": ", ".join(unseen_sites(federation))}
    asked |= {f"evaluation.{name}": getattr(settings, name) for name in ("statistics_per", "entropy_passes")}
    usual = Evaluation()
    set_so = {key: v for key, v in asked.items() if v and v != getattr(usual, key.rpartition(".")[2], "")}
    return [f"{key}={v} on a method without a model for sites that took no part: {why}" for key, v in set_so.items()]


def paint_overlays(
    federation: Federation, way: Way, experiment: Experiment, scores: pd.DataFrame
) -> dict[str, list[Picture]]:
    """Pictures of the best models' worst, median and best test case of every site, worst case first.

    Args:
        federation: at its end.
        way: its own to the sites.
        experiment: the run's.
        scores: of its metrics.csv.
    """
    roles = {name: pick_cases(scores, name) for name in all_sites(federation)}
    painter = Painter(experiment.data.regions, roles, experiment.evaluation)
    show_all_best(federation.over(way.scored_by(painter)))

    def drawn(site: str, case: str, role: str) -> Picture:
        return replace(painter.picture(experiment.data.site(site), case, scores, role), judge=judge_of(scores, site))

    return {name: [drawn(name, case, role) for case, role in chosen.items()] for name, chosen in roles.items()}


def show_all_best(federation: Federation) -> None:
    """Let the best models predict the cases to be painted.

    Args:
        federation: one that scores by a `Painter`, which keeps what they predict.
    """
    for name in best_models(federation):
        show_best(federation, name, PAINTED)


def best_models(federation: Federation) -> list[str]:
    """Names of the models of which there is a best one: ``global``, ``personal/<site>``, and at unseen sites others."""
    algorithm: Any = federation.algorithm
    names = ["global"] if "global" in algorithm.views else []
    if "personal" in algorithm.views:
        names += [f"personal/{site}" for site in members(federation)]
    elsewhere = [*([ADAPTED] if algorithm.adapts else []), *(v for v in algorithm.unseen_views if v == OWN_STATISTICS)]
    return [*names, *elsewhere] if unseen_sites(federation) else names


def last_serves(federation: Federation, name: str) -> bool:
    """Whether the best model of a name is the last one; an adapted one mixes all others."""
    checkpoint = federation.checkpoint
    mixed = [other for other in best_models(federation) if other != ADAPTED] if name == ADAPTED else [name]
    return all(checkpoint.chosen(other).round == checkpoint.round for other in mixed)


def show_best(federation: Federation, name: str, splits: Sequence[Split]) -> list[Row]:
    """Evaluate one best model where it serves; rows of scores, as of all that follow."""
    if name == ADAPTED:
        return show_best_adapted(federation) if "test" in splits else []
    view, _, site = name.partition("/")
    checkpoint, best = federation.checkpoint, federation.checkpoint.chosen(name)
    kept = {site: checkpoint.read(best.kept)} if site and best.kept else {}
    federation.transport.restore(kept, {site: best.round} if site else {})
    sites, server = [site] if site else None, checkpoint.read(best.server)
    return score_sites(federation, server, best.round, sites=sites, splits=splits, views=(view,), checkpoint=BEST)


def show_best_adapted(federation: Federation) -> list[Row]:
    """Evaluate, at unseen sites, what they adapt from the best global model and every site's best personal one."""
    checkpoint, shared = federation.checkpoint, federation.checkpoint.chosen("global")
    own = {site: checkpoint.chosen(f"personal/{site}") for site in members(federation)}
    kept = {site: checkpoint.read(best.kept) for site, best in own.items() if best.kept}
    federation.transport.restore(kept, {site: best.round for site, best in own.items()})
    return score_unseen(federation, checkpoint.read(shared.server), shared.round, views=(ADAPTED,), checkpoint=BEST)


def score_sites(
    federation: Federation,
    server: State,
    round: int,
    *,
    sites: Sequence[str] | None = None,
    splits: Sequence[Split],
    **options: Any,
) -> list[Row]:
    """Ask for scores on these splits of seen sites, and on test cases of unseen ones where test is among the splits."""
    seen = members(federation) if sites is None else sites
    rows: list[Row] = []
    if sites is None and "test" in splits:
        # first: what is published counts as traffic of the run, and must not be taken for the end of a scored round
        rows += score_unseen(federation, server, round, **options)
    return rows + _rows(federation.evaluate(server, round, seen, tuple(splits), **options))


def score_unseen(federation: Federation, server: State, round: int, **options: Any) -> list[Row]:
    """Ask unseen sites for scores on test cases; where the method adapts, the seen sites publish their models first."""
    outside = unseen_sites(federation)
    published = None
    if outside and federation.algorithm.adapts and ADAPTED in options.get("views", (ADAPTED,)):
        published = federation.publish(round)
        if options["checkpoint"] == LAST:
            federation.record_publication(server, round, published, outside)
    return _rows(federation.evaluate(server, round, outside, ("test",), published, **options))


def _rows(found: Mapping[str, Update]) -> list[Row]:
    return [row for update in found.values() for row in update.rows]


def unseen_sites(federation: Federation) -> list[str]:
    """Sites that only test."""
    return [name for name, site in federation.transport.sites.items() if not site.seen]


def members(federation: Federation) -> Sequence[str]:
    """Seen sites that are there at the end: those that left are asked nothing more."""
    return federation.members(federation.checkpoint.round)


def all_sites(federation: Federation) -> list[str]:
    """Seen sites that are there at the end, and unseen ones."""
    return [*members(federation), *unseen_sites(federation)]
