"""Predictions gathered case by case, and their scores.

On the case's own grid, slice after slice is brought back as `predict.py` does it, and only then decided; the truth is
read again from its file. On the network's grid, both masks are those that the network sees. Where the spacing is known,
distances are in millimetres on either. One case at a time is in memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedseg.datamodules.cases import Case, Sample, Split
from fedseg.datamodules.fitting import on_own_grid
from fedseg.datamodules.regions import Regions
from fedseg.evaluation.calibration import Reliability
from fedseg.evaluation.metrics import CALIBRATION, LENGTHS, Mask, Spacing, check_metrics, score_known
from fedseg.models.heads import decide

Predict = Callable[[Tensor], Tensor]
Grid = Literal["own", "network"]
"""Where masks are compared: on the stored image's or volume's own pixels, or on the network's."""
MILLIMETRES, PIXELS = "mm", "px"


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

    def at_own_size(self, case: Case) -> Sample:
        """The case as stored."""

    def known(self, case: Case, labels: NDArray[np.uint8]) -> Mask | None:
        """Where labels (D, H, W) of a case count: (D, R, H, W); None where all do."""


@dataclass(frozen=True)
class CaseMasks:
    """What was predicted for a case, and what is true.

    Attributes:
        case: The case.
        prediction: (R, D, H, W) bool, regions in the order of `Regions.names`.
        truth: (R, D, H, W) bool.
        known: (R, D, H, W) bool, where labels count; None: everywhere.
        spacing: Millimetres per voxel (slice, row, column) of these masks; None when unknown.
        reliability: Tallies of the probabilities on the same grid, if asked for.
    """

    case: Case
    prediction: Mask
    truth: Mask
    known: Mask | None = None
    spacing: Spacing = None
    reliability: Reliability | None = None


class CaseScore(NamedTuple):
    """One number: a metric of one region of one case, and the unit of the lengths in it ("mm", "px", or none)."""

    case: str
    region: str
    metric: str
    value: float
    unit: str = ""


def evaluate(
    predict: Predict,
    site: ScoredSite,
    split: Split,
    regions: Regions,
    *,
    metrics: Sequence[str],
    tolerance: float,
    grid: Grid = "network",
    keep: Callable[[CaseMasks], None] | None = None,
) -> list[CaseScore]:
    """Score a model on every case of a split.

    Args:
        predict: Images (B, C, H, W) in [0, 1], as the batches hold them, to probabilities (B, R, H, W) on any device.
        site: The site to score.
        split: The split to score.
        regions: What the channels of the probabilities are.
        metrics: Names of `evaluation.metrics.METRICS`, such as `QUICK` or `FULL`.
        tolerance: Of nsd, in millimetres for cases with known spacing, else in pixels.
        grid: Where masks are compared.
        keep: Is given the masks of every case.

    Returns:
        One entry per case, region and metric, in that order; empty if the split has no case.

    Raises:
        DivergedError: The model's probabilities are not finite.
        ValueError: Unknown metrics, probabilities that do not fit the regions, slices missing or out of order.
    """
    check_metrics(metrics, tolerance)
    scores = []
    of_masks = [metric for metric in metrics if metric not in CALIBRATION]
    calibrated = len(of_masks) < len(metrics)
    for masks in predict_cases(predict, site, split, regions, grid=grid, calibrated=calibrated):
        if keep is not None:
            keep(masks)
        unit = PIXELS if masks.spacing is None else MILLIMETRES
        known = np.ones_like(masks.truth) if masks.known is None else masks.known
        of_regions = zip(regions.names, masks.prediction, masks.truth, known, strict=True)
        for number, (region, prediction, truth, counts) in enumerate(of_regions):
            values = score_known(prediction, truth, counts, masks.spacing, of_masks, tolerance)
            if masks.reliability is not None:
                shown = bool((truth & counts).any())  # as for all others, whether a score counts depends on the truth
                found = masks.reliability.scores(number)
                values |= found if shown else dict.fromkeys(found, float("nan"))
            scores += [
                CaseScore(masks.case.case, region, metric, values[metric], unit if metric in LENGTHS else "")
                for metric in metrics
            ]
    return scores


