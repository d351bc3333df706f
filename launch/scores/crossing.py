"""Every site's personal model at every other site: `evaluation.cross_sites=true`.

A model travels to the sites where it is scored, through the server. Across machines every site says in its terms
whether its model may, and whether others' may be scored on its images; one that does not agree refuses the run before
it begins.
"""

from __future__ import annotations

import pandas as pd

from fedseg.configs.compose import ConfigError
from fedseg.evaluation import QUICK
from fedseg.federation.admission import unbounded
from fedseg.federation.contract import VISITING, EvaluateTask, QueryTask, Row, event
from fedseg.federation.engine import ONCE, Federation
from fedseg.federation.state import State, Update
from fedseg.federation.transforms import VISITOR
from fedseg.launch.experiment import Experiment
from fedseg.launch.scores.scoring import all_sites, members
from fedseg.reporting.crossing import COLUMNS, SHARED
from fedseg.reporting.summary import BEST, WHOLE


def check_crossing(experiment: Experiment) -> None:
    """Refuse what cannot be had.

    Raises:
        ConfigError: the method has no personal models, or they see images by the site that these are from.
    """
    if not experiment.evaluation.cross_sites:
        return
    if experiment.declared.prepares_by_site:
        raise ConfigError(
            "evaluation.cross_sites=true shows a site's model images of other sites, and here images are prepared by "
            "the site that they are from, which its message does not tell of others; take evaluation.cross_sites=false"
        )
    if "personal" not in experiment.declared.views:
        raise ConfigError(
            f"evaluation.cross_sites=true compares sites' personal models, and "
            f"algorithm={experiment.config.algorithm.preset} has none: take a method with personal models, or leave "
            "evaluation.cross_sites=false (the global model's scores at every site are in the tables anyway)"
        )


def cross_scores(federation: Federation, scores: pd.DataFrame) -> tuple[list[Row], list[Row]]:
    """The best models at the test cases of every site, also of those that took no part.

    Args:
        federation: at its end.
        scores: the run's metrics.csv, which tells how models do at home, and the global one everywhere.

    Returns:
        Rows of cross_sites.csv, and events of sites that gave no model or no scores.
    """
    rows, events, round = _known(scores), [], federation.checkpoint.round + 1
    for source in members(federation):
        answers = _visits(federation, source)
        refused = [update for update in answers if update.refusal]
        events += [event(round, update.site, "refused", f"cross_sites: {update.refusal}") for update in refused]
        found = _means_once(pd.DataFrame([r for u in answers for r in u.rows], columns=list(scores.columns)))
        rows += _rows(found[found["metric"].isin(QUICK)].assign(model=source))
    return rows, events


def _known(scores: pd.DataFrame) -> list[Row]:
    """What the run's table tells already."""
    final = scores[(scores["checkpoint"] == BEST) & (scores["split"] == "test") & scores["metric"].isin(QUICK)]
    final = _means_once(final)
    shared = final[final["view"] == SHARED].assign(model=SHARED)
    own = final[final["view"] == "personal"]
    return _rows(pd.concat([shared, own.assign(model=own["site"])]))


def _means_once(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores without the means by region that a site tells beside its mean."""
    return scores[(scores["case"] != "") | (scores["region"] == WHOLE)]


def _rows(table: pd.DataFrame) -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in table[list(COLUMNS)].to_dict("records")]


def _visits(federation: Federation, source: str) -> list[Update]:
    """Let the best personal model of a site be scored at all others; the answers, the source's own first."""
    checkpoint = federation.checkpoint
    best = checkpoint.chosen(f"personal/{source}")
    federation.transport.restore({source: checkpoint.read(best.kept)} if best.kept else {}, {source: best.round})
    give = QueryTask("publish", best.round, federation.seed, checkpoint=BEST, topic=VISITING)
    (given,) = federation.ask({source: give}, {source: State()})
    given.refusal = given.refusal or unbounded(given, ONCE)
    if given.refusal or not given.tensors:  # it never trained
        return [given]
    show = EvaluateTask(
        best.round, federation.seed, splits=("test",), checkpoint=BEST, views=("personal",), topic=VISITING
    )
    message = federation.algorithm.broadcast(checkpoint.read(best.server), source, show)
    groups = {**message.tensors, **{f"{VISITOR}{group}": ts for group, ts in given.tensors.items()}}
    others = [site for site in all_sites(federation) if site != source]
    messages = dict.fromkeys(others, State(groups, message.scalars))
    return [given, *federation.ask(dict.fromkeys(others, show), messages)]
