"""Overview of the phantom: sites in columns, dials in rows. Run: python -m fedseg.datamodules.phantom.picture FILE."""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image

from fedseg.datamodules.cases import Sample
from fedseg.datamodules.phantom.data import REGIONS, Anatomy, draw_case
from fedseg.datamodules.phantom.style import Dials

COLOURS = ("#00e676", "#40c4ff")
ROWS = {
    "all dials 0:\nsites alike": Dials(0, 0, 0, 0),
    "appearance 1:\ndevice": Dials(1, 0, 0, 0),
    "annotation 1:\noutlines": Dials(0, 1, 0, 0),
    "structure 1:\npatients": Dials(0, 0, 1, 0),
    "all dials 1": Dials(1, 1, 1, 1),
}


def draw_overview(anatomy: Anatomy, sites: int, seed: int = 0, index: int = 1, resolution: int = 128) -> Figure:
    """Figure with the same case number of every site under each dial.

    Solid: the site's annotation. Dotted: the true outline, where the annotators depart from it.
    """
    figure = Figure(
        figsize=(1.45 * sites + 1.1, 1.45 * len(ROWS) + 0.65),
        layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01),
    )
    axes = figure.subplots(len(ROWS), sites, squeeze=False)
    for row, (name, dials) in enumerate(ROWS.items()):
        for site in range(sites):
            axis = axes[row, site]
            sample = draw_case(anatomy, seed, site, index, dials, resolution=resolution)
            axis.imshow(sample.image[0], cmap="gray", vmin=0, vmax=255)
            if dials.annotation:
                careful = Dials(dials.appearance, 0, dials.structure, dials.amount)
                truth = draw_case(anatomy, seed, site, index, careful, resolution=resolution)
                _contours(axis, truth, anatomy, "dotted")
            _contours(axis, sample, anatomy, "solid")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"site {site + 1}", fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=9)
    lines = [Line2D([], [], color=c, label=region) for region, c in zip(REGIONS[anatomy], COLOURS, strict=True)]
    lines.append(Line2D([], [], color="black", label="solid: the site's annotation"))
    lines.append(Line2D([], [], color="black", linestyle="dotted", label="dotted: the true outline, where it differs"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9, frameon=False)
    return figure


def _contours(axis: Axes, sample: Sample, anatomy: Anatomy, style: str) -> None:
    if sample.labels is None:
        return
    for ids, colour in zip(REGIONS[anatomy].values(), COLOURS, strict=True):
        mask = np.isin(sample.labels[0], ids)
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=colour, linewidths=1.1, linestyles=style)


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG of 256 colours: a quarter of the size, and it looks nearly the same."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Write the overview to a file."""
    parser = argparse.ArgumentParser(description="Draw an overview of the phantom's dials.")
    parser.add_argument("file", type=Path, help="picture to write (.png)")
    parser.add_argument("--anatomy", choices=sorted(REGIONS), default="fundus")
    parser.add_argument("--sites", type=int, default=6)
    arguments = parser.parse_args()
    save(draw_overview(arguments.anatomy, arguments.sites), arguments.file)


if __name__ == "__main__":
    main()
