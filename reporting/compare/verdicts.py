"""One plain sentence per site: should it use its personal model or the global one?

The pair is chosen on validation cases, for each site: its best personal model and its best global one (local and pooled
training are baselines, not candidates). Test cases then answer one question per site, and these questions
are one family for Holm's correction. What is said about local training comes from the family of all tests
(`Analysis.tests`), which holds every model at every site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from evaluation.statistics import holm
from reporting.compare.analysis import GLOBAL, PERSONAL, Analysis, Model
from reporting.compare.options import Options

Answer = Literal["personal", "global", "mixed", "no difference shown", "too few cases", "not compared"]


@dataclass(frozen=True)
class Verdict:
    """What the runs say about one site.

    Attributes:
        site: its name.
        answer: which model it should use, or why that cannot be said.
        personal: the personal model that validation chose; None if there is none.
        shared: the global one.
        test: personal against global (see `Analysis.compare`), with p_holm; empty if not compared.
        alone: the same for the recommended model, or validation's choice, against local training; may be empty.
        text: the sentence.
        aside: about local training; may be empty.
    """

    site: str
    answer: Answer
    personal: Model | None
    shared: Model | None
    test: Mapping[str, Any] = field(default_factory=dict)
    alone: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    aside: str = ""


def verdicts(analysis: Analysis) -> list[Verdict]:
    """The verdict of every seen site."""
    drafts = []
    for site in analysis.sites:
        personal, shared = (best_on_validation(analysis, site, view) for view in (PERSONAL, GLOBAL))
        row = None if personal is None else analysis.compare(personal, shared, site)
        drafts.append(Verdict(site, "not compared", personal, shared, row or {}))
    corrected = iter(holm([draft.test["p"] for draft in drafts if draft.test]))
    return [_finished(draft, analysis, float(next(corrected)) if draft.test else 1.0) for draft in drafts]


def best_on_validation(analysis: Analysis, site: str, view: str) -> Model | None:
    """The candidate with the best validation mean at a site (over all sites, where the site has none)."""
    candidates = [
        m for m in analysis.models if m.view == view and not analysis.is_baseline(m) and site in analysis.test[m]
    ]
    sign = 1 if analysis.options.higher_is_better else -1

    def worth(model: Model) -> tuple[float, float]:
        means = analysis.validation.get(model, {})
        known = [value for value in means.values() if np.isfinite(value)]
        everywhere = sign * float(np.mean(known)) if known else -np.inf
        own = means.get(site, float("nan"))
        return (sign * own if np.isfinite(own) else everywhere, everywhere)

    return max(candidates, key=worth, default=None)


def answer_of(test: Mapping[str, Any], alpha: float) -> Answer:
    """Read a corrected test.

    The direction is that of the ranks, which the test is about; where the mean points the other way, a few cases with
    large differences speak against many with small ones, and neither model is recommended.
    """
    if not test:
        return "not compared"
    if test["smallest_p"] > alpha:
        return "too few cases"
    if test["p_holm"] > alpha:
        return "no difference shown"
    if test["effect"] * test["gain"] <= 0:
        return "mixed"
    return "personal" if test["effect"] > 0 else "global"


def _finished(draft: Verdict, analysis: Analysis, p_holm: float) -> Verdict:
    options = analysis.options
    test = {**draft.test, "p_holm": p_holm} if draft.test else {}
    answer = answer_of(test, options.alpha)
    told = replace(draft, test=test, answer=answer)
    alone = _against_local(analysis, told)
    return replace(told, alone=alone, text=_sentence(told, options), aside=_aside(alone, options))


def _against_local(analysis: Analysis, verdict: Verdict) -> Mapping[str, Any]:
    """The row of the family of all tests that holds the site's model against local training."""
    tests = analysis.tests
    used = used_model(analysis, verdict)
    if used is None or tests.empty:
        return {}
    rows = tests[
        (tests["question"] == "against local training")
        & (tests["model"] == used.label)
        & (tests["site"] == verdict.site)
    ]
    return {} if rows.empty else {str(key): value for key, value in rows.iloc[0].to_dict().items()}


