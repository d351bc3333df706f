"""Statistics of a comparison, over arrays of scores; the tests themselves are scipy's.

Scores of one model at one site are an array (seeds, cases), or, averaged by `by_patient`, (seeds, patients): what
a seed did not test is NaN. Two images of a patient are no two patients, and two seeds of a run neither: wherever
patients are the sample (tests, ranks), a patient's number is averaged over its cases, then over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]
Numbers = NDArray[np.int64]
FLIPS = 9999  # random changes of signs, where patients are too many for all of them
POWER = 0.8
LEAST_PATIENTS = 3  # of an interval: t reaches 12.7 errors with two, and the ends of a bootstrap are the two themselves
DECIMALS = 12  # differences closer than this are equal: averages over seeds leave rounding errors


class Interval(NamedTuple):
    """A mean, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Means with intervals.

    Attributes:
        sites: of every site: seeds, patients and their cases were drawn again.
        overall: of the mean over sites: sites were drawn again, too.

    Fewer patients than `LEAST_PATIENTS` have no interval: its ends are NaN.
    """

    sites: dict[str, Interval]
    overall: Interval


def by_patient(scores: Scores, patients: Numbers) -> Scores:
    """(seeds, cases) -> (seeds, patients): mean over the tested cases of a patient; NaN where there are none.

    Args:
        scores: NaN where a seed did not test a case.
        patients: (cases,) the patient of each case, numbered from 0.
    """
    member = _members(patients)
    counts = np.isfinite(scores) @ member
    means: Scores = np.divide(
        np.nan_to_num(scores) @ member, counts, out=np.full(counts.shape, np.nan), where=counts > 0
    )
    return means


def _members(patients: Numbers) -> Scores:
    """(cases, patients): 1 where a case is of a patient."""
    member: Scores = (patients[:, None] == np.arange(int(patients.max(initial=-1)) + 1)).astype(float)
    return member


def site_mean(scores: Scores) -> float:
    """Mean over seeds of the means over patients; NaN if there is no score."""
    per_seed = seed_means(scores)
    return float(np.nanmean(per_seed)) if np.isfinite(per_seed).any() else float("nan")


def seed_means(scores: Scores) -> Scores:
    """(seeds, patients) -> (seeds,): mean over the patients that each seed tested; NaN where it tested none."""
    counts = np.isfinite(scores).sum(axis=1)
    means: Scores = np.divide(np.nansum(scores, axis=1), counts, out=np.full(len(scores), np.nan), where=counts > 0)
    return means


def over_seeds(scores: Scores) -> Scores:
    """(seeds, patients) -> (patients,): every patient averaged over the seeds that tested it; untested ones left out.

    A seed is not another patient; averaging first leaves one number per patient.
    """
    counts = np.isfinite(scores).sum(axis=0)
    tested = counts > 0
    averages: Scores = np.nansum(scores[:, tested], axis=0) / counts[tested]
    return averages


def bootstrap(
    scores: Mapping[str, Scores],
    *,
    draws: int,
    confidence: float,
    seed: int = 0,
    patients: Mapping[str, Numbers] | None = None,
) -> Bootstrap:
    """Hierarchical percentile bootstrap over seed, site, patient and case.

    Seeds are crossed with sites: a draw takes the same seeds at every site. Patients are drawn within their site, cases
    within their patient, and both are the same for all seeds. Sites are drawn for the mean over sites only, each
    counting once.

    Args:
        scores: site -> (seeds, cases), NaN where a seed did not test a case; the same number of seeds at every site.
        draws: how many resamples.
        confidence: of the intervals, in (0, 1).
        seed: of the draws.
        patients: site -> (cases,) the patient of each case, numbered from 0; None: each case is a patient.

    Raises:
        ValueError: no site, or sites with different numbers of seeds.
    """
    seeds = {len(values) for values in scores.values()}
    if len(seeds) != 1:
        raise ValueError(f"bootstrap needs sites with the same number of seeds, got {sorted(seeds)}")
    generator = np.random.default_rng(seed)
    count = seeds.pop()
    whose = {site: np.arange(v.shape[1]) if patients is None else patients[site] for site, v in scores.items()}
    seed_weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    drawn = {site: _drawn_means(values, whose[site], seed_weights, generator) for site, values in scores.items()}
    means = {site: site_mean(by_patient(values, whose[site])) for site, values in scores.items()}
    columns = np.stack(list(drawn.values()), axis=1)
    site_weights = generator.multinomial(len(drawn), np.full(len(drawn), 1 / len(drawn)), size=draws)
    patients_of = {site: len(over_seeds(by_patient(values, whose[site]))) for site, values in scores.items()}
    return Bootstrap(
        {site: _interval(means[site], drawn[site], confidence, patients_of[site]) for site in scores},
        _interval(
            float(np.nanmean(list(means.values()))),
            _weighted(columns, site_weights),
            confidence,
            sum(patients_of.values()),
        ),
    )


def by_drawn_patients(scores: Scores, draws: int, seed: int) -> Scores:
    """(draws,) means over seeds of the means over patients, drawn again: the same for the same seed.

    Args:
        scores: (seeds, patients), NaN where a seed did not score a patient.
        draws: how many.
        seed: of the draws.
    """
    ones = np.ones((draws, len(scores)), np.int64)
    return _drawn_means(scores, np.arange(scores.shape[1]), ones, np.random.default_rng(seed))


def _drawn_means(values: Scores, patients: Numbers, seed_weights: Numbers, generator: np.random.Generator) -> Scores:
    """(draws,) means of one site under drawn seeds, patients and cases."""
    draws, count = len(seed_weights), int(patients.max(initial=-1)) + 1
    weights = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
    if count == len(patients):
        shown = np.isfinite(by_patient(values, patients)).T.astype(float)
        total, counts = weights @ np.nan_to_num(by_patient(values, patients)).T, weights @ shown
    else:
        cases = _drawn_cases(patients, draws, generator)
        pairs = [_of_drawn_cases(row, patients, cases, weights) for row in values]
        total, counts = (np.stack(parts, axis=1) for parts in zip(*pairs, strict=True))
    per_seed = np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
    return _weighted(per_seed, seed_weights)


def _drawn_cases(patients: Numbers, draws: int, generator: np.random.Generator) -> Scores:
    """(draws, cases): how often each case is drawn among those of its patient."""
    weights = np.ones((draws, len(patients)))
    for patient in np.flatnonzero(np.bincount(patients) > 1):
        own = np.flatnonzero(patients == patient)
        weights[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
    return weights


def _of_drawn_cases(row: Scores, patients: Numbers, cases: Scores, weights: Scores) -> tuple[Scores, Scores]:
    """(draws,) sum of the drawn patients' means with one seed, and how many drawn patients it tested."""
    member, tested = _members(patients), np.isfinite(row).astype(float)
    counts = (cases * tested) @ member
    known = counts > 0
    means = np.divide((cases * np.nan_to_num(row)) @ member, counts, out=np.zeros(counts.shape), where=known)
    return (means * weights).sum(axis=1), (known * weights).sum(axis=1)


