"""Which slices make which batch, and the one loader that fetches them for all sites."""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fedseg.common.seeds import data_seed
from fedseg.datamodules.errors import DataError

Batch = dict[str, Any]
Sampling = Literal["shuffle", "replacement"]
SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2  # batches that a worker prepares before they are asked for
LONGEST_BATCH = 900.0  # seconds; a worker that takes longer stands still


class Pick(NamedTuple):
    """One slice or volume to fetch: its store, case and place in the case, and the seed of its augmentation.

    Of a patch that is not drawn by chance also its corner.
    """

    store: int
    case: int
    slice: int
    seed: int = 0
    corner: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """One batch to fetch.

    Attributes:
        picks: Its slices.
        augment: Whether to augment.
        masks: Whether to hand out masks.
        views: Augmented views per image; above 1 the images are (B, V, C, H, W).
        patients: Number of each slice's patient, where it is asked for.
    """

    picks: tuple[Pick, ...]
    augment: bool = False
    masks: bool = True
    views: int = 1
    patients: tuple[int, ...] | None = None


def draw(count: int, size: int, mode: Sampling, seed: int) -> NDArray[np.int64]:
    """Which of ``count`` items come in which order.

    Args:
        count: Number of items, at least 1.
        size: How many to draw.
        mode: "shuffle": one random permutation after the other, so that no item comes twice before all came once;
            "replacement": each draw independent of the others.
        seed: Of the order; a shorter draw is the beginning of a longer one.

    Returns:
        (size,) indices below ``count``.
    """
    random = np.random.default_rng(seed)
    if mode == "replacement":
        return random.integers(count, size=size)
    rounds = -(-size // count)
    return np.concatenate([random.permutation(count) for _ in range(rounds)])[:size] if size else np.empty(0, np.int64)


def training_plans(
    items: NDArray[np.int64], steps: int, batch_size: int, mode: Sampling, seed: int, *, masks: bool, views: int = 1
) -> list[Plan]:
    """Batches for ``steps`` steps, each exactly ``batch_size`` long.

    Args:
        items: (N, 3) rows of store, case, slice.
        steps: Number of batches.
        batch_size: Slices per batch.
        mode: See :func:`draw`.
        seed: Of the order and, with the position in it, of every slice's augmentation.
        masks: Whether to hand out masks.
        views: Views per image.
    """
    order = draw(len(items), steps * batch_size, mode, data_seed(seed, "order"))
    picks = [
        Pick(store, case, number, data_seed(seed, position))
        for position, (store, case, number) in enumerate(items[order].tolist())
    ]
    starts = range(0, len(picks), batch_size)
    return [Plan(tuple(picks[i : i + batch_size]), augment=True, masks=masks, views=views) for i in starts]


def patient_plans(
    items: NDArray[np.int64], patients: NDArray[np.int64], steps: int, rate: float, seed: int
) -> list[Plan]:
    """Batches of whole patients: each patient is in a batch with that probability, independently (Poisson sampling).

    Args:
        items: (N, 3) rows of store, case, slice.
        patients: (N,) number of each row's patient, from 0.
        steps: Number of batches; a batch may be empty.
        rate: In (0, 1].
        seed: Of the patients and of every slice's augmentation.
    """
    random = np.random.default_rng(data_seed(seed, "patients"))
    count = int(patients.max(initial=-1)) + 1
    plans = []
    for step in range(steps):
        rows = np.flatnonzero((random.random(count) < rate)[patients])
        picks = tuple(
            Pick(store, case, number, data_seed(seed, step, row))
            for row, (store, case, number) in zip(rows.tolist(), items[rows].tolist(), strict=True)
        )
        plans.append(Plan(picks, augment=True, patients=tuple(patients[rows].tolist())))
    return plans


class _Turn(Sampler[Plan]):
    """The batches of the turn that is on; replaced for every turn while the loader and its workers live on."""

    def __init__(self) -> None:
        self.plans: Sequence[Plan] = ()

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)


class Loaders:
    """One DataLoader for all sites and rounds; a second one only while two feeds are read at the same time.

    Args:
        dataset: Answers a plan with a batch.
        workers: Processes that fetch; 0 fetches in this process.
    """

    def __init__(self, dataset: Dataset[Batch], workers: int) -> None:
        self.dataset = dataset
        self.workers = workers
        self._idle: list[tuple[_Turn, DataLoader[Batch]]] = []
        # what goes with a cycle of references waits five seconds for each of its workers, which then are killed
        weakref.finalize(self, self._idle.clear)

    def run(self, plans: Sequence[Plan]) -> Iterator[Batch]:
        """Fetches the batches of ``plans`` in order."""
        if self.workers and plans and not self._idle:
            self._check_shared_memory(plans[0])
        turn, loader = self._idle.pop() if self._idle else self._new()
        turn.plans = plans
        broken = False
        try:
            yield from loader
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not self.workers or (isinstance(error, RuntimeError) and "DataLoader" not in str(error)):
                raise
            broken = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                f"data.workers={self.workers}: a process that prepares batches ended or stands still ({reason}); set "
                f"data.workers=0, or give it more memory (also in {SHARED_MEMORY})"
            ) from error
        finally:
            if not broken:
                self._idle.append((turn, loader))

    def _check_shared_memory(self, plan: Plan) -> None:
        """Workers hand batches over in shared memory, and wait for ever where there is too little of it."""
        if not SHARED_MEMORY.is_dir():
            return
        batch = self.dataset[plan]
        size = sum(value.numel() * value.element_size() for value in batch.values() if isinstance(value, Tensor))
        needed, free = 2 * self.workers * AHEAD * size, shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            print(
                f"warning: data.workers={self.workers} needs about {needed >> 20} MiB in {SHARED_MEMORY}, which has "
                f"{free >> 20} MiB free: batches are prepared without workers, with the same results (containers: "
                "docker run --shm-size)",
                file=sys.stderr,
            )
            self.workers = 0

    def _new(self) -> tuple[_Turn, DataLoader[Batch]]:
        turn = _Turn()
        loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_size=None,  # an item of the data set is a whole batch
            sampler=turn,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            prefetch_factor=AHEAD if self.workers else None,
            timeout=LONGEST_BATCH if self.workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that fetching never moves the training's random stream
            worker_init_fn=_one_thread,
        )
        return turn, loader


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:  # noqa: ARG001  (the loader hands the worker's number)
    import cv2

    cv2.setNumThreads(0)


class Feed:
    """Batches that can be counted, and read again from the start, without handing a trainer the loader itself.

    A trainer that is handed a DataLoader stops its workers after every fit; behind a plain iterable they live on.
    """

    def __init__(self, loaders: Loaders, plans: Sequence[Plan]) -> None:
        self._loaders = loaders
        self._plans = plans

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        return self._loaders.run(self._plans)
