"""Figure of docs/methods/feddg.md: `python -m docs.figures.make_feddg [FILE]` from the repository's root.

Rows: the donor sites, whose published amplitudes are mixed in. Columns: the donor's weight. It is one image throughout.
The last two rows have the released window, one frequency, and a wide one.
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from fedseg.algorithms.functional.fourier import low_frequency_amplitude, mix_amplitude
from fedseg.datamodules.phantom.data import draw_case
from fedseg.datamodules.phantom.style import Dials

SITES, RESOLUTION, CASE = 5, 128, 1
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
HALF_WIDTH, RELEASED, WIDE = 1, 0, 12
OUT = Path(__file__).with_name("feddg_styles.png")


def image(site: int) -> Tensor:
    """(1, 3, H, W) in [0, 1]: one case of a phantom site whose devices differ as much as the dial allows."""
    sample = draw_case("fundus", 0, site, CASE, Dials(1.0, 0.0, 0.0, 0.0), resolution=RESOLUTION)
    return torch.from_numpy(sample.image).permute(0, 3, 1, 2).float() / 255


def show(axis: Axes, picture: Tensor, title: str = "") -> None:
    """Draw (1, 3, H, W) in [0, 1]."""
    axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def draw() -> Figure:
    """The figure."""
    rows = [(donor, HALF_WIDTH) for donor in range(1, SITES)] + [(1, RELEASED), (1, WIDE)]
    figure = Figure(
        figsize=(1.5 * (len(WEIGHTS) + 1) + 0.5, 1.55 * len(rows) + 0.3),
        layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01),
    )
    axes = figure.subplots(len(rows), len(WEIGHTS) + 1)
    own = image(0)
    for row, (donor, half_width) in enumerate(rows):
        crop = low_frequency_amplitude(image(donor), half_width)
        show(axes[row, 0], image(donor), "donor (stays there)" if row == 0 else "")
        axes[row, 0].set_ylabel(f"site {donor + 1}, b = {half_width}", fontsize=9)
        for column, weight in enumerate(WEIGHTS, start=1):
            title = f"donor weight {weight:g}" if row == 0 else ""
            show(axes[row, column], mix_amplitude(own, crop, weight), title)
    return figure


if __name__ == "__main__":
    draw().savefig(sys.argv[1] if len(sys.argv) > 1 else OUT, dpi=70)
