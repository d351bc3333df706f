"""Metrics against hand-made numbers, brute force and MONAI."""

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedseg.evaluation import FULL, LOWER_IS_BETTER, METRICS, QUICK, score
from fedseg.evaluation.metrics import CALIBRATION

Mask = NDArray[np.bool_]
ALL = tuple(name for name in METRICS if name not in CALIBRATION)
SIDED = {"sensitivity", "precision", "rvd", "offset"}  # prediction and truth are not alike there
TOLERANCE = 1.0
SPACINGS = [None, (1.0, 1.0, 1.0), (3.0, 0.7, 1.6)]


def all_scores(prediction: Mask, truth: Mask, spacing: tuple[float, float, float] | None = None) -> dict[str, float]:
    """Those that are defined."""
    values = score(prediction, truth, spacing, ALL, TOLERANCE)
    assert np.isnan(values["invented"]) == bool(truth.any())
    return {name: value for name, value in values.items() if not np.isnan(value)}


def blobs(seed: int, shape: tuple[int, ...], keep: float = 0.5) -> Mask:
    """Random lumps of 2 pixels and more, so that contour and inside differ."""
    rng = np.random.default_rng(seed)
    coarse = rng.random([-(-side // 3) for side in shape]) < keep
    mask = coarse
    for axis in range(len(shape)):
        mask = mask.repeat(3, axis=axis)
    return mask[tuple(slice(side) for side in shape)] ^ (rng.random(shape) < 0.03)


def brute_contour(mask: Mask) -> list[tuple[int, ...]]:
    """Pixel by pixel: set, with a neighbour that is unset or beyond the image."""
    found = []
    for pixel in product(*(range(side) for side in mask.shape)):
        around = [
            tuple(p + step * (axis == a) for axis, p in enumerate(pixel)) for a in range(mask.ndim) for step in (-1, 1)
        ]
        inside = [all(0 <= p < side for p, side in zip(q, mask.shape, strict=True)) and bool(mask[q]) for q in around]
        if mask[pixel] and not all(inside):
            found.append(pixel)
    return found


def brute_set(mask: Mask) -> Mask:
    """The contour as a mask; its pixels come in the order of `brute_contour`."""
    found = np.zeros_like(mask)
    found[tuple(np.array(brute_contour(mask)).T)] = True
    return found


def brute_parts(mask: Mask) -> list[set[tuple[int, ...]]]:
    """Connected components by flood fill; diagonal neighbours count."""
    left = {tuple(map(int, pixel)) for pixel in np.argwhere(mask)}
    parts = []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            pixel = edge.pop()
            part.add(pixel)
            near = {
                tuple(p + s for p, s in zip(pixel, step, strict=True)) for step in product((-1, 0, 1), repeat=mask.ndim)
            }
            edge += near & left
            left -= near
        parts.append(part)
    return parts


def brute_lesions(prediction: Mask, truth: Mask) -> float:
    """F1 under the largest matching of structures, found by augmenting paths."""
    found, there = brute_parts(prediction), brute_parts(truth)
    fits = [[len(a & b) >= 0.1 * len(a | b) for b in found] for a in there]
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    hits = sum(place(row, set()) for row in range(len(there)))
    return 2 * hits / (len(there) + len(found))


def brute_force(prediction: Mask, truth: Mask, steps: tuple[float, ...]) -> dict[str, float]:
    pixels = [np.array(brute_contour(mask)) * steps for mask in (prediction, truth)]
    table = np.sqrt(((pixels[0][:, None] - pixels[1][None]) ** 2).sum(-1))
    there, back = table.min(axis=1), table.min(axis=0)
    both = np.concatenate([there, back])
    covered = [other[brute_set(mask)] for mask, other in ((prediction, truth), (truth, prediction))]
    sides = np.concatenate([np.where(covered[0], -1, 1), np.where(covered[1], 1, -1)])
    common, joint = int((prediction & truth).sum()), int((prediction | truth).sum())
    own, true = int(prediction.sum()), int(truth.sum())
    return {
        "sensitivity": common / true,
        "precision": common / own,
        "rvd": max(own - true, true - own) / true,
        "lesion_f1": brute_lesions(prediction, truth),
        "dice": 2 * common / (int(prediction.sum()) + int(truth.sum())),
        "iou": common / joint,
        "hd95": max(np.quantile(there, 0.95), np.quantile(back, 0.95)),
        "hd95_pooled": float(np.quantile(both, 0.95)),
        "assd": float(both.mean()),
        "offset": float((sides * both).mean()),
        "nsd": float((both <= TOLERANCE).mean()),
        "missed": 0.0,
    }


# --- numbers by hand -----------------------------------------------------------------------------------------------


def line(*columns: int, width: int = 12) -> Mask:
    mask = np.zeros((1, 1, width), dtype=bool)
    mask[0, 0, list(columns)] = True
    return mask


def test_points_on_a_line() -> None:
    # prediction at 2, truth at 2 and 5: distances 0 | 0 and 3
    values = all_scores(line(2), line(2, 5))
    assert values["dice"] == pytest.approx(2 / 3)
    assert values["iou"] == pytest.approx(1 / 2)
    assert values["hd95"] == pytest.approx(0.95 * 3)  # between 0 and 3, interpolated
    assert values["hd95_pooled"] == pytest.approx(0.9 * 3)  # 0, 0, 3
    assert values["assd"] == pytest.approx(1)
    assert values["nsd"] == pytest.approx(2 / 3)


def test_a_shifted_square() -> None:
    truth, prediction = np.zeros((2, 1, 20, 20), dtype=bool)
    truth[0, 5:10, 5:10] = True  # 25 pixels, 16 of them contour
    prediction[0, 5:10, 7:12] = True
    values = all_scores(prediction, truth)
    assert values["dice"] == pytest.approx(2 * 15 / 50)
    assert values["iou"] == pytest.approx(15 / 35)
    assert values["hd95"] == pytest.approx(2)
    assert all_scores(prediction, truth, (9.0, 1.0, 0.5))["hd95"] == pytest.approx(
        1
    )  # two columns of half a millimetre


def test_a_hole_has_a_contour_and_the_border_is_one() -> None:
    full, holed = np.ones((1, 7, 7), dtype=bool), np.ones((1, 7, 7), dtype=bool)
    holed[0, 3, 3] = (
        False  # new contour: the four neighbours of (3, 3), two from the border's ring (rows and columns 0, 6)
    )
    values = all_scores(holed, full)
    assert values["assd"] == pytest.approx(4 * 2 / (24 + 24 + 4))
    assert values["nsd"] == pytest.approx(48 / 52)


def test_a_tolerance_is_not_missed_by_rounding() -> None:
    assert 0.1 * 3 > 0.3  # in floating point
    assert score(line(2), line(5), (1.0, 1.0, 0.1), ["nsd"], 0.3) == {"nsd": 1.0}
    assert score(line(2), line(5), (1.0, 1.0, 0.1), ["nsd"], 0.299) == {"nsd": 0.0}


# --- empty masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 4)])
def test_without_truth_only_what_is_invented_counts(found: bool, shape: tuple[int, ...]) -> None:
    prediction, truth = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    prediction[0, 1, 1] = found
    assert all_scores(prediction, truth) == {"invented": float(found)}


@pytest.mark.parametrize(
    ("shape", "spacing", "diagonal"),
    [((1, 4, 5), None, 5.0), ((1, 4, 5), (9.0, 2.0, 1.0), 52**0.5), ((4, 4, 5), (4.0, 1.0, 1.0), 13.0)],
)
def test_a_missed_region_is_the_worst(
    shape: tuple[int, ...], spacing: tuple[float, float, float] | None, diagonal: float
) -> None:
    some, none = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    some[0, 1, 1] = True
    values = all_scores(none, some, spacing)
    lengths = dict.fromkeys(("hd95", "hd95_pooled", "assd"), pytest.approx(diagonal))
    shares = dict.fromkeys(("dice", "iou", "nsd", "sensitivity", "precision", "lesion_f1"), 0)
    assert values == {**shares, "missed": 1, "rvd": 1, **lengths}


# --- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shape", [(1, 13, 17), (5, 9, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_brute_force(shape: tuple[int, ...], spacing: tuple[float, float, float] | None, seed: int) -> None:
    prediction, truth = blobs(2 * seed, shape, 0.4), blobs(2 * seed + 1, shape, 0.2 + 0.15 * seed)
    assert prediction.any()
    assert truth.any()
    steps = spacing or (1.0, 1.0, 1.0)
    squeezed = [mask[0] if len(mask) == 1 else mask for mask in (prediction, truth)]
    expected = brute_force(squeezed[0], squeezed[1], steps[-squeezed[0].ndim :])
    assert all_scores(prediction, truth, spacing) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.75, 1.5)])
