"""Finds images that occur twice: exactly, by a hash of their pixels, or nearly, by their outlines in small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.cases import Case, Pixels
from fedseg.datamodules.check.reading import Opened
from fedseg.datamodules.duplicates import Copies, digest, name
from fedseg.datamodules.findings import Finding

SIDE = 32
# Correlation of outlines: 0.94 and more after recompression, halving or a gamma of 0.8; at most 0.83 between images of
# different patients (polyps, vessels, brain MRI).
ALIKE = 0.92
MOST_SEARCHED = 20_000  # images whose outlines are kept: 40 MB, and half a minute of search
BLOCK = 1024


@dataclass
class Fingerprints:
    """Hashes of all images and masks, and the outlines of the first ``MOST_SEARCHED`` images."""

    copies: Copies = field(default_factory=Copies)
    outlines: list[NDArray[np.int8]] = field(default_factory=list)
    owners: list[tuple[Case, str]] = field(default_factory=list)
    left_out: int = 0

    def add(self, opened: Opened) -> None:
        """Takes a decoded case."""
        start = 0
        for part in opened.parts:
            depth = len(part.image)
            image = digest(part.image)
            self.copies.add(part.case, (image, "" if part.labels is None else digest(part.labels)))
            if opened.image is not None:
                self._add_outline(part.case, opened.image[start + depth // 2], image)
            start += depth

    def _add_outline(self, case: Case, plane: Pixels, image: str) -> None:
        outline = outlines_of(plane)
        if outline is None:
            return
        if len(self.outlines) >= MOST_SEARCHED:
            self.left_out += 1
            return
        self.outlines.append(outline)
        self.owners.append((case, image))

    def findings(self, splits: Mapping[tuple[str, str], str]) -> Iterator[Finding]:
        """Duplicates of images and masks; ``splits`` tells the split of a site's patient."""
        yield from self.copies.findings(splits)
        yield from self._near()

    def _near(self) -> Iterator[Finding]:
        """Pairs of different patients; slices and frames of one patient may look alike."""
        if self.left_out:
            what = f"near duplicates were searched among the first {MOST_SEARCHED} images; {self.left_out} came later"
            yield Finding("not searched", what, "check sites in smaller groups if you suspect copies")
        if len(self.outlines) < 2:
            return
        patients: dict[tuple[str, str], int] = {}
        patient = np.array([patients.setdefault((case.site, case.patient), len(patients)) for case, _ in self.owners])
        stacked = np.stack(self.outlines)
        for start in range(0, len(stacked), BLOCK):
            block = _unit(stacked[start : start + BLOCK])
            for later in range(start, len(stacked), BLOCK):
                alike = block @ _unit(stacked[later : later + BLOCK]).T
                for row, column in np.argwhere(alike > ALIKE):
                    i, j = start + int(row), later + int(column)
                    if i < j and patient[i] != patient[j] and self.owners[i][1] != self.owners[j][1]:
                        yield _near_duplicate(self.owners[i][0], self.owners[j][0], float(alike[row, column]))


def outlines_of(plane: Pixels) -> NDArray[np.int8] | None:
    """Differences between neighbours of a picture of 32 x 32 grey pixels, their square roots as int8.

    Args:
        plane: (H, W, C), one slice.

    Returns:
        (1984,), or None for a blank picture.
    """
    grey = np.ascontiguousarray(plane.mean(axis=-1, dtype=np.float32))
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    steps = np.concatenate([np.diff(small, axis=0).ravel(), np.diff(small, axis=1).ravel()])
    rooted = np.sign(steps) * np.sqrt(np.abs(steps))
    largest = np.abs(rooted).max()
    return np.round(rooted * (127 / largest)).astype(np.int8) if largest > 0 else None


def _unit(outlines: NDArray[np.int8]) -> NDArray[np.float32]:
    """Rows of length 1."""
    rows = outlines.astype(np.float32)
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _near_duplicate(first: Case, second: Case, alike: float) -> Finding:
    what = f"looks like {name(second, first)} (outlines correlate by {alike:.2f}), of another patient"
    cure = "look at both; if they are one picture, keep one or give both the same patient"
    return Finding("near duplicate", what, cure, first.site, first.case, first.image)
