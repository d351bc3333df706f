"""Draw docs/figures/contrastive_features.png: python docs/figures/make_contrastive.py [ROUNDS].

Pre-trains on synthetic organ volumes of three sites, once without and once with the exchange of features, and maps the
projected features of slices that no encoder was trained on by their two principal components.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from fedseg.algorithms.contrastive import Contrastive
from fedseg.algorithms.functional.partitions import slice_partition
from fedseg.algorithms.functional.probes import alignment, cross_site_accuracy, uniformity
from fedseg.configs.compose import compose
from fedseg.datamodules import DATASETS
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.phantom.data import PhantomDataModule
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder

TARGET = Path(__file__).parent / "contrastive_features.png"
COLOURS = ("#440154", "#31688E", "#35B779", "#E69F00")  # partitions, first to last slices
MARKERS = ("o", "^", "s")
SETTINGS = [
    "algorithm=contrastive",
    "algorithm.crop=0.8",  # the size of the organ tells the level
    "data=half",
    "data.anatomy=organ",
    "data.n_sites=3",
    "data.cases_per_site=16",
    "data.amount=0",
    "data.slices=16",
    "data.size=48",
    "data.augment=light",
    "data.batch_size=16",
    "federation.local_steps=10",
    "federation.evaluate_every=1000",
    "evaluation.overlays=false",
]


class HalfOrgans(PhantomDataModule):
    """The upper halves of synthetic organs: their two ends look alike, and levels could not be told apart."""

    def read(self, case: Case) -> Sample:
        """From the middle slice upwards."""
        whole = super().read(case)
        half = len(whole.image) // 2
        labels = None if whole.labels is None else whole.labels[half:]
        return replace(whole, image=whole.image[half:], labels=labels)


class Mapped(NamedTuple):
    """Features of all sites: vectors (N, D), partitions (N,), sites (N,)."""

    vectors: Tensor
    partitions: Tensor
    sites: Tensor


def embed(experiment: Experiment, server: State | None) -> Mapped:
    """Validation and test slices under a server's encoder, or under the fresh one."""
    algorithm: Any = experiment.algorithm()
    assert isinstance(algorithm, Contrastive)
    names = experiment.data.sites
    message = algorithm.broadcast(server or algorithm.init_server({}), names[0], EvaluateTask(1, 0))
    algorithm.receive(message, State(), experiment.data.site(names[0]))
    learner = algorithm.learner.eval()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, name in enumerate(names):
        for split in ("val", "test"):
            for batch in experiment.data.site(name).eval_batches(split):
                with torch.no_grad():
                    vectors = learner(algorithm.normalize(batch["image"]))
                partitions = slice_partition(batch["slice"], batch["depth"], algorithm.partitions, "equal")
                rows.append((vectors, partitions, torch.full_like(partitions, number)))
    return Mapped(*(torch.cat(column) for column in zip(*rows, strict=True)))


def pretrain(folder: Path, rounds: int, exchange: str) -> tuple[Experiment, State]:
    """One run; returns its experiment and the server's state at its end."""
    settings = [*SETTINGS, f"algorithm.exchange={exchange}", f"federation.rounds={rounds}", f"output={folder}"]
    config = compose(settings, SCHEMA)
    execute(config)
    snapshot = Checkpoint(RunFolder(folder).checkpoints).load()
    assert snapshot is not None
    experiment = Experiment(config)
    experiment.data.setup()
    return experiment, snapshot.server


def draw(panels: dict[str, Mapped]) -> Figure:
    """One panel per encoder: colour is the partition, the marker is the site."""
    figure = Figure(figsize=(4.1 * len(panels), 4.9), dpi=130, layout="constrained")
    for axis, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        centred = found.vectors - found.vectors.mean(0)
        _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
        points = centred @ directions[:2].T
        share = float(sizes[:2].square().sum() / sizes.square().sum())
        for site, marker in enumerate(MARKERS):
            chosen = found.sites == site
            colours = [COLOURS[int(number) - 1] for number in found.partitions[chosen]]
            axis.scatter(*points[chosen].T, c=colours, marker=marker, s=20, alpha=0.75, linewidths=0)
        axis.set_title(title, fontsize=11, fontweight="bold")
        axis.set_xlabel(f"{described(found)}\n(two components hold {share:.0%} of the variance)", fontsize=9)
        axis.set(xticks=[], yticks=[])
    marks = [
        Line2D([], [], linestyle="", marker="o", color=c, label=f"partition {i + 1}") for i, c in enumerate(COLOURS)
    ]
    marks += [
        Line2D([], [], linestyle="", marker=m, color="#777777", label=f"site {i + 1}") for i, m in enumerate(MARKERS)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)
    return figure


def described(found: Mapped) -> str:
    """The probes of all sites together."""
    return (
        f"cross-site retrieval {cross_site_accuracy(found.vectors, found.partitions, found.sites, 5):.2f}   "
        f"alignment {alignment(found.vectors, found.partitions, found.sites):.2f}   "
        f"uniformity {uniformity(found.vectors):.2f}"
    )


def main(rounds: int) -> None:
    """Pre-train twice, measure, draw."""
    with tempfile.TemporaryDirectory() as folder:
        alone, alone_server = pretrain(Path(folder) / "none", rounds, "none")
        matched, matched_server = pretrain(Path(folder) / "features", rounds, "features")
        panels = {
            "before: random encoder": embed(alone, None),
            "no exchange": embed(alone, alone_server),
            "features exchanged, matched": embed(matched, matched_server),
        }
    for title, found in panels.items():
        print(f"{title}: {described(found)}")
    draw(panels).savefig(TARGET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    DATASETS["half"] = HalfOrgans
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
