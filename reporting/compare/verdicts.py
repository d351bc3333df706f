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

from evaluation.statistics import attainable, holm
from reporting.compare.analysis import AGAINST_LOCAL, GLOBAL, PERSONAL, Analysis, Model
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
        test: personal against global (see `Analysis.compare`), with p_holm, the smallest p_holm that its cases could
            give, and how many sites are the family; empty if not compared.
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
        personal, shared = chosen_pair(analysis, site)
        row = None if personal is None else analysis.compare(personal, shared, site)
        drafts.append(Verdict(site, "not compared", personal, shared, row or {}))
    tested = [draft for draft in drafts if draft.test]
    family = [draft.test["p"] for draft in tested]
    corrected = dict(zip((draft.site for draft in tested), holm(family), strict=True))
    done = []
    for draft in drafts:
        test = dict(draft.test)
        if test:
            place = tested.index(draft)
            p_holm = float(corrected[draft.site])
            least = p_holm if p_holm <= analysis.options.alpha else attainable(family, place, test["smallest_p"])
            test |= {"p_holm": p_holm, "smallest_p_holm": least, "family": len(tested)}
        done.append(_finished(replace(draft, test=test), analysis))
    return done


def chosen_pair(analysis: Analysis, site: str) -> tuple[Model | None, Model | None]:
    """The personal and the global model with the best validation means at a site, of those that share a test case."""
    personal, shared = (by_validation(analysis, site, view) for view in (PERSONAL, GLOBAL))
    pairs = ((a, b) for a in personal for b in shared if analysis.gain(a, b, site) is not None)
    return next(pairs, (next(iter(personal), None), next(iter(shared), None)))


def by_validation(analysis: Analysis, site: str, view: str) -> list[Model]:
    """Candidates at a site, the best validation mean there first (over all sites, where the site has none).

    Complete models come before those that lack seeds or sites: their validation means would say something else.
    """
    candidates = [
        m for m in analysis.models if m.view == view and not analysis.is_baseline(m) and site in analysis.test[m]
    ]

    def order(model: Model) -> tuple[bool, float, float]:
        own, everywhere = analysis.worth(model, site), analysis.worth(model)
        return model in analysis.complete, own if np.isfinite(own) else everywhere, everywhere

    return sorted(candidates, key=order, reverse=True)


def answer_of(test: Mapping[str, Any], alpha: float) -> Answer:
    """Read a corrected test.

    The test is about ranks of cases, given these trained models; the interval of the mean also covers the choice of
    seeds. A model is recommended where both point to it. Where only the test does, evidence is mixed: the mean points
    the other way, or its interval contains 0.
    """
    if not test:
        return "not compared"
    if test["p_holm"] > alpha:
        return "too few cases" if test["smallest_p_holm"] > alpha else "no difference shown"
    if test["effect"] > 0 and test["low"] > 0:
        return "personal"
    return "global" if test["effect"] < 0 and test["high"] < 0 else "mixed"


def _finished(draft: Verdict, analysis: Analysis) -> Verdict:
    options = analysis.options
    told = replace(draft, answer=answer_of(draft.test, options.alpha))
    alone = _against_local(analysis, told)
    return replace(told, alone=alone, text=_sentence(told, options), aside=_aside(alone, options))


def _against_local(analysis: Analysis, verdict: Verdict) -> Mapping[str, Any]:
    """The row of the family of all tests that holds the site's model against local training."""
    tests = analysis.answers_to(AGAINST_LOCAL)
    used = used_model(analysis, verdict)
    if used is None or tests.empty:
        return {}
    rows = tests[(tests["model"] == used.label) & (tests["site"] == verdict.site)]
    return {} if rows.empty else {str(key): value for key, value in rows.iloc[0].to_dict().items()}


def used_model(analysis: Analysis, verdict: Verdict) -> Model | None:
    """The recommended model; where none is, the one that validation prefers."""
    if verdict.answer in ("personal", "global"):
        return verdict.personal if verdict.answer == "personal" else verdict.shared
    known = [model for model in (verdict.personal, verdict.shared) if model is not None]
    return max(known, key=lambda model: analysis.worth(model, verdict.site), default=None)


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
    size, p, cases = _size(test, options), f"corrected {probability(test['p_holm'])}", test["pairs"]
    better, worse = f"{test['better']} of {cases} cases better", f"{test['worse']} of {cases} cases worse"
    pair = f"its personal model ({personal}) and the global one ({shared})"
    sided = test["low"] > 0 or test["high"] < 0
    favoured = "its personal model" if test["effect"] > 0 else "the global model"
    return {
        "personal": f"{site} should use its personal model ({personal}) rather than the global one ({shared}): "
        f"{size}, {better}, {p}.",
        "global": f"{site} should use the global model ({shared}) rather than its personal one ({personal}), whose "
        f"gain is {size}, {worse}, {p}.",
        "mixed": f"{site}: mixed evidence about {pair}. The cases favour {favoured} ({better}, {worse}, {p}), but the "
        f"mean gain of the personal one is {size}: "
        + ("it points the other way." if sided else "other seeds or cases may turn it.")
        + " Look at the cases.",
        "no difference shown": f"{site}: no difference shown between {pair}: {size}, {better}, {p}."
        + (" The mean alone would say more: look at the cases with the largest differences." if sided else ""),
        "too few cases": f"{site}: too few test cases to tell its personal model ({personal}) from the global "
        f"one ({shared}): {size}, {better}; with {test['better'] + test['worse']} that differ and "
        f"{count(test['family'], 'site')} tested, corrected p cannot be below {test['smallest_p_holm']:.2g}.",
    }[verdict.answer]


def _size(test: Mapping[str, Any], options: Options) -> str:
    """A gain and its interval, where there is one."""
    if not np.isfinite([test["low"], test["high"]]).all():
        return amount(test["gain"], options)
    low, high = (f"{test[end] * options.scale:+.1f}".replace("-", "−") for end in ("low", "high"))
    return f"{amount(test['gain'], options)} ({options.confidence:.0%} interval {low} to {high})"


def count(number: int, word: str) -> str:
    """A number and its noun: "1 site", "4 sites"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _aside(alone: Mapping[str, Any], options: Options) -> str:
    if not alone:
        return ""
    cases = f"{alone['better']} of {alone['pairs']} cases better"
    told = f"{amount(alone['gain'], options)}, {cases}, corrected {probability(alone['p_holm'])}"
    name = alone["model"]
    if alone["p_holm"] > options.alpha:
        return f"Against training alone, {name} shows no sure difference: {told}."
    if alone["effect"] > 0:
        return f"Taking part pays against training alone: {name} {told}."
    return f"Negative transfer: {name} does worse than training alone: {told}."


def _named(model: Model | None) -> str:
    return "none" if model is None else model.method
