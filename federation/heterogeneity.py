"""Sites drawn by how far their labels are from all sites' and by how badly they learn, after FedACS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from random import Random
from statistics import fmean

import torch
from torch import Tensor

from fedseg.federation.selection import History, Past
from fedseg.federation.state import Tensors, Update

LABELS = "labels"
"""Topic of the introduction by which a site is asked for the histograms of its labels, and their group."""
BINS = 10
LARGEST_WEIGHT = 3.0


@dataclass(frozen=True)
class Heterogeneity:
    """Sites drawn by label distance and loss, as in FedACS (Gu et al., CISP-BMEI 2021).

    Their paper was not available; steps as in the algorithm of its sibling ACSFed, and where that leaves its function
    open, ours. A site's s is labels d / sum d + (1 - labels) loss / sum loss, over all sites; its strength H begins
    with s and, when it took part, becomes memory H + (1 - memory) s (their cumulative sum, in units in which a site
    that was never drawn has one, too). Its chance is P = (1 - chance) H / sum H + chance / K. A round draws as many
    sites as are asked, without replacement and so that each is among them with probability `asked` times its chance.

    Attributes:
        sites: all that can be asked.
        asked: how many are.
        labels: part of the label distances; at 0 sites are asked for no histograms.
        chance: share of the chances that is the same for all; 1 is uniform sampling, bit for bit.
        memory: how much of a site's strength stays when it took part again.
    """

    sites: Sequence[str]
    asked: int
    labels: float
    chance: float
    memory: float

    def __call__(self, round: int, history: History, random: Random) -> dict[str, float]:
        """All of the work for each site that is drawn."""
        probabilities = self.probabilities(history)
        if all(isclose(p, self.asked / len(self.sites), rel_tol=1e-9) for p in probabilities.values()):
            return dict.fromkeys(random.sample(list(self.sites), self.asked), 1.0)
        return dict.fromkeys(systematic(probabilities, self.asked, random), 1.0)

    @property
    def topic(self) -> str:
        """Histograms of labels, where they play a part."""
        return LABELS if self.labels else ""

    def probabilities(self, history: History) -> dict[str, float]:
        """Of each site, to be in a round; they sum to the number of sites in it."""
        even = self.chance / len(self.sites)
        chances = {site: (1 - self.chance) * own + even for site, own in shares(self.strengths(history)).items()}
        return inclusion(chances, self.asked)

    def strengths(self, history: History) -> dict[str, float]:
        """H of each site; what it would be now, of one that took no part yet."""
        now = self.scores(history)
        known = {site: past.strength for site, past in history.items()}
        return {site: now[site] if (own := known.get(site)) is None else own for site in self.sites}

    def scores(self, history: History) -> dict[str, float]:
        """Each site's s; one that told no loss yet counts as the mean of those that did. They sum to 1."""
        losses = {s: max(p.loss, 0.0) for s, p in history.items() if p.loss is not None}
        middle = fmean(losses.values()) if losses else 1.0
        known = {site: past.distance for site, past in history.items()}
        by_loss = shares({site: losses.get(site, middle) for site in self.sites})
        by_labels = shares({site: known.get(site) or 0.0 for site in self.sites})
        return {site: self.labels * by_labels[site] + (1 - self.labels) * by_loss[site] for site in self.sites}

    def introduced(self, introductions: Mapping[str, Update]) -> dict[str, Past]:
        """What is known of sites before round 1.

        Raises:
            ValueError: what a site told are no histograms.
        """
        images = {site: float(update.examples) for site, update in introductions.items()}
        far: Mapping[str, float] = {}
        if self.labels:
            far = distances(_checked({site: u.get(LABELS).get(LABELS) for site, u in introductions.items()}), images)
        return {site: Past(0, 0.0, None, count, far.get(site)) for site, count in images.items()}

    def remembered(self, history: History, told: History) -> dict[str, Past]:
        """What sites told before a round and in it, with the strengths of those that took part."""
        far = {site: past.distance for site, past in history.items()}
        now = {**history, **{site: replace(past, distance=far.get(site)) for site, past in told.items()}}
        before, scores = self.strengths(history), self.scores(now)
        for site in told:
            now[site] = replace(now[site], strength=self.memory * before[site] + (1 - self.memory) * scores[site])
        return now


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Values over their sum; all alike where that is nothing."""
    total = sum(values.values())
    return {name: value / total if total else 1 / len(values) for name, value in values.items()}


def inclusion(chances: Mapping[str, float], count: int) -> dict[str, float]:
    """Probabilities to be among so many, proportional to chances as far as none is above 1; they sum to the count."""
    certain: set[str] = set()
    while True:
        rest = {name: chance for name, chance in chances.items() if name not in certain}
        scale = (count - len(certain)) / sum(rest.values()) if rest else 0.0
        above = {name for name, chance in rest.items() if chance * scale >= 1}
        if not above:
            return {name: 1.0 if name in certain else chances[name] * scale for name in chances}
        certain |= above


def systematic(probabilities: Mapping[str, float], count: int, random: Random) -> list[str]:
    """So many names, each among them with exactly its probability (Madow, 1949, in an order drawn by chance)."""
    names = random.sample(list(probabilities), len(probabilities))
    drawn: list[str] = []
    start, reached = random.random(), 0.0
    for name in names:
        reached += probabilities[name]
        if len(drawn) < count and start + len(drawn) < reached:
            drawn.append(name)
    return drawn if len(drawn) == count else [*drawn, next(name for name in reversed(names) if name not in drawn)]


def corrections(probabilities: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What to multiply a site's weight by, so that the sum over those drawn has the sum over all sites as its mean.

    It is one over the probability; less where one update would count more than three times the whole sum.

    Args:
        probabilities: of each site, to be drawn.
        weights: of each site in the mean of all.
    """
    total = sum(weights.values())
    return {
        site: min(1 / p, LARGEST_WEIGHT * total / weights[site] if weights.get(site) else 1 / p)
        for site, p in probabilities.items()
    }


