"""Splits by patient, and label budgets."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.datamodules import Case, DataError
from fedseg.datamodules.splits import assign, budget, check_fractions

FRACTIONS = [0.6, 0.15, 0.25]


def cases_of(patients: list[int], site: str = "a", split: dict[int, str] | None = None) -> list[Case]:
    official = split or {}
    return [
        Case(site, f"c{number}", f"p{patient}", mask="", split=official.get(patient))  # type: ignore[arg-type]
        for number, patient in enumerate(patients)
    ]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 5), st.randoms())
def test_no_patient_is_cut_and_the_order_of_files_is_nothing(
    patients: list[int], seed: int, shuffler: random.Random
) -> None:
    cases = cases_of(patients)
    if len(set(patients)) == 1:
        with pytest.raises(DataError, match="single labelled patient"):
            assign(cases, FRACTIONS, seed)
        return
    split = assign(cases, FRACTIONS, seed)
    by_patient: dict[str, set[str]] = {}
    for case in cases:
        by_patient.setdefault(case.patient, set()).add(split[case.case])
    assert all(len(splits) == 1 for splits in by_patient.values())
    assert {"train", "test"} <= set(split.values())
    shuffler.shuffle(cases)
    assert assign(cases, FRACTIONS, seed) == split


def test_fractions_count_patients_and_the_seed_matters() -> None:
    cases = cases_of(list(range(40)))
    split = assign(cases, FRACTIONS, 0)
    assert Counter(split.values()) == {"train": 24, "val": 6, "test": 10}
    assert split != assign(cases, FRACTIONS, 1)


def test_sites_of_equal_patients_are_split_differently() -> None:
    assert assign(cases_of(list(range(40)), "a"), FRACTIONS, 0) != assign(cases_of(list(range(40)), "b"), FRACTIONS, 0)


@pytest.mark.parametrize(
    ("patients", "expected"), [(2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (6, (4, 1, 1)), (14, (8, 2, 4))]
)
def test_few_patients_still_train_and_test(patients: int, expected: tuple[int, int, int]) -> None:
    counts = Counter(assign(cases_of(list(range(patients))), FRACTIONS, 3).values())
    assert (counts["train"], counts["val"], counts["test"]) == expected


def test_official_splits_stand_and_validation_is_carved_out_of_train() -> None:
    official = {**dict.fromkeys(range(10), "train"), 10: "test", 11: "test"}
    split = assign(cases_of(list(range(12)) * 2, split=official), FRACTIONS, 0)
    assert {name for name, place in split.items() if place == "test"} == {"c10", "c11", "c22", "c23"}
    assert Counter(split.values()) == {"train": 16, "val": 4, "test": 4}  # 0.15 / 0.75 of ten patients


def test_complete_official_splits_are_left_alone() -> None:
    official = {0: "train", 1: "val", 2: "test", 3: "test"}
    assert assign(cases_of([0, 1, 2, 3], split=official), FRACTIONS, 0) == {
        "c0": "train",
        "c1": "val",
        "c2": "test",
        "c3": "test",
    }


def test_a_patient_with_an_official_split_has_it_for_all_cases() -> None:
    cases = [Case("a", f"c{i}", "p" if i < 2 else f"q{i}", mask="", split="test" if i == 0 else None) for i in range(9)]
    assert assign(cases, FRACTIONS, 0)["c1"] == "test"


def test_patients_without_labels_train() -> None:
    cases = [*cases_of(list(range(6))), Case("a", "u", "u")]
    assert assign(cases, FRACTIONS, 0)["u"] == "train"


def test_budgets_are_nested() -> None:
    patients = [f"p{i}" for i in range(9)]
    budgets = [budget(patients, "a", count, 0) for count in range(1, 12)]
    assert [len(chosen) for chosen in budgets] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert all(small <= large for small, large in pairwise(budgets))
    assert budget(patients, "a", None, 0) == set(patients)


@pytest.mark.parametrize("fractions", [[0.5, 0.5], [0.5, 0.2, 0.2], [-0.1, 0.6, 0.5], [0.0, 0.5, 0.5]])
def test_bad_fractions_are_refused(fractions: list[float]) -> None:
    with pytest.raises(DataError, match="sum to 1"):
        check_fractions(fractions)
