"""Several raters' masks of one case: what is learnt, what is scored against, and how far they agree."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.cases import Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import few
from fedseg.datamodules.readers.labels import unknown_labels
from fedseg.datamodules.readers.settings import MAJORITY, RANDOM, STAPLE, Reading

Labels = NDArray[np.uint8]
Probabilities = NDArray[np.float64]
STEPS, CLOSE = 1000, 1e-8


class Opinions(NamedTuple):
    """What raters say, pixel by pixel, each combination of answers once.

    Attributes:
        answers: (M, R) label ids.
        counts: (M,) pixels that have them.
        places: (D, H, W), which of the M a pixel has.
    """

    answers: Labels
    counts: NDArray[np.int64]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, masks: Sequence[Labels]) -> Opinions:
        """Of masks (D, H, W), one for each rater."""
        answers, places = np.zeros((1, 0), np.uint8), np.zeros(masks[0].size, np.int64)
        for mask in masks:  # there are few combinations, so that no pixel need be sorted
            ids = np.flatnonzero(np.bincount(mask.ravel()))
            number = np.zeros(256, np.int64)
            number[ids] = np.arange(len(ids))
            places = places * len(ids) + number[mask.ravel()]
            counts = np.bincount(places)
            there = np.flatnonzero(counts)
            answers = np.column_stack([answers[there // len(ids)], ids.astype(np.uint8)[there % len(ids)]])
            renumbered = np.zeros(len(counts), np.int64)
            renumbered[there] = np.arange(len(there))
            places = renumbered[places]
        return cls(answers, np.bincount(places), places.reshape(masks[0].shape))

    def settled(self, ids: Labels) -> Labels:
        """(D, H, W) of a label id (M,) for each combination of answers."""
        return ids[self.places]


def settled(sample: Sample, masks: Mapping[str, Labels], reading: Reading) -> Sample:
    """A case with the masks of its raters made one truth, which is scored against, and what is learnt.

    Args:
        sample: The case.
        masks: Rater to label ids (D, H, W); in the order of the setting.
        reading: Says how.

    Raises:
        DataError: A rater who is asked for has no mask of the case, or label ids are in no region.
    """
    for rater, labels in masks.items():
        if unknown := {int(label) for label in np.flatnonzero(np.bincount(labels.ravel()))} - {0, *reading.ids}:
            known = {label for ids in reading.regions.values() for label in ids}
            raise DataError(f"the mask of rater {rater!r} has unknown label ids {unknown_labels(unknown, known)}")
    opinions = Opinions.of([*masks.values()])
    truth = _truth("raters_test", reading.raters_test, masks, opinions, reading)
    if reading.raters_train == RANDOM:
        taught = tuple(masks.values())
    elif reading.raters_train == reading.raters_test:
        taught = ()
    else:
        taught = (_truth("raters_train", reading.raters_train, masks, opinions, reading),)
    return replace(sample, labels=truth, taught=taught, agreement=tuple(agreement(opinions, reading).items()))


def _truth(setting: str, how: str, masks: Mapping[str, Labels], opinions: Opinions, reading: Reading) -> Labels:
    if how == MAJORITY:
        return opinions.settled(majority(opinions, reading))
    if how == STAPLE:
        return opinions.settled(staple(opinions, reading)[0])
    if how not in masks:
        raise DataError(
            f"data.{setting}={how}: has no mask by rater {how!r}, but by {few([*masks])}; leave the case out, or take "
            f"{MAJORITY}, {STAPLE}" + f", {RANDOM}" * (setting == "raters_train") + " or another rater"
        )
    return masks[how]


def majority(opinions: Opinions, reading: Reading) -> Labels:
    """(M,) label ids by the votes for each region: of more than half of the raters.

    Of all label ids it is that whose regions differ from the raters' in the fewest places together, the smallest of
    several, so that half of the votes outline nothing. Where raters agree, their label id stays. Who says that a pixel
    does not count has no vote there; if nobody has, it does not count.
    """
    ids = np.array([label for label in (0, *reading.ids) if label not in reading.ignored], np.uint8)
    shows = _shows(reading)
    voting = ~np.isin(opinions.answers, reading.ignored)
    votes = (shows[opinions.answers] & voting[..., None]).sum(axis=1)  # (M, regions)
    against = voting.sum(axis=1)[:, None, None] - votes[:, None]
    costs = np.where(shows[ids], against, votes[:, None]).sum(axis=2)
    alike = (opinions.answers == opinions.answers[:, :1]).all(axis=1) | ~voting.any(axis=1)
    return np.where(alike, opinions.answers[:, 0], ids[costs.argmin(axis=1)])


def staple(opinions: Opinions, reading: Reading) -> tuple[Labels, Probabilities]:
    """Warfield, Zou, Wells, IEEE TMI 2004, for any number of labels: truth and raters' reliability by EM.

    A rater j answers l where s is true with probability theta_j(l, s). E: how probable each s is, given all answers; M:
    theta_j from these. How frequent labels are (the prior) stays what all raters' answers say together. The first
    truth is that of `majority`. No field couples neighbouring pixels, and all pixels of the case count, so that a
    large background makes every rater look specific, as in ITK.

    Returns:
        (M,) label ids, the most probable ones; and theta, (R, S, S) over the label ids that occur, answers first.
    """
    answers, weights = opinions.answers, opinions.counts.astype(np.float64)
    there = np.setdiff1d(np.unique(answers), reading.ignored)
    if not len(there):
        return answers[:, 0], np.ones((answers.shape[1], 0, 0))
    said = answers[..., None] == there  # (M, R, S); nothing where a rater says that the pixel does not count
    prior = (said * weights[:, None, None]).sum(axis=(0, 1))
    with np.errstate(divide="ignore"):
        prior = np.log(prior / prior.sum())
    first = majority(opinions, reading)
    truth = (first[:, None] == there).astype(np.float64)
    theta = np.zeros((answers.shape[1], len(there), len(there)))
    for _ in range(STEPS):
        before = theta
        mass = np.einsum("mrl,ms,m->rls", said, truth, weights)
        theta = mass / np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        with np.errstate(divide="ignore"):
            logs = np.log(theta)
        likely = prior + np.where(said[..., None], logs[None], 0).sum(axis=(1, 2))  # (M, S)
        top = likely.max(axis=1, keepdims=True)
        truth = np.exp(likely - np.where(np.isfinite(top), top, 0))
        truth /= truth.sum(axis=1, keepdims=True)
        if (moved := np.abs(theta - before).max()) < CLOSE:
            break
    else:
        print(
            f"warning: STAPLE: after {STEPS} steps the reliability of a case's raters moves by {moved:.0e} in each; "
            f"{MAJORITY} needs none",
            file=sys.stderr,
        )
    return np.where(said.any(axis=(1, 2)), there[truth.argmax(axis=1)], first), theta


def agreement(opinions: Opinions, reading: Reading) -> dict[str, float]:
    """Region to the mean Dice of all pairs of raters, of pixels that count for both.

    Pairs of whom neither shows the region are left out; a region that no rater shows, and that of one rater, is not in
    it.
    """
    shown, counting = _shows(reading)[opinions.answers], ~np.isin(opinions.answers, reading.ignored)
    found: dict[str, list[float]] = {name: [] for name in reading.regions}
    for a, b in combinations(range(opinions.answers.shape[1]), 2):
        both = counting[:, a] & counting[:, b]
        for number, name in enumerate(reading.regions):
            ours, theirs = (shown[:, rater, number] & both for rater in (a, b))
            if total := int(opinions.counts[ours].sum() + opinions.counts[theirs].sum()):
                found[name].append(2 * int(opinions.counts[ours & theirs].sum()) / total)
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _shows(reading: Reading) -> NDArray[np.bool_]:
    """(256, regions): which regions a label id shows."""
    return np.array([[label in ids for ids in reading.regions.values()] for label in range(256)], bool)
