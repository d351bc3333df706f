"""The suite's round loop against a plain PyTorch loop: the same network, data, batches and losses.

    python benchmarks/engine.py                 six sites: time; six and a hundred sites: memory
    python benchmarks/engine.py --quick         a few minutes, for a first look

Every cell runs in its own process with one thread, and the implementations take turns, so that a drift of the machine
meets all of them. CPU seconds per round are medians over rounds and repetitions; the first round (warm-up) is left out.

    plain     a hand-written FedAvg loop, PyTorch's default layout, optimiser and allocator
    suite     this suite as it comes: channels_last, fused optimiser, allocator thresholds, checkpoint every round
    bare      this suite without the first and the last of these: what the engine itself costs
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Run all cells and print one table, or one cell as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, rounds and repetitions")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(**json.loads(options.cell))))
        return
    repetitions = 1 if options.quick else 3
    timed = {"sites": 6, "steps": 2 if options.quick else 5, "rounds": 3 if options.quick else 4}
    crowded = {"sites": 100, "steps": 1, "rounds": 3}
    time_table(timed, repetitions)
    memory_table([{**crowded, "sites": 6, "rounds": 6}, crowded])


def time_table(work: dict[str, int], repetitions: int) -> None:
    """CPU seconds per round, and the mean losses of the last round side by side."""
    names = ("plain", "suite", "bare")
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name in names:
            cells[name].append(cell(name, **work))
    print(f"\n{work['sites']} sites x {work['steps']} steps a round, Unet/resnet18, 128 px, batch 4, one thread")
    head = ("CPU s a round", 16), ("of plain", 10), ("before round 1", 16), ("peak MiB", 10), ("loss, round 1", 16)
    print(" " * 8 + "".join(f"{title:>{width}}" for title, width in (*head, ("last round", 12))))
    medians = {n: statistics.median(s for c in cells[n] for s in c["seconds"][1:]) for n in names}
    for name in names:
        fixed = statistics.median(c["fixed"] for c in cells[name])
        peak = max(c["peak"] for c in cells[name])
        losses = cells[name][0]["losses"]
        ratio = medians[name] / medians["plain"]
        print(f"{name:8}{medians[name]:16.2f}{ratio:10.3f}{fixed:16.1f}{peak:10.0f}{losses[0]:16.4f}{losses[-1]:12.4f}")


def memory_table(works: list[dict[str, int]]) -> None:
    """Peak memory of FedAvg for few and many sites, and its growth over rounds."""
    print(f"\nmemory of FedAvg\n{'sites':>8}{'peak MiB':>10}{'of the first row':>18}   resident MiB after each round")
    first = 0.0
    for work in works:
        found = cell("suite", **work)
        first = first or found["peak"]
        after = " ".join(f"{value:.0f}" for value in found["resident"])
        print(f"{work['sites']:8}{found['peak']:10.0f}{found['peak'] / first:18.2f}   {after}")


def cell(name: str, **work: int) -> dict[str, Any]:
    """One implementation in a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps({"name": name, **work})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_cell(name: str, sites: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one implementation in this process."""
    from fedseg.configs.compose import compose
    from fedseg.launch.experiment import Experiment
    from fedseg.launch.settings import SCHEMA

    arguments = [
        "algorithm=fedavg", "algorithm.weighting=uniform", "data=phantom", f"data.n_sites={sites}", "model=unet",
        "data.cases_per_site=10", "data.amount=0", "data.batch_size=4", f"federation.rounds={rounds}",
        f"federation.local_steps={steps}", f"federation.evaluate_every={rounds + 1}", "trainer.threads=1",
        "trainer.accelerator=cpu", f"training.channels_last={'true' if name == 'suite' else 'false'}",
    ]  # fmt: skip
    if name != "suite":
        leave_allocator_alone()
    experiment = Experiment(compose(arguments, SCHEMA))
    experiment.data.setup()
    watch = Watch()
    if name == "plain":
        losses = list(plain_loop(experiment, rounds, steps, watch))
    else:
        losses = suite_loop(experiment, watch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": watch.seconds, "fixed": watch.fixed, "resident": watch.resident, "losses": losses, "peak": peak}


def leave_allocator_alone() -> None:
    """Keep glibc's own thresholds."""
    from fedseg.launch import experiment

    vars(experiment)["keep_freed_memory"] = lambda: None


class Watch:
    """CPU seconds and resident memory at the end of each round."""

    def __init__(self) -> None:
        self.fixed = time.process_time()
        self.before = self.fixed
        self.seconds: list[float] = []
        self.resident: list[float] = []

    def lap(self) -> None:
        """A round has ended."""
        now = time.process_time()
        self.seconds.append(now - self.before)
        self.before = now
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * resource.getpagesize() / 2**20)


def plain_loop(experiment: Any, rounds: int, steps: int, watch: Watch) -> Iterator[float]:
    """FedAvg as one would write it by hand; yields the mean loss of each round."""
    import torch

    from fedseg.common.seeds import derive_seed

    method = experiment.algorithm()
    network, recipe, seed = method.model, method.recipe, experiment.config.seed
    shared = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = experiment.data.sites
    for round in range(1, rounds + 1):
        losses, total = [], {name: torch.zeros_like(t, dtype=torch.float32) for name, t in shared.items()}
        for site in names:
            network.load_state_dict(shared)
            optimizer = torch.optim.Adam(network.parameters(), lr=recipe.training.lr)
            for batch in experiment.data.site(site).train_batches(derive_seed(seed, "batches", round, site), steps):
                optimizer.zero_grad()
                loss = recipe.loss(network(recipe.normalize(batch["image"])), batch["mask"])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            for name, tensor in network.state_dict().items():
                total[name] += tensor
        shared = {name: (total[name] / len(names)).to(tensor.dtype) for name, tensor in shared.items()}
        yield float(torch.stack(losses).mean())
        watch.lap()


def suite_loop(experiment: Any, watch: Watch) -> list[float]:
    """The same through the engine; the mean loss of each round."""
    from fedseg.federation.checkpoint import Checkpoint
    from fedseg.federation.contract import Scored, Silent

    class Observer(Silent):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def round_done(self, record: Any) -> None:
            if record.rounds:
                self.losses.append(statistics.fmean(row["loss"] for row in record.rounds))
                watch.lap()

    observer = Observer()
    with tempfile.TemporaryDirectory() as folder:
        experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), observer).run()
    return observer.losses


if __name__ == "__main__":
    main()
