"""A site's terms: read from its file, and held against what a run asks for, before the site trains a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from math import floor
from pathlib import Path
from typing import Any

from fedseg.algorithms import Algorithm
from fedseg.configs.compose import ConfigError, read_mapping
from fedseg.configs.knobs import unknown, validated
from fedseg.federation.schedule import Schedule
from fedseg.federation.terms import Terms
from fedseg.launch.experiment import Experiment
from fedseg.launch.scores.scoring import SERVED_ELSEWHERE
from fedseg.launch.sites.spending import AT_SITE, Spent
from fedseg.privacy.refusals import shown_singly
from fedseg.reporting.folder import file_name

NOTHING = Spent()


def read_terms(path: Path) -> Terms:
    """A site's terms.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown key or a value that cannot be used.
    """
    values, errors = validated(Terms, read_mapping(path, "least_sites: 3"), "")
    if errors:
        raise ConfigError(f"terms: {path}: " + "; ".join(errors))
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Terms(**given)


def terms_of(folder: str | None, site: str) -> Terms:
    """The terms of a site where all data lie in one place: those of FOLDER/SITE.yaml, else nothing is forbidden.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = Path(folder or "") / f"{file_name(site)}.yaml"
    return read_terms(path) if folder and path.exists() else Terms(model_scored_elsewhere=True, scores_others=True)


def agreed_terms(experiment: Experiment) -> dict[str, Terms]:
    """Every site's terms in a run whose data lie in one place, once the run's settings were held against them.

    Raises:
        ConfigError: there is no such folder, a file in it is of no site or cannot be used, or terms forbid the run.
    """
    folder, names = experiment.deployment.terms, (*experiment.data.sites, *experiment.data.unseen_sites)
    check_folder(folder, names)
    found = {site: terms_of(folder, site) for site in names}
    for site, terms in found.items():
        check_terms(experiment, site, terms)
    return found


def check_folder(folder: str | None, sites: Collection[str]) -> None:
    """Refuse a folder of terms that is none, or that holds a file of no site.

    Raises:
        ConfigError: naming what is wrong.
    """
    if folder is None:
        return
    known = {f"{file_name(site)}.yaml" for site in sites}
    found = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
    if not found:
        raise ConfigError(f"deployment.terms={folder} should be a folder with {min(known)} and the like")
    if odd := [name for name in found if name not in known]:
        raise ConfigError(f"deployment.terms={folder}: {unknown(odd[0], known, 'file')}")


def check_terms(experiment: Experiment, site: str, terms: Terms, elsewhere: Spent = NOTHING) -> None:
    """Refuse a run whose settings a site's terms forbid.

    Args:
        experiment: the run.
        site: its name.
        terms: its own.
        elsewhere: what the site has spent in other runs.

    Raises:
        ConfigError: naming the site, the terms, and what to take instead.
    """
    algorithm, seen = experiment.declared, site not in experiment.config.data.unseen
    against = [*_protection(experiment, terms, algorithm, elsewhere), *_use(experiment, terms, algorithm, seen)]
    if against:
        told = "; ".join(f"{term}: {cure}" for term, cure in against)
        raise ConfigError(f"site {site!r} has terms against this run: {told}; or leave it out (deployment.sites)")


def listed(terms: Mapping[str, Terms]) -> dict[str, dict[str, Any]]:
    """Every site's terms as plain values."""
    plain = {site: asdict(own) for site, own in terms.items()}
    return {site: {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} for site, own in plain.items()}


def tells(algorithm: Algorithm) -> bool:
    """Whether a method tells of a site's training, be it by a mean or singly."""
    return bool(algorithm.shares or algorithm.per_site or algorithm.introduces or algorithm.adapts)


def sites_behind_a_mean(schedule: Schedule) -> int:
    """The fewest sites whose updates the settings let into a mean."""
    if schedule.order != "together" or schedule.combine == "krum":
        return 1
    left_out = {"trimmed_mean": 2 * schedule.hostile, "multi_krum": schedule.hostile}
    return schedule.min_sites - left_out.get(schedule.combine, 0)


