"""How much faster a round is when sites train side by side on the cores of one machine (`trainer.workers`).

    python -m benchmarks.workers [KEY=VALUE ...]

Both ways answer the same tasks in turn, one site after the other with one thread, and two sites at a time with one
thread each; updates must be equal bit for bit. Wall seconds of a round, medians over rounds but the first, in which
processes are forked; the ratio is of paired rounds. Both cores must be idle otherwise: the load is printed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from contextlib import closing

import torch

from fedseg.configs.compose import compose
from fedseg.federation.contract import Scored, TrainTask
from fedseg.federation.state import Update
from fedseg.federation.workers import SideBySide
from fedseg.launch.experiment import Experiment, Way
from fedseg.launch.settings import SCHEMA

WORKERS, ROUNDS, STEPS = 2, 5, 10
COMMON = [
    "data=phantom", "data.n_sites=4", "data.cases_per_site=12", "data.amount=0", "data.resolution=128", "data.size=128",
    "data.batch_size=4", "model=unet", "algorithm=fedavg", "trainer.accelerator=cpu", "trainer.threads=1",
]  # fmt: skip


def timed(way: Way, experiment: Experiment, round: int) -> tuple[float, list[Update]]:
    """Wall seconds of a round's local training, and the updates."""
    method, sites = experiment.algorithm(), experiment.data.sites
    server = method.init_server({})
    tasks = {site: TrainTask(round, 0, steps=STEPS) for site in sites}
    messages = {site: method.broadcast(server, site, task) for site, task in tasks.items()}
    start = time.perf_counter()
    updates = list(way.ask(tasks, messages))
    return time.perf_counter() - start, updates


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    experiment = Experiment(compose([*COMMON, *sys.argv[1:]], SCHEMA))
    experiment.data.setup()
    sites = experiment.sites()
    one = experiment.in_process(sites, lambda *_: Scored())
    pairs: list[tuple[float, float]] = []
    print(f"load before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores", flush=True)
    with closing(SideBySide(experiment.in_process(sites, lambda *_: Scored()), WORKERS, 1)) as two:
        for round in range(1, ROUNDS + 2):
            (alone, updates), (beside, same) = timed(one, experiment, round), timed(two, experiment, round)
            for update, other in zip(updates, same, strict=True):
                for group, tensors in update.tensors.items():
                    assert all(torch.equal(tensor, other[group][name]) for name, tensor in tensors.items())
            pairs.append((alone, beside))
            print(f"round {round}: {alone:.2f} s one by one, {beside:.2f} s side by side", flush=True)
    counted = pairs[1:]
    one_by_one, side_by_side = (statistics.median(times) for times in zip(*counted, strict=True))
    ratio = statistics.median(alone / beside for alone, beside in counted)
    print(f"one by one {one_by_one:.2f} s, {WORKERS} side by side {side_by_side:.2f} s: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
