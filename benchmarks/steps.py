"""What a local step of a method costs, as a multiple of FedAvg's, and what a site keeps, sends and receives.

    OMP_NUM_THREADS=1 python -m benchmarks.steps                        the methods the suite is named for
    OMP_NUM_THREADS=1 python -m benchmarks.steps "feddg algorithm.second_order=true" ditto --common model=unet

Each method plays its first round for real, so that what sites tell each other is there in the second one. Then all
methods take turns: one local fit of the first site each, on batches read beforehand. CPU seconds (on a GPU: seconds) of
the whole fit over its steps: forward, backward, optimiser, and what a method does once when a fit ends. Medians over
repetitions but the first; ratios are of paired times. Bytes are those of the last round and of the first site.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedseg.configs.compose import compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Batch, RoundRecord, Task
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


class Traffic:
    """An observer that adds up the bytes of one site's last round."""

    def __init__(self) -> None:
        self.bytes = {"up": 0, "down": 0}
        self.site = ""

    def round_started(self, round: int, rounds: int, sites: Sequence[str]) -> None:
        """Nothing."""

    def site_done(self, task: str, round: int, site: str, scalars: Mapping[str, float], seconds: float) -> None:
        """Nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Only the last round's traffic stays."""
        for direction in self.bytes:
            rows = (row for row in record.traffic if (row["site"], row["direction"]) == (self.site, direction))
            self.bytes[direction] = sum(row["bytes"] for row in rows)


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
            federation = experiment.federation(Checkpoint(Path(folder)), lambda *_: {}, self.traffic)
            self.server = federation.run()
            self.algorithm, self.kept = federation.algorithm, federation.transport.kept()[self.site.name]
        self.worker = experiment.algorithm()
        self.task = Task("train", 2, experiment.config.seed)
        self._receive()
        self.batches = [self._placed(batch) for batch in self.worker.batches(self.site, 0, steps)]

    def seconds(self) -> float:
        """Seconds per step of one more fit from the same start."""
        self._receive()
        start = clock(self.compute.device)
        self.compute.fit(self.worker, self.batches)
        return (clock(self.compute.device) - start) / self.steps

    def kept_bytes(self) -> int:
        """What the site keeps between its turns, in bytes."""
        return sum(self.kept.sizes().values())

    def _receive(self) -> None:
        message: State = self.algorithm.broadcast(self.server, self.site.name, self.task)
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=NAMED, help="methods or presets, each with settings of its own")
    parser.add_argument("--common", nargs="*", default=[], help="settings that all methods share")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="local steps of a fit")
    options = parser.parse_args()
    quieten_libraries()
    methods = ["fedavg", *options.methods]
    fits = {method: Fit(method, options.common, options.steps) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(options.repeats + 1):
        for method, fit in fits.items():
            seconds[method].append(fit.seconds())
    width = max(map(len, methods))
    print(f"{'method':{width}}  seconds  times FedAvg's    kept (kB)      up (kB)    down (kB)")
    for method, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken[1:], seconds["fedavg"][1:], strict=True))
        moved = fits[method].traffic.bytes
        sizes = "".join(f"{size / 1e3:13.1f}" for size in (fits[method].kept_bytes(), moved["up"], moved["down"]))
        print(f"{method:{width}}{statistics.median(taken[1:]):9.3f}{ratio:16.2f}{sizes}")


if __name__ == "__main__":
    main()
