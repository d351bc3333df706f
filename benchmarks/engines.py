"""The same work in one process, across machines through Flower (on loopback, TLS and keys on), and in its simulation.

`python -m benchmarks.engines FOLDER [SETTING=VALUE ...]` prints one table: seconds per round (between two checkpoints,
median after the first round), what of it is work at the slowest site, megabytes per round, and memory of all processes
together (proportional set size, so that shared pages count once). Flower's overhead is what is left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from uuid import uuid4

from reporting.folder import RunFolder
from scripts.loopback import ROOT, Loopback

SITES = ("site_01", "site_02", "site_03")
SETTINGS = (
    "algorithm=fedavg",
    "data.n_sites=3",
    "data.cases_per_site=12",
    "data.amount=0",
    "data.size=128",
    "model=unet",
    "model.encoder=resnet34",
    "data.batch_size=4",
    "federation.rounds=4",
    "federation.local_steps=5",
    "federation.evaluate_every=100",
    "evaluation.overlays=false",
    "evaluation.metrics=[dice]",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
)
MARK = "BENCHMARK_OF_ENGINES"


@dataclass
class Measured:
    """What was seen of one run.

    Attributes:
        ends: when the rounds were saved, in seconds.
        peak: largest memory of all its processes, in bytes.
    """

    ends: list[float] = field(default_factory=list)
    peak: int = 0


def main(arguments: Sequence[str]) -> int:
    """Measure all three, and print the table."""
    folder, settings = Path(arguments[0]).absolute(), [*SETTINGS, *arguments[1:]]
    folder.mkdir(parents=True, exist_ok=True)
    engines: dict[str, Callable[[Path, list[str]], None]] = {
        "in process": in_process,
        "Flower, loopback": across,
        "Flower, simulation": simulated,
    }
    print(f"imports of a site, once per worker: {imports():.1f} CPU s\n", flush=True)
    print(f"{'engine':20}{'s/round':>9}{'work':>8}{'rest':>8}{'MB/round':>10}{'memory MB':>11}", flush=True)
    for name, engine in engines.items():
        run = RunFolder(folder / name.replace(",", "").replace(" ", "-"))
        mark = uuid4().hex
        os.environ[MARK] = mark
        with watching(run, mark) as measured:
            engine(run.path, settings)
        print(row(name, run, measured), flush=True)
    return 0


def in_process(output: Path, settings: list[str]) -> None:
    """`train.py`."""
    train([*settings, f"output={output}"])


def simulated(output: Path, settings: list[str]) -> None:
    """`train.py engine=flower-simulation`."""
    train([*settings, "engine=flower-simulation", f"output={output}"])


def across(output: Path, settings: list[str]) -> None:
    """SuperLink and SuperNodes."""
    with Loopback(output.parent / "lab") as loopback:
        loopback.certificates()
        loopback.start_link()
        for site in SITES:
            loopback.register(site)
            loopback.start_node(site)
        told = loopback.run(*settings, f"deployment.sites=[{','.join(SITES)}]", f"output={output}", seconds=3600)
    if "test dice" not in told:
        raise RuntimeError(told[-5000:])


def train(arguments: list[str]) -> None:
    """In a process of its own."""
    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, capture_output=True)


def imports() -> float:
    """CPU seconds in which a site's worker imports everything."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import launch.site_worker"], cwd=ROOT, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def row(name: str, run: RunFolder, measured: Measured) -> str:
    """One line of the table."""
    spans = [b - a for a, b in zip(measured.ends, measured.ends[1:], strict=False)]
    seconds = median(spans)
    rounds = run.rounds()
    by_round = rounds[rounds["round"] > 1].groupby("round")["seconds"]
    work = float((by_round.sum() if name == "in process" else by_round.max()).median())
    traffic = run.traffic()
    megabytes = traffic[traffic["round"] == 2]["bytes"].sum() / 1e6
    return f"{name:20}{seconds:9.2f}{work:8.2f}{seconds - work:8.2f}{megabytes:10.1f}{measured.peak / 1e6:11.0f}"


@contextmanager
def watching(run: RunFolder, mark: str) -> Iterator[Measured]:
    """Notes when rounds are saved, and how much memory all processes with the mark take."""
    measured, stop = Measured(), threading.Event()

    def look() -> None:
        index, seen = run.checkpoints / "index.json", 0
        for count in range(sys.maxsize):
            if stop.wait(0.05):
                return
            if index.exists() and (changed := index.stat().st_mtime_ns) != seen:
                seen = changed
                measured.ends.append(changed / 1e9)
            if count % 20 == 0:
                measured.peak = max(measured.peak, memory(mark))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield measured
    finally:
        stop.set()
        thread.join()


def memory(mark: str) -> int:
    """Bytes of all processes that were started with the mark."""
    return sum(_memory(process, f"{MARK}={mark}".encode()) for process in Path("/proc").glob("[0-9]*"))


def _memory(process: Path, mark: bytes) -> int:
    try:
        if process.name == str(os.getpid()) or mark not in (process / "environ").read_bytes():
            return 0
        rollup = (process / "smaps_rollup").read_text()
    except OSError:  # it ended, or is another user's
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
