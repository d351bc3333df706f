"""What bringing masks to a smaller grid costs them: `python -m benchmarks.grid DIR SIDE [KEY=VALUE ...]`.

DIR and the settings are those of `python -m fedseg.datamodules.check`. Masks are made smaller by nearest neighbour, by
the label that covers most of a pixel, and by area as the suite does it, and enlarged again by nearest neighbour. A
structure is lost when none of its own pixels shows its label then.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.grid import fit_labels
from fedseg.launch.check import build

Labels = NDArray[np.uint8]
Size = tuple[int, int]


def nearest(labels: Labels, size: Size) -> Labels:
    """The label at the centre of a grid pixel."""
    return np.asarray(cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def majority(labels: Labels, size: Size) -> Labels:
    """The label that covers most of a grid pixel."""
    ids = np.flatnonzero(np.bincount(labels.ravel()))
    planes = [(labels == label).astype(np.float32) for label in ids]
    covered = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_AREA) for plane in planes]
    return np.asarray(ids[np.argmax(covered, axis=0)], np.uint8)


RULES: dict[str, Callable[[Labels, Size], Labels]] = {"nearest": nearest, "majority": majority, "area": fit_labels}


def measured(masks: Sequence[Labels], side: int, rule: Callable[[Labels, Size], Labels]) -> dict[str, float]:
    """Means over masks, of all labels together, and the structures of all of them."""
    dice, area, lost, there, seconds = [], [], 0, 0, 0.0
    for mask in masks:
        start = time.process_time()
        grid = rule(mask, (side, side))
        seconds += time.process_time() - start
        back = nearest(grid, (mask.shape[0], mask.shape[1]))
        drawn, kept = np.count_nonzero(mask), np.count_nonzero(back)
        dice.append(2 * np.count_nonzero((mask == back) & (mask > 0)) / (drawn + kept))
        area.append(kept / drawn - 1)
        for count, shown in structures(mask, back):
            there += count
            lost += count - shown
    spread = {"area": float(np.mean(area)), "largest": float(np.max(np.abs(area)))}
    return {"dice": float(np.mean(dice)), "lost": lost, "of": there, **spread, "ms": 1000 * seconds / len(masks)}


def structures(mask: Labels, back: Labels) -> Iterator[tuple[int, int]]:
    """Connected structures of each label, and how many of them the enlarged grid still shows."""
    for label in np.unique(mask[mask > 0]):
        count, parts = cv2.connectedComponents((mask == label).astype(np.uint8), connectivity=8)
        yield int(count) - 1, int(np.count_nonzero(np.unique(parts[back == label])))


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    root, side, *settings = arguments
    data, _, _ = build([root, *settings])
    samples = (data.read(case).labels for case in data.cases() if case.labelled)
    masks = [plane for labels in samples if labels is not None for plane in labels if plane.any()]
    cv2.setNumThreads(1)
    print(f"{len(masks)} masks that show something, to {side} pixels a side; {masks[0].shape} is the first\n")
    print("rule       dice  structures lost  area, mean and largest  ms per mask")
    for name, rule in RULES.items():
        row = measured(masks, int(side), rule)
        print(f"{name:9} {row['dice']:.3f}  {row['lost']:.0f} of {row['of']:.0f}  ", end="")
        print(f"{row['area']:+.1%}, {row['largest']:.0%}  {row['ms']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
