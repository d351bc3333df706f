"""Draw iopfl_routing.png: which model an unseen site's images are answered by, before and after the adaptation.

    python -m docs.figures.make_iopfl

Three sites of the phantom train; the fourth adapts what they publish. About two CPU minutes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

matplotlib.use("Agg")
from benchmarks.iopfl_balance import Fold
from fedseg.algorithms.functional.routing import mixtures
from fedseg.federation.client import Images

HERE = Path(__file__).parent
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#555555")
SHOWN = 8


def main() -> None:
    """Train, adapt, draw."""
    torch.set_num_threads(1)
    fold = Fold.train("site_04")
    images = torch.cat(list(Images(fold.site, "test")))[:SHOWN]
    torch.manual_seed(1)
    fold.worker.adapt(Images(fold.site, "test"))
    network = fold.worker.network("adapted").eval()
    weights = torch.stack(list(mixtures(network, fold.worker.normalize(images)).values())).numpy()
    sites = [group.partition("/")[2] for group in fold.worker.received.tensors if "/" in group]
    print(f"Dice of the global model {fold.dice('global'):.3f}, adapted {fold.dice('adapted'):.3f}")
    draw(images.permute(0, 2, 3, 1).numpy(), weights, [*sites, "global"]).savefig(HERE / "iopfl_routing.png", dpi=130)


def draw(images: NDArray[np.float32], weights: NDArray[np.float32], experts: list[str]) -> Figure:
    """Images on top, their mixtures below, layers at the bottom.

    Args:
        images: (N, H, W, 3) in [0, 1].
        weights: (layers, N, experts).
        experts: their names.
    """
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    rows = figure.add_gridspec(3, 1, height_ratios=(1.25, 1.5, 1.9))
    top = rows[0].subgridspec(1, len(images))
    for index, image in enumerate(images):
        axis = figure.add_subplot(top[index])
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(f"image {index + 1}", fontsize=9)
    deepest = weights[weights.std(axis=1).mean(axis=1).argmax()]
    layer = int(weights.std(axis=1).mean(axis=1).argmax()) + 1
    _bars(figure.add_subplot(rows[1]), deepest, experts)
    figure.axes[-1].set_title(
        f"Mixture of each image, in the layer where images differ most (layer {layer})", fontsize=10
    )
    figure.axes[-1].set_xlabel("image of the unseen site", fontsize=9)
    _bars(figure.add_subplot(rows[2]), weights.mean(axis=1), experts)
    figure.axes[-1].set_title("Mixture of each routed layer, mean over the images", fontsize=10)
    figure.axes[-1].set_xlabel("layer, from input to output", fontsize=9)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(experts), frameon=False, fontsize=10)
    return figure


def _bars(axis: Axes, mixture: NDArray[np.float32], experts: list[str]) -> None:
    """Stacked bars of (N, experts) weights."""
    places = np.arange(1, len(mixture) + 1)
    bottom = np.zeros(len(mixture))
    for name, colour, share in zip(experts, COLOURS, mixture.T, strict=True):
        axis.bar(places, share, bottom=bottom, color=colour, label=name, width=0.8)
        bottom += share
    axis.set(ylim=(0, 1), xlim=(0.4, len(mixture) + 0.6), ylabel="weight", xticks=places)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
