"""Whether a run's memory grows with its sites by what they keep, and with its rounds not at all.

    OMP_NUM_THREADS=1 python -m benchmarks.kept                     the methods the suite is named for
    OMP_NUM_THREADS=1 python -m benchmarks.kept ditto --common model=unet

Every method trains FEW and MANY sites, each number in a process of its own, on the same few images per site, which lie
on the disk. ``resident`` is the growth of resident memory per further site, in megabytes, after the last round;
``kept`` is what the last site keeps between its turns, and ``filed`` what the server holds of each site. FedAvg's
row is what a site costs in any method. ``rounds`` is the growth from the second round to the last with MANY sites.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedseg.configs.compose import compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import RoundRecord, Scored, Silent
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA

FEW, MANY, ROUNDS = 4, 24, 5
NAMED = ["feddg", "lcfed", "iopfl", "contrastive algorithm.pairing=instance"]
COMMON = [
    "data=phantom",
    "data.cases_per_site=8",
    "data.amount=0",
    "data.size=64",
    "data.batch_size=2",
    f"federation.rounds={ROUNDS}",
    "federation.local_steps=1",
    f"federation.evaluate_every={ROUNDS + 1}",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
]


class Watch(Silent):
    """Notes resident memory at the end of each round, in megabytes."""

    def __init__(self) -> None:
        self.resident: list[float] = []

    def round_done(self, record: RoundRecord) -> None:
        """The introduction counts as a round."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * resource.getpagesize() / 1e6)


def run(settings: Sequence[str]) -> dict[str, Any]:
    """One run in this process."""
    experiment = Experiment(compose(settings, SCHEMA))
    experiment.data.setup()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        federation = experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), watch)
        server = federation.run()
    last = experiment.data.sites[-1]
    kept = sum(federation.transport.kept()[last].sizes().values()) / 1e6
    filed = sum(size for group, size in server.sizes().items() if group.endswith(f"/{last}")) / 1e6
    return {"resident": watch.resident, "kept": kept, "filed": filed}


def measure(method: str, sites: int, common: Sequence[str]) -> dict[str, Any]:
    """One run in a process of its own."""
    settings = [*COMMON, *common, *f"algorithm={method}".split(), f"data.n_sites={sites}"]
    command = [sys.executable, "-m", "benchmarks.kept", "--run", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=NAMED, help="methods or presets, each with settings of its own")
    parser.add_argument("--common", nargs="*", default=[], help="settings that all methods share")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(json.loads(options.run))))
        return
    methods = ["fedavg", *options.methods]
    width = max(map(len, methods))
    print(f"{'method':{width}}    kept MB   filed MB   resident MB a site   rounds MB", flush=True)
    for method in methods:
        few, many = (measure(method, sites, options.common) for sites in (FEW, MANY))
        growth = (many["resident"][-1] - few["resident"][-1]) / (MANY - FEW)
        rounds = many["resident"][-1] - many["resident"][2]
        print(f"{method:{width}}{many['kept']:11.2f}{many['filed']:11.2f}{growth:21.2f}{rounds:12.1f}", flush=True)


if __name__ == "__main__":
    main()
