"""What a local step of a method costs, as a multiple of FedAvg's.

    OMP_NUM_THREADS=1 python -m benchmarks.steps feddg "feddg algorithm.second_order=true" ditto
    OMP_NUM_THREADS=1 python -m benchmarks.steps feddg --common data.size=256 model=unet

Each method is brought to where its first local step starts: sites introduce themselves, the server answers, the first
site receives. Then all methods take turns on one batch each, without data loading; CPU seconds (on a GPU: seconds) of
forward, backward and optimiser. Medians over repetitions but the first; ratios are of paired times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from configs.compose import compose
from federation.client import turn
from federation.contract import Task
from federation.state import State
from launch.experiment import Experiment
from launch.settings import SCHEMA


def prepare(method: str, common: Sequence[str]) -> Callable[[], float]:
    """A function that does one more local step and returns its seconds.

    Args:
        method: name of a method or preset, and settings of its own behind it.
        common: settings that all methods share.
    """
    experiment = Experiment(compose([*common, *f"algorithm={method}".split()], SCHEMA))
    experiment.data.setup()
    device = experiment.compute.device
    worker, server = experiment.algorithm(), experiment.algorithm()
    sites = {name: experiment.data.site(name) for name in experiment.data.sites}
    task, told = Task("introduce", 0, experiment.config.seed), {}
    for name, site in sites.items():
        told[name], _ = turn(worker, site, task, State(), State(), experiment.compute, lambda *_: {})
    first = next(iter(sites))
    message = server.broadcast(server.init_server(told), first, Task("train", 1, experiment.config.seed))
    worker.receive(message, State(), sites[first])
    worker.to(device)
    optimizer = worker.configure_optimizers()
    batch = next(iter(worker.batches(sites[first], 0, 1)))
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> float:
        start = clock(device)
        worker.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return clock(device) - start

    return step


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, of the wall once a GPU has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", help="names of methods or presets, each with settings of its own")
    parser.add_argument("--common", nargs="*", default=[], help="settings that all methods share")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    methods = ["fedavg", *options.methods]
    steps = {method: prepare(method, options.common) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(options.repeats + 1):
        for method, step in steps.items():
            seconds[method].append(step())
    width = max(map(len, methods))
    print(f"{'method':{width}}  seconds  times FedAvg's")
    for method, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken[1:], seconds["fedavg"][1:], strict=True))
        print(f"{method:{width}}{statistics.median(taken[1:]):9.3f}{ratio:16.2f}")


if __name__ == "__main__":
    main()
