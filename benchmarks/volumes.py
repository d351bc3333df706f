"""Volumes: the suite's rounds against FedAvg written by hand with MONAI: own transforms, network, loss and loop.

    python -m benchmarks.volumes                              the phantom as experiment=volumes has it, three seeds
    python -m benchmarks.volumes --seeds 1 data=folder data.root=DIR ...      other settings, as for train.py

Equal are volumes (in memory, on the network's grid), split, network, size and number of patches, share of patches
around every label, loss, normalisation, optimiser, learning rate, steps and weights of sites; nothing is augmented.
Every cell runs in its own process with one thread, and the two take turns, so that a drift of the machine meets both.
CPU seconds per round are medians over rounds and seeds, without the first round (warm-up). Dice is that of the last
global model on the test cases, by one plain scorer for both.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine import Watch
from fedseg.configs.compose import compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Scored, Silent
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA

NAMES = ("plain", "suite")
GREY, SPREAD = 0.449, 0.226  # mean and standard deviation that both take from every value
FIXED = (
    "experiment=volumes", "algorithm=fedavg", "data.augment=none", "trainer.threads=1", "trainer.accelerator=cpu",
    "wandb.mode=disabled", "training.loss=dice_bce", "federation.evaluate_every=1000",
)  # fmt: skip


def main() -> None:
    """Run all cells and print one table, or one cell as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="as for train.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cell", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.cell:
        print(json.dumps(run_cell(options.cell, options.settings)))
        return
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for seed, name in itertools.product(range(options.seeds), NAMES):
        cells[name].append(cell(name, [*options.settings, f"seed={seed}"]))
    table(cells)


