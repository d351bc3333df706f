"""Images painted from masks of all sites' shapes: `python -m fedseg.launch.fedsim DIR shapes=FILE output=OUT`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.shapes import ShapeModel
from fedseg.launch.command import guarded, whole
from fedseg.launch.generative.pictures import Planes, cases_of, prepared, refuse_written, sites_of, write_site
from fedseg.launch.shapes import refuse_unknown
from fedseg.launch.telling import data_of, split
from fedseg.models.generative.painting import Painting, painted, train_painter

HELP = f"""python -m fedseg.launch.shapes ...                                      first: one model of all sites' shapes
python -m fedseg.launch.fedsim DIR site=NAME shapes=FILE output=OUT     at each site: its data, and painted images
python -m fedseg.launch.fedsim DIR shapes=FILE output=OUT               of all sites of DIR
python train.py data=folder data.root=OUT ...                           then any method; splits are as they were

  share=S   of the training images that are painted, below 1; 0.25
  steps=N   of the painter, which is trained at the site and thrown away; {Painting.steps}
  seed=N    of everything; 0

Settings of the data are those of python train.py, data.size=32, 64 or 128 among them. All data are written on that
grid, in 8 bit."""
PAINTED = "painted_"
"""How the names of painted cases begin."""
OWN: Mapping[str, str] = {
    "site": "",
    "shapes": "",
    "output": "",
    "share": "0.25",
    "steps": str(Painting.steps),
    "seed": "0",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments, help=HELP)


def _run(arguments: Sequence[str]) -> None:
    own, rest = split(arguments, OWN)
    share, steps, seed = _numbers(own)
    model, output = ShapeModel.load(Path(own["shapes"])), Path(own["output"])
    data = prepared(data_of(rest, HELP))
    model.check(data.regions)
    sites = sites_of(data, own["site"])
    for site in sites:
        refuse_written(output, site)
    for site in sites:
        begun = time.process_time()
        added = _painted(data, site, model, share, steps, seed) if site in data.sites else []
        took = (time.process_time() - begun) / 60
        write_site(data, site, output, lambda images: images, added)
        print(f"{output}: {site}, as it is, and {len(added)} painted images ({took:.1f} CPU minutes)", flush=True)


def _numbers(own: Mapping[str, str]) -> tuple[float, int, int]:
    """Share, steps and seed.

    Raises:
        ConfigError: one of them is no such number, or a file is not named.
    """
    if lacking := [name for name in ("shapes", "output") if not own[name]]:
        raise ConfigError(f"{lacking[0]}= is missing: shapes=FILE of python -m fedseg.launch.shapes, and output=OUT")
    try:
        share = float(own["share"])
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"share={own['share']} should be a number from 0, below 1")
    return share, whole("steps", own["steps"], 1), whole("seed", own["seed"], 0)


def _painted(
    data: MultiCenterDataModule, site: str, model: ShapeModel, share: float, steps: int, seed: int
) -> list[Planes]:
    """Cases that a painter of the site's images makes of drawn masks.

    Raises:
        DataError: there is nothing to learn from, or pixels are not known.
    """
    refuse_unknown(data, site)
    cases = [(case.images, case.labels) for case in cases_of(data, site, "train") if case.labels is not None]
    if not cases:
        raise DataError(f"site {site!r}: no labelled training images, of which a painter could learn")
    images = torch.cat([images for images, _ in cases])
    masks = data.regions.encode(torch.from_numpy(np.concatenate([labels for _, labels in cases])))
    count = round(share / (1 - share) * len(images))
    if not count:
        return []
    names = [f"{PAINTED}{number:04d}" for number in range(1, count + 1)]
    if known := sorted({row["case"] for row in data.splits() if row["site"] == site} & set(names)):
        raise DataError(
            f"site {site!r} has a case {known[0]!r}, as painted ones are called; take its data without these"
        )
    own = derive_seed("fedsim", site, seed)
    painter = train_painter(images, masks, Painting(steps=steps), own)
    drawn = np.stack(model.masks(count, data.regions, data.size, np.random.default_rng(own)))
    made = painted(painter, data.regions.encode(torch.from_numpy(drawn)), images, derive_seed(own, "looks"))
    return [
        Planes(name, name, "train", image[None], labels[None])
        for name, image, labels in zip(names, made, drawn, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