def predict_cases(
    predict: Predict,
    site: ScoredSite,
    split: Split,
    regions: Regions,
    *,
    only: Collection[str] | None = None,
    grid: Grid = "network",
    calibrated: bool = False,
) -> Iterator[CaseMasks]:
    """Predict cases one after the other, the slices of a volume gathered.

    Args:
        predict: As for `evaluate`.
        site: The site to score.
        split: The split to score.
        regions: What the channels of the probabilities are.
        only: Names of the cases to predict (for pictures); None: all of the split.
        grid: Of the masks.
        calibrated: Tally probabilities too.

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
            bring = _on_own_grid if grid == "own" else _on_network_grid
            yield bring(case, parts, site, regions, calibrated)


class _Slice(NamedTuple):
    """One slice: its case, its number there, how many there are; if wanted, what is on the network's grid.

    Attributes:
        case: Name of the case.
        number: Of the slice.
        depth: Slices of the case.
        whole: Whether the network saw the volume as a whole.
        probabilities: (R, h, w).
        truth: (R, h, w) bool.
        known: (R, h, w) bool, or None.
    """

    case: str
    number: int
    depth: int
    whole: bool
    probabilities: Tensor = torch.empty(0)
    truth: Mask = np.empty(0, bool)
    known: Mask | None = None


def _on_network_grid(
    case: Case, parts: Sequence[_Slice], site: ScoredSite, regions: Regions, calibrated: bool
) -> CaseMasks:
    found = [part.known for part in parts if part.known is not None]
    known = np.stack(found, axis=1) if found else None
    truth = np.stack([part.truth for part in parts], axis=1)
    told = (part.probabilities for part in parts)
    prediction, reliability = _decided(told, truth, known, regions, calibrated)
    return CaseMasks(case, prediction, truth, known, site.spacing(case), reliability)


def _on_own_grid(
    case: Case, parts: Sequence[_Slice], site: ScoredSite, regions: Regions, calibrated: bool
) -> CaseMasks:
    sample = site.at_own_size(case)
    labels = sample.labels
    if labels is None:
        raise ValueError(f"{case}: its mask was read before, and now has none")
    if len(parts) != len(labels) and not parts[0].whole:
        raise ValueError(f"{case}: its mask was read with {len(parts)} slices, and now has other ones")
    truth = np.stack([regions.encode(torch.from_numpy(plane)).numpy() > 0.5 for plane in labels], axis=1)
    counts = site.known(case, labels)
    known = None if counts is None else counts.swapaxes(0, 1)
    on_grid = (part.probabilities.float().numpy() for part in parts)
    told = (torch.from_numpy(maps) for maps in on_own_grid(on_grid, len(parts), labels.shape, sample.box))
    prediction, reliability = _decided(told, truth, known, regions, calibrated)
    return CaseMasks(case, prediction, truth, known, sample.spacing, reliability)


def _decided(
    slices: Iterable[Tensor], truth: Mask, known: Mask | None, regions: Regions, calibrated: bool
) -> tuple[Mask, Reliability | None]:
    """Masks (R, D, H, W) from the probabilities (R, H, W) of slice after slice, and their tallies if wanted."""
    tallies = Reliability(len(truth)) if calibrated else None
    planes = []
    for number, probabilities in enumerate(slices):
        planes.append(decide(probabilities[None], regions.activation)[0].numpy())
        if tallies is not None:
            tallies.add(probabilities.numpy(), truth[:, number], None if known is None else known[:, number])
    return np.stack(planes, axis=1), tallies


def _slices(
    predict: Predict, site: ScoredSite, split: Split, regions: Regions, only: Collection[str] | None
) -> Iterator[_Slice]:
    for batch in site.eval_batches(split):
        names, whole = batch["case"], batch["image"].ndim == 5
        wanted = [only is None or name in only for name in names]
        found = iter(_predicted(predict, batch, wanted, regions, site.name) if any(wanted) else ())
        for i, name in enumerate(names):
            first, depth = int(batch["slice"][i]), int(batch["depth"][i])
            for number in range(depth) if whole else [first]:
                yield _Slice(name, number, depth, whole, *(next(found) if wanted[i] else ()))


def _predicted(
    predict: Predict, batch: dict[str, Any], wanted: list[bool], regions: Regions, site: str
) -> Iterator[tuple[Tensor, Mask, Mask | None]]:
    """Of each wanted slice of a batch, or of a volume's: probabilities, true masks, and where they count if told."""
    truth = (batch["mask"][wanted] > 0.5).cpu()
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
    known = (batch["known"][wanted] > 0.5).cpu() if "known" in batch else None
    for i, own in enumerate(probabilities.cpu()):
        its = None if known is None else known[i]
        if own.ndim == 3:
            yield own, truth[i].numpy(), None if its is None else its.numpy()
        else:
            for k in range(own.shape[1]):
                yield own[:, k], truth[i][:, k].numpy(), None if its is None else its[:, k].numpy()