def table(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One row for each of the two."""
    seconds = {n: statistics.median(s for c in cells[n] for s in c["seconds"][1:]) for n in NAMES}
    print(f"{'':8}{'CPU s a round':>14}{'of plain':>10}{'before round 1':>16}{'peak MiB':>10}   Dice of every seed")
    for name in NAMES:
        fixed, peak = (statistics.median(c[key] for c in cells[name]) for key in ("fixed", "peak"))
        dice = "  ".join(f"{100 * c['dice']:.1f}" for c in cells[name])
        print(
            f"{name:8}{seconds[name]:14.2f}{seconds[name] / seconds['plain']:10.3f}{fixed:16.1f}{peak:10.0f}   {dice}"
        )


def cell(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """One implementation in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.volumes", "--cell", name, *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_cell(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Measure one implementation in this process."""
    experiment = Experiment(compose([*FIXED, *settings], SCHEMA))
    experiment.data.setup()
    watch = Watch()
    network = by_hand(experiment, watch) if name == "plain" else by_the_suite(experiment, watch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": watch.seconds, "fixed": watch.fixed, "peak": peak, "dice": dice_of(network, experiment)}


# --- the suite --------------------------------------------------------------------------------------------------------


class Laps(Silent):
    """Tells the watch of rounds."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def round_done(self, record: Any) -> None:
        """One more lap, unless nothing was trained."""
        if record.rounds:
            self.watch.lap()


def by_the_suite(experiment: Experiment, watch: Watch) -> nn.Module:
    """FedAvg through the engine; images in [0, 1] to scores."""
    found: list[nn.Module] = []

    def keep(worker: Any, *_: object) -> Scored:
        found[:] = [copy.deepcopy(worker.network("global"))]
        return Scored()

    with tempfile.TemporaryDirectory() as folder:
        experiment.federation(Checkpoint(Path(folder)), keep, Laps(watch)).run()
    return found[0]


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(experiment: Experiment, watch: Watch) -> nn.Module:
    """FedAvg as one would write it with MONAI."""
    from monai.losses import DiceLoss

    config = experiment.config
    torch.manual_seed(config.seed)
    sites = {name: batches(experiment, name) for name in experiment.data.sites}
    examples = {name: len(experiment.data.site(name).cases("train")) for name in sites}
    network = dynunet(experiment)
    dice, cross_entropy = DiceLoss(sigmoid=True, batch=True, reduction="none"), nn.BCEWithLogitsLoss()
    shared = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for _ in range(config.federation.rounds):
        total = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        for name, feed in sites.items():
            network.load_state_dict(shared)
            optimizer = torch.optim.Adam(network.parameters(), lr=config.training.lr)
            for batch in itertools.islice(feed, config.federation.local_steps):
                optimizer.zero_grad()
                scores = network((batch["image"] - GREY) / SPREAD)
                there = batch["label"].flatten(2).amax((0, 2))  # regions that the batch does not show have no Dice term
                loss = (dice(scores, batch["label"]).flatten() * there).mean() + cross_entropy(scores, batch["label"])
                loss.backward()
                optimizer.step()
            for key, tensor in network.state_dict().items():
                total[key] += tensor * (examples[name] / sum(examples.values()))
        shared = total
        watch.lap()
    network.load_state_dict(shared)
    return network


def dynunet(experiment: Experiment) -> nn.Module:
    """The network that `model` describes, of MONAI itself."""
    from monai.networks.nets import DynUNet

    model, data = experiment.config.model, experiment.data
    strides = model.strides or [[1] * 3, *[[2] * 3] * (model.levels - 1)]
    filters = [model.width * 2**level for level in range(len(strides))]
    made: nn.Module = DynUNet(
        3, data.in_channels, len(data.regions.names), [[3] * 3] * len(strides), strides, strides[1:], filters,
        norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip
    own, other = (sum(p.numel() for p in n.parameters()) for n in (made, experiment.algorithm().network("global")))
    if own != other:
        raise SystemExit(
            f"the networks differ: {own} parameters by hand, {other} in the suite; take model.norm=instance"
        )
    return made


def batches(experiment: Experiment, name: str) -> Iterator[Any]:
    """Batches of random patches of a site's volumes, without end."""
    from monai.data import CacheDataset, DataLoader, set_track_meta
    from monai.transforms import ClassesToIndicesd, Compose, RandCropByLabelClassesd, SpatialPadd

    set_track_meta(False)
    data, site = experiment.data, experiment.data.site(name)
    both, size, count = ("image", "label"), data.size, len(data.regions.ids)
    cropped = RandCropByLabelClassesd(
        both, "ids", size, [count, *[1] * count], count + 1, num_samples=1, indices_key="ids_cls_indices",
        warn=False,
    )  # fmt: skip
    cached = CacheDataset(
        [dict(zip((*both, "ids"), volume(experiment, site, case), strict=True)) for case in site.cases("train")],
        Compose([SpatialPadd((*both, "ids"), size), ClassesToIndicesd("ids", num_classes=count + 1), cropped]),
        progress=False,
    )
    loader = DataLoader(cached, batch_size=data.batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def volume(experiment: Experiment, site: Any, case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Image (C, D, H, W) in [0, 1], masks (R, D, H, W) and numbers of the labels (1, D, H, W) of a case."""
    pixels = torch.from_numpy(site.image(case).copy()).movedim(-1, 0)
    image = pixels.float() / (255 if pixels.dtype == torch.uint8 else 1)
    ids = torch.from_numpy(site.truth(case).copy())
    regions = [torch.isin(ids, torch.tensor(labels)) for labels in experiment.data.regions.labels.values()]
    numbers = torch.zeros_like(ids)
    for place, label in enumerate(sorted(experiment.data.regions.ids), 1):
        numbers[ids == label] = place
    return image.contiguous(), torch.stack(regions).float(), numbers[None]


def dice_of(network: nn.Module, experiment: Experiment) -> float:
    """Mean over sites, test cases and regions, on the network's grid."""
    from monai.inferers import sliding_window_inference

    network.eval()
    sites = [experiment.data.site(name) for name in experiment.data.sites]
    means = []
    for site in sites:
        scores = []
        for case in site.cases("test"):
            image, masks, _ = volume(experiment, site, case)
            window = tuple(experiment.data.size), 2, network, 0.25
            with torch.no_grad():
                found = sliding_window_inference((image[None] - GREY) / SPREAD, *window, mode="gaussian")
            assert isinstance(found, Tensor)
            outlined = (found[0] > 0).float()
            shared, sizes = (outlined * masks).flatten(1).sum(1), (outlined + masks).flatten(1).sum(1)
            scores += (2 * shared / sizes)[masks.flatten(1).any(1)].tolist()
        means.append(statistics.fmean(scores))
    return statistics.fmean(means)


if __name__ == "__main__":
    main()