def _protection(
    experiment: Experiment, terms: Terms, algorithm: Algorithm, elsewhere: Spent
) -> Iterator[tuple[str, str]]:
    """Terms on what leaves the site that are not met, and their cures."""
    schedule, privacy = experiment.schedule, experiment.privacy
    if not tells(algorithm):
        return
    if algorithm.among_peers and terms.least_sites > 1:
        cure = f"take algorithm=fedavg federation.order=together federation.min_sites={terms.least_sites}"
        yield f"least_sites {terms.least_sites}, and peers see each other's models singly", cure
    elif (behind := sites_behind_a_mean(schedule)) < terms.least_sites:
        plain = "" if behind == schedule.min_sites else "federation.order=together federation.combine=mean "
        least = max(schedule.min_sites, terms.least_sites)
        yield f"least_sites {terms.least_sites}, and these let in {behind}", f"take {plain}federation.min_sites={least}"
    if not algorithm.shares:  # so that there is no sum to mask, and no step to make private
        if terms.masked or terms.max_epsilon is not None:
            harmonised = algorithm.introduces and experiment.config.training.harmonise != "none"
            cure = "training.harmonise=none" if harmonised else "algorithm=local"
            yield f"masked or max_epsilon, and the method {'; '.join(shown_singly(algorithm))}", f"take {cure}"
        return
    if terms.masked and privacy.aggregation != "masked":
        yield "masked", "take privacy.aggregation=masked"
    if terms.max_epsilon is not None:
        left = terms.max_epsilon - elsewhere.epsilon
        if privacy.mechanism not in AT_SITE or privacy.max_epsilon is None or privacy.max_epsilon > left:
            yield _budget(terms.max_epsilon, elsewhere)
        if privacy.delta > terms.max_delta:
            yield f"max_delta {terms.max_delta:g}", f"take privacy.delta={terms.max_delta:g}"


def _budget(most: float, elsewhere: Spent) -> tuple[str, str]:
    """A term on epsilon that is not met, and the cure; epsilons of runs add up, which is never less than they cost."""
    term = f"max_epsilon {most:g}" + (f", of which {elsewhere.told}" if elsewhere.epsilon else "")
    left = (
        floor((most - elsewhere.epsilon) * 1000) / 1000 if elsewhere.epsilon else most
    )  # the cure must not be rounded up
    if left <= 0:
        return term, "nothing is left for any run; the site's people may raise max_epsilon"
    return term, f"take privacy.mechanism=patient (or sparse) and privacy.max_epsilon={left:.12g}, or less"


def _use(experiment: Experiment, terms: Terms, algorithm: Algorithm, seen: bool) -> Iterator[tuple[str, str]]:
    """Terms on methods and on what becomes of models and scores that are not met, and their cures."""
    config = experiment.config
    if terms.methods and not {config.algorithm.name, config.algorithm.preset} & set(terms.methods):
        yield f"methods {', '.join(terms.methods)}", f"take algorithm={terms.methods[0]}"
    away = ["global" if view in SERVED_ELSEWHERE else view for view in algorithm.unseen_views]
    made = algorithm.views if seen else away
    if terms.views and (odd := sorted(set(made) - set(terms.views))):
        yield f"views {', '.join(terms.views)}", f"take a method that makes no {odd[0]} models"
    if seen and algorithm.adapts and config.data.unseen and not terms.publishes_model:
        yield "publishes_model false", "take data.unseen=[]"
    if experiment.evaluation.cross_sites:
        given = ("model_scored_elsewhere",) if seen else ()
        for term in (*given, "scores_others"):
            if not getattr(terms, term):
                yield f"{term} false", "take evaluation.cross_sites=false"
        if seen and (terms.masked or terms.max_epsilon is not None):
            yield "masked or max_epsilon, and its personal model would travel bare", "take evaluation.cross_sites=false"
    schedule = experiment.schedule
    if schedule.selection == "heterogeneity" and schedule.select_labels and not terms.label_counts:
        yield "label_counts false", "take federation.select_labels=0"
    if experiment.deployment.case_scores != "means" and not terms.case_scores:
        yield "case_scores false", "take deployment.case_scores=means"
