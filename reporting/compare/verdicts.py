"""One plain answer for the federation and for each site: use the personal model, the global one, or train alone?

The candidates are the same everywhere (`choice`). Three questions are asked about each two of them; the answers over
sites are one family for Holm's correction, those at the sites another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from fedseg.common.text import count
from fedseg.evaluation.statistics import attainable, detectable, detectable_by_interval, holm, smallest_p
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.choice import Choice, choose
from fedseg.reporting.compare.options import Options
from fedseg.reporting.units import signed

Candidate = Literal["personal", "global", "alone"]
Answer = Literal["personal", "global", "alone", "equivalent", "not shown", "too few patients", "not compared"]
CANDIDATES: tuple[Candidate, ...] = ("personal", "global", "alone")
PAIRS = tuple(combinations(CANDIDATES, 2))
MAIN = PAIRS[0]
WORDS = {"personal": "the personal model", "global": "the global model", "alone": "training alone"}
SURE_SEEDS = 3  # with fewer, what another training would bring is hardly known
Pair = tuple[Candidate, Candidate]


@dataclass(frozen=True)
class Verdict:
    """What the runs say about one site, or about the mean over all.

    Attributes:
        site: its name, or `OVERALL`.
        answer: which model to use, or why that cannot be said.
        models: of each candidate; those that are not there are missing.
        tests: first against second candidate (see `Analysis.compare`), with p_holm, the smallest p_holm that its
            patients could give, how many tests are the family, and the difference that they could have shown.
        few_seeds: of the tests that the answer rests on the fewest, where these are fewer than three; else 0.
        text: the sentence.
        details: one line for each test.
    """

    site: str
    answer: Answer
    models: Mapping[Candidate, Model]
    tests: Mapping[Pair, Mapping[str, Any]] = field(default_factory=dict)
    few_seeds: int = 0
    text: str = ""
    details: Sequence[str] = ()

    @property
    def personal(self) -> Model | None:
        """The personal model."""
        return self.models.get("personal")

    @property
    def shared(self) -> Model | None:
        """The global one."""
        return self.models.get("global")

    @property
    def provisional(self) -> bool:
        """Whether another training may well turn the answer."""
        return self.few_seeds > 0

    @property
    def test(self) -> Mapping[str, Any]:
        """Personal against global; empty if not compared."""
        return self.tests.get(MAIN, {})


def verdicts(analysis: Analysis, choice: Choice | None = None) -> list[Verdict]:
    """The verdict on the mean over sites, then that of every site; the candidates are chosen if they are not given."""
    choice = choice or choose(analysis)
    known = zip(CANDIDATES, (choice.personal, choice.shared, choice.alone), strict=True)
    models = {candidate: model for candidate, model in known if model is not None}
    found = []
    for places in ([OVERALL], analysis.sites):
        tests = _corrected(analysis, models, places)
        found += [_verdict(place, models, tests[place], analysis.options) for place in places]
    return found if analysis.sites else []


def _corrected(
    analysis: Analysis, models: Mapping[Candidate, Model], places: Sequence[str]
) -> dict[str, dict[Pair, dict[str, Any]]]:
    """The tests of one family: all pairs of candidates at all these places."""
    alpha = analysis.options.alpha
    asked = [(place, pair) for place in places for pair in PAIRS if models.keys() >= set(pair)]
    rows = {key: analysis.compare(models[key[1][0]], models[key[1][1]], key[0]) for key in asked}
    known = {key: row for key, row in rows.items() if row is not None}
    raw = [float(row["p"]) for row in known.values()]
    found: dict[str, dict[Pair, dict[str, Any]]] = {place: {} for place in places}
    for number, ((place, pair), row, p_holm) in enumerate(zip(known, known.values(), holm(raw), strict=True)):
        all_of_them = smallest_p(row["patients"])  # if nobody tied
        least, at_all = (
            float(p_holm) if p_holm <= alpha else attainable(raw, number, p) for p in (row["smallest_p"], all_of_them)
        )
        corrected = {"p_holm": float(p_holm), "smallest_p_holm": least, "smallest_p_at_all": at_all}
        found[place][pair] = {
            **row, **corrected, "family": len(known), "detectable": _detectable(row, at_all, alpha, len(known))
        }  # fmt: skip
    return found


def _detectable(row: Mapping[str, Any], least: float, alpha: float, family: int) -> float:
    """The smallest true difference that would be shown with 80 % power: by the test, and by the interval.

    Infinite where there are too few patients for any; NaN where their spread is not known.
    """
    if least > alpha or row["no_interval"]:
        return math.inf
    reach = max(row["gain"] - row["low"], row["high"] - row["gain"])
    by_test = detectable(row["error"], row["freedom"], alpha / family)
    return by_test if math.isnan(by_test) else max(by_test, detectable_by_interval(reach, alpha))


class Evidence:
    """The tests of one place, read in both directions.

    Args:
        tests: first against second candidate.
        options: level and margin.
    """

    def __init__(self, tests: Mapping[Pair, Mapping[str, Any]], options: Options) -> None:
        self.tests, self.alpha = tests, options.alpha
        self.margin = options.margin / options.scale

    def ends(self, one: Candidate, other: Candidate) -> tuple[float, float]:
        """Interval of the gain of one over the other; NaN where they were not compared."""
        if (one, other) in self.tests:
            row = self.tests[one, other]
            return row["low"], row["high"]
        row = self.tests.get((other, one), {"low": np.nan, "high": np.nan})
        return -row["high"], -row["low"]

    def compared(self, one: Candidate, other: Candidate) -> bool:
        """Whether both are there."""
        return (one, other) in self.tests or (other, one) in self.tests

    def better(self, one: Candidate, other: Candidate) -> bool:
        """Shown better: the corrected test speaks, and the interval excludes 0 on the same side."""
        row = self.tests.get((one, other)) or self.tests.get((other, one))
        return row is not None and row["p_holm"] <= self.alpha and self.ends(one, other)[0] > 0

    def not_worse(self, one: Candidate, other: Candidate) -> bool:
        """Not worse by more than the margin, and not shown worse at all."""
        return self.ends(one, other)[0] > -self.margin and not self.better(other, one)

    def alike(self, one: Candidate, other: Candidate) -> bool:
        """The interval lies within the margin."""
        low, high = self.ends(one, other)
        return -self.margin < low and high < self.margin

    def recommended(self) -> list[Candidate]:
        """Candidates that are better than one other and not worse than any."""
        found = []
        for one in CANDIDATES:
            others = [other for other in CANDIDATES if other != one and self.compared(one, other)]
            if any(self.better(one, o) for o in others) and all(self.not_worse(one, o) for o in others):
                found.append(one)
        return found


def answer_of(tests: Mapping[Pair, Mapping[str, Any]], options: Options) -> Answer:
    """Read the corrected tests of one place."""
    evidence = Evidence(tests, options)
    found = evidence.recommended()
    if len(found) == 1:
        return found[0]
    if found:  # two; what they are better than is told, whichever they are
        return "equivalent" if set(found) == set(MAIN) else "not shown"
    if MAIN not in tests:
        return "not compared"
    if tests[MAIN]["p_holm"] > options.alpha and tests[MAIN]["smallest_p_at_all"] > options.alpha:
        return "too few patients"
    beaten = evidence.better("alone", "personal") or evidence.better("alone", "global")
    return "equivalent" if evidence.alike(*MAIN) and not beaten else "not shown"


def _verdict(
    place: str, models: Mapping[Candidate, Model], tests: Mapping[Pair, Mapping[str, Any]], options: Options
) -> Verdict:
    answer = answer_of(tests, options)
    behind = [row for pair, row in tests.items() if answer in pair or (answer == "equivalent" and pair == MAIN)]
    seeds = min((row["seeds"] for row in behind), default=0)
    details = [_detail(pair, models, row, options) for pair, row in tests.items()]
    text = _sentence(place, answer, models, tests, options)
    return Verdict(place, answer, models, tests, seeds if seeds < SURE_SEEDS else 0, text, details)


# --- words ------------------------------------------------------------------------------------------------------------


def amount(gain: float, options: Options) -> str:
    """A difference with its sign: "+4.1 Dice", in points of 100; a distance says which way is better."""
    shown = signed(gain * options.scale)
    words = options.title if options.scale > 1 else f"{options.points} {options.title}"
    return f"{shown} {words}" if options.higher_is_better else f"{shown} {words} (+ is better)"


def interval(row: Mapping[Any, Any], options: Options, *, sign: bool = True) -> str:
    """The ends of an interval: "+1.0 to +7.2"; or why there is none: "no interval: 2 patients"."""
    scaled = (float(row[end]) * options.scale for end in ("low", "high"))
    ends = (signed(end) if sign else f"{end:.1f}".replace("-", "−") for end in scaled)
    return str(row["no_interval"]) or " to ".join(ends)


def gain_with_interval(row: Mapping[str, Any], options: Options) -> str:
    """A gain, and its interval or why there is none: "+4.1 Dice (95% interval +1.0 to +7.2)"."""
    name = "" if row["no_interval"] else f"{options.confidence:.0%} interval "
    return f"{amount(row['gain'], options)} ({name}{interval(row, options)})"


def probability(p: float) -> str:
    """P = 0.012, p = 0.0004, p < 0.0001."""
    if p < 1e-4:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.4f}"


def units(row: Mapping[Any, Any]) -> str:
    """How many patients and cases: "9 patients, 41 cases"."""
    return f"{count(row['patients'], 'patient')}, {count(row['cases'], 'case')}"


def _detail(pair: Pair, models: Mapping[Candidate, Model], row: Mapping[str, Any], options: Options) -> str:
    """One test: "personal over global (ditto, fedavg): +4.1 Dice (95% interval +1.0 to +7.2), 9 of 12 ..."."""
    names = ", ".join(dict.fromkeys(models[one].method for one in pair))
    better = f"{row['better']} of {count(row['patients'], 'patient')} better"
    gain = gain_with_interval(row, options)
    return f"{pair[0]} over {pair[1]} ({names}): {gain}, {better}, corrected {probability(row['p_holm'])}"


def _sentence(
    place: str,
    answer: Answer,
    models: Mapping[Candidate, Model],
    tests: Mapping[Pair, Mapping[str, Any]],
    options: Options,
) -> str:
    evidence = Evidence(tests, options)
    subject = "Over all sites" if place == OVERALL else place
    if answer in ("personal", "global", "alone"):
        return f"{subject}: {_use(answer, models)}, {_reasons(answer, evidence, options)}{_of(tests)}."
    if answer == "not compared":
        missing = [f"{one} model" for one in MAIN if one not in models]
        why = f"these runs have no {' and no '.join(missing)}" if missing else "they share no seed and test case"
        return f"{subject}: personal and global model cannot be compared, {why}.{_shown(evidence)}"
    row = tests[MAIN]
    if answer == "equivalent":
        names = f"personal ({models['personal'].method}) and global model ({models['global'].method})"
        within = f"the difference lies within ±{options.margin:g} {options.points}{_of(tests)}"
        return f"{subject}: {names} are equivalent, {within}.{_shown(evidence)}"
    if answer == "too few patients":
        voting = row["better"] + row["worse"]
        return (
            f"{subject}: too few patients to tell personal and global model apart: {units(row)}. With "
            f"{count(voting, 'patient')} that {'differs' if voting == 1 else 'differ'} and "
            f"{count(row['family'], 'test')}, corrected p cannot be below {row['smallest_p_holm']:.2g}."
            f"{_shown(evidence)}"
        )
    told = f"{subject}: no model is shown to be the one to use{_of(tests)}.{_shown(evidence)}"
    return f"{told}{_could_show(row['detectable'], options)}"


def _could_show(least: float, options: Options) -> str:
    """Which difference the patients could have shown: one beyond the metric's range means none."""
    if np.isnan(least):
        return ""
    if least > options.span:
        return " These patients could not have shown any difference with 80% power."
    return f" These patients could have shown a difference of {least * options.scale:.1f} (80% power)."


