"""Statistics against the libraries' own functions, against numbers done by hand, and against planted truths."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from evaluation.statistics import (
    attainable,
    block_ranks,
    bootstrap,
    fairness,
    holm,
    over_seeds,
    paired,
    rank_stability,
    ranking,
    seed_means,
    site_mean,
    wins,
)

NAN = float("nan")


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """statsmodels collects garbage at every correction, which takes long once torch is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- means ------------------------------------------------------------------------------------------------------------


def test_every_seed_counts_once_in_a_mean_and_every_case_once_in_a_test() -> None:
    scores = np.array([[1.0, 0.0, NAN, NAN], [NAN, 1.0, 1.0, 1.0]])
    assert seed_means(scores).tolist() == [0.5, 1.0]
    assert site_mean(scores) == 0.75
    assert over_seeds(scores).tolist() == [1.0, 0.5, 1.0, 1.0]
    assert over_seeds(np.array([[NAN, 2.0]])).tolist() == [2.0]
    assert np.isnan(site_mean(np.full((2, 3), NAN)))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [6, 25, 80])
def test_paired_is_scipys_wilcoxon(cases: int) -> None:
    differences = np.random.default_rng(cases).normal(0.3, 1, cases)
    found = paired(differences)
    assert found.p == stats.wilcoxon(differences).pvalue
    assert (found.better, found.worse, found.pairs) == ((differences > 0).sum(), (differences < 0).sum(), cases)
    against = stats.wilcoxon(differences, alternative="greater").statistic  # the sum of positive ranks
    total = cases * (cases + 1) / 2
    assert found.effect == pytest.approx((2 * against - total) / total)


def test_rank_biserial_by_hand_and_ties_do_not_vote() -> None:
    found = paired(np.array([0.0, 1.0, 2.0, -3.0, 4.0, 0.0]))  # ranks 1, 2, 3, 4: 7 for, 3 against
    assert (found.pairs, found.better, found.worse) == (6, 3, 1)
    assert found.effect == pytest.approx(0.4)
    assert found.p == stats.wilcoxon([1.0, 2.0, -3.0, 4.0]).pvalue


def test_all_ties_are_no_difference_and_rounding_is_a_tie() -> None:
    found = paired(np.array([0.0, 1e-16, -1e-16]))
    assert (found.p, found.effect, found.better, found.worse) == (1.0, 0.0, 0, 0)


@pytest.mark.parametrize("cases", range(1, 9))
def test_the_smallest_p_is_what_scipy_gives_when_all_cases_agree(cases: int) -> None:
    found = paired(np.arange(1.0, cases + 1))
    assert found.smallest_p == pytest.approx(stats.wilcoxon(np.arange(1.0, cases + 1)).pvalue)
    assert found.p == pytest.approx(found.smallest_p)


def test_a_paired_test_refuses_what_it_cannot_test() -> None:
    for differences in (np.empty(0), np.array([1.0, NAN])):
        with pytest.raises(ValueError, match="finite differences"):
            paired(differences)


def test_what_a_test_could_give_at_best_depends_on_its_family() -> None:
    assert attainable([0.5], 0, 0.01) == pytest.approx(0.01)
    assert attainable([0.5, 0.5, 0.5], 0, 0.01) == pytest.approx(0.03)
    assert attainable([0.5, 0.001], 0, 0.01) == pytest.approx(0.01)  # the other one comes first


def test_holm_is_statsmodels_and_right_by_hand() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert holm(p_values).tolist() == multipletests(p_values, method="holm")[1].tolist()
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).size == 0


# --- intervals --------------------------------------------------------------------------------------------------------


def test_one_seed_and_one_site_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).normal(0, 1, 40)
    found = bootstrap({"a": values[None]}, draws=20_000, confidence=0.9).sites["a"]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1)
    assert found.mean == values.mean()
    assert [found.low, found.high] == pytest.approx(list(theirs.confidence_interval), abs=0.01)


def test_the_hierarchy_is_that_of_a_loop_written_out() -> None:
    generator = np.random.default_rng(1)
    scores = {
        site: generator.normal(level, 1, (3, 8)) + np.array([[0.0], [0.5], [-0.5]])
        for site, level in (("a", 0), ("b", 2), ("c", 3))
    }
    found = bootstrap(scores, draws=20_000, confidence=0.95)
    drawn = []
    for _ in range(6_000):
        seeds = generator.integers(0, 3, 3)
        sites = generator.choice(list(scores), 3)
        cases = {site: generator.integers(0, 8, 8) for site in scores}
        drawn.append(np.mean([scores[site][seeds][:, cases[site]].mean() for site in sites]))
    assert [found.overall.low, found.overall.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.06)
    assert found.overall.mean == pytest.approx(np.mean([values.mean() for values in scores.values()]))


def test_cases_that_a_seed_did_not_test_are_left_out() -> None:
    scores = np.array([[1.0, 1.0, NAN, NAN], [NAN, NAN, 3.0, 3.0]])
    found = bootstrap({"a": scores}, draws=500, confidence=0.95)
    assert found.sites["a"] == (2.0, 1.0, 3.0)
    assert bootstrap({"a": scores[:1]}, draws=500, confidence=0.95).overall == (1.0, 1.0, 1.0)


def test_bootstrap_refuses_unequal_seeds() -> None:
    with pytest.raises(ValueError, match="same number of seeds"):
        bootstrap({"a": np.zeros((1, 2)), "b": np.zeros((2, 2))}, draws=100, confidence=0.95)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator, hits, trials = np.random.default_rng(2), 0, 400
    for trial in range(trials):
        interval = bootstrap({"a": generator.normal(1, 1, (1, 40))}, draws=400, confidence=0.9, seed=trial).sites["a"]
        hits += interval.low <= 1 <= interval.high
    assert 0.84 <= hits / trials <= 0.94  # percentile intervals are a little narrow


