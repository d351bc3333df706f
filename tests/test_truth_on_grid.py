"""Masks on the network's grid: no structure vanishes, areas stay."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedseg.datamodules import Sample
from fedseg.datamodules.grid import fit_labels
from fedseg.datamodules.transforms import resize

Labels = NDArray[np.uint8]


def drawn(kind: str, side: int) -> Labels:
    """A mask with structures of one kind."""
    mask = np.zeros((side, side), np.uint8)
    if kind == "one pixel":
        mask[side // 3, side // 2] = 1
    elif kind == "small lesions":
        for y, x in np.argwhere(np.random.default_rng(0).random((side // 24, side // 24)) < 0.3) * 24 + 7:
            mask[y : y + 2, x : x + 2] = 1
    elif kind == "thin line":
        cv2.line(mask, (5, 7), (side - 20, side // 2), 1, 1)
    elif kind == "straight line":
        mask[side // 2, 3 : side - 3] = 1
    elif kind == "vessels":
        for k in range(5):
            cv2.line(mask, (10 + 30 * k, 3), (side - 9, side - 40 * k - 5), 1, 1 + k)
    elif kind == "disc and cup":
        cv2.circle(mask, (side // 2, side // 2), side // 4, 1, -1)
        cv2.circle(mask, (side // 2 + 3, side // 2), side // 8, 2, -1)
    elif kind == "ring":
        cv2.circle(mask, (side // 2, side // 2), side // 3, 3, 2)
    elif kind == "blob":
        cv2.ellipse(mask, (side // 2, side // 3), (side // 4, side // 7), 30, 0, 360, 255, -1)
    return mask


KINDS = ["one pixel", "small lesions", "thin line", "straight line", "vessels", "disc and cup", "ring", "blob"]


def kept(labels: Labels, grid: Labels) -> dict[tuple[int, int], bool]:
    """Whether each connected structure of each label has a grid pixel in which one of its pixels' centres lies."""
    rows, columns = ((2 * np.arange(n) + 1) * k // (2 * n) for n, k in zip(labels.shape, grid.shape, strict=True))
    back = grid[rows][:, columns]
    found = {}
    for label in set(np.unique(labels).tolist()) - {0}:
        count, parts = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=8)
        found |= {(label, part): bool((back[parts == part] == label).any()) for part in range(1, count)}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (100, 73), (255, 256), (300, 90)])
def test_every_structure_stays(kind: str, size: tuple[int, int]) -> None:
    labels = drawn(kind, 257)
    grid = fit_labels(labels, size)
    assert (grid.shape, grid.dtype) == (size, np.uint8)
    assert set(np.unique(grid)) == set(np.unique(labels))
    assert all(kept(labels, grid).values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("one pixel", "small lesions")])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (100, 73)])
def test_every_label_keeps_its_area(kind: str, size: tuple[int, int]) -> None:
    labels = drawn(kind, 256)
    grid = fit_labels(labels, size)
    for label in set(np.unique(labels).tolist()) - {0}:
        area = (labels == label).sum() * grid.size / labels.size
        assert abs((grid == label).sum() - area) <= 1 + 0.01 * area


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (16, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_a_label_of_random_pixels_keeps_its_area(size: tuple[int, int], seed: int) -> None:
    labels = (np.random.default_rng(seed).random((50, 61)) < 0.6).astype(np.uint8)
    area = labels.mean() * size[0] * size[1]
    grid = fit_labels(labels, size)
    assert -1 <= int(grid.sum()) - area <= len(kept(labels, grid))  # structures without a pixel get one


def test_a_line_loses_no_end() -> None:
    grid = fit_labels(drawn("straight line", 256), (64, 64))
    _, columns = np.nonzero(grid)
    assert len(columns) == pytest.approx(250 / 16, abs=1)
    assert columns.min() < 8
    assert columns.max() > 56
    assert np.diff(np.sort(columns)).max() <= 8


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_what_lies_on_the_grid_is_what_it_was(factor: int) -> None:
    small = np.random.default_rng(1).integers(0, 4, (24, 40), np.uint8)
    large = small.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(fit_labels(large, (24, 40)), small)


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (130, 64), (200, 111)])
def test_masks_that_are_not_made_smaller_are_those_of_nearest_neighbour(size: tuple[int, int]) -> None:
    labels = np.random.default_rng(2).integers(0, 3, (64, 64), np.uint8)
    near = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    assert np.array_equal(fit_labels(labels, size), near)


def test_a_small_label_between_large_ones_keeps_its_place() -> None:
    labels = np.ones((64, 64), np.uint8)
    labels[:, 32:] = 2
    labels[20:22, 31:33] = 3
    labels[40, 40] = 255  # an id outside loss and score is a label like any other
    grid = fit_labels(labels, (8, 8))
    assert (grid == 3).sum() == 1
    assert grid[5, 5] == 255
    assert all(kept(labels, grid).values())


def test_a_structure_never_takes_the_only_pixel_of_another() -> None:
    labels = np.zeros((16, 16), np.uint8)
    labels[0, 0], labels[1, 1], labels[2, 2] = 1, 2, 3  # one grid pixel for three
    grid = fit_labels(labels, (4, 4))
    assert np.count_nonzero(grid) == 1
    labels[3:6, 3:6] = 4  # it reaches that pixel, and has others
    assert set(np.unique(fit_labels(labels, (4, 4)))) == {0, int(grid.max()), 4}


@st.composite
def masks(draw: st.DrawFn) -> tuple[Labels, tuple[int, int]]:
    """Structures far enough from each other that the grid has room for all of them."""
    height, width = draw(st.integers(20, 80)), draw(st.integers(20, 80))
    size = draw(st.integers(8, height)), draw(st.integers(8, width))
    labels = np.zeros((height, width), np.uint8)
    apart = (-(-height // size[0]) + 1, -(-width // size[1]) + 1)
    for y in range(0, height - 1, 2 * apart[0]):
        for x in range(0, width - 1, 2 * apart[1]):
            h, w = draw(st.integers(0, apart[0])), draw(st.integers(0, apart[1]))
            labels[y : y + h, x : x + w] = draw(st.integers(1, 3))
    return labels, size


@pytest.mark.slow
@given(masks())
@settings(max_examples=60, deadline=None)
def test_any_structure_stays_where_there_is_room(given_: tuple[Labels, tuple[int, int]]) -> None:
    labels, size = given_
    grid = fit_labels(labels, size)
    assert all(kept(labels, grid).values())
    structures = len(kept(labels, grid))
    area = np.count_nonzero(labels) * grid.size / labels.size
    assert abs(np.count_nonzero(grid) - area) <= structures + 2


def test_volumes_are_made_smaller_slice_by_slice() -> None:
    planes = np.stack([drawn(kind, 128) for kind in KINDS])
    sample = Sample(np.zeros((*planes.shape, 1), np.uint8), planes, (5.0, 1.0, 1.0))
    small = resize(sample, (40, 32))
    assert small.labels is not None
    assert all(np.array_equal(a, fit_labels(b, (40, 32))) for a, b in zip(small.labels, planes, strict=True))
    assert small.spacing == (5.0, 3.2, 4.0)