def _use(answer: Candidate, models: Mapping[Candidate, Model]) -> str:
    if answer == "alone":
        return f"train alone ({models['alone'].method})"
    return f"use {WORDS[answer]} ({models[answer].method})"


def _reasons(answer: Candidate, evidence: Evidence, options: Options) -> str:
    """What the recommended one is better than, and what it is not worse than."""
    others = [other for other in CANDIDATES if other != answer and evidence.compared(answer, other)]
    better = [f"{WORDS[o]}" for o in others if evidence.better(answer, o)]
    rest = [f"{WORDS[o]}" for o in others if not evidence.better(answer, o)]
    told = f"better than {' and '.join(better)}"
    return told + (f"; not worse than {rest[0]} by more than {options.margin:g} {options.points}" if rest else "")


def _of(tests: Mapping[Pair, Mapping[str, Any]]) -> str:
    row = tests.get(MAIN) or next(iter(tests.values()))
    return f" ({units(row)})"


def _shown(evidence: Evidence) -> str:
    """What is shown although nothing is recommended, and where test and interval disagree."""
    told, mixed = [], []
    for one, other in PAIRS:
        for a, b in ((one, other), (other, one)):
            if evidence.better(a, b):
                told.append(f"{WORDS[a]} better than {WORDS[b]}")
        row = evidence.tests.get((one, other))
        if row and row["p_holm"] <= evidence.alpha and not (row["low"] > 0 or row["high"] < 0):
            mixed.append(f"{WORDS[one]} against {WORDS[other]}")
    text = f" Shown: {'; '.join(told)}." if told else ""
    if mixed and not evidence.alike(*MAIN):
        text += f" Mixed: {'; '.join(mixed)}: the test speaks, the interval holds 0; other seeds or sites may turn it."
    return text
