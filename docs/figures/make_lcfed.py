"""Where the sites' heads disagree in a finished LC-Fed run, and what the calibration makes of it.

python docs/figures/make_lcfed.py RUN docs/figures/lcfed_disagreement.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedseg.algorithms.lcfed import LCFed
from fedseg.configs.compose import load
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import EvaluateTask
from fedseg.launch.experiment import Experiment
from fedseg.models.heads import decide, probabilities
from fedseg.reporting.folder import RunFolder

COLUMNS = ("image", "disagreement: distance", "its peaks", "first head", "calibrated", "change in probability")
COLOURS = ("#00e676", "#40c4ff")


def draw(run: Path, target: Path, sites: int = 4) -> None:
    """One row per site: its first test image."""
    folder = RunFolder(run)
    experiment = Experiment(load(folder.read_config()))
    experiment.data.setup()
    snapshot = Checkpoint(folder.checkpoints).load()
    assert snapshot is not None, f"{run} holds no checkpoint"
    worker = experiment.algorithm()
    assert isinstance(worker, LCFed), f"{run} is not a run of LC-Fed"
    names = experiment.data.sites[:sites]
    figure, axes = plt.subplots(
        len(names),
        len(COLUMNS),
        figsize=(2 * len(COLUMNS), 2.05 * len(names) + 0.9),
        layout="constrained",
        squeeze=False,
    )
    painted = []
    for row, name in zip(axes, names, strict=True):
        site = experiment.data.site(name)
        message = worker.broadcast(snapshot.server, name, EvaluateTask(snapshot.round, 0))
        worker.receive(message, snapshot.kept[name], site)
        painted.append(paint(row, look(worker, next(iter(site.eval_batches("test")))), name))
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=10)
    for column, ticks, told in (
        (1, (0, 0.5, 1), "0: alike, 1: heads differ most"),
        (5, (-0.5, 0, 0.5), "calibrated minus first"),
    ):
        bar = figure.colorbar(painted[-1][column], ax=axes[:, column], location="bottom", shrink=0.8, ticks=ticks)
        bar.set_label(told, fontsize=8)
    figure.legend(handles=lines(experiment.data.regions.names), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(target, dpi=110)


def lines(regions: Sequence[str]) -> list[Line2D]:
    """What the outlines mean."""
    named = [Line2D([], [], color=colour, label=name) for name, colour in zip(regions, COLOURS, strict=False)]
    styles = {"solid": "answer (first column: annotation)", "dotted": "the site's annotation"}
    return named + [Line2D([], [], color="black", linestyle=style, label=told) for style, told in styles.items()]


@torch.no_grad()
def look(worker: LCFed, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The pictures of a batch's first image."""
    images, activation = batch["image"][:1], worker.recipe.activation
    network = worker.network("personal").eval()
    _, features = network.body(worker.normalize(images))
    logits = network.head(features)
    maps = {}
    for kind in ("distance", "peaks"):
        network.maps = replace(worker.maps, maps=kind)
        maps[kind] = network.disagreement(features, logits)
    network.maps = worker.maps
    first = probabilities(logits, activation)
    calibrated = probabilities(network.calibrate(features, logits), activation)
    found = {"image": images, "truth": batch["mask"][:1], **maps, "change": calibrated - first}
    found |= {"first": decide(first, activation), "calibrated": decide(calibrated, activation)}
    return {name: tensor[0].float().numpy() for name, tensor in found.items()}


def paint(row: np.ndarray, found: dict[str, np.ndarray], name: str) -> list[AxesImage]:
    """Six panels: truth in lines, answers in lines over the image, maps of the first region."""
    image = found["image"].transpose(1, 2, 0)
    panels = [image, found["distance"][0], found["peaks"][0], image, image, found["change"][0]]
    shades = [
        {"cmap": "gray", "vmin": 0, "vmax": 1},
        {"cmap": "inferno", "vmin": 0, "vmax": 1},
        {"cmap": "inferno", "vmin": 0, "vmax": 1},
        {"cmap": "gray", "vmin": 0, "vmax": 1},
        {"cmap": "gray", "vmin": 0, "vmax": 1},
        {"cmap": "coolwarm", "vmin": -0.5, "vmax": 0.5},
    ]
    shown = []
    for axis, panel, shade in zip(row, panels, shades, strict=True):
        shown.append(axis.imshow(panel, **shade))
        axis.set(xticks=[], yticks=[])
    contours(row[0], found["truth"], "solid")
    for axis, answer in ((row[3], "first"), (row[4], "calibrated")):
        contours(axis, found["truth"], "dotted")
        contours(axis, found[answer], "solid")
        axis.set_xlabel(f"Dice {dice(found[answer], found['truth'])}", fontsize=8)
    for axis in (row[1], row[2], row[5]):
        contours(axis, found["truth"][:1], "dotted")
    row[0].set_ylabel(name, fontsize=10)
    return shown


def contours(axis: Axes, masks: np.ndarray, style: str) -> None:
    """Outlines of the regions."""
    for mask, colour in zip(masks, COLOURS, strict=False):
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1, linestyles=style)


def dice(answer: np.ndarray, truth: np.ndarray) -> str:
    """Of each region."""
    overlap = 2 * (answer * truth).sum((1, 2))
    return ", ".join(f"{o / max(total, 1):.2f}" for o, total in zip(overlap, (answer + truth).sum((1, 2)), strict=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
