"""What of a message's cost is the suite's own: `OMP_NUM_THREADS=1 python -m benchmarks.messages [SETTING=VALUE ...]`.

One answer to one training task of FedAvg (a ResNet-34 Unet: 98 MB each way) passes all that the suite does with it, in
this process: CPU seconds, medians of six. What Flower does, and the training itself, is not in it; `benchmarks.engines`
measures both.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedseg.configs.compose import compose
from fedseg.federation.contract import Task, TrainTask
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import MOST_DATA, Envelope
from fedseg.federation.flower.keys import SiteKey
from fedseg.federation.flower.records import Answer, Facts, Question, unpack
from fedseg.federation.flower.transport import FlowerTransport
from fedseg.federation.ledger import Ledger
from fedseg.federation.state import State, Tensors, Update
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA

SETTINGS = ("algorithm=fedavg", "data=phantom", "model=unet", "model.encoder=resnet34")
SITE, RUN, ROUNDS = "a", "0" * 32, 7


class Stopwatch:
    """CPU seconds of this process by part."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        start = time.process_time()
        yield
        self.spent[name].append(time.process_time() - start)


class Exchange:
    """A server's end and a site's, and nothing of Flower between them.

    Args:
        folder: for keys and ledgers.
        state: what the server sends.
    """

    def __init__(self, folder: Path, state: State) -> None:
        nobody: Any = None
        self.ledger, self.watch = Ledger(folder / "ledger.jsonl"), Stopwatch()
        self.way = FlowerTransport(nobody, Question("hello", RUN, ""), 1.0)
        self.way.sites[SITE] = Facts(SITE, True, 3, 10)
        self.way.pins.keys[SITE] = SiteKey(folder / SITE, SITE).public
        self.way.head, self.way.known = (lambda: self.ledger.head), (lambda: self.ledger.known)
        self.site = SiteClient(SITE, folder / SITE, nobody)
        self.message, self.trained = state, State(_as_trained(state), {"steps": 1.0, "seconds": 1.0, "loss": 1.0})

    def round(self, number: int) -> None:
        """One task and its answer."""
        task = TrainTask(number, 0)
        start = time.process_time()
        within = sum(map(sum, self.watch.spent.values()))
        (update,) = self.ledger.noted({SITE: task}, {SITE: self.message}, self._answers(task))
        assert not update.refusal, update.refusal
        within = sum(map(sum, self.watch.spent.values())) - within
        self.watch.spent["server: the ledger"].append(time.process_time() - start - within)

    def _answers(self, task: Task) -> Iterator[Update]:
        part = self.watch.part
        self.way._known = self.way.known()
        with part("server: writes the question"):
            asked = self.way._write(SITE, task, self.message)
        with part("site: between Flower's process and the worker, both ways"):
            _passed(asked)
            _passed(asked)
        with part("site: reads the question"):
            question, message = unpack(asked, Question)
        with part("site: packs, hashes and signs the answer"):
            found = self.site.signed(asked.text, question, message, Answer(SITE, 10), self.trained)
        with part("server: reads the answer and checks the signature"):
            update = self.way._update(SITE, task, found)
        yield update


def _as_trained(state: State) -> dict[str, Tensors]:
    """Tensors in the order in which training leaves them: channels last."""
    order = torch.channels_last
    return {
        group: {n: (t + 0).contiguous(memory_format=order) if t.ndim == 4 else t + 0 for n, t in tensors.items()}
        for group, tensors in state.tensors.items()
    }


def _passed(envelope: Envelope) -> None:
    """The block through a socket of this machine, as between two processes."""
    here, there = Pipe()
    sender = threading.Thread(target=here.send_bytes, args=(envelope.data,))
    sender.start()
    there.recv_bytes(MOST_DATA)
    sender.join()


def main(arguments: Sequence[str]) -> None:
    """Measure, and print a table."""
    algorithm = Experiment(compose([*SETTINGS, *arguments], SCHEMA)).algorithm(in_channels=3)
    state = State(algorithm.init_server({}).tensors)
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(Path(folder), state)
        for number in range(1, ROUNDS + 1):
            exchange.round(number)
    medians = {name: median(spent[1:]) for name, spent in exchange.watch.spent.items()}
    for name, seconds in medians.items():
        print(f"{name:60} {seconds:.3f} CPU s")
    print(f"{'together':60} {sum(medians.values()):.3f} CPU s, {sum(state.sizes().values()) / 1e6:.0f} MB each way")


if __name__ == "__main__":
    main(sys.argv[1:])
