"""Statistics against the libraries' own functions, against numbers done by hand, and against planted truths."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fedseg.evaluation.statistics import (
    attainable,
    block_ranks,
    bootstrap,
    by_patient,
    detectable,
    fairness,
    holm,
    over_seeds,
    paired,
    rank_stability,
    ranking,
    seed_means,
    sign_flip,
    site_mean,
    wins,
)

NAN = float("nan")


# --- means ------------------------------------------------------------------------------------------------------------


def test_every_seed_counts_once_in_a_mean_and_every_case_once_in_a_test() -> None:
    scores = np.array([[1.0, 0.0, NAN, NAN], [NAN, 1.0, 1.0, 1.0]])
    assert seed_means(scores).tolist() == [0.5, 1.0]
    assert site_mean(scores) == 0.75
    assert over_seeds(scores).tolist() == [1.0, 0.5, 1.0, 1.0]
    assert over_seeds(np.array([[NAN, 2.0]])).tolist() == [2.0]
    assert np.isnan(site_mean(np.full((2, 3), NAN)))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patients", [2, 7, 13])
def test_with_few_patients_the_test_is_scipys_permutation_of_signs(patients: int) -> None:
    differences = np.random.default_rng(patients).normal(0.4, 1, patients)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)
    found = paired({"a": differences[None]})
    assert found.p_patients == pytest.approx(theirs.pvalue)
    assert found.p_error == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert found.p == max(found.p_patients, found.p_error)
    assert (found.better, found.worse, found.patients) == ((differences > 0).sum(), (differences < 0).sum(), patients)


@pytest.mark.slow
def test_with_many_patients_signs_are_drawn_and_close_to_scipys() -> None:
    differences = np.random.default_rng(0).normal(0.25, 1, 60)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=50_000, rng=1)
    assert sign_flip(differences) == pytest.approx(theirs.pvalue, abs=0.01)
    assert paired({"a": differences[None]}).smallest_p == sign_flip(np.ones(60)) == 1 / 10_000


def test_sites_are_strata_that_count_alike() -> None:
    """The statistic is the mean over sites of means over patients; signs change within sites: scipy, written out."""
    gains = {"a": np.array([[1.0, 2.0, 0.5]]), "b": np.array([[3.0, -1.0, 2.0, 2.5, 0.25, 1.0]])}
    found = paired(gains)
    flat = np.concatenate([values[0] for values in gains.values()])
    means = stats.permutation_test(
        (flat,), lambda x: (x[:3].mean() + x[3:].mean()) / 2, permutation_type="samples", n_resamples=np.inf,
        vectorized=False,
    )  # fmt: skip
    assert found.p_patients == pytest.approx(means.pvalue)
    assert found.gain == pytest.approx(means.statistic)
    variance = sum(values[0].var(ddof=1) / values.size for values in gains.values()) / 4
    assert found.error == pytest.approx(np.sqrt(variance))


def test_ties_do_not_vote_and_all_ties_are_no_difference() -> None:
    found = paired({"a": np.array([[0.0, 1.0, 2.0, -3.0, 4.0, 0.0]])})
    assert (found.patients, found.better, found.worse) == (6, 3, 1)
    assert found.p_patients == sign_flip(np.array([1.0, 2.0, -3.0, 4.0]))
    assert found.smallest_p == 2 / 2**4
    found = paired({"a": np.array([[0.0, 1e-16, -1e-16]])})
    assert (found.p, found.better, found.worse, found.smallest_p) == (1.0, 0, 0, 1.0)


@pytest.mark.parametrize("patients", range(1, 9))
def test_the_smallest_p_is_what_all_patients_give_if_they_agree(patients: int) -> None:
    found = paired({"a": np.arange(1.0, patients + 1)[None]})
    assert found.smallest_p == found.p_patients == pytest.approx(min(1.0, 2 / 2**patients))


def test_images_of_a_patient_are_averaged_first() -> None:
    """Forty images of five patients are five numbers; a patient with many images weighs as much as one with one."""
    patients = np.repeat(np.arange(5), 8)
    scores = np.arange(40.0)[None]
    assert by_patient(scores, patients).tolist() == [[3.5, 11.5, 19.5, 27.5, 35.5]]
    uneven = np.array([[1.0, NAN, 5.0, 2.0], [NAN, NAN, 3.0, 4.0]])
    found = by_patient(uneven, np.array([0, 0, 0, 1]))
    assert found.tolist() == [[3.0, 2.0], [3.0, 4.0]]
    assert paired({"a": by_patient(scores, patients)}).smallest_p == 2 / 2**5


def test_the_luck_of_seeds_is_no_difference() -> None:
    """Patients agree within each training, trainings do not: signs of patients alone would see a difference."""
    patients = np.random.default_rng(3).normal(0, 0.2, 30)
    lucky = np.array([2.5, 0.5, 0.9])[:, None] + patients
    found = paired({"a": lucky})
    assert found.p_patients < 0.001
    assert found.p_error > 0.1
    assert found.p == found.p_error
    assert found.freedom == pytest.approx(2, abs=0.3)
    steady = np.array([1.3, 1.2, 1.4])[:, None] + patients
    assert paired({"a": steady}).p < 0.001


@pytest.mark.slow
def test_seeds_that_test_other_patients_are_not_lucky_for_that() -> None:
    """Without luck of the training, the error is that of the patients, whoever tested whom."""
    generator = np.random.default_rng(4)
    errors, spread = [], []
    for _ in range(200):
        scores = np.full((3, 60), NAN)
        people = generator.normal(1, 1, 60)
        for seed in range(3):
            own = generator.permutation(60)[:20]
            scores[seed, own] = people[own]
        found = paired({"a": scores})
        errors.append(found.error)
        spread.append(found.gain)
    assert np.std(spread) <= np.mean(errors) <= 1.4 * np.std(spread)


def test_a_paired_test_refuses_what_it_cannot_test() -> None:
    for differences in (np.empty((1, 0)), np.full((2, 3), NAN)):
        with pytest.raises(ValueError, match="finite differences"):
            paired({"a": differences})


def test_a_single_patient_has_no_error_of_its_own() -> None:
    found = paired({"a": np.array([[1.0]])})
    assert (found.p, found.smallest_p) == (1.0, 1.0)
    assert np.isnan(found.error)
    both = paired({"a": np.array([[1.0]]), "b": np.array([[1.0, 2.0, 3.0]])})
    assert both.error == pytest.approx(np.sqrt((1 + 1 / 3) / 4))


@pytest.mark.slow
@pytest.mark.parametrize("patients", [12, 60])
def test_what_could_be_shown_is_found_four_times_of_five(patients: int) -> None:
    generator, found, trials = np.random.default_rng(patients), 0, 400
    least = detectable(1 / np.sqrt(patients), patients - 1, 0.05)
    for _ in range(trials):
        found += paired({"a": generator.normal(least, 1, (1, patients))}).p <= 0.05
    assert 0.74 <= found / trials <= 0.86


def test_what_a_test_could_give_at_best_depends_on_its_family() -> None:
    assert attainable([0.5], 0, 0.01) == pytest.approx(0.01)
    assert attainable([0.5, 0.5, 0.5], 0, 0.01) == pytest.approx(0.03)
    assert attainable([0.5, 0.001], 0, 0.01) == pytest.approx(0.01)  # the other one comes first


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_cases_are_drawn_within_drawn_patients() -> None:
    generator = np.random.default_rng(3)
    patients = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5])
    scores = generator.normal(0, 1, (2, 6))[:, patients] + generator.normal(0, 0.7, (2, 10))
    scores[1, 0] = NAN
    found = bootstrap({"a": scores}, draws=20_000, confidence=0.95, patients={"a": patients}).sites["a"]
    drawn = []
    for _ in range(6_000):
        chosen = generator.integers(0, 6, 6)
        cases = {p: generator.choice(np.flatnonzero(patients == p), (patients == p).sum()) for p in range(6)}
        with np.errstate(invalid="ignore"):
            means = [
                [np.nanmean(row[cases[p]]) if np.isfinite(row[cases[p]]).any() else NAN for p in chosen]
                for row in scores
            ]
        drawn.append(np.mean(np.nanmean(means, axis=1)[generator.integers(0, 2, 2)]))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.06)
    assert found.mean == pytest.approx(np.mean(np.nanmean(by_patient(scores, patients), axis=1)))


def test_cases_that_a_seed_did_not_test_are_left_out() -> None:
    scores = np.array([[1.0, 1.0, NAN, NAN], [NAN, NAN, 3.0, 3.0]])
    found = bootstrap({"a": scores}, draws=500, confidence=0.95)
    assert found.sites["a"] == (2.0, 1.0, 3.0)
    assert bootstrap({"a": scores, "b": scores}, draws=500, confidence=0.95).overall == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("patients", [1, 2, 3])
@pytest.mark.parametrize("seeds", [1, 3])
def test_fewer_than_three_patients_have_no_interval_whatever_their_images_and_seeds(patients: int, seeds: int) -> None:
    generator = np.random.default_rng(0)
    scores = generator.uniform(size=(seeds, 4 * patients))
    whose = np.repeat(np.arange(patients), 4)
    alone = bootstrap({"a": scores}, draws=100, confidence=0.95, patients={"a": whose})
    apart = bootstrap({"a": scores, "b": scores}, draws=100, confidence=0.95, patients={"a": whose, "b": whose})
    ends = paired({"a": by_patient(scores, whose)}).interval(0.95)
    assert np.isfinite(alone.sites["a"].mean)
    assert np.isfinite([*alone.sites["a"][1:], *alone.overall[1:], *ends]).all() == (patients >= 3)
    assert np.isfinite(apart.overall[1:]).all() == (2 * patients >= 3)


def test_bootstrap_refuses_unequal_seeds() -> None:
    with pytest.raises(ValueError, match="same number of seeds"):
        bootstrap({"a": np.zeros((1, 2)), "b": np.zeros((2, 2))}, draws=100, confidence=0.95)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator, hits, trials = np.random.default_rng(2), 0, 400
    for trial in range(trials):
        interval = bootstrap({"a": generator.normal(1, 1, (1, 40))}, draws=400, confidence=0.9, seed=trial).sites["a"]
        hits += interval.low <= 1 <= interval.high
    assert 0.84 <= hits / trials <= 0.94  # percentile intervals are a little narrow


@pytest.mark.slow
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


@pytest.mark.slow
def test_without_a_difference_families_reject_at_the_stated_rate() -> None:
    """Four sites, twenty cases, three seeds that share the cases' luck: at most 5 % of the families say anything."""
    generator, single, families, trials = np.random.default_rng(5), 0, 0, 500
    for _ in range(trials):
        p_values = [paired({"a": _differences(generator, 0.0)}).p for _ in range(4)]
        single += sum(p < 0.05 for p in p_values)
        families += bool((holm(p_values) <= 0.05).any())
    assert 0.02 <= single / (4 * trials) <= 0.06
    assert families / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


