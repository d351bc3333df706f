"""What privacy and compression cost: bytes and seconds of one update, and a private local step against FedAvg's.

    OMP_NUM_THREADS=1 python -m benchmarks.privacy
    OMP_NUM_THREADS=1 python -m benchmarks.privacy model=unet data.size=128

CPU seconds, medians of paired repetitions; implementations take turns. Arguments are settings of `train.py`; the
network has group normalisation. Encryption is measured on PIECE numbers and grows in proportion. Masks are a whole
round of SITES sites, one of which drops out after it sealed its shares; the row counts one site, or the server.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedseg.algorithms import Algorithm
from fedseg.configs.compose import compose
from fedseg.federation.contract import Batch, Cohort, T, Transform
from fedseg.federation.state import Mean, State, Update
from fedseg.federation.transforms import remembered
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.privacy.build import build_transforms
from fedseg.privacy.masked import Masked, MaskedRound
from fedseg.privacy.settings import Compression, Privacy

PATIENTS, REPEATS, PIECE, SITES = 4, 5, 200_000, 5
COMMON = ["algorithm=fedavg", "model.norm=group", "trainer.threads=1", "trainer.accelerator=cpu"]
CHAINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float16": ({}, {"cast": "float16"}),
    "top_k 0.1": ({}, {"top_k": 0.1}),
    "top_k 0.01, float16": ({}, {"top_k": 0.01, "cast": "float16"}),
    "site": ({"mechanism": "site"}, {}),
    "sparse, share 0.1": ({"mechanism": "sparse"}, {}),
    "encrypted": ({"aggregation": "encrypted"}, {}),
}


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    plain, private = worker([]), worker(["privacy.mechanism=patient", f"privacy.patients_per_step={PATIENTS}"])
    shape = plain.init_server({})["model"]
    numbers = sum(t.numel() for t in shape.values())
    print(f"an update of {numbers:,} numbers, {4 * numbers:,} bytes\n")
    print(f"{'transforms':22}{'bytes':>14}{'times':>8}{'site s':>9}{'server s':>10}{'off by':>10}")
    for name, (mechanism, compression) in CHAINS.items():
        chain = build_transforms(Privacy(**mechanism), Compression(**compression), 1.0)
        part = {"row": torch.randn(PIECE) * 1e-3} if name == "encrypted" else {k: t * 1e-3 for k, t in shape.items()}
        show(name, chain, part, numbers)
    show_masked({k: t * 1e-3 for k, t in shape.items()}, numbers)
    steps(plain, private)


def worker(more: list[str]) -> Algorithm:
    """A site's half of FedAvg."""
    return Experiment(compose([*COMMON, *sys.argv[1:], *more], SCHEMA)).algorithm(in_channels=3)


def show(name: str, chain: tuple[Transform, ...], tensors: Mapping[str, Tensor], numbers: int) -> None:
    """A row: bytes that travel, seconds at the site and at the server, distance of the mean from the plain one."""
    scale = numbers / sum(t.numel() for t in tensors.values())
    at_site, at_server = [], []
    for _ in range(2 if name == "encrypted" else REPEATS):
        update = Update({"model": dict(tensors)}, {"steps": 1.0, "seconds": 0.0}, site="a", examples=1)
        start = time.process_time()
        for transform in chain:
            update, _ = transform.on_client(update, State(), 0)
        at_site.append(time.process_time() - start)
        start = time.process_time()
        arrived = update
        for transform in reversed(chain):
            arrived = transform.on_arrival(arrived)
        total = next(filter(None, (transform.accumulator() for transform in chain)), None) or Mean()
        for _ in range(2):
            total.add(arrived, 1.0)
        mean = total.result()
        for transform in reversed(chain):
            mean, _ = transform.on_server(mean, Cohort({"a": 1.0, "b": 1.0}, 2.0, 2, 2), State(), 0)
        at_server.append(time.process_time() - start)
    size = scale * sum(update.sizes().values())
    off = max(float((mean["model"][key] - tensor).abs().max()) for key, tensor in tensors.items())
    site, server = (scale * statistics.median(taken) for taken in (at_site, at_server))
    print(f"{name:22}{size:14,.0f}{size / 4 / numbers:8.3f}{site:9.3f}{server:10.3f}{off:10.1e}", flush=True)


def show_masked(tensors: dict[str, Tensor], numbers: int) -> None:
    """The row of secure aggregation: a site's seconds and bytes over the four messages of a round."""
    sides, size, at_site = {f"s{n}": Masked() for n in range(SITES)}, 0, 0.0
    *there, _ = sides

    def consult(topic: str, messages: Mapping[str, State], read: Callable[[str, State], T]) -> dict[str, T]:
        nonlocal size, at_site
        said, start = {}, time.process_time()
        for site, message in messages.items():
            said[site] = sides[site].consulted(site, topic.partition("/")[2], message)
        at_site += time.process_time() - start
        size += sum(sum(answer.sizes().values()) for answer in said.values())
        return {site: read(site, answer) for site, answer in said.items()}

    start, total = time.process_time(), MaskedRound()
    along = total.begin(list(sides), {"model": tensors}, consult)
    for site in there:
        begun = time.process_time()
        sides[site].consulted(site, "train", remembered(along[site], Masked.name))
        update = Update({"model": tensors}, {"steps": 1.0, "seconds": 0.0}, site=site, examples=7)
        sent, _ = sides[site].on_client(update, State(), 0)
        at_site += time.process_time() - begun
        size += sum(sent.sizes().values())
        total.add(sent, 0.0)
    total.end(consult)
    mean = total.result()
    server = time.process_time() - start - at_site
    off = max(float((mean["model"][key] - tensor).abs().max()) for key, tensor in tensors.items())
    name, site_bytes = f"masked, {SITES} sites", size / len(there)
    print(f"{name:22}{site_bytes:14,.0f}{site_bytes / 4 / numbers:8.3f}{at_site / SITES:9.3f}{server:10.3f}{off:10.1e}")


def steps(plain: Algorithm, private: Algorithm) -> None:
    """A private step on some patients of one image each, and FedAvg's step on the same images."""
    size = compose([*COMMON, *sys.argv[1:]], SCHEMA).data.size
    images = torch.rand(PATIENTS, 3, size, size)
    mask = torch.zeros_like(plain.predict(images, "global")).bernoulli(0.3)
    batch = {"image": images, "mask": mask, "patient": torch.arange(PATIENTS)}
    run = {name: stepper(algorithm, batch) for name, algorithm in (("FedAvg", plain), ("private", private))}
    taken: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(REPEATS + 1):
        for name, step in run.items():
            taken[name].append(step())
    print(f"\na local step on {PATIENTS} patients of one image, {size} px")
    for name, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[1:], taken["FedAvg"][1:], strict=True))
        print(f"{name:10}{statistics.median(seconds[1:]):8.3f} s {ratio:6.2f} times FedAvg's")


def stepper(algorithm: Algorithm, batch: Batch) -> Callable[[], float]:
    """A function that does one local step and returns its seconds."""
    optimizer = algorithm.configure_optimizers()

    def step() -> float:
        start = time.process_time()
        torch.autograd.backward(algorithm.training_step(batch, 0))
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


if __name__ == "__main__":
    main()
