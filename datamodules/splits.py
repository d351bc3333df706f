"""Splits by patient: seeded, independent of the order of files and of other sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import floor

from fedseg.common.seeds import data_seed
from fedseg.datamodules.cases import SPLITS, Case, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuses fractions that do not split anything.

    Raises:
        DataError: Not three, negative, not summing to 1, or nothing to train on.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise DataError(
            f"data.split={list(fractions)}: give three fractions of the patients (train, val, test) that sum to 1, "
            "train above 0"
        )


def assign(cases: Sequence[Case], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """The split of every case of one seen site.

    Official splits stand; a patient who has one for some case has it for all. Other patients are shared out by
    ``fractions``. Where the official splits name train patients but lack val or test, the missing one is carved out of
    train. Patients without any label train (unlabelled) unless the official split says otherwise.

    Args:
        cases: All cases of one site, in any order.
        fractions: Train, val and test as fractions of the site's patients.
        seed: Of the split.

    Returns:
        Case name to split.

    Raises:
        DataError: One patient only, who cannot both train and test.
    """
    site = cases[0].site
    official = {case.patient: case.split for case in cases if case.split is not None}
    labelled = {case.patient for case in cases if case.labelled}
    split: dict[str, Split] = dict.fromkeys({c.patient for c in cases} - labelled, "train")
    free = ranked(labelled - set(official), site, seed)
    if len(free) == 1 and not official and max(fractions) < 1:
        raise DataError(
            f"site {site!r} has a single labelled patient ({free[0]!r}), who cannot both train and test; add patients, "
            f"or hold the site out with data.unseen=[{site}]"
        )
    split |= _share_out(free, fractions)
    split |= official
    if official:
        split |= _carve(split, labelled, site, fractions, seed)
    return {case.case: split[case.patient] for case in cases}


def too_few(
    site: str, split: Mapping[str, str], cases: Sequence[Case], fractions: Sequence[float]
) -> Iterator[Finding]:
    """Splits of a site that trains which nobody is left for.

    Args:
        site: Its name.
        split: Case to split.
        cases: All of the site.
        fractions: Train, val and test as fractions of the site's patients.
    """
    filled = set(split.values())
    for name, fraction in zip(SPLITS[1:], fractions[1:], strict=True):
        if "train" in filled and name not in filled and fraction > 0:
            what = f"{len({case.patient for case in cases})} patients are too few: none is left for {name}"
            cure = f"add patients, set another data.split, or hold the site out with data.unseen=[{site}]"
            yield Finding("empty split", what, cure, site)


def budget(patients: Iterable[str], site: str, count: int | None, seed: int) -> frozenset[str]:
    """The patients whose labels may be used; a smaller budget is a subset of a larger one.

    Args:
        patients: Labelled training patients of one site.
        site: Name of the site.
        count: How many patients at most; None: all.
        seed: Of the split.
    """
    return frozenset(ranked(patients, site, seed, "labels")[:count])


def check_shares(site: str, shares: Mapping[int, float]) -> dict[int, float]:
    """Shares of a site's training patients by the round with which they come.

    Raises:
        DataError: they leave nobody for the start, or name the start itself.
    """
    told = f"data.arrives={{{site}: {dict(shares)}}}"
    if odd := [round for round in shares if round < 2]:
        raise DataError(f"{told}: name rounds from 2 on, not {odd[0]}; who is not named is there from round 1")
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) >= 1:
        raise DataError(f"{told}: give shares above 0 that sum to less than 1; who is left is there from round 1")
    return dict(shares)


def arrivals(patients: Iterable[str], site: str, shares: Mapping[int, float], seed: int) -> dict[str, int]:
    """Patients who come later, and with which round; the last of a random order that depends on nothing else.

    Args:
        patients: Training patients of one site.
        site: Name of the site.
        shares: See `check_shares`.
        seed: Of the split.

    Raises:
        DataError: A share of them is nobody.
    """
    waiting = ranked(patients, site, seed, "arrival")
    count = len(waiting)
    found: dict[str, int] = {}
    for round in sorted(shares, reverse=True):
        coming = floor(shares[round] * count + 0.5)
        if not coming:
            raise DataError(
                f"site {site!r}: {shares[round]:g} of {count} training patients (data.arrives, round {round}) is "
                "nobody; take a larger share"
            )
        waiting, late = waiting[:-coming], waiting[-coming:]
        found |= dict.fromkeys(late, round)
    return found


def ranked(patients: Iterable[str], site: str, seed: int, purpose: str = "split") -> list[str]:
    """Patients in a random order in which a patient's rank against another depends on nothing else."""
    return sorted(patients, key=lambda patient: (data_seed(seed, purpose, site, patient), patient))


def _share_out(patients: Sequence[str], fractions: Sequence[float]) -> dict[str, Split]:
    counts = _counts(len(patients), fractions)
    places: list[Split] = [name for name in reversed(SPLITS) for _ in range(counts[name])]
    return dict(zip(patients, places, strict=True))


def _counts(patients: int, fractions: Sequence[float]) -> dict[Split, int]:
    """Largest remainders, then at least one patient to train, to test and to validate, in this order, if there are."""
    exact = [fraction * patients for fraction in fractions]
    counts = [floor(share + 1e-9) for share in exact]
    by_remainder = sorted(range(3), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: patients - sum(counts)]:
        counts[i] += 1
    for i in (0, 2, 1):
        richest = max(range(3), key=lambda j: (counts[j], -j))
        if counts[i] == 0 and fractions[i] > 0 and counts[richest] > 1:
            counts[richest] -= 1
            counts[i] += 1
    return dict(zip(SPLITS, counts, strict=True))


def _carve(
    split: Mapping[str, Split], labelled: set[str], site: str, fractions: Sequence[float], seed: int
) -> dict[str, Split]:
    """Takes the splits that the official ones lack out of train, at least one patient each while train keeps one."""
    carved: dict[str, Split] = {}
    present = {split[patient] for patient in labelled}
    train = ranked((patient for patient in labelled if split[patient] == "train"), site, seed)
    wanted: list[tuple[Split, float]] = [("test", fractions[2]), ("val", fractions[1])]
    for name, fraction in wanted:
        if name in present or fraction == 0 or len(train) < 2:
            continue
        count = min(len(train) - 1, max(1, round(len(train) * fraction / (fractions[0] + fraction))))
        carved |= dict.fromkeys(train[:count], name)
        train = train[count:]
    return carved
