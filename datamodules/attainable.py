"""The best score that the network's grid allows: of a perfect mask, reduced to the grid and brought back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedseg.datamodules.cases import Case
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.fitting import Box, on_own_grid
from fedseg.datamodules.regions import Regions

Labels = NDArray[np.uint8]
LOW = 0.9
"""A mean Dice below this is warned of: the grid, not the model, would be what is measured."""
MOST_TRIED = 10  # cases on which a finer grid is tried


def attainable_dice(
    labels: Labels, grid: Labels, regions: Regions, ignored: Sequence[int], box: Box | None = None
) -> dict[str, float]:
    """Dice of a perfect mask on the network's grid, brought back as probabilities are; regions that occur only.

    Args:
        labels: (D, H, W) label ids as stored.
        grid: (d, h, w), the same on the network's grid.
        regions: Of the run.
        ignored: Label ids of pixels that do not count.
        box: To which the case is cut.
    """
    counts = np.zeros((3, len(regions.names)), np.int64)
    maps_on_grid = (_maps(small, regions).astype(np.float32) for small in grid)
    back = on_own_grid(maps_on_grid, len(grid), labels.shape, box)
    for plane, maps in zip(labels, back, strict=True):
        known = ~np.isin(plane, ignored)
        truth = _maps(plane, regions) & known
        mask = _decided(maps, regions.exclusive) & known
        counts += [[int(part[i].sum()) for i in range(len(truth))] for part in (mask & truth, mask, truth)]
    found = zip(regions.names, *counts.tolist(), strict=True)
    return {name: 2 * both / (own + true) for name, both, own, true in found if true}


def _maps(labels: Labels, regions: Regions) -> NDArray[np.bool_]:
    return np.asarray(regions.encode(torch.from_numpy(labels)).numpy() > 0.5)


def _decided(maps: NDArray[np.float32], exclusive: bool) -> NDArray[np.bool_]:
    """(R, H, W): where a model that is as sure would outline each region."""
    if not exclusive:
        return maps > 0.5
    winner = np.concatenate([1 - maps.sum(axis=0, keepdims=True), maps]).argmax(axis=0)
    return np.stack([winner == number for number in range(1, len(maps) + 1)])


@dataclass
class Attainable:
    """The labelled cases of one site.

    Attributes:
        site: Its name.
        cases: Region to the cases that show it, each with its best attainable Dice.
    """

    site: str
    cases: dict[str, list[tuple[Case, float]]] = field(default_factory=dict)

    def add(self, case: Case, found: Mapping[str, float]) -> None:
        """Takes a case."""
        for region, dice in found.items():
            self.cases.setdefault(region, []).append((case, dice))

    def mean(self, region: str) -> float:
        """Over the cases that show a region; NaN where none does."""
        values = [dice for _, dice in self.cases.get(region, ())]
        return float(np.mean(values)) if values else float("nan")

    def lowest(self, region: str) -> float:
        """Of the cases that show a region; NaN where none does."""
        return min((dice for _, dice in self.cases.get(region, ())), default=float("nan"))

    def examples(self, region: str) -> list[Case]:
        """Some cases, from the lowest to the highest Dice, whose mean is about that of all."""
        ranked = sorted(self.cases[region], key=lambda pair: pair[1])
        places = np.linspace(0, len(ranked) - 1, min(len(ranked), MOST_TRIED)).round().astype(int)
        return [ranked[place][0] for place in places]


def attainable_findings(
    sites: Sequence[Attainable],
    annotated: Callable[[str], Sequence[str]],
    setting: str,
    setting_that_allows: Callable[[Sequence[Case], str, float], str],
) -> Iterator[Finding]:
    """Where the grid costs so much that scores tell more of it than of models.

    Args:
        sites: All that are there.
        annotated: The regions that count at a site.
        setting: That the network's grid follows from, as it is written: data.size=128.
        setting_that_allows: Of cases, a region and a mean Dice: the setting with which a perfect mask reaches it.
    """
    for site in sites:
        for region in annotated(site.site):
            if site.mean(region) < LOW:
                what = (
                    f"on the network's grid ({setting}) a perfect mask of {region!r} scores a Dice of "
                    f"{site.mean(region):.2f} only (mean of {len(site.cases[region])} cases, lowest "
                    f"{site.lowest(region):.2f}): no model can be expected to score more"
                )
                finer = setting_that_allows(site.examples(region), region, LOW)
                cure = f"set {finer}, which allows at least {LOW:g}"
                yield Finding("grid too coarse", what, cure, site.site)
