"""Masks on the network's grid: made smaller by area, so that thin and small structures stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]
Whole = NDArray[np.int64]

BLOCK = 8
"""Side of the squares of grid pixels in which each label keeps its area."""
# Bayer's matrix: among pixels that a label covers alike, a line for one, those far from each other come first
_PAIR = np.array([[0, 2], [3, 1]])
_FOUR = np.block([[4 * _PAIR + _PAIR[i, j] for j in range(2)] for i in range(2)])
_EIGHT = np.block([[4 * _FOUR + _PAIR[i, j] for j in range(2)] for i in range(2)])
DITHER: Whole = _EIGHT.max() - _EIGHT.ravel()


def fit_labels(labels: Labels, size: tuple[int, int]) -> Labels:
    """Brings a mask to a grid: larger by nearest neighbour, smaller by area, and as it is where the size is the same.

    Smaller by area means: in every square of 8 x 8 grid pixels each label keeps as many of them as its area there comes
    to, those that it covers most; what rounding leaves over goes on to the next square. A connected structure (of 8
    neighbours) that would be left without a pixel gets the one that holds most of it, unless another structure has no
    other pixel. Whole numbers only: the result is the same on every machine.

    Args:
        labels: (H, W) label ids.
        size: (height, width) of the grid.
    """
    height, width = min(labels.shape[0], size[0]), min(labels.shape[1], size[1])
    if (height, width) != labels.shape:
        labels = _smaller(labels, (height, width))
    if labels.shape != size:
        labels = cast(Labels, cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
    return labels


def fit_planes(labels: Labels, size: tuple[int, int]) -> Labels:
    """Brings every slice of (D, H, W) label ids to a grid; see `fit_labels`."""
    return np.stack([fit_labels(plane, size) for plane in labels])


def _smaller(labels: Labels, size: tuple[int, int]) -> Labels:
    ids = np.flatnonzero(np.bincount(labels.ravel()))
    grid = np.zeros(size, np.uint8)
    covered = {int(label): _coverage(labels == label, size) for label in ids if label}
    # small ones choose first, so that rounding never takes their place
    for label in sorted(covered, key=lambda label: int(covered[label].sum())):
        grid[_largest(np.where(grid == 0, covered[label], 0), covered[label], labels.size)] = label
    _Rescue(grid, [_Structures.of(labels, label) for label in covered], labels.shape).all()
    return grid


def _coverage(mask: NDArray[np.bool_], size: tuple[int, int]) -> Whole:
    """How much of each grid pixel a mask covers; the whole pixel is ``mask.size``."""
    return _sums(_sums(mask, size[0]).T, size[1]).T


def _sums(values: NDArray[np.bool_] | Whole, parts: int) -> Whole:
    """Sums over equal parts of the rows, in units of 1 / parts of a row: a row may belong to two of them."""
    count = len(values)
    whole, rest = np.divmod(np.arange(parts + 1) * count, parts)
    before = np.zeros((count + 1, values.shape[1]), np.int64)
    np.cumsum(values, axis=0, out=before[1:])
    split = values[np.minimum(whole, count - 1)] * rest[:, None]
    return cast(Whole, np.diff(before[whole] * parts + split, axis=0))


def _largest(free: Whole, covered: Whole, whole: int) -> NDArray[np.bool_]:
    """The pixels that a label keeps: of every block as many as its area there, those with the greatest coverage.

    Args:
        free: coverage of pixels that no other label has.
        covered: coverage of all pixels.
        whole: coverage of a pixel that lies inside.
    """
    height, width = free.shape
    area = np.cumsum(_blocks(covered).sum(axis=1))  # rounded sums: what one block lacks the next one gets
    count = np.diff((2 * area + whole) // (2 * whole), prepend=0)
    some = np.flatnonzero(count)
    candidates = _blocks(free)[some]
    keys = np.where(candidates > 0, candidates * BLOCK**2 + DITHER, -1)
    order = np.argsort(-keys, axis=1)
    kept = np.arange(BLOCK**2) < count[some, None]
    chosen = np.zeros_like(keys, bool)
    np.put_along_axis(chosen, order, kept, axis=1)
    blocks = np.zeros((len(count), BLOCK**2), bool)
    blocks[some] = chosen & (keys > 0)
    return _pixels(blocks, (height, width))


def _blocks(grid: Whole) -> Whole:
    """(blocks, pixels): squares row by row, every other row backwards, so that the next one is a neighbour."""
    rows, columns = (-(-side // BLOCK) for side in grid.shape)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), grid.dtype)
    padded[: grid.shape[0], : grid.shape[1]] = grid
    squares = padded.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).copy()
    squares[1::2] = squares[1::2, ::-1].copy()
    return squares.reshape(rows * columns, BLOCK**2)


def _pixels(blocks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The grid that `_blocks` cut."""
    rows, columns = (-(-side // BLOCK) for side in size)
    squares = blocks.reshape(rows, columns, BLOCK, BLOCK).copy()
    squares[1::2] = squares[1::2, ::-1].copy()
    return squares.swapaxes(1, 2).reshape(rows * BLOCK, columns * BLOCK)[: size[0], : size[1]]


@dataclass(frozen=True)
class _Structures:
    """The connected structures of one label: 1, 2, ... in ``parts``, 0 elsewhere; ``boxes`` are rows x, y, w, h."""

    label: int
    parts: NDArray[np.int32]
    boxes: NDArray[np.int32]

    @classmethod
    def of(cls, labels: Labels, label: int) -> _Structures:
        _, parts, boxes, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=8)
        return cls(label, cast("NDArray[np.int32]", parts), cast("NDArray[np.int32]", boxes[:, :4]))

    def inside(self, part: int) -> tuple[Whole, Whole]:
        """Rows and columns of a structure's pixels."""
        x, y, w, h = self.boxes[part]
        rows, columns = np.nonzero(self.parts[y : y + h, x : x + w] == part)
        return rows + y, columns + x


class _Rescue:
    """Gives a grid pixel to structures that have none; a structure may have those in which its pixels' centres lie.

    Args:
        grid: Is changed.
        structures: Of every label.
        shape: Of the mask at its own size.
    """

    def __init__(self, grid: Labels, structures: list[_Structures], shape: tuple[int, ...]) -> None:
        self.grid = grid
        self.structures = {own.label: own for own in structures}
        centres = ((2 * np.arange(n) + 1) * k // (2 * n) for n, k in zip(shape, grid.shape, strict=True))
        self.rows, self.columns = centres  # the grid's row and column of every row and column of the mask

    def all(self) -> None:
        """Labels in order, structures in the order of their first pixel."""
        for own in self.structures.values():
            there = (self.grid == own.label)[self.rows][:, self.columns]
            pixels = np.bincount(own.parts[there], minlength=len(own.boxes))
            for part in np.flatnonzero(pixels[1:] == 0) + 1:
                self._one(own, int(part))

    def _one(self, own: _Structures, part: int) -> None:
        cells, counts = np.unique(self._cells(own, part), axis=1, return_counts=True)
        choice = cells[:, np.argsort(-counts, kind="stable")].T.tolist()
        if not any(self.grid[row, column] == own.label for row, column in choice):  # one given to a neighbour may do
            free = next(((row, column) for row, column in choice if self._is_free(row, column)), None)
            if free is not None:
                self.grid[free] = own.label

    def _cells(self, own: _Structures, part: int) -> Whole:
        rows, columns = own.inside(part)
        return np.stack([self.rows[rows], self.columns[columns]])

    def _is_free(self, row: int, column: int) -> bool:
        """Whether every structure that has this pixel has another one."""
        if not (label := int(self.grid[row, column])):
            return True
        own = self.structures[label]
        here = own.parts[np.ix_(self.rows == row, self.columns == column)]
        for part in np.unique(here[here > 0]):
            cells = self._cells(own, int(part))
            has = (self.grid[cells[0], cells[1]] == label) & ((cells[0] != row) | (cells[1] != column))
            if not has.any():
                return False
        return True
