"""Named regions over label ids: what a network learns to outline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from fedseg.datamodules.errors import DataError


@dataclass(frozen=True)
class Regions:
    """Named sets of label ids, in the order of the network's outputs.

    Attributes:
        labels: Region name to label ids (1 to 255), such as ``{"disc": (1, 2), "cup": (2,)}``.
        exclusive: False: one sigmoid per region, regions may nest or overlap. True: one softmax over background and
            regions, which then must be disjoint.

    Raises:
        DataError: No region, an empty region, an id outside 1 to 255, or exclusive regions that share an id.
    """

    labels: Mapping[str, tuple[int, ...]]
    exclusive: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", {name: tuple(ids) for name, ids in self.labels.items()})
        if not self.labels:
            raise DataError("data.regions is empty: name at least one, such as {foreground: [1]}")
        for name, ids in self.labels.items():
            _check_ids(name, ids)
        if self.exclusive:
            self._check_disjoint()

    def _check_disjoint(self) -> None:
        owner: dict[int, str] = {}
        for name, ids in self.labels.items():
            for label in ids:
                if label in owner:
                    raise DataError(
                        f"data.regions: {owner[label]!r} and {name!r} share label {label}, but data.exclusive=true "
                        "needs disjoint regions; remove the shared label or set data.exclusive=false"
                    )
                owner[label] = name

    @property
    def names(self) -> tuple[str, ...]:
        """Region names in channel order."""
        return tuple(self.labels)

    @property
    def ids(self) -> frozenset[int]:
        """Every label id that belongs to a region."""
        return frozenset(label for ids in self.labels.values() for label in ids)

    @property
    def channels(self) -> int:
        """Outputs of the network: one per region, and for softmax one more for the background, which comes first."""
        return len(self.labels) + int(self.exclusive)

    @property
    def activation(self) -> Literal["sigmoid", "softmax"]:
        """What turns the network's outputs into probabilities."""
        return "softmax" if self.exclusive else "sigmoid"

    def encode(self, labels: Tensor, dimensions: int = 2) -> Tensor:
        """One binary map per region; the background never has a channel.

        Args:
            labels: (..., H, W) integer label ids.
            dimensions: After the regions: 3 makes (..., R, D, H, W) of (..., D, H, W).

        Returns:
            (..., R, H, W) float32, 0 or 1.
        """
        # comparisons are far faster than torch.isin, which widens the labels first
        maps = [reduce(torch.logical_or, (labels == label for label in ids)) for ids in self.labels.values()]
        return torch.stack(maps, dim=-1 - dimensions).float()

    def known(self, labels: Tensor, ignored: Collection[int], dimensions: int = 2) -> Tensor:
        """Where labels count: of the shape of :meth:`encode`, 0 at pixels with an ignored label id, else 1."""
        nowhere = torch.zeros_like(labels, dtype=torch.bool)
        counts = ~reduce(torch.logical_or, (labels == label for label in ignored), nowhere)
        place = -1 - dimensions
        return counts.float().unsqueeze(place).repeat_interleave(len(self.labels), dim=place)


def _check_ids(name: str, ids: tuple[int, ...]) -> None:
    if not name:
        raise DataError("data.regions: a region needs a name")
    if not ids:
        raise DataError(f"data.regions.{name} is empty: list its label ids, such as [1]")
    if len(set(ids)) != len(ids):
        raise DataError(f"data.regions.{name} lists a label id twice: {list(ids)}")
    if 0 in ids:
        raise DataError(f"data.regions.{name} contains label 0, which is always the background; remove it")
    wrong = [label for label in ids if not 1 <= label <= 255]
    if wrong:
        raise DataError(f"data.regions.{name} contains {wrong}: label ids run from 1 to 255 (data.label_values maps)")
