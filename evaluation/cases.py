"""Predictions gathered case by case, and their scores.

Masks are decided and scored on the network's grid; where the spacing is known, distances are in millimetres all the
same, since the spacing accounts for the resize. One case at a time is in memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedseg.datamodules.cases import Case, Split
from fedseg.datamodules.regions import Regions
from fedseg.evaluation.metrics import Mask, Spacing, check_metrics, score_known
from fedseg.models.heads import decide

Predict = Callable[[Tensor], Tensor]


class DivergedError(ValueError):
    """A model whose probabilities are no numbers any more."""


class ScoredSite(Protocol):
    """What evaluation needs of a site; `datamodules.SiteData` has it."""

    name: str

    def eval_batches(self, split: Split) -> Iterable[dict[str, Any]]:
        """Batches of image, mask, case, slice and depth: case after case, slices in order."""

    def cases(self, split: Split) -> list[Case]:
        """The cases, in the same order."""

    def spacing(self, case: Case) -> Spacing:
        """Millimetres per voxel on the network's grid, or None."""


@dataclass(frozen=True)
class CaseMasks:
    """What was predicted for a case, and what is true.

    Attributes:
        case: The case.
        prediction: (R, D, H, W) bool, regions in the order of `Regions.names`.
        truth: (R, D, H, W) bool.
        known: (R, D, H, W) bool, where labels count; None: everywhere.
    """

    case: Case
    prediction: Mask
    truth: Mask
    known: Mask | None = None


class CaseScore(NamedTuple):
    """One number: a metric of one region of one case."""

    case: str
    region: str
    metric: str
    value: float


def evaluate(
    predict: Predict,
    site: ScoredSite,
    split: Split,
    regions: Regions,
    *,
    metrics: Sequence[str],
    tolerance: float,
) -> list[CaseScore]:
    """Score a model on every case of a split.

    Args:
        predict: Images (B, C, H, W) in [0, 1], as the batches hold them, to probabilities (B, R, H, W) on any device.
        site: The site to score.
        split: The split to score.
        regions: What the channels of the probabilities are.
        metrics: Names of `evaluation.metrics.METRICS`, such as `QUICK` or `FULL`.
        tolerance: Of nsd, in millimetres for cases with known spacing, else in pixels.

    Returns:
        One entry per case, region and metric, in that order; empty if the split has no case.

    Raises:
        DivergedError: The model's probabilities are not finite.
        ValueError: Unknown metrics, probabilities that do not fit the regions, slices missing or out of order.
    """
    check_metrics(metrics, tolerance)
    scores = []
    for masks in predict_cases(predict, site, split, regions):
        spacing = site.spacing(masks.case)
        known = np.ones_like(masks.truth) if masks.known is None else masks.known
        of_regions = zip(regions.names, masks.prediction, masks.truth, known, strict=True)
        for region, prediction, truth, counts in of_regions:
            values = score_known(prediction, truth, counts, spacing, metrics, tolerance)
            scores += [CaseScore(masks.case.case, region, metric, value) for metric, value in values.items()]
    return scores


def predict_cases(
    predict: Predict, site: ScoredSite, split: Split, regions: Regions, *, only: Collection[str] | None = None
) -> Iterator[CaseMasks]:
    """Predict cases one after the other, the slices of a volume gathered.

    Args:
        predict: As for `evaluate`.
        site: The site to score.
        split: The split to score.
        regions: What the channels of the probabilities are.
        only: Names of the cases to predict (for pictures); None: all of the split.

    Yields:
        One entry per case, in the order of the split.

    Raises:
        DivergedError: The model's probabilities are not finite.
        ValueError: Probabilities that do not fit the regions; slices missing or out of order.
    """
    slices = _slices(predict, site, split, regions, only)
    for case in site.cases(split):
        parts: list[_Slice] = []
        while not parts or len(parts) < parts[0].depth:
            part = next(slices, None)
            if part is None or (part.case, part.number) != (case.case, len(parts)):
                raise ValueError(
                    f"site {site.name!r}: slice {len(parts)} of case {case.case!r} is missing or out of order"
                )
            parts.append(part)
        if only is None or case.case in only:
            gathered = (np.stack(masks, axis=1) for masks in zip(*(p.masks for p in parts), strict=True))
            yield CaseMasks(case, *gathered)


class _Slice(NamedTuple):
    """One slice: its case, its number there, how many there are; if wanted, the masks (R, H, W) of `CaseMasks`."""

    case: str
    number: int
    depth: int
    masks: tuple[Mask, ...]


def _slices(
    predict: Predict, site: ScoredSite, split: Split, regions: Regions, only: Collection[str] | None
) -> Iterator[_Slice]:
    for batch in site.eval_batches(split):
        names = batch["case"]
        wanted = [only is None or name in only for name in names]
        masks = iter(_masks(predict, batch, wanted, regions, site.name) if any(wanted) else ())
        for i, name in enumerate(names):
            number, depth = int(batch["slice"][i]), int(batch["depth"][i])
            yield _Slice(name, number, depth, next(masks) if wanted[i] else ())


def _masks(
    predict: Predict, batch: dict[str, Any], wanted: list[bool], regions: Regions, site: str
) -> list[tuple[Mask, ...]]:
    """Predicted and true masks (R, H, W) of the wanted slices of a batch, and where they count if that is told."""
    truth = batch["mask"][wanted] > 0.5
    with torch.no_grad():
        probabilities = predict(batch["image"][wanted])
    if probabilities.shape != truth.shape:
        raise ValueError(
            f"the model predicts {tuple(probabilities.shape)}, the masks of regions {', '.join(regions.names)} are "
            f"{tuple(truth.shape)}"
        )
    if not probabilities.isfinite().all():
        names = dict.fromkeys(name for name, want in zip(batch["case"], wanted, strict=True) if want)
        raise DivergedError(f"site {site!r}: the model's probabilities are not finite (cases {', '.join(names)})")
    prediction = decide(probabilities, regions.activation).cpu()
    masks = [prediction, truth.cpu()]
    if "known" in batch:
        masks.append(batch["known"][wanted].cpu() > 0.5)
    return list(zip(*(mask.numpy() for mask in masks), strict=True))