def _weighted(values: Scores, weights: NDArray[np.int64]) -> Scores:
    """Row means with weights, NaN left out."""
    known = np.where(np.isfinite(values), weights, 0)
    total = known.sum(axis=1)
    weighted = (np.nan_to_num(values) * known).sum(axis=1)
    means: Scores = np.divide(weighted, total, out=np.full(len(values), np.nan), where=total > 0)
    return means


def _interval(mean: float, drawn: Scores, confidence: float, patients: int) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if patients < LEAST_PATIENTS or not len(known):
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class PairedTest:
    """Whether differences of pairs lie around zero, two-sided, at one site or over several that count alike.

    Attributes:
        patients: ties included.
        better: patients with a positive difference.
        worse: patients with a negative one.
        gain: mean over sites of the mean over seeds of the mean over patients.
        p: the larger of the two that follow, not corrected.
        p_patients: of the sign-flip permutation test: these trained models, other patients.
        p_error: of a t test whose error holds the luck of patients and that of seeds; NaN where all differences agree.
        smallest_p: that so many patients can give at all: 2 / 2^n where n do not tie, at least 1 / (`FLIPS` + 1).
        error: standard error of the gain, over patients and seeds; NaN where it cannot be told.
        freedom: its degrees of freedom (Satterthwaite).
    """

    patients: int
    better: int
    worse: int
    gain: float
    p: float
    p_patients: float
    p_error: float
    smallest_p: float
    error: float
    freedom: float

    def interval(self, confidence: float) -> tuple[float, float]:
        """The gain, more and less what its error allows; NaN where that cannot be told, or patients are too few."""
        if self.patients < LEAST_PATIENTS:
            return float("nan"), float("nan")
        reach = float(stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.error
        return self.gain - reach, self.gain + reach


def smallest_p(voting: int) -> float:
    """What a sign-flip test can give at all of so many patients, none of whom ties."""
    return min(1.0, max(2.0 ** (1 - voting), 1 / (FLIPS + 1) if voting > _most_exact() else 0.0))


def detectable(error: float, freedom: float, alpha: float) -> float:
    """The smallest true difference that a two-sided t test at this level finds with `POWER`, given its error."""
    return float(stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(POWER, freedom)) * error


def detectable_by_interval(reach: float, alpha: float) -> float:
    """The smallest true difference of which an interval excludes 0 with `POWER`, given how far it reaches to a side."""
    return reach * float(1 + stats.norm.ppf(POWER) / stats.norm.ppf(1 - alpha / 2))


def paired(gains: Mapping[str, Scores]) -> PairedTest:
    """Test whether differences of pairs lie around zero; sites are strata and count alike.

    A patient's difference is averaged over the seeds that tested it. Under no difference its sign is as likely the
    other one: the permutation test flips signs, all ways or `FLIPS` random ones (Fisher; stratified, since no patient
    leaves its site). Seeds are not exchangeable patients; their luck enters by the t test.

    Args:
        gains: site -> (seeds, patients), positive where the first model is better, NaN where a seed did not test a
            patient; the same seeds at every site.

    Raises:
        ValueError: there is no pair at some site, or a difference is infinite.
    """
    means = [np.round(over_seeds(values), DECIMALS) for values in gains.values()]
    if not means or not all(len(own) and np.isfinite(own).all() for own in means):
        raise ValueError(f"a paired test needs finite differences at every site, got {gains}")
    weighted = np.concatenate([own / (len(own) * len(means)) for own in means])
    gain = float(np.mean([site_mean(values) for values in gains.values()]))
    error, freedom = _error(list(gains.values()), means)
    p_patients = sign_flip(weighted)
    p_error = float(2 * stats.t.sf(abs(gain) / error, freedom)) if error > 0 else float("nan")
    voting = int((weighted != 0).sum())
    return PairedTest(
        patients=len(weighted),
        better=int((weighted > 0).sum()),
        worse=int((weighted < 0).sum()),
        gain=gain,
        p=1.0 if gain * weighted.sum() < 0 else max(p_patients, p_error) if p_error == p_error else p_patients,
        p_patients=p_patients,
        p_error=p_error,
        smallest_p=smallest_p(voting),
        error=error,
        freedom=freedom,
    )


def sign_flip(differences: Scores) -> float:
    """P, two-sided, of the sum of differences when every sign is as likely the other one; ties do not vote.

    That of `scipy.stats.permutation_test` with one sample, whose signs are drawn once for all tests of so many
    patients: exact up to 2^13 ways, else of `FLIPS` random ones.
    """
    voting = differences[differences != 0]
    if not len(voting):
        return 1.0
    flipped = np.abs(_signs(len(voting)).astype(float) @ voting)
    extreme = int((flipped >= abs(voting.sum()) * (1 - 1e-12)).sum())
    exact = len(voting) <= _most_exact()
    return extreme / len(flipped) if exact else (1 + extreme) / (1 + len(flipped))


def _most_exact() -> int:
    """Of so many patients all changes of signs are taken."""
    return int(np.log2(FLIPS + 1))


@lru_cache(maxsize=64)
def _signs(count: int) -> NDArray[np.int8]:
    """(ways, patients): -1 or 1; kept, and therefore small."""
    if count <= _most_exact():
        ways = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        ways = np.random.default_rng(0).integers(0, 2, (FLIPS, count))
    signs: NDArray[np.int8] = (2 * ways - 1).astype(np.int8)
    return signs


def _error(gains: Sequence[Scores], means: Sequence[Scores]) -> tuple[float, float]:
    """Standard error of a mean over sites, and its degrees of freedom; NaN where every site has a single patient.

    Two sources of luck are added: patients (their means over seeds) and seeds (their means over sites). What seeds
    differ in because they tested different patients is taken off the second, though not off its uncertainty. A model's
    luck with single patients is in both, so that the error is rather too large. A single seed has no luck that could be
    seen; a single patient of a site is taken to vary as patients of the other sites do.
    """
    variances = [float(own.var(ddof=1)) for own in means if len(own) > 1]
    if not variances:
        return float("nan"), float("nan")
    share, usual = 1 / len(gains) ** 2, float(np.mean(variances))
    of_patients = [share * (float(own.var(ddof=1)) if len(own) > 1 else usual) / len(own) for own in means]
    per_seed = np.mean([seed_means(values) for values in gains], axis=0)
    whole = np.isfinite(per_seed)
    between, of_seeds, seeds = 0.0, 0.0, int(whole.sum())
    if seeds > 1:
        between = float(per_seed[whole].var(ddof=1)) / seeds
        of_seeds = max(0.0, between - share * sum(_by_other_patients(values[whole]) for values in gains) / seeds)
    total = sum(of_patients) + of_seeds
    parts = sum(part**2 / max(1, len(own) - 1) for part, own in zip(of_patients, means, strict=True))
    parts += between**2 / (seeds - 1) if seeds > 1 else 0.0
    return float(np.sqrt(total)), max(1.0, float(total**2 / parts)) if parts else float("inf")


def _by_other_patients(values: Scores) -> float:
    """The variance that seeds' means have because seeds tested different patients; 0 where all tested the same."""
    tested = np.isfinite(values).astype(float)
    counts = tested.sum(axis=1)
    spreads = [float(np.nanvar(row, ddof=1)) for row, n in zip(values, counts, strict=True) if n > 1]
    if not spreads or not counts.all():
        return 0.0
    pairs = list(combinations(range(len(values)), 2))
    apart = [
        (1 / counts[a] + 1 / counts[b] - 2 * (tested[a] @ tested[b]) / (counts[a] * counts[b])) / 2 for a, b in pairs
    ]
    return float(np.mean(spreads)) * float(np.mean(apart))


def attainable(p_values: Sequence[float], index: int, smallest: float) -> float:
    """The smallest corrected p that one test of a family could have, the others being as they are.

    Args:
        p_values: of the tests, not corrected.
        index: which test.
        smallest: p that it could give at all.
    """
    return float(holm([*p_values[:index], smallest, *p_values[index + 1 :]])[index])


def holm(p_values: Sequence[float]) -> Scores:
    """Holm's step-down correction over one family of tests."""
    order = np.argsort(p_values)
    corrected: Scores = np.empty(len(order))
    raw = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(raw))
    return corrected


