"""One model of the shapes of several sites' masks: `python -m fedseg.launch.shapes DIR [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import cv2
import numpy as np

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.shapes import GRID, Labels, ShapeModel, Shapes
from fedseg.datamodules.told import FEWEST
from fedseg.launch.command import guarded
from fedseg.launch.telling import WORDS, by_site, data_of, gathered, split

HELP = f"""python -m fedseg.launch.shapes DIR [KEY=VALUE ...]            one model of all sites' training masks
python -m fedseg.launch.shapes DIR site=NAME tell=FILE.json    what a site tells: sums over its training masks
python -m fedseg.launch.shapes told=[A.json,B.json,...]        one model from what sites told

With masks that cancel in the sum, whoever makes the model sees the sums over all sites and no site's own:
python -m fedseg.launch.shapes site=NAME key=FILE              writes FILE, which stays, and FILE.pub, for the others
python -m fedseg.launch.shapes DIR site=NAME tell=FILE.json key=FILE masked=[A.pub,B.pub,C.pub]
python -m fedseg.launch.shapes told=[A.json,B.json,C.json]     of all of them

  output=FILE    of the model; shapes.json
  picture=FILE   a PNG of outlines that are drawn from it; none

Masks are taken on the network's grid (data.size), and told on one of {GRID} x {GRID}. Settings of the data are those of
python train.py."""
OWN: Mapping[str, str] = {"output": "shapes.json", "picture": "", **WORDS}
SELDOM = 0.9
"""Share of the masks below which a region is seldom drawn."""
ROWS, COLUMNS, SIDE = 4, 8, 64
"""Of the picture: masks, and pixels of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments, help=HELP)


def _run(arguments: Sequence[str]) -> None:
    own, rest = split(arguments, OWN)
    if own["picture"] and not own["picture"].lower().endswith(".png"):
        raise ConfigError(f"picture={own['picture']}: a name that ends in .png")
    what, seen = "sums over {cases} masks of {site}", "the site's mean shape, and how its shapes vary"
    sites = gathered(own, rest, Shapes, lambda: dict(_shapes(data_of(rest, HELP), own["site"])), what=what, seen=seen)
    if sites is None:
        return
    model = ShapeModel.of(reduce(add, sites.values()))
    model.save(Path(own["output"]))
    print(f"masks: {', '.join(f'{name} {one.cases}' for name, one in sites.items())}")
    print(f"{own['output']}: a model of {len(model.deviations)} directions, of {model.cases} masks")
    for place, shown in enumerate(model.shown, 1):
        if shown < SELDOM * model.cases:
            print(
                f"warning: region {place} is in {shown:.0f} of {model.cases} masks: one Gaussian seldom draws what is "
                "mostly absent",
                file=sys.stderr,
            )
    if own["picture"]:
        _draw(model, Path(own["picture"]))


def training_masks(data: MultiCenterDataModule, site: str) -> list[Labels]:
    """(h, w) label ids of a site's labelled training images, on the network's grid.

    Args:
        data: set up.
        site: of the data.

    Raises:
        DataError: they are volumes, hold pixels of which it is not known what they are, or are drawn of several
            raters' each time anew.
    """
    if data.dimensions == 3:
        raise DataError("shapes are of images and slices; take data.dimensions=2")
    if data.patches is not None:
        raise DataError("shapes are of whole images on one grid; take data.fit=resize")
    refuse_unknown(data, site)
    held = data.site(site)
    return [plane for case in held.cases("train") for plane in held.taught(case)]


def refuse_unknown(data: MultiCenterDataModule, site: str) -> None:
    """Shapes are of masks that are known as a whole.

    Raises:
        DataError: they are not.
    """
    if site in data.unannotated or data.ignore_labels:
        raise DataError(
            f"site {site!r}: data.unannotated or data.ignore_labels leave pixels unknown, where no shape can be "
            "measured; leave the site, or the labels, out"
        )


def _shapes(data: MultiCenterDataModule, only: str) -> Iterator[tuple[str, Shapes]]:
    data.setup()
    cases = (case for site in data.sites for case in data.site(site).cases("train"))
    for site, found in by_site(cases, only, "labelled training images").items():
        if len(found) < FEWEST:
            raise DataError(f"site {site!r}: {len(found)} masks are too few to tell sums of; {FEWEST} are needed")
        yield site, Shapes.of(training_masks(data, site), data.regions)


def _draw(model: ShapeModel, path: Path) -> None:
    """Inside of how many regions a pixel is, in grey, of masks that are drawn."""
    drawn = model.drawn(ROWS * COLUMNS, np.random.default_rng(0))
    cells = [
        np.mean([cv2.resize(plane, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) < 0 for plane in signed], axis=0)
        for signed in drawn
    ]
    framed = np.stack([np.pad(255 * cell, 1, constant_values=128) for cell in cells]).astype(np.uint8)
    rows = framed.reshape(ROWS, COLUMNS, SIDE + 2, SIDE + 2).transpose(0, 2, 1, 3).reshape(ROWS * (SIDE + 2), -1)
    write_atomic(path, cv2.imencode(".png", rows)[1].tobytes())


if __name__ == "__main__":
    sys.exit(main())