@pytest.mark.slow
def test_seeds_are_no_cases() -> None:
    """Taking every seed's case as a case of its own would find differences that are not there; the average does not."""
    generator, naive, right, trials = np.random.default_rng(6), 0, 0, 400
    for _ in range(trials):
        differences = _differences(generator, 0.0)
        naive += paired({"a": differences.ravel()[None]}).p < 0.05
        right += paired({"a": differences}).p < 0.05
    assert naive / trials > 0.12
    assert right / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


@pytest.mark.slow
def test_a_gain_at_one_site_is_found_there_only() -> None:
    generator, found, elsewhere, trials = np.random.default_rng(7), 0, 0, 300
    for _ in range(trials):
        p_values = [paired({"a": _differences(generator, gain)}).p for gain in (0.0, 1.5, 0.0, 0.0)]
        rejected = holm(p_values) <= 0.05
        found += bool(rejected[1])
        elsewhere += bool(rejected[[0, 2, 3]].any())
    assert found / trials > 0.95
    assert elsewhere / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def _differences(generator: np.random.Generator, gain: float) -> np.ndarray:
    """(3 seeds, 20 cases): what is common to a case, and what a seed adds."""
    return gain + generator.normal(0, 1, 20) + generator.normal(0, 0.3, (3, 20))
