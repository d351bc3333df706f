"""What LC-Fed's two kinds of local step cost, as multiples of FedAvg's, and how many bytes travel and stay.

    OMP_NUM_THREADS=1 python -m benchmarks.lcfed_step
    OMP_NUM_THREADS=1 python -m benchmarks.lcfed_step model=tiny data.size=96

CPU seconds of forward, backward and optimiser on one random batch; methods take turns, the median of the paired ratios
counts. Arguments are settings of `train.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from algorithms import Algorithm
from algorithms.lcfed import LCFed
from configs.compose import compose
from federation.contract import Task
from federation.state import State
from launch.experiment import Experiment
from launch.settings import SCHEMA
from models.select import Selector, everything

SITES, REPEATS = 4, 5


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    plain, ours = (worker(name, sys.argv[1:]) for name in ("fedavg", "lcfed"))
    assert isinstance(ours, LCFed)
    steps = {
        "FedAvg": stepper(plain, everything, sys.argv[1:]),
        "LC-Fed, head": stepper(ours, ours.personal, sys.argv[1:]),
        "LC-Fed, body": stepper(ours, ours._body, sys.argv[1:]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):
        for name, step in steps.items():
            seconds[name].append(step())
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken[1:], seconds["FedAvg"][1:], strict=True))
        print(f"{name:14}{statistics.median(taken[1:]):8.3f} s {ratio:6.2f} times FedAvg's")
    for name, method in (("FedAvg", plain), ("LC-Fed", ours)):
        print(f"{name:8}down {method.received.sizes()}, stays {method.keep().sizes()}")


def worker(name: str, settings: list[str]) -> Algorithm:
    """A worker in the second round of a federation whose heads differ."""
    experiment = Experiment(compose([f"algorithm={name}", *settings], SCHEMA))
    algorithm = experiment.algorithm(in_channels=3)
    site = type("Named", (), {"name": "s1"})()
    server = algorithm.init_server({f"s{i}": State() for i in range(SITES)})
    if isinstance(algorithm, LCFed):
        head = algorithm.model.get_submodule("segmentation_head").state_dict()
        for i in range(SITES):
            server.tensors[f"head/s{i}"] = {name: t + 0.1 * torch.randn_like(t) for name, t in head.items()}
    algorithm.receive(algorithm.broadcast(server, "s1", Task("train", 2, 0)), State(), site)
    return algorithm


def stepper(algorithm: Algorithm, learning: Selector, settings: list[str]) -> Callable[[], float]:
    """A function that does one more local step in which these weights learn, and returns its seconds."""
    config = compose(settings, SCHEMA)
    size, regions = config.data.size, len(Experiment(config).data.regions.names)
    shape = (config.data.batch_size, 3, size, size)
    batch = {"image": torch.rand(shape), "mask": (torch.rand(shape[0], regions, size, size) > 0.5).float()}
    optimizer = algorithm.configure_optimizers()

    def step() -> float:
        start = time.process_time()
        algorithm._freeze_all_but(learning)
        algorithm.loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


if __name__ == "__main__":
    main()