@dataclass(frozen=True)
class Ranking:
    """Average ranks of models over patients, and whether they differ.

    Attributes:
        ranks: (models,) mean rank, 1 is best, ties share.
        blocks: patients that rank all models.
        p: of Friedman's test; NaN with fewer than three models.
        agreement: Kendall's W of the patients' rankings in [0, 1].
        critical_difference: Nemenyi's: average ranks further apart than this differ; NaN with fewer than three models.
    """

    ranks: Scores
    blocks: int
    p: float
    agreement: float
    critical_difference: float


def ranking(scores: Scores, *, alpha: float, higher_is_better: bool) -> Ranking:
    """Rank models on every patient (Friedman, Nemenyi).

    Args:
        scores: (patients, models), finite.
        alpha: level of the critical difference.
        higher_is_better: which end is rank 1.
    """
    blocks, models = scores.shape
    ranks = block_ranks(scores, higher_is_better=higher_is_better)
    mean = ranks.mean(axis=0) if blocks else np.full(models, np.nan)
    if models < 3 or blocks < 2 or (ranks == ranks[:, :1]).all():
        return Ranking(mean, blocks, float("nan"), float("nan"), float("nan"))
    statistic, p = stats.friedmanchisquare(*ranks.T)
    q = float(stats.studentized_range.ppf(1 - alpha, models, np.inf)) / np.sqrt(2)
    return Ranking(
        mean,
        blocks,
        float(p),
        float(statistic) / (blocks * (models - 1)),
        q * float(np.sqrt(models * (models + 1) / (6 * blocks))),
    )