def histograms(covered: Tensor) -> Tensors:
    """How a site's cases spread over the share of the image that a region covers.

    Bins are even in the root of the share, since most regions are small. A region that was annotated in no case has
    zeros.

    Args:
        covered: (N, R) shares of N cases; NaN where a region was not annotated.

    Returns:
        (R, 10) float64 shares of the cases, under the group's name.
    """
    places = (covered.double().sqrt() * BINS).floor().clamp(0, BINS - 1)
    hits = (places.unsqueeze(-1) == torch.arange(BINS, dtype=torch.float64)).double().sum(dim=0)
    return {LABELS: hits / hits.sum(dim=-1, keepdim=True).clamp(min=1)}


def distances(found: Mapping[str, Tensor], images: Mapping[str, float]) -> dict[str, float]:
    """Half the L1 distance of each site's histograms to the mean of all by images, from 0 to 1, mean over its regions.

    Args:
        found: site -> (R, 10); a row of zeros of a region that was not annotated there, which then does not count.
        images: site -> how many it has.
    """
    there = {site: q.sum(dim=-1) > 0.5 for site, q in found.items()}
    weight = torch.stack([there[site].double() * images[site] for site in found])  # (K, R)
    stacked = torch.stack(list(found.values()))
    mean = (weight.unsqueeze(-1) * stacked).sum(dim=0) / weight.sum(dim=0).clamp(min=1e-12).unsqueeze(-1)
    apart = {site: ((q - mean).abs().sum(dim=-1) / 2)[there[site]] for site, q in found.items()}
    return {site: float(own.mean()) if len(own) else 0.0 for site, own in apart.items()}


def _checked(told: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site, q in told.items():
        if q is None or q.dtype != torch.float64 or q.ndim != 2 or q.shape[1] != BINS:
            raise ValueError(f"site {site!r} told no histograms of its labels, one of {BINS} bins for each region")
        sums = q.sum(dim=-1)
        if not bool((q >= 0).all()) or not bool(((sums - 1).abs() < 1e-6).logical_or(sums == 0).all()):
            raise ValueError(f"site {site!r} told histograms of its labels that are no shares")
        found[site] = q
    if len({len(q) for q in found.values()}) > 1:
        counts = ", ".join(f"{site} {len(q)}" for site, q in found.items())
        raise ValueError(f"sites told histograms of different numbers of regions: {counts}")
    return found
