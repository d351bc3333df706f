"""The same work in one process, across machines through Flower (on loopback, TLS and keys on), and in its simulation.

`python -m benchmarks.engines FOLDER [cores=N] [rows=N] [SETTING=VALUE ...]` prints a table: seconds per round (between
two checkpoints, median after the first round) and as a multiple of the first row's, CPU seconds of all processes in the
same span, megabytes in round 2 (of all messages, where there are any), and memory of all processes together
(proportional set size: shared pages count once).

With `cores=1` all processes of a row share one core. That is like for like: in one process sites train one after the
other, across machines side by side, and on one core both take as long as the work does. What is above 1 is overhead.
`rows=2` leaves the simulation out. Behind each row: CPU seconds per round by program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from uuid import uuid4

import pandas as pd

from fedseg.federation.checkpoint import Checkpoint
from fedseg.reporting.folder import RunFolder
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
OWN = ("cores", "rows")
MARK, POLL = "BENCHMARK_OF_ENGINES", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # 1 s is Flower's own default


@dataclass
class Measured:
    """What was seen of one run.

    Attributes:
        ends: when the rounds were saved, in seconds, and CPU seconds of its processes by then, by program.
        peak: largest memory of all its processes, in bytes.
    """

    ends: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    peak: int = 0

    @property
    def seconds(self) -> float:
        """Of a round."""
        return median(b - a for (a, _), (b, _) in pairwise(self.ends))

    @property
    def cpu(self) -> dict[str, float]:
        """CPU seconds of a round by program; those of processes that ended are their parents', once these waited."""
        spans = list(pairwise(spent for _, spent in self.ends))
        names = self.ends[-1][1]
        return {name: median(b.get(name, 0.0) - a.get(name, 0.0) for a, b in spans) for name in names}


def main(arguments: Sequence[str]) -> int:
    """Measure all three, and print the table."""
    folder, given = Path(arguments[0]).absolute(), [word for word in arguments[1:] if word.partition("=")[0] not in OWN]
    own = dict(word.split("=") for word in arguments[1:] if word not in given)
    pinned(own)
    settings = [*SETTINGS, *given]
    folder.mkdir(parents=True, exist_ok=True)
    engines: dict[str, Callable[[Path, list[str]], None]] = {
        "in process": in_process,
        "Flower, loopback": across,
        "Flower, simulation": simulated,
    }
    print(f"imports of a site, once per worker: {imports():.1f} CPU s\n", flush=True)
    print(f"{'engine':20}{'s/round':>9}{'times':>8}{'CPU s':>8}{'MB/round':>10}{'memory MB':>11}", flush=True)
    first = 0.0
    for name, engine in [*engines.items()][: int(own.get("rows", 3))]:
        run = RunFolder(folder / name.replace(",", "").replace(" ", "-"))
        mark = uuid4().hex
        os.environ[MARK] = mark
        with watching(run.checkpoints / "index.json", mark, partial(trained, run)) as measured:
            engine(run.path, settings)
        first = first or measured.seconds
        print(row(name, run, measured, first), flush=True)
    return 0


def pinned(own: Mapping[str, str]) -> None:
    """Let this process, and all that it starts, have as many cores as was said; without a word, all."""
    if "cores" in own:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(own["cores"]) :])


def in_process(output: Path, settings: list[str]) -> None:
    """`train.py`."""
    train([*settings, f"output={output}"])


def simulated(output: Path, settings: list[str]) -> None:
    """`train.py engine=flower-simulation`."""
    train([*settings, "engine=flower-simulation", f"output={output}"])


def across(output: Path, settings: list[str]) -> None:
    """SuperLink and SuperNodes."""
    with Loopback(output.parent / "lab", {POLL: "1"}) as loopback:
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
    subprocess.run([sys.executable, "-c", "import fedseg.launch.sites.site_worker"], cwd=ROOT, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def trained(run: RunFolder) -> bool:
    """Whether a round has been saved."""
    return Checkpoint(run.checkpoints).round > 0


def row(name: str, run: RunFolder, measured: Measured, first: float) -> str:
    """One line of the table."""
    megabytes = sum(table[table["round"] == 2]["bytes"].sum() for table in _moved(run)) / 1e6
    times = measured.seconds / first
    numbers = f"{measured.seconds:9.2f}{times:8.2f}{sum(measured.cpu.values()):8.2f}"
    return f"{name:20}{numbers}{megabytes:10.1f}{measured.peak / 1e6:11.0f}   {told(measured)}"


def _moved(run: RunFolder) -> list[pd.DataFrame]:
    """Tables of bytes: of all messages both ways, or, where none travelled, of what training exchanges."""
    sent = run.sent()
    return [sent, run.audit()] if len(sent) else [run.traffic()]


def told(measured: Measured) -> str:
    """CPU seconds by program."""
    return ", ".join(f"{part} {seconds:.1f}" for part, seconds in sorted(measured.cpu.items()) if seconds > 0.05)


@contextmanager
def watching(index: Path, mark: str, begun: Callable[[], bool]) -> Iterator[Measured]:
    """Notes when a round has ended, and how much memory all processes with the mark take.

    Args:
        index: changes with the end of every round.
        mark: in the environment of the processes.
        begun: whether a round has ended at all.
    """
    measured, stop = Measured(), threading.Event()

    def look() -> None:
        seen = 0
        for count in range(sys.maxsize):
            if stop.wait(0.05):
                return
            if begun() and (changed := index.stat().st_mtime_ns) != seen:
                seen = changed
                spent: dict[str, float] = defaultdict(float)
                for process in marked(mark):
                    spent[program(process)] += cpu(process)
                measured.ends.append((changed / 1e9, spent))
            if count % 20 == 0:
                measured.peak = max(measured.peak, memory(mark))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield measured
    finally:
        stop.set()
        thread.join()


def marked(mark: str) -> Iterator[Path]:
    """All processes that were started with the mark."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            if process.name != str(os.getpid()) and f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                yield process


def program(process: Path) -> str:
    """What a process runs: a script's name, or that of a module."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    word = words[words.index("-m") + 1] if "-m" in words[:3] else words[1] if len(words) > 1 else words[0]
    return Path(word).name


def memory(mark: str) -> int:
    """Bytes of all processes with the mark."""
    return sum(_memory(process) for process in marked(mark))


def cpu(process: Path) -> float:
    """CPU seconds of a process and of its children that have ended."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _memory(process: Path) -> int:
    try:
        rollup = (process / "smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