def used_model(analysis: Analysis, verdict: Verdict) -> Model | None:
    """The recommended model; where none is, the one that validation prefers."""
    if verdict.answer in ("personal", "global"):
        return verdict.personal if verdict.answer == "personal" else verdict.shared
    known = [model for model in (verdict.personal, verdict.shared) if model is not None]
    sign = 1 if analysis.options.higher_is_better else -1

    def worth(model: Model) -> float:
        value = analysis.validation.get(model, {}).get(verdict.site, float("nan"))
        return sign * value if np.isfinite(value) else -np.inf

    return max(known, key=worth, default=None)


def amount(gain: float, options: Options) -> str:
    """A difference with its sign: "+4.1 Dice", in points of 100; a distance says which way is better."""
    shown = f"{gain * options.scale:+.1f}".replace("-", "−")
    return f"{shown} {options.title}" if options.higher_is_better else f"{shown} {options.title} (+ is better)"


def probability(p: float) -> str:
    """P = 0.012, p = 0.0004, p < 0.0001."""
    if p < 1e-4:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.4f}"


def _sentence(verdict: Verdict, options: Options) -> str:
    site, test = verdict.site, verdict.test
    if not test:
        missing = " and no ".join(
            word
            for word, model in (("personal model", verdict.personal), ("global model", verdict.shared))
            if model is None
        )
        why = f"these runs have no {missing} for it" if missing else "its two models share no seed and test case"
        return f"{site}: personal and global cannot be compared, {why}."
    personal, shared = _named(verdict.personal), _named(verdict.shared)
    low, high = (f"{test[end] * options.scale:+.1f}".replace("-", "−") for end in ("low", "high"))
    size = f"{amount(test['gain'], options)} ({options.confidence:.0%} interval {low} to {high})"
    p, cases = probability(test["p_holm"]), test["pairs"]
    better, worse = f"{test['better']} of {cases} cases better", f"{test['worse']} of {cases} cases worse"
    unsure = (
        " The mean is less sure than the ranks: look at the cases that go the other way."
        if test["low"] <= 0 <= test["high"]
        else ""
    )
    return {
        "personal": f"{site} should use its personal model ({personal}): {size} against the global one "
        f"({shared}), {better}, {p}.{unsure}",
        "global": f"{site} should use the global model ({shared}): its personal one ({personal}) makes {size}, "
        f"{worse}, {p}.{unsure}",
        "mixed": f"{site}: cases and mean disagree about the personal model ({personal}) against the global one "
        f"({shared}): {size}, yet {better} and {worse}, {p}; look at the cases.",
        "no difference shown": f"{site}: no difference shown between its personal model ({personal}) and the global "
        f"one ({shared}): {size}, {better}, {p}.",
        "too few cases": f"{site}: too few test cases to tell its personal model ({personal}) from the global "
        f"one ({shared}): {size}, {better}; with {cases} {'case' if cases == 1 else 'cases'} p cannot be below "
        f"{test['smallest_p']:.2g}.",
    }[verdict.answer]


def _aside(alone: Mapping[str, Any], options: Options) -> str:
    if not alone:
        return ""
    cases = f"{alone['better']} of {alone['pairs']} cases better"
    told = f"{amount(alone['gain'], options)}, {cases}, {probability(alone['p_holm'])}"
    name = alone["model"]
    if alone["smallest_p"] > options.alpha or alone["p_holm"] > options.alpha:
        return f"Against training alone, {name} shows no sure difference: {told}."
    if alone["effect"] > 0:
        return f"Taking part pays against training alone: {name} {told}."
    return f"Negative transfer: {name} does worse than training alone: {told}."


def _named(model: Model | None) -> str:
    return "none" if model is None else model.method
