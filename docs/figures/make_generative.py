"""Figures of docs/methods/generative.md, from the repository's root.

python -m docs.figures.make_generative FILE.png BEFORE AFTER GIVEN    data of vafl: sites as they are and in the style
python -m docs.figures.make_generative FILE.png OUT                   data of fedsim: sites' images, and painted ones

BEFORE, AFTER and OUT are folders that the commands wrote with output=, GIVEN one of give=.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.image import imread, imsave
from numpy.typing import NDArray

COLUMNS, GAP = 6, 1
PAINTED = "painted_"


def row(paths: Iterable[Path], labels: bool = False) -> NDArray[np.float64]:
    """(h, w, 3) pictures side by side; of masks the ids as greys."""
    found = [np.asarray(imread(path), np.float64) for path in list(paths)[:COLUMNS]]
    pictures = [np.repeat(p[..., None] * (100 if labels else 1), 3, axis=2) if p.ndim == 2 else p for p in found]
    pictures = [p[..., :3] for p in pictures]
    framed = [np.pad(p, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=1) for p in pictures]
    return np.concatenate(framed, axis=1).clip(0, 1)


def tested(site: Path) -> list[str]:
    """Names of a site's test images."""
    lines = (line.split(",") for line in (site.parent / "sites.csv").read_text(encoding="utf-8").splitlines())
    return [Path(line[1]).name for line in lines if line[0] == site.name and line[-1] == "test"]


def translated(before: Path, after: Path, given: Path) -> NDArray[np.float64]:
    """Images that were given, and of every site with a translator test images, and below them the same in the style."""
    rows = [row(sorted(given.glob("*.png")))]
    for kept in sorted(after.glob("*/translator.safetensors")):
        site = kept.parent.name
        names = tested(kept.parent)
        rows += [row(root / site / "images" / name for name in names) for root in (before, after)]
    return np.concatenate(rows)


def painted(out: Path) -> NDArray[np.float64]:
    """Of every site its images, painted ones, and the masks of these."""
    rows = []
    for site in sorted(path for path in out.iterdir() if path.is_dir()):
        images = sorted((site / "images").glob("*.png"))
        made = [path for path in images if path.name.startswith(PAINTED)]
        rows += [row(path for path in images if path not in made), row(made)]
        rows += [row((site / "masks" / path.name for path in made), labels=True)]
    return np.concatenate(rows)


if __name__ == "__main__":
    file, *folders = sys.argv[1:]
    places = [Path(folder) for folder in folders]
    imsave(file, translated(*places) if len(places) > 1 else painted(*places))
