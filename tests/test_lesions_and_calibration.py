"""Structures found one by one, and probabilities that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedseg.datamodules import Regions
from fedseg.evaluation import CaseScore, evaluate
from fedseg.evaluation.calibration import BINS, Reliability
from fedseg.evaluation.lesions import lesion_f1
from tests.test_evaluate_cases import REGIONS, FakeSite, volumes

BOTH = ("ece", "brier")


def squares(*corners: tuple[int, int], side: int = 4) -> np.ndarray:
    mask = np.zeros((40, 40), bool)
    for row, column in corners:
        mask[row : row + side, column : column + side] = True
    return mask


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (squares((2, 2), (20, 20)), 1.0),
        (squares((2, 2)), 2 / 3),  # one of two found
        (squares((2, 2), (20, 20), (30, 5)), 4 / 5),  # one invented
        (squares((3, 3), (20, 22)), 1.0),  # 9 of 23 and 8 of 24 pixels in common
        (squares((2, 2), (23, 23)), 2 / 4),  # 1 of 31 pixels is no hit
        (np.ones((40, 40), bool), 0.0),  # everything is nothing found
        (squares((2, 2), (20, 20)) | squares((2, 10), side=1), 4 / 5),
    ],
)
def test_structures_are_found_or_not(predicted: np.ndarray, expected: float) -> None:
    assert lesion_f1(predicted, squares((2, 2), (20, 20))) == pytest.approx(expected)


def test_a_structure_counts_once() -> None:
    truth = np.zeros((4, 30), bool)
    truth[:, 2:12], truth[:, 14:24] = True, True
    joined = np.zeros_like(truth)
    joined[:, 2:24] = True
    assert lesion_f1(joined, truth) == pytest.approx(2 / 3)  # one prediction stands for one of them
    assert lesion_f1(truth, joined) == pytest.approx(2 / 3)


def test_neighbours_touch_at_corners_too() -> None:
    diagonal = np.eye(6, dtype=bool)
    assert lesion_f1(diagonal, diagonal) == 1
    cube = np.zeros((3, 3, 3), bool)
    cube[0, 0, 0], cube[1, 1, 1] = True, True
    one = cube.copy()
    one[0, 0, 0] = False
    assert lesion_f1(one, cube) == 1  # half of one structure


def brute(p: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """Pixel by pixel, bin by bin."""
    total, error = 0, 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        own = [
            (a, b)
            for a, b in zip(p.tolist(), t.tolist(), strict=True)
            if low <= a < high or (number == BINS - 1 and a == 1)
        ]
        total += len(own)
        if own:
            error += len(own) * abs(sum(a for a, _ in own) / len(own) - sum(b for _, b in own) / len(own))
    assert total == len(p)
    return error / total, sum((a - b) ** 2 for a, b in zip(p.tolist(), t.tolist(), strict=True)) / total


@pytest.mark.parametrize("known", [False, True])
def test_tallies_over_slices_are_those_of_all_pixels(known: bool) -> None:
    rng = np.random.default_rng(3)
    p = rng.integers(0, 97, (2, 3, 5, 7)).astype(np.float32) / 96  # R, D, H, W; 0 and 1 among them
    t, counts = rng.random(p.shape) < 0.4, rng.random(p.shape) < 0.7
    tallies = Reliability(2)
    for number in range(3):
        tallies.add(p[:, number], t[:, number], counts[:, number] if known else None)
    for region in range(2):
        chosen = counts[region] if known else np.ones_like(counts[region])
        expected = brute(p[region][chosen].astype(float), t[region][chosen].astype(float))
        assert tuple(tallies.scores(region).values()) == pytest.approx(expected, rel=1e-6)


def test_no_pixel_that_counts_is_no_calibration() -> None:
    tallies = Reliability(1)
    tallies.add(np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), bool))
    assert np.isnan(list(tallies.scores(0).values())).all()


def by_case(scores: list[CaseScore]) -> dict[tuple[str, str, str], float]:
    return {row[:3]: row.value for row in scores}


def test_metrics_of_masks_and_of_probabilities_keep_their_order() -> None:
    def half(images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 2, *images.shape[2:]), 0.25)

    site = FakeSite(volumes())
    scores = evaluate(half, site, "test", REGIONS, metrics=["ece", "dice", "brier"], tolerance=1)
    assert [row.metric for row in scores[:3]] == ["ece", "dice", "brier"]
    found = by_case(scores)
    share = (volumes()["a"] > 0).mean()
    assert found["a", "disc", "ece"] == pytest.approx(abs(0.25 - share))
    assert found["a", "disc", "brier"] == pytest.approx(share * 0.75**2 + (1 - share) * 0.25**2)
    alone = by_case(evaluate(half, site, "test", REGIONS, metrics=["brier"], tolerance=1))
    assert alone == {key: value for key, value in found.items() if key[2] == "brier"}


def test_a_case_that_does_not_show_a_region_is_undefined_never_perfect() -> None:
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, 0, 0] = 1
    site = FakeSite({"a": labels, "none": np.zeros_like(labels)}, regions=Regions({"disc": (1, 2), "cup": (2,)}))

    def nothing(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 2, *images.shape[2:])

    metrics = ["sensitivity", "precision", "rvd", "lesion_f1", *BOTH]
    found = by_case(evaluate(nothing, site, "test", REGIONS, metrics=metrics, tolerance=1))
    for case, region in (("a", "cup"), ("none", "disc"), ("none", "cup")):
        assert all(np.isnan(found[case, region, metric]) for metric in metrics)
    worst = [found["a", "disc", metric] for metric in metrics]
    assert worst == pytest.approx([0, 0, 1, 0, 1 / 16, 1 / 16])
