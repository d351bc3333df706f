"""What a local step of a method costs, as a multiple of FedAvg's, and what a site keeps, sends and receives.

    OMP_NUM_THREADS=1 python -m benchmarks.steps                        the methods the suite is named for
    OMP_NUM_THREADS=1 python -m benchmarks.steps "feddg algorithm.second_order=true" ditto --common model=unet
    OMP_NUM_THREADS=1 python -m benchmarks.steps --all --write docs/methods/costs.csv    the table of all methods
    OMP_NUM_THREADS=1 python -m benchmarks.steps --all --memory --write docs/methods/costs.csv    its memory alone

Each method plays its first round for real, so that what sites tell each other is there in the second one. Then all
methods take turns: one local fit of the first site each, on batches read beforehand. CPU seconds (on a GPU: seconds) of
the whole fit over its steps: forward, backward, optimiser, and what a method does once when a fit ends. Medians over
repetitions but the first; ratios are of paired times. Bytes are the first site's: those up of the first round, those
down of the second; what it told before the first round is counted apart. Memory, on a CPU, is that of all tensors of
the worker, and what a first fit takes beyond them at its highest: gradients, moments of the optimiser, activations; it
is PyTorch's own count, which no other work on the machine changes. Batches and what was received are not in it. Methods
named with --write replace their rows and leave the others.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from fedseg.algorithms import ALGORITHMS
from fedseg.configs.compose import compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Batch, RoundRecord, Scored, Silent, TrainTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment, quieten_libraries
from fedseg.launch.settings import SCHEMA

NAMED = [
    "feddg",
    "feddg_released",
    "lcfed",
    "lcfed algorithm.head_share=1",
    "lcfed algorithm.head_share=0",
    "iopfl",
    "contrastive algorithm.pairing=instance",
]
NEEDED = {
    "contrastive": ["algorithm.pairing=instance"],
    "condistfl": ["data.unannotated={site_01:[cup]}"],
}
"""What a method's defaults lack on the images of the main job."""


class Traffic(Silent):
    """An observer that adds up the bytes of one site's last round, and of what it told before the first."""

    def __init__(self) -> None:
        self.bytes = {"up": 0, "down": 0}
        self.told = 0
        self.sends: list[str] = []
        self.site = ""

    def round_done(self, record: RoundRecord) -> None:
        """Only the last round's traffic stays; a record after it is of a publication."""
        rows = [row for row in record.traffic if row["site"] == self.site]
        sent = [row for row in rows if row["direction"] == "up"]
        if record.round == 0:
            self.told = sum(row["bytes"] for row in sent)
        elif record.round == 1:
            self.sends = [row["group"] for row in sent]
            for direction in self.bytes:
                self.bytes[direction] = sum(row["bytes"] for row in rows if row["direction"] == direction)