def test_the_hierarchys_intervals_are_narrow_with_few_seeds_and_sites_and_fair_with_more() -> None:
    """What the page says beside them: with 3 seeds and 4 sites they miss the truth more often than their name says."""
    covered = {few: _coverage(*few, trials=200) for few in ((3, 4), (8, 10))}
    assert 0.75 <= covered[3, 4] <= 0.95
    assert covered[8, 10] >= 0.88
    assert np.isnan(bootstrap({"a": np.ones((1, 1))}, draws=100, confidence=0.95).sites["a"].low)


def _coverage(seeds: int, sites: int, trials: int) -> float:
    """How often a 95 % interval of the mean over sites holds the truth, when seeds, sites and cases vary."""
    generator, hits = np.random.default_rng(8), 0
    for trial in range(trials):
        luck = generator.normal(0, 1, (seeds, 1))
        scores = {}
        for site in range(sites):
            level, cases = generator.normal(0, 2), generator.normal(0, 2, (1, 15))
            scores[str(site)] = level + luck + cases + generator.normal(0, 1, (seeds, 15))
        interval = bootstrap(scores, draws=300, confidence=0.95, seed=trial).overall
        hits += interval.low <= 0 <= interval.high
    return hits / trials


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranking_is_scipys_friedman_with_kendalls_w() -> None:
    scores = np.random.default_rng(3).normal(size=(20, 4)) + np.array([0.0, 0.5, 1.0, 1.0])
    found = ranking(scores, alpha=0.05, higher_is_better=True)
    statistic, p = stats.friedmanchisquare(*scores.T)
    assert found.p == pytest.approx(p)
    assert found.agreement == pytest.approx(statistic / (20 * 3))
    assert found.ranks.sum() == pytest.approx(10)
    assert found.ranks.argmax() == 0


def test_the_critical_difference_is_that_of_demsar_2006() -> None:
    scores = np.random.default_rng(4).normal(size=(14, 4))
    assert ranking(scores, alpha=0.05, higher_is_better=True).critical_difference == pytest.approx(1.25, abs=0.005)


def test_ranks_share_ties_and_follow_the_metric() -> None:
    scores = np.array([[0.9, 0.9, 0.5]])
    assert block_ranks(scores, higher_is_better=True).tolist() == [[1.5, 1.5, 3.0]]
    assert block_ranks(scores, higher_is_better=False).tolist() == [[2.5, 2.5, 1.0]]
    two = ranking(scores[:, :2], alpha=0.05, higher_is_better=True)
    assert np.isnan(two.p)
    assert np.isnan(two.critical_difference)


def test_stability_is_one_for_equal_orders_and_minus_one_for_opposite_ones() -> None:
    assert rank_stability(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]])) == 1
    assert rank_stability(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])) == -1
    assert np.isnan(rank_stability(np.array([[1.0, 2.0, 3.0]])))


def test_wins_count_cases() -> None:
    counts = wins(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [2.0, 1.0]]), higher_is_better=True)
    assert counts.tolist() == [[0, 2], [1, 0]]


def test_fairness_by_hand() -> None:
    scores = {"a": np.full((2, 5), 0.9), "b": np.full((2, 5), 0.5), "c": np.full((2, 5), 0.7)}
    found = fairness(scores, higher_is_better=True)
    assert (found.worst_site, found.worst) == ("b", 0.5)
    assert found.mean == pytest.approx(0.7)
    assert found.gap == pytest.approx(0.4)
    assert found.spread == pytest.approx(0.2)
    assert found.decile == pytest.approx(0.5)
    assert fairness(scores, higher_is_better=False).worst_site == "a"


# --- planted truths ---------------------------------------------------------------------------------------------------


def test_without_a_difference_families_reject_at_the_stated_rate() -> None:
    """Four sites, twenty cases, three seeds that share the cases' luck: at most 5 % of the families say anything."""
    generator, single, families, trials = np.random.default_rng(5), 0, 0, 500
    for _ in range(trials):
        p_values = [paired(over_seeds(_differences(generator, 0.0))).p for _ in range(4)]
        single += sum(p < 0.05 for p in p_values)
        families += bool((holm(p_values) <= 0.05).any())
    assert 0.035 <= single / (4 * trials) <= 0.06
    assert families / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_seeds_are_no_cases() -> None:
    """Taking every seed's case as a case of its own would find differences that are not there; the average does not."""
    generator, naive, right, trials = np.random.default_rng(6), 0, 0, 400
    for _ in range(trials):
        differences = _differences(generator, 0.0)
        naive += paired(differences.ravel()).p < 0.05
        right += paired(over_seeds(differences)).p < 0.05
    assert naive / trials > 0.12
    assert right / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_gain_at_one_site_is_found_there_only() -> None:
    generator, found, elsewhere, trials = np.random.default_rng(7), 0, 0, 300
    for _ in range(trials):
        p_values = [paired(over_seeds(_differences(generator, gain))).p for gain in (0.0, 1.5, 0.0, 0.0)]
        rejected = holm(p_values) <= 0.05
        found += bool(rejected[1])
        elsewhere += bool(rejected[[0, 2, 3]].any())
    assert found / trials > 0.95
    assert elsewhere / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def _differences(generator: np.random.Generator, gain: float) -> np.ndarray:
    """(3 seeds, 20 cases): what is common to a case, and what a seed adds."""
    return gain + generator.normal(0, 1, 20) + generator.normal(0, 0.3, (3, 20))
