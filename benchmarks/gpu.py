r"""This suite's local training on a GPU against a bare loop: bf16, channels last, the same network, batches and loss.

    python -m benchmarks.gpu                   an Unet/resnet18 at 256 px, batches of 16; then memory of five sites
    python -m benchmarks.gpu data.anatomy=organ data.slices=64 data.resolution=128 data.dimensions=3 \
        data.size=64 data.batch_size=2 model=unet3d model.architecture=dynunet model.width=32
    python -m benchmarks.gpu --device cpu      in small, where there is no GPU: shows that it runs

    bare      a hand-written loop over batches that lie on the device in its memory layout: autocast to bf16, fused Adam
    fit       this suite's local fit over the same batches on the device: Lightning, bf16-mixed, what a method adds
    turn      a site's whole turn: receive, read and augment cases (data.workers), move batches to the device, fit, send
    sites     a round of several sites, one after the other: memory alone

Every cell runs in its own process, and the rows take turns, so that a drift of the machine meets all of them. Images
per second are medians over repetitions without the first fit of each process. On a GPU seconds are of the wall, on a
CPU of the process. Peak memory is what PyTorch has allocated on the GPU at its highest, on a CPU the process's resident
memory. Losses are means over the steps of a fit: those of `bare` and `fit` say whether both computed the same.

The suite has no setting that keeps a site's cases on the device: augmentation works on the CPU, and `turn` tells what
that costs beside `fit`.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import Watch
from benchmarks.steps import clock
from fedseg.algorithms.stock import LAST
from fedseg.configs.compose import compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import turn
from fedseg.federation.contract import LOSS, Batch, Scored, TrainTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment, quieten_libraries
from fedseg.launch.settings import SCHEMA

TIMED = ("bare", "fit", "turn")
FIXED = (
    "algorithm=fedavg", "trainer.precision=bf16-mixed", "training.channels_last=true", "training.optimizer=adam",
    "federation.rounds=2", "federation.evaluate_every=1000", "wandb.mode=disabled",
)  # fmt: skip
PHANTOM = ("data=phantom", "data.amount=0")
SIZES = {
    "cuda": (
        *PHANTOM, "data.cases_per_site=40", "data.resolution=256", "data.size=256", "data.batch_size=16",
        "data.workers=4", "model=unet", "federation.local_steps=50", "trainer.accelerator=gpu",
    ),
    "cpu": (
        *PHANTOM, "data.cases_per_site=8", "data.resolution=64", "data.size=64", "data.batch_size=4", "model=tiny",
        "federation.local_steps=2", "trainer.accelerator=cpu", "trainer.threads=1",
    ),
}  # fmt: skip
NO_FIGURE = "No GPU was used: these numbers show that the benchmark runs, and are no figure of a GPU."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells and print one table, or one cell as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="as for train.py")
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--sites", type=int, default=5, help="of the last row")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each row, and fits in each")
    parser.add_argument("--cell", choices=(*TIMED, "sites"), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here; --device cpu runs the same in small, which is no figure of a GPU")
    if options.cell:
        print(json.dumps(run_cell(options.cell, options.device, options.settings, options.sites, options.repeats)))
        return
    own = sys.argv[1:] if arguments is None else list(arguments)
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in (*TIMED, "sites")}
    for name in (*TIMED * options.repeats, "sites"):
        command = [sys.executable, "-m", "benchmarks.gpu", "--cell", name, *own]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cells[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(cells, options.device, options.sites))


def table(cells: Mapping[str, Sequence[Mapping[str, Any]]], device: str, sites: int) -> str:
    """One row for each way, and what the numbers are of."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = [f"{where}, PyTorch {torch.__version__}; {cells['bare'][0]['job']}"]
    lines += [NO_FIGURE] if device == "cpu" else []
    lines.append(f"{'':8}{'images/s':>10}{'of bare':>10}{'peak MiB':>10}{'loss':>10}")
    speed = {name: statistics.median(s for cell in cells[name] for s in cell["images"]) for name in TIMED}
    peak = {name: max(cell["peak"] for cell in rows) for name, rows in cells.items()}
    for name in TIMED:
        numbers = f"{speed[name]:10.1f}{speed[name] / speed['bare']:10.3f}{peak[name]:10.0f}"
        lines.append(f"{name:8}{numbers}{cells[name][0]['loss']:10.4f}")
    lines.append(f"{f'{sites} sites':8}{'':20}{peak['sites']:10.0f}")
    return "\n".join(lines)