class Fit:
    """A method in its second round at the first site, ready to train again and again.

    Args:
        method: name of a method or preset, and settings of its own behind it.
        common: settings that all methods share.
        steps: local steps of a fit.
    """

    def __init__(self, method: str, common: Sequence[str], steps: int) -> None:
        settings = [*common, *f"algorithm={method}".split(), "federation.rounds=1", "federation.local_steps=1"]
        experiment = Experiment(compose(settings, SCHEMA))
        experiment.data.setup()
        self.compute, self.steps = experiment.compute, steps
        self.site, self.traffic = experiment.data.site(experiment.data.sites[0]), Traffic()
        self.traffic.site = self.site.name
        with tempfile.TemporaryDirectory() as folder:
            federation = experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), self.traffic)
            self.server = federation.run()
            self.algorithm, self.kept = federation.algorithm, federation.transport.kept()[self.site.name]
        self.worker = experiment.algorithm()
        self.task = TrainTask(2, experiment.config.seed, peers=tuple(experiment.data.sites))
        if self.algorithm.among_peers:  # nothing goes to a server
            self.traffic.sends = sorted(self.algorithm.per_site)
        self._receive()
        self.batches = [self._placed(batch) for batch in self.worker.batches(self.site, 0, steps)]

    @property
    def on_cpu(self) -> bool:
        """Whether PyTorch's count of memory is that of this device."""
        return self.compute.device.type == "cpu"

    def seconds(self) -> float:
        """Seconds per step of one more fit from the same start."""
        self._receive()
        start = clock(self.compute.device)
        self.compute.fit(self.worker, self.batches)
        return (clock(self.compute.device) - start) / self.steps

    def kept_bytes(self) -> int:
        """What the site keeps between its turns, in bytes."""
        return sum(self.kept.sizes().values())

    def memory(self) -> int:
        """Bytes of the worker's tensors, and what a fit takes beyond them at its highest; of the first fit alone."""
        held = sum(t.numel() * t.element_size() for t in [*self.worker.parameters(), *self.worker.buffers()])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watch:
            self.compute.fit(self.worker, self.batches)
        events = watch.profiler.kineto_results.events() if watch.profiler and watch.profiler.kineto_results else []
        moved = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return held + max(accumulate(int(count) for _, count in moved))

    def _receive(self) -> None:
        message: State = self.algorithm.broadcast(self.server, self.site.name, self.task)
        later = self.algorithm.among_peers or self.algorithm.exchanges_answers  # nothing comes down in the first round
        if self.traffic.bytes["down"] or later:  # of the second one, when what sites showed in the first is sent along
            self.traffic.bytes["down"] = sum(message.sizes().values())
        self.worker.receive(message, self.kept, self.site)

    def _placed(self, batch: Batch) -> Batch:
        device = self.compute.device
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, of the wall once a GPU has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def memories(methods: Sequence[str], common: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """The memory of each method, and nothing else."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        fit = Fit(method, common, steps)
        if not fit.on_cpu:
            raise SystemExit("--memory counts what a CPU's tensors take; add --common trainer.accelerator=cpu")
        rows.append({"method": method, "memory": fit.memory()})
        print(f"{method}: {rows[-1]['memory'] / 1e6:.1f} MB", flush=True)
    return rows


def measured(methods: Sequence[str], common: Sequence[str], repeats: int, steps: int) -> list[dict[str, Any]]:
    """A row for each method; FedAvg's is first."""
    fits = {method: Fit(method, common, steps) for method in ["fedavg", *(m for m in methods if m != "fedavg")]}
    memory = {method: fit.memory() for method, fit in fits.items()} if fits["fedavg"].on_cpu else {}
    seconds: dict[str, list[float]] = {method: [] for method in fits}
    for _ in range(repeats + 1):
        for method, fit in fits.items():
            seconds[method].append(fit.seconds())
    rows = []
    for method, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken[1:], seconds["fedavg"][1:], strict=True))
        traffic = fits[method].traffic
        moved = {**traffic.bytes, "kept": fits[method].kept_bytes(), "told": traffic.told}
        moved |= {"memory": memory[method]} if memory else {}
        groups = {"sends": " ".join(traffic.sends)}
        rows.append({"method": method, "seconds": statistics.median(taken[1:]), "step": ratio, **moved, **groups})
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]], common: Sequence[str], steps: int) -> None:
    """Put rows into the table of all methods, in the order of their names in the code."""
    header = (
        f"# Measured by `python -m benchmarks.steps --write`: a fit of {steps} steps of the main job "
        f"({' '.join(['default.yaml', *common])}), one thread of a CPU, PyTorch {torch.__version__.split('+')[0]}.\n"
        "# step: CPU seconds over FedAvg's; up, down: bytes of a site in round 1, in round 2; kept: bytes at a "
        "site between rounds; told: bytes before round 1; memory: bytes at the highest of a local fit.\n"
    )
    columns = ("method", "step", "up", "down", "kept", "told", "memory", "sends", "settings")
    found: dict[str, Mapping[str, Any]] = {}
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        found = {row["method"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
    for row in rows:
        name, *settings = row["method"].split()
        timed = {"step": f"{row['step']:.2f}"} if "step" in row else {}
        found[name] = {**found.get(name, {}), **row, **timed, "method": name, "settings": " ".join(settings)}
    table = pd.DataFrame([found[name] for name in ALGORITHMS if name in found], columns=columns)
    path.write_text(header + table.to_csv(index=False), encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=NAMED, help="methods or presets, each with settings of its own")
    parser.add_argument("--all", action="store_true", help="every method at its own defaults")
    parser.add_argument("--common", nargs="*", default=[], help="settings that all methods share")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="local steps of a fit")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, and leave all else as it is")
    parser.add_argument("--write", type=Path, help="put the rows into this table")
    options = parser.parse_args()
    quieten_libraries()
    methods = [" ".join([name, *NEEDED.get(name, [])]) for name in ALGORITHMS] if options.all else options.methods
    if options.memory:
        rows = memories(methods, options.common, options.steps)
    else:
        rows = measured(methods, options.common, options.repeats, options.steps)
        show(rows)
    if options.write:
        write(options.write, rows, options.common, options.steps)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print them.

    Args:
        rows: see `measured`.
    """
    width = max(len(row["method"]) for row in rows)
    print(f"{'method':{width}}  seconds  times FedAvg's    kept (kB)      up (kB)    down (kB)")
    for row in rows:
        sizes = "".join(f"{row[what] / 1e3:13.1f}" for what in ("kept", "up", "down"))
        print(f"{row['method']:{width}}{row['seconds']:9.3f}{row['step']:16.2f}{sizes}")


if __name__ == "__main__":
    main()
