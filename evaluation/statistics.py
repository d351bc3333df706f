"""Statistics of a comparison, over arrays of scores; the tests themselves are scipy's and statsmodels'.

Scores of one model at one site are an array (seeds, cases): a case that a seed did not test is NaN. Seeds of a run are
no new patients: wherever cases are the sample (tests, ranks), a case's number is first averaged over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]
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
        sites: of every site: seeds and cases were drawn again; a single case has no interval.
        overall: of the mean over sites: seeds, sites and cases were drawn again.
    """

    sites: dict[str, Interval]
    overall: Interval


def site_mean(scores: Scores) -> float:
    """Mean over seeds of the means over cases; NaN if there is no score."""
    per_seed = seed_means(scores)
    return float(np.nanmean(per_seed)) if np.isfinite(per_seed).any() else float("nan")


def seed_means(scores: Scores) -> Scores:
    """(seeds, cases) -> (seeds,): mean over the cases that each seed tested; NaN where it tested none."""
    counts = np.isfinite(scores).sum(axis=1)
    means: Scores = np.divide(np.nansum(scores, axis=1), counts, out=np.full(len(scores), np.nan), where=counts > 0)
    return means


def over_seeds(scores: Scores) -> Scores:
    """(seeds, cases) -> (cases,): every case averaged over the seeds that tested it; untested cases are left out.

    A seed is not another patient; averaging first leaves one number per case.
    """
    counts = np.isfinite(scores).sum(axis=0)
    tested = counts > 0
    averages: Scores = np.nansum(scores[:, tested], axis=0) / counts[tested]
    return averages


def bootstrap(scores: Mapping[str, Scores], *, draws: int, confidence: float, seed: int = 0) -> Bootstrap:
    """Hierarchical percentile bootstrap over seed, site and case.

    Seeds are crossed with sites: a draw takes the same seeds at every site. Cases are drawn within their site and are
    the same for all seeds. Sites are drawn for the mean over sites only, each counting once.

    Args:
        scores: site -> (seeds, cases), NaN where a seed did not test a case; the same number of seeds at every site.
        draws: how many resamples.
        confidence: of the intervals, in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: no site, or sites with different numbers of seeds.
    """
    seeds = {len(values) for values in scores.values()}
    if len(seeds) != 1:
        raise ValueError(f"bootstrap needs sites with the same number of seeds, got {sorted(seeds)}")
    generator = np.random.default_rng(seed)
    count = seeds.pop()
    seed_weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    drawn = {site: _drawn_means(values, seed_weights, generator) for site, values in scores.items()}
    means = {site: site_mean(values) for site, values in scores.items()}
    columns = np.stack(list(drawn.values()), axis=1)
    site_weights = generator.multinomial(len(drawn), np.full(len(drawn), 1 / len(drawn)), size=draws)
    overall = _weighted(columns, site_weights)
    alone = np.full(draws, np.nan)
    return Bootstrap(
        {
            site: _interval(means[site], values if scores[site].shape[1] > 1 else alone, confidence)
            for site, values in drawn.items()
        },
        _interval(float(np.nanmean(list(means.values()))), overall, confidence),
    )


def _drawn_means(values: Scores, seed_weights: NDArray[np.int64], generator: np.random.Generator) -> Scores:
    """(draws,) means of one site under drawn seeds and drawn cases."""
    tested = np.isfinite(values)
    cases = values.shape[1]
    case_weights = generator.multinomial(cases, np.full(cases, 1 / cases), size=len(seed_weights)).astype(float)
    total, counts = case_weights @ np.nan_to_num(values).T, case_weights @ tested.T.astype(float)
    per_seed = np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
    return _weighted(per_seed, seed_weights)


def _weighted(values: Scores, weights: NDArray[np.int64]) -> Scores:
    """Row means with weights, NaN left out."""
    known = np.where(np.isfinite(values), weights, 0)
    total = known.sum(axis=1)
    weighted = (np.nan_to_num(values) * known).sum(axis=1)
    means: Scores = np.divide(weighted, total, out=np.full(len(values), np.nan), where=total > 0)
    return means


def _interval(mean: float, drawn: Scores, confidence: float) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon's signed-rank test over cases, two-sided.

    Attributes:
        pairs: cases, ties included.
        better: cases with a positive difference.
        worse: cases with a negative one.
        median: of the differences.
        p: of the test, not corrected; 1 where all cases tie.
        smallest_p: that so many cases can give at all, 2 / 2^n where n of them do not tie.
        effect: matched-pairs rank-biserial correlation in [-1, 1]: share of ranks for, minus share against.
    """

    pairs: int
    better: int
    worse: int
    median: float
    p: float
    smallest_p: float
    effect: float


def paired(differences: Scores) -> PairedTest:
    """Test whether differences of pairs lie around zero.

    Args:
        differences: (cases,), one per case, positive where the first model is better; ties do not vote.

    Raises:
        ValueError: there is no pair, or a difference is not finite.
    """
    rounded = np.round(differences, DECIMALS)
    if not len(rounded) or not np.isfinite(rounded).all():
        raise ValueError(f"a paired test needs finite differences, got {differences}")
    voting = rounded[rounded != 0]
    ranks = stats.rankdata(np.abs(voting))
    effect = float((np.sign(voting) * ranks).sum() / ranks.sum()) if len(voting) else 0.0
    return PairedTest(
        pairs=len(rounded),
        better=int((rounded > 0).sum()),
        worse=int((rounded < 0).sum()),
        median=float(np.median(differences)),
        p=float(stats.wilcoxon(voting).pvalue) if len(voting) else 1.0,
        smallest_p=min(1.0, 2.0 ** (1 - len(voting))),
        effect=effect,
    )


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
    from statsmodels.stats.multitest import multipletests  # a second's import, for comparisons only

    if not len(p_values):
        return np.empty(0)
    corrected: Scores = multipletests(p_values, method="holm")[1]
    return corrected


@dataclass(frozen=True)
class Ranking:
    """Average ranks of models over cases, and whether they differ.

    Attributes:
        ranks: (models,) mean rank, 1 is best, ties share.
        blocks: cases that rank all models.
        p: of Friedman's test; NaN with fewer than three models.
        agreement: Kendall's W of the cases' rankings in [0, 1].
        critical_difference: Nemenyi's: average ranks further apart than this differ; NaN with fewer than three models.
    """

    ranks: Scores
    blocks: int
    p: float
    agreement: float
    critical_difference: float


def ranking(scores: Scores, *, alpha: float, higher_is_better: bool) -> Ranking:
    """Rank models on every case (Friedman, Nemenyi).

    Args:
        scores: (cases, models), finite.
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
    """(cases, models) -> (models, models): on how many cases the model of the row beats that of the column."""
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
        decile: the score that bounds the worst tenth of all cases.
    """

    mean: float
    worst_site: str
    worst: float
    gap: float
    spread: float
    decile: float


def fairness(scores: Mapping[str, Scores], *, higher_is_better: bool) -> Fairness:
    """Sites' means compared, and the low end of the cases.

    Args:
        scores: site -> (seeds, cases).
        higher_is_better: which end is bad.
    """
    means = {site: mean for site, values in scores.items() if np.isfinite(mean := site_mean(values))}
    cases = np.concatenate([over_seeds(values) for values in scores.values()])
    worst = (min if higher_is_better else max)(means, key=lambda site: means[site])
    known = np.array(list(means.values()))
    return Fairness(
        mean=float(known.mean()),
        worst_site=worst,
        worst=means[worst],
        gap=float(np.ptp(known)),
        spread=float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
        decile=float(np.percentile(cases, 10 if higher_is_better else 90)),
    )