@pytest.mark.parametrize("shape", [(1, 40, 56), (6, 24, 20)])
def test_monai(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> None:
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    for seed in range(3):
        prediction, truth = blobs(seed, shape, 0.35), blobs(seed + 50, shape, 0.35)
        pair = [
            torch.from_numpy(mask if len(mask) > 1 else mask[0])[None, None].float() for mask in (prediction, truth)
        ]
        steps = list(spacing if len(truth) > 1 else spacing[1:])
        theirs = {
            "dice": metrics.compute_dice(*pair).item(),
            "iou": metrics.compute_iou(*pair).item(),
            "hd95": metrics.compute_hausdorff_distance(*pair, percentile=95, spacing=steps).item(),
            "assd": metrics.compute_average_surface_distance(*pair, symmetric=True, spacing=steps).item(),
            "nsd": metrics.compute_surface_dice(*pair, class_thresholds=[TOLERANCE], spacing=steps).item(),
        }
        ours = all_scores(prediction, truth, spacing)
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


# --- properties ----------------------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(1, 9, 12), (4, 7, 6)])


@given(seeds, seeds, shapes)
@settings(max_examples=40, deadline=None)
def test_prediction_and_truth_may_change_places(a: int, b: int, shape: tuple[int, ...]) -> None:
    first, second = blobs(a, shape, 0.3), blobs(b, shape, 0.3)
    assume(first.any() and second.any())
    there, back = all_scores(first, second, (2, 1, 1.5)), all_scores(second, first, (2, 1, 1.5))
    for name in there.keys() - SIDED:
        assert there[name] == pytest.approx(back[name])
    assert (there["sensitivity"], there["precision"]) == pytest.approx((back["precision"], back["sensitivity"]))
    assert there["offset"] == pytest.approx(-back["offset"])
    assert abs(there["offset"]) <= there["assd"]


@given(seeds, seeds, shapes, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_lengths_grow_with_the_spacing_and_ratios_do_not(a: int, b: int, shape: tuple[int, ...], scale: float) -> None:
    first, second = blobs(a, shape, 0.3), blobs(b, shape, 0.3)
    small = score(first, second, (2, 1, 1.5), ALL, TOLERANCE)
    large = score(first, second, (2 * scale, scale, 1.5 * scale), ALL, TOLERANCE * scale)
    expected = {name: value * (scale if METRICS[name].is_length else 1) for name, value in small.items()}
    assert large == pytest.approx(expected, nan_ok=True)


@given(seeds, shapes)
@settings(max_examples=20, deadline=None)
def test_a_mask_agrees_with_itself(seed: int, shape: tuple[int, ...]) -> None:
    mask = blobs(seed, shape)
    assume(mask.any())
    values = all_scores(mask, mask.copy())
    assert values == {name: METRICS[name].best for name in values}


@given(seeds, seeds, shapes)
@settings(max_examples=40, deadline=None)
def test_values_lie_between_best_and_worst(a: int, b: int, shape: tuple[int, ...]) -> None:
    first, second = blobs(a, shape, 0.2), blobs(b, shape, 0.2)
    assume(second.any())
    values = all_scores(first, second)
    worst = all_scores(np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool))
    for name, value in values.items():
        if name == "rvd":  # too much has no bound
            assert value >= 0
            continue
        if METRICS[name].signed:  # nor has it one end
            continue
        low, high = sorted((METRICS[name].best, worst[name]))
        assert low <= value <= high
    if first.any() and second.any():
        assert values["iou"] == pytest.approx(values["dice"] / (2 - values["dice"]))


@given(seeds, seeds)
@settings(max_examples=20, deadline=None)
def test_a_margin_of_background_changes_nothing_but_the_contour_at_the_border(a: int, b: int) -> None:
    first, second = blobs(a, (1, 9, 9), 0.3), blobs(b, (1, 9, 9), 0.3)
    assume(first.any() and second.any())
    wide = [np.pad(mask, ((0, 0), (3, 5), (4, 2))) for mask in (first, second)]
    assert all_scores(wide[0], wide[1]) == pytest.approx(all_scores(first, second))


# --- use -----------------------------------------------------------------------------------------------------------


def test_names_choose_and_order_the_metrics() -> None:
    assert list(score(line(1), line(2), None, ["assd", "dice"], TOLERANCE)) == ["assd", "dice"]
    assert set(QUICK) < set(FULL) < set(METRICS)
    distances = {"hd95", "hd95_pooled", "assd"}
    assert set(LOWER_IS_BETTER) == {*distances, "missed", "invented", "rvd", "ece", "brier"}


def test_inputs_are_left_alone_and_two_dimensions_are_enough() -> None:
    prediction, truth = blobs(1, (1, 9, 9)), blobs(2, (1, 9, 9))
    before = prediction.copy(), truth.copy()
    assert all_scores(prediction[0], truth[0]) == all_scores(prediction, truth)
    assert (prediction == before[0]).all()
    assert (truth == before[1]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["dise"]}, "did you mean 'dice'"),
        ({"names": []}, "no metric"),
        ({"names": ["ece"]}, "of probabilities"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, 1.0)}, "spacing"),
        ({"truth": line(1, width=9)}, "one shape"),
        ({"truth": line(1).astype(np.uint8)}, "bool"),
        ({"truth": np.zeros(5, bool), "prediction": np.zeros(5, bool)}, "one shape"),
    ],
)
def test_what_does_not_fit_raises(change: dict[str, object], words: str) -> None:
    good = {"prediction": line(1), "truth": line(2), "spacing": None, "names": ["dice"], "tolerance": 1.0}
    with pytest.raises(ValueError, match=words):
        score(**(good | change))  # type: ignore[arg-type]
