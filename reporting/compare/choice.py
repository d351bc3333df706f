"""Which personal and which global model a comparison is about: one of each for the whole federation.

Both are chosen on validation patients of all sites, or named. Test patients choose nothing, and no site chooses for
itself: a site's few validation patients would often fall on another method, and a run more could turn its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedseg.evaluation.statistics import by_drawn_patients
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import GLOBAL, LOCAL, OVERALL, PERSONAL, Analysis, Model

RARE = 0.005  # shares below it are not shown


@dataclass(frozen=True)
class Choice:
    """The three candidates of every site.

    Attributes:
        personal: the personal model; None if there is none.
        shared: the global one.
        alone: local training under the most similar settings.
        shares: view -> model -> how often it would be chosen if the validation patients were drawn again.
        named: views whose model the user named.
    """

    personal: Model | None
    shared: Model | None
    alone: Model | None
    shares: Mapping[str, Mapping[Model, float]]
    named: frozenset[str]

    def rule(self, analysis: Analysis) -> list[str]:
        """How the models were chosen, and how surely."""
        told = []
        for view, model in ((PERSONAL, self.personal), (GLOBAL, self.shared)):
            if model is None:
                continue
            if view in self.named:
                told.append(f"The {view} model is {model.method}: named, not chosen.")
                continue
            shares = self.shares.get(view, {})
            if len(shares) < 2:
                told.append(f"The {view} model is {model.method}: there is no other.")
                continue
            others = [f"{m.method} {share:.0%}" for m, share in shares.items() if m != model and share >= RARE]
            told.append(
                f"The {view} model is {model.method}: of {len(shares)}, it has the best validation "
                f"{analysis.options.title}, mean over sites. With validation patients drawn again it is chosen in "
                f"{shares.get(model, 0.0):.0%} of the draws" + (f" ({', '.join(others)})." if others else ".")
            )
        return told


def choose(analysis: Analysis) -> Choice:
    """The candidates.

    Raises:
        ReportingError: a model that was named is not there, or there are several of that name.
    """
    names = {PERSONAL: analysis.options.personal, GLOBAL: analysis.options.global_}
    found = {
        view: _named(analysis, view, name) if name else by_validation(analysis, view) for view, name in names.items()
    }
    pairs = ((a, b) for a in found[PERSONAL] for b in found[GLOBAL] if analysis.compare(a, b, OVERALL) is not None)
    personal, shared = next(pairs, (next(iter(found[PERSONAL]), None), next(iter(found[GLOBAL]), None)))
    trained = personal or shared
    return Choice(
        personal,
        shared,
        None if trained is None else analysis.peer(trained, LOCAL, PERSONAL),
        {view: shares(analysis, view) for view, name in names.items() if not name},
        frozenset(view for view, name in names.items() if name),
    )


def _eligible(analysis: Analysis, view: str) -> list[Model]:
    return [model for model in analysis.models if model.view == view and not analysis.is_baseline(model)]


def candidates(analysis: Analysis, view: str) -> list[Model]:
    """Models that may be chosen: local and pooled training are baselines; complete ones go before all others."""
    own = _eligible(analysis, view)
    return [model for model in own if model in analysis.complete] or own


def by_validation(analysis: Analysis, view: str) -> list[Model]:
    """The candidates, the best validation mean over all sites first, then the models that are not complete."""
    return sorted(
        _eligible(analysis, view), key=lambda model: (model in analysis.complete, analysis.worth(model)), reverse=True
    )


def shares(analysis: Analysis, view: str) -> dict[Model, float]:
    """How often each candidate would be chosen if every site's validation patients were drawn again."""
    tables = {model: analysis.validation_scores.get(model, {}) for model in candidates(analysis, view)}
    tables = {model: sites for model, sites in tables.items() if sites}
    if not tables:
        return {}
    means: dict[Model, list[np.ndarray]] = {model: [] for model in tables}
    for number, site in enumerate(analysis.sites):
        own = {model: sites[site] for model, sites in tables.items() if site in sites}
        patients = sorted({patient for table in own.values() for patient in table.columns})
        if not patients:
            continue
        for model, table in own.items():
            scores = table.reindex(columns=patients).to_numpy()
            means[model].append(by_drawn_patients(scores, analysis.options.draws, seed=number))
    drawn = np.stack([np.nanmean(parts, axis=0) for parts in means.values() if parts], axis=1)
    chosen = np.bincount((analysis.options.sign * drawn).argmax(axis=1), minlength=drawn.shape[1]) / len(drawn)
    order = [model for model, parts in means.items() if parts]
    return dict(sorted(zip(order, map(float, chosen), strict=True), key=lambda item: -item[1]))


def _named(analysis: Analysis, view: str, name: str) -> Sequence[Model]:
    there = {
        model: first
        for model, first in analysis.twins.items()
        if model.view == view and not analysis.is_baseline(model)
    }
    exact = [first for model, first in there.items() if model.method == name]
    alike = exact or [first for model, first in there.items() if analysis.name(model) == name]
    if len(alike) == 1:
        return alike
    what = f"{len(alike)} {view} models are of that name" if alike else f"no {view} model is of that name"
    known = ", ".join(sorted(f"{view}='{model.method}'" for model in there))
    raise ReportingError(f"{view}={name}: {what}; choose among: {known or 'none'}")