def run_cell(name: str, device: str, settings: Sequence[str], sites: int, repeats: int) -> dict[str, Any]:
    """Measure one way in this process.

    Returns:
        Of `sites` the peak alone, in MiB; else also images per second of every fit, the loss, and what was done.
    """
    quieten_libraries()
    count = sites if name == "sites" else 1
    experiment = Experiment(compose([*FIXED, *SIZES[device], f"data.n_sites={max(2, count)}", *settings], SCHEMA))
    experiment.data.setup()
    if name == "sites":
        with tempfile.TemporaryDirectory() as folder:
            experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), Watch()).run()
        return {"peak": peak_mib(device)}
    job = Job(experiment)
    ways: dict[str, Callable[[], Callable[[], float]]] = {"bare": job.bare, "fit": job.fit, "turn": job.turn}
    fit, seconds = ways[name](), []
    for _ in range(repeats + 1):
        start = clock(job.device)
        loss = fit()
        seconds.append(clock(job.device) - start)
    images = [job.images / taken for taken in seconds[1:]]
    return {"images": images, "loss": loss, "peak": peak_mib(device), "job": job.told}


def peak_mib(device: str) -> float:
    """Memory at its highest."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Job:
    """The first site's local fit in round 1, to be done in one way or another, each time from the same start.

    Args:
        experiment: of FedAvg.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.compute, self.device = experiment.compute, experiment.compute.device
        config, data = experiment.config, experiment.data
        self.site, self.worker = data.site(data.sites[0]), experiment.algorithm()
        self.steps: int = config.federation.local_steps
        self.images = self.steps * data.batch_size
        self.task = TrainTask(1, config.seed, steps=self.steps)
        server = self.worker.init_server({})
        self.message = self.worker.broadcast(server, self.site.name, self.task)
        size = " x ".join(map(str, data.size))
        network = type(self.worker.model).__name__
        self.told = f"{network}, {size}, bf16, channels last, fits of {self.steps} steps of {data.batch_size} images"

    def bare(self) -> Callable[[], float]:
        """The loop one would write by hand."""
        recipe = self.worker.recipe
        dimensions = max(p.ndim for p in self.worker.model.parameters())
        network = copy.deepcopy(self.worker.model).to(self.device).to(memory_format=LAST[dimensions])
        network.train()
        start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        normalize = recipe.normalize.to(self.device)
        layout = [
            (batch["image"].contiguous(memory_format=LAST[dimensions]), batch["mask"]) for batch in self._placed()
        ]

        def fit() -> float:
            network.load_state_dict(start)
            optimizer = torch.optim.Adam(network.parameters(), lr=recipe.training.lr, fused=True)
            losses = []
            for images, mask in layout:
                optimizer.zero_grad()
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = recipe.loss(network(normalize(images)), mask)
                torch.autograd.backward(loss)
                optimizer.step()
                losses.append(loss.detach())
            return float(torch.stack(losses).mean())

        return fit

    def fit(self) -> Callable[[], float]:
        """The suite's local fit, over batches that lie on the device."""
        batches = self._placed()

        def fit() -> float:
            self.worker.receive(self.message, State(), self.site)
            self.compute.fit(self.worker, batches)
            return self.worker.send(self.site).scalars[LOSS]

        return fit

    def turn(self) -> Callable[[], float]:
        """The suite's turn."""

        def unscored(*_: object) -> Scored:
            return Scored()

        def answer() -> float:
            update, _ = turn(self.worker, self.site, self.task, self.message, State(), self.compute, unscored)
            return update.scalars[LOSS]

        return answer

    def _placed(self) -> list[Batch]:
        batches = self.site.train_batches(self.task.seed, self.steps)
        return [{k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]


if __name__ == "__main__":
    main()
