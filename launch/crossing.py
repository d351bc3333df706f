"""Every site's personal model at every other site: `evaluation.cross_sites=true`.

It needs personal models and images in one place. Sites on machines of their own keep both, and none of them has agreed
to hand its model to the others: such a run is refused before it starts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import ConfigError
from fedseg.evaluation import QUICK, evaluate
from fedseg.federation.client import seed_everything
from fedseg.federation.contract import Row, Task
from fedseg.federation.engine import Federation
from fedseg.launch.experiment import Experiment
from fedseg.launch.scoring import BEST, all_sites, predict
from fedseg.reporting.crossing import COLUMNS, SHARED


def check_crossing(experiment: Experiment) -> None:
    """Refuse what cannot be had.

    Raises:
        ConfigError: sites keep their models and images to themselves, or the method has no personal models.
    """
    if not experiment.evaluation.cross_sites:
        return
    if experiment.config.engine != "in-process":
        raise ConfigError(
            f"evaluation.cross_sites=true shows every site's personal model the images of all others; with "
            f"engine={experiment.config.engine} both stay at their sites, and no site has consented to hand its model "
            "over: leave evaluation.cross_sites=false, or train with engine=in-process where all data are in one place"
        )
    if "personal" not in experiment.algorithm(in_channels=3).views:
        raise ConfigError(
            f"evaluation.cross_sites=true compares sites' personal models, and "
            f"algorithm={experiment.config.algorithm.preset} has none: take a method with personal models, or leave "
            "evaluation.cross_sites=false (the global model's scores at every site are in the tables anyway)"
        )


def cross_scores(federation: Federation, experiment: Experiment, scores: pd.DataFrame) -> list[Row]:
    """Rows of cross_sites.csv: the best models at the test cases of every site, also of those that took no part.

    Args:
        federation: at its end; its data are here.
        experiment: its settings.
        scores: the run's metrics.csv, which tells how models do at home, and the global one everywhere.
    """
    rows = _known(scores)
    worker: Any = experiment.algorithm()
    for source in federation.sites:
        if not _receives(worker, federation, experiment, source):
            continue
        for target in all_sites(federation):
            if target != source:
                rows += _scored(worker, experiment, source, target)
    return rows


def _known(scores: pd.DataFrame) -> list[Row]:
    """What the run's table tells already."""
    final = scores[(scores["checkpoint"] == BEST) & (scores["split"] == "test") & scores["metric"].isin(QUICK)]
    shared = final[final["view"] == SHARED].assign(model=SHARED)
    own = final[final["view"] == "personal"]
    table = pd.concat([shared, own.assign(model=own["site"])])[list(COLUMNS)]
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _receives(worker: Any, federation: Federation, experiment: Experiment, source: str) -> bool:
    """Make the worker the best personal model of a site; False where the site never trained."""
    checkpoint = federation.checkpoint
    best = checkpoint.chosen(f"personal/{source}")
    kept = checkpoint.read(best.kept) if best.kept else None
    if kept is None:
        return False
    task = Task("evaluate", best.round, federation.seed, splits=("test",), checkpoint=BEST)
    message = federation.algorithm.broadcast(checkpoint.read(best.server), source, task)
    seed_everything(derive_seed(federation.seed, "evaluate", best.round, source))
    worker.receive(message, kept, experiment.data.site(source))
    worker.to(experiment.compute.device)
    return bool(worker.trained_here)


def _scored(worker: Any, experiment: Experiment, source: str, target: str) -> list[Row]:
    site, settings = experiment.data.site(target), experiment.evaluation
    found = evaluate(
        partial(predict, worker, "personal"),
        site,
        "test",
        experiment.data.regions,
        metrics=QUICK,
        tolerance=settings.tolerance,
        grid=settings.grid,
    )
    common = {"model": source, "site": target, "seen": site.seen}
    names = ("case", "region", "metric", "value")
    return [{**common, **{name: getattr(score, name) for name in names}} for score in found]