def block_ranks(scores: Scores, *, higher_is_better: bool) -> Scores:
    """(blocks, models) -> ranks within each block, 1 is best, ties share."""
    if not scores.size:
        return np.empty(scores.shape)
    ranks: Scores = stats.rankdata(np.round(-scores if higher_is_better else scores, DECIMALS), axis=1)
    return ranks


def rank_stability(scores: Scores) -> float:
    """How alike blocks (seeds, or sites) order the models: mean Kendall's tau over pairs of blocks, in [-1, 1].

    Args:
        scores: (blocks, models); pairs in which a block ties all models do not count.

    Returns:
        NaN with fewer than two blocks or two models.
    """
    if scores.shape[1] < 2:
        return float("nan")
    taus = [stats.kendalltau(a, b).statistic for a, b in combinations(np.round(scores, DECIMALS), 2)]
    known = [float(tau) for tau in taus if np.isfinite(tau)]
    return float(np.mean(known)) if known else float("nan")


def wins(scores: Scores, *, higher_is_better: bool) -> NDArray[np.int64]:
    """(patients, models) -> (models, models): on how many patients the model of the row beats that of the column."""
    oriented = np.round(scores if higher_is_better else -scores, DECIMALS)
    counts: NDArray[np.int64] = (oriented[:, :, None] > oriented[:, None, :]).sum(axis=0)
    return counts


@dataclass(frozen=True)
class Fairness:
    """How evenly a model serves sites.

    Attributes:
        mean: over sites.
        worst_site: name of the worst one.
        worst: its mean.
        gap: best site minus worst site, never negative.
        spread: standard deviation over sites (of the sample); NaN with one site.
        decile: the score that bounds the worst tenth of all patients.
    """

    mean: float
    worst_site: str
    worst: float
    gap: float
    spread: float
    decile: float


def fairness(scores: Mapping[str, Scores], *, higher_is_better: bool) -> Fairness:
    """Sites' means compared, and the low end of the patients.

    Args:
        scores: site -> (seeds, patients).
        higher_is_better: which end is bad.
    """
    means = {site: mean for site, values in scores.items() if np.isfinite(mean := site_mean(values))}
    patients = np.concatenate([over_seeds(values) for values in scores.values()])
    worst = (min if higher_is_better else max)(means, key=lambda site: means[site])
    known = np.array(list(means.values()))
    return Fairness(
        mean=float(known.mean()),
        worst_site=worst,
        worst=means[worst],
        gap=float(np.ptp(known)),
        spread=float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
        decile=float(np.percentile(patients, 10 if higher_is_better else 90)),
    )
