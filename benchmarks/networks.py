"""Networks beside each other: their size, what of them travels, their work and what they reach.

    python -m benchmarks.networks NETWORK ... [--seeds 2] [--with "SETTINGS"]

A NETWORK is its settings in one string, as in "model=tiny model.lora_rank=4"; `--with` are the settings of all of them,
such as the data. Each is trained once for every seed in a folder of its own, which is thrown away.

weights     numbers in the network's parameters
learn       those of them that do
GFLOP       of one image forward, a multiplication and an addition being two (torch.utils.flop_counter)
KB a round  of one site in one round, up and down, from communication.csv
Dice        of the best round's test cases on their own grid, mean over sites, then over seeds, and of every seed
CPU s       of a run, scoring included, mean over seeds
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedseg.configs.compose import compose
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute, read_settings
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder

FIXED = ("trainer.accelerator=cpu", "trainer.threads=1", "evaluation.overlays=false", "evaluation.metrics=[dice]")
COLUMNS = ("network", "weights", "learn", "GFLOP", "KB a round", "Dice", "of every seed", "CPU s")


@dataclass(frozen=True)
class Size:
    """What a network is before it learns.

    Attributes:
        weights: numbers in its parameters.
        learn: those that learn.
        flops: of one image forward.
    """

    weights: int
    learn: int
    flops: int


@dataclass(frozen=True)
class Trained:
    """What one run gave.

    Attributes:
        bytes: of one site in one round, both ways.
        dice: mean over sites.
        seconds: of this process.
    """

    bytes: float
    dice: float
    seconds: float


def size(settings: Sequence[str]) -> Size:
    """Build the network of a run, and count."""
    experiment = Experiment(compose(settings, SCHEMA))
    network = experiment.declared.model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *experiment.data.size))
    parameters = list(network.parameters())
    learn = sum(p.numel() for p in parameters if p.requires_grad)
    return Size(sum(p.numel() for p in parameters), learn, counter.get_total_flops())


def trained(settings: Sequence[str]) -> Trained:
    """Run once, and read the folder."""
    with tempfile.TemporaryDirectory() as home:
        before = resource.getrusage(resource.RUSAGE_SELF)
        with redirect_stdout(sys.stderr):  # where the runs' own tables go
            execute(read_settings([*settings, f"output={home}/run"]))
        after = resource.getrusage(resource.RUSAGE_SELF)
        folder = RunFolder(Path(home) / "run")
        traffic = pd.read_csv(folder.path / "communication.csv")
        scores = folder.scores()
    of_test = scores.query("checkpoint == 'best' and split == 'test' and metric == 'dice' and grid == 'own'")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    by_turn = traffic.groupby(["round", "site"])["bytes"].sum()
    return Trained(float(by_turn.mean()), float(of_test.groupby("site")["value"].mean().mean()), seconds)


def row(network: str, common: Sequence[str], seeds: int) -> tuple[str, ...]:
    """One line of the table."""
    settings = [*FIXED, *common, *network.split()]
    found = size(settings)
    runs = [trained([*settings, f"seed={seed}"]) for seed in range(seeds)]
    dice = [100 * run.dice for run in runs]
    return (
        network,
        f"{found.weights:,}",
        f"{found.learn:,}",
        f"{found.flops / 1e9:.3f}",
        f"{statistics.mean(run.bytes for run in runs) / 1e3:,.0f}",
        f"{statistics.mean(dice):.1f}",
        ", ".join(f"{value:.1f}" for value in dice),
        f"{statistics.mean(run.seconds for run in runs):.0f}",
    )


def main() -> None:
    """Measure, and print a table in Markdown row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--with", dest="common", default="", metavar="SETTINGS")
    options = parser.parse_args()
    rows = (row(network, options.common.split(), options.seeds) for network in options.networks)
    print(f"| {' | '.join(COLUMNS)} |\n|---{'|---:' * 5}|---|---:|")
    for cells in rows:
        print(f"| `{cells[0]}` | {' | '.join(cells[1:])} |", flush=True)


if __name__ == "__main__":
    main()
