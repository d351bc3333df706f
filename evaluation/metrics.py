"""Definitions of all metrics: the one place where they stand.

A mask is the set of pixels of one region in one case; a case is an image, or a volume where volumes exist (never a
slice of it). The background is no region and has no score. P is the predicted mask, T the true one.

* dice = 2 |P and T| / (|P| + |T|);  iou = |P and T| / |P or T|.
* The contour of a mask is the mask without its erosion by the cross (4 neighbours in 2-D, 6 in 3-D); where a mask
  touches the image's border, the border is contour. Distances run between centres of contour pixels, from every pixel
  of one contour to the nearest of the other: d(P, T) and d(T, P), in millimetres where the spacing is known, else in
  pixels.
* hd95 = the greater of the 95th percentiles of d(P, T) and d(T, P) (linear interpolation), as in MONAI.
  hd95_pooled = the 95th percentile of both lists together, as in medpy.
* assd = mean of both lists together.
* nsd = share of both lists that is at most the tolerance (surface Dice of Nikolov et al., 2018, counting contour pixels
  alike whatever area they stand for).
* sensitivity = |P and T| / |T|;  precision = |P and T| / |P|.
* rvd = | |P| - |T| | / |T|, of areas in 2-D.
* offset = the same mean with signs: a contour pixel of P counts as negative where T covers it, one of T where P does
  not. Positive: P is drawn larger than T; about k where P is T grown by k. Neither end is the better one: 0 is.
* lesion_f1: see `evaluation.lesions`.
* ece, brier: of probabilities, not of masks: see `evaluation.calibration`. Over all pixels of a case that count.
* missed = 1 where T is not empty and P is: a region overlooked; 0 where it was found, be it badly.
* invented = 1 where T is empty and P is not; 0 where both are empty.

Empty masks. Where T is empty every score but `invented` is undefined, NaN, whatever P is; where T is not empty
`invented` is. So whether a case counts depends on the data only: every model's means are over the same cases, their
number stands beside them, agreement on nothing lifts no mean, and what is invented is a rate of its own (MONAI leaves
such cases out too). Where P alone is empty offset is undefined, too, and the others are the worst there is: dice, iou,
nsd, sensitivity, precision, lesion_f1 0, rvd 1 (by its formula), and for distances the image's diagonal, the greatest
distance that two of its pixels can have (BraTS 2023 scores missed lesions so, with 374 mm for its volumes): a method
cannot improve its distances by predicting nothing in hard cases.

Ignored pixels (data.ignore_labels) are taken out of P and T before anything else: a mask ends where they begin. A case
in which no pixel of a region counts has no score of it, NaN.

The distances are our own few lines on scipy's k-d tree, tested against brute force and MONAI: MONAI agrees but takes
seconds to import for three functions, and other libraries define contours or percentiles differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import cKDTree

from fedseg.common.names import nearest
from fedseg.evaluation.lesions import lesion_f1

Mask = NDArray[np.bool_]
Distances = NDArray[np.float64]
Spacing = tuple[float, float, float] | None


@dataclass(frozen=True)
class Metric:
    """What a metric's numbers mean.

    Attributes:
        title: Full name, for tables and plots.
        best: Value of perfect agreement.
        worst: Value when only the prediction is empty (of invented: when only the truth is); None: the image's
            diagonal.
        bounded: Whether no value is beyond the worst one.
        signed: Whether values lie on both sides of the best one, so that no model is better for more or for less.
    """

    title: str
    best: float
    worst: float | None
    bounded: bool = True
    signed: bool = False

    @property
    def higher_is_better(self) -> bool:
        """Whether greater values are better."""
        return self.worst is not None and self.worst < self.best

    @property
    def is_length(self) -> bool:
        """Whether values are millimetres or pixels."""
        return self.worst is None

    @property
    def span(self) -> float:
        """The greatest difference that two values can have; infinite where nothing bounds them."""
        return float("inf") if self.worst is None or not self.bounded else abs(self.best - self.worst)


LESIONS = "lesion_f1"
INVENTED = "invented"
"""The one score of cases that do not show a region."""
OFFSET = "offset"
METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", best=1, worst=0),
    "iou": Metric("IoU", best=1, worst=0),
    "hd95": Metric("95 % Hausdorff distance", best=0, worst=None),
    "hd95_pooled": Metric("95 % Hausdorff distance (pooled)", best=0, worst=None),
    "assd": Metric("Average symmetric surface distance", best=0, worst=None),
    OFFSET: Metric("Signed surface distance", best=0, worst=None, signed=True),
    "nsd": Metric("Surface Dice", best=1, worst=0),
    "sensitivity": Metric("Sensitivity", best=1, worst=0),
    "precision": Metric("Precision", best=1, worst=0),
    "rvd": Metric("Relative volume difference", best=0, worst=1, bounded=False),
    "lesion_f1": Metric("Lesion-wise F1", best=1, worst=0),
    "ece": Metric("Expected calibration error", best=0, worst=1),
    "brier": Metric("Brier score", best=0, worst=1),
    "missed": Metric("Missed", best=0, worst=1),
    INVENTED: Metric("Invented", best=0, worst=1),
}
CALIBRATION = ("ece", "brier")
"""Metrics of probabilities."""
QUICK = ("dice", "iou")
FULL = (
    *("dice", "iou", "hd95", "assd", "nsd", "sensitivity", "precision", "rvd"),
    *("missed", INVENTED),
)
"""What is computed unless asked otherwise: overlaps cost nothing beside distances. Counting lesions and tallying
probabilities cost up to as much as distances once more, and speak of some tasks only."""
LENGTHS = frozenset(name for name, metric in METRICS.items() if metric.is_length) | {"nsd"}
"""Metrics in which lengths count, of nsd its tolerance: their numbers need a unit."""
LOWER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if not (metric.higher_is_better or metric.signed))


class Overlap(NamedTuple):
    """Pixels of two masks, neither of them empty: of both, of the prediction, of the truth."""

    both: int
    p: int
    t: int


OVERLAPS: dict[str, Callable[[Overlap], float]] = {
    "dice": lambda of: 2 * of.both / (of.p + of.t),
    "iou": lambda of: of.both / (of.p + of.t - of.both),
    "sensitivity": lambda of: of.both / of.t,
    "precision": lambda of: of.both / of.p,
    "rvd": lambda of: abs(of.p - of.t) / of.t,
    "missed": lambda _: 0.0,
}
SURFACES: dict[str, Callable[[Distances, Distances, float], float]] = {  # of d(P, T), d(T, P), tolerance
    "hd95": lambda pt, tp, _: max(np.percentile(pt, 95), np.percentile(tp, 95)),
    "hd95_pooled": lambda pt, tp, _: np.percentile(np.concatenate([pt, tp]), 95),
    "assd": lambda pt, tp, _: np.concatenate([pt, tp]).mean(),
    # a distance of three pixels of 0.1 mm must not exceed 0.3 by rounding
    "nsd": lambda pt, tp, tolerance: (np.concatenate([pt, tp]) <= tolerance * (1 + 1e-9)).mean(),
}


def check_metrics(names: Sequence[str], tolerance: float) -> None:
    """Refuse metrics that do not exist, before anything is computed.

    Raises:
        ValueError: An unknown name, no name, or a tolerance that is no length.
    """
    if not names:
        raise ValueError(f"evaluation.metrics names no metric; known: {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"evaluation.metrics: unknown metric {name!r}; {nearest(name, METRICS)}")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"evaluation.tolerance={tolerance}: the tolerance of nsd is a length of at least 0")


def score(prediction: Mask, truth: Mask, spacing: Spacing, names: Sequence[str], tolerance: float) -> dict[str, float]:
    """Compare two masks of one region in one case.

    Args:
        prediction: (D, H, W) bool; D = 1 for a 2-D image, whose contours are then 2-D. (H, W) is taken as D = 1.
        truth: Bool, of the same shape.
        spacing: Millimetres per voxel (slice, row, column); None: distances are in pixels.
        names: Metrics of `METRICS`.
        tolerance: Of nsd, in the unit of the distances.

    Returns:
        Value of each metric; NaN where the truth is empty, and of invented where it is not.

    Raises:
        ValueError: Shapes, types, spacing or names that do not fit.
    """
    check_metrics(names, tolerance)
    if of_probabilities := [name for name in names if name in CALIBRATION]:
        raise ValueError(f"{of_probabilities[0]} is of probabilities, not of masks; evaluation.evaluate has them")
    prediction, truth, steps = _prepared(prediction, truth, spacing)
    p, t = int(prediction.sum()), int(truth.sum())
    if not t:
        return {name: float(p > 0) if name == INVENTED else float("nan") for name in names}
    if not p:
        diagonal = float(np.linalg.norm((np.array(truth.shape) - 1) * steps))
        worst = {name: diagonal if METRICS[name].worst is None else METRICS[name].worst for name in names}
        return {
            name: float("nan") if name in (INVENTED, OFFSET) else float(value or 0) for name, value in worst.items()
        }
    both = int((prediction & truth).sum())
    values = {name: OVERLAPS[name](Overlap(both, p, t)) for name in names if name in OVERLAPS}
    if any(name in SURFACES or name == OFFSET for name in names):
        pt, tp = surface_distances(prediction, truth, steps)
        values |= {name: float(SURFACES[name](pt, tp, tolerance)) for name in names if name in SURFACES}
        if OFFSET in names:
            values[OFFSET] = _offset(prediction, truth, pt, tp)
    if LESIONS in names:
        values[LESIONS] = lesion_f1(prediction, truth)
    return {name: float("nan") if name == INVENTED else values[name] for name in names}


def score_known(
    prediction: Mask, truth: Mask, known: Mask, spacing: Spacing, names: Sequence[str], tolerance: float
) -> dict[str, float]:
    """`score` over the pixels whose label is known (all of one shape); NaN where there is none."""
    if not names:
        return {}
    if not known.any():
        return dict.fromkeys(names, float("nan"))
    return score(prediction & known, truth & known, spacing, names, tolerance)


def contour(mask: Mask) -> Mask:
    """Pixels of a mask with a neighbour (4 in 2-D, 6 in 3-D) outside the mask or the image."""
    inner: Mask = binary_erosion(mask)
    return mask & ~inner


def surface_distances(prediction: Mask, truth: Mask, steps: Sequence[float]) -> tuple[Distances, Distances]:
    """Distances from each contour pixel of one mask to the nearest contour pixel of the other.

    Args:
        prediction: Not empty.
        truth: Not empty, of the same shape.
        steps: Length of a pixel along each axis.

    Returns:
        d(P, T) with one entry per contour pixel of the prediction, and d(T, P) with one per contour pixel of the truth.
    """
    box = _around(prediction, truth)
    points = [np.argwhere(contour(mask[box])) * np.asarray(steps) for mask in (prediction, truth)]
    forward, backward = cKDTree(points[1]).query(points[0])[0], cKDTree(points[0]).query(points[1])[0]
    return np.asarray(forward), np.asarray(backward)


def _around(prediction: Mask, truth: Mask) -> tuple[slice, ...]:
    """The box of two masks: outside it there is nothing to erode."""
    return find_objects((prediction | truth).astype(np.uint8))[0]


def _offset(prediction: Mask, truth: Mask, forward: Distances, backward: Distances) -> float:
    """Mean of `surface_distances`, which come in the order of the pixels, with the sign of the larger mask."""
    box = _around(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    beyond = np.where(truth[contour(prediction)], -forward, forward)
    short = np.where(prediction[contour(truth)], backward, -backward)
    return float(np.concatenate([beyond, short]).mean())


def _prepared(prediction: Mask, truth: Mask, spacing: Spacing) -> tuple[Mask, Mask, tuple[float, ...]]:
    """Both masks in the dimensions that they really have, and the length of a pixel along each."""
    if prediction.shape != truth.shape or truth.ndim not in (2, 3) or not truth.size:
        raise ValueError(f"masks must be (D, H, W) of one shape, got {prediction.shape} and {truth.shape}")
    if prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {prediction.dtype} and {truth.dtype}")
    steps = (1.0, 1.0, 1.0) if spacing is None else tuple(spacing)
    if len(steps) != 3 or not all(0 < step < np.inf for step in steps):
        raise ValueError(f"spacing must be three positive lengths (slice, row, column), got {spacing}")
    if truth.ndim == 3 and len(truth) > 1:
        return prediction, truth, steps
    height_width = truth.shape[-2:]
    return prediction.reshape(height_width), truth.reshape(height_width), steps[1:]
