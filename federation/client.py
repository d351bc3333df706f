"""One site's answer to one message. Nothing survives a turn but what `keep` returns."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from fedseg.common.parts import PartError, called, is_path
from fedseg.common.seeds import derive_seed
from fedseg.federation.contract import (
    Batch,
    ClientHalf,
    Evaluate,
    EvaluateTask,
    Row,
    S,
    Site,
    Split,
    Task,
    TrainTask,
    W,
)
from fedseg.federation.heterogeneity import LABELS, histograms
from fedseg.federation.ranges import check_ranges
from fedseg.federation.state import State, Update, told_non_finite


@dataclass(frozen=True)
class Compute:
    """Where and how local training computes.

    Attributes:
        accelerator: Lightning's accelerator; auto takes a GPU where there is one.
        precision: Lightning's precision, for example 32-true or bf16-mixed.
        gradient_clip: largest gradient norm of a local step; null does not clip.
        deterministic: ask PyTorch for deterministic kernels (slower on GPUs; CPU runs are deterministic anyway).
        threads: threads of PyTorch on the CPU; null leaves PyTorch's choice.
        workers: processes on the CPU that train and score sites side by side, with the same results; each has `threads`
            threads, or with null its share of the cores.
        callbacks: of Lightning, made anew for every local fit, with their settings, as in
            {pytorch_lightning.callbacks:StochasticWeightAveraging: {swa_lrs: 0.01}, my_package:Watch: {}}.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    gradient_clip: PositiveFloat | None = None
    deterministic: bool = False
    threads: PositiveInt | None = None
    workers: PositiveInt = 1
    callbacks: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        check_ranges(Compute, vars(self), "trainer")
        if self.gradient_clip is not None and self.precision != "32-true":
            raise ValueError("trainer.gradient_clip needs trainer.precision=32-true: the optimisers are fused")
        if self.workers > 1 and self.device.type != "cpu":
            raise ValueError(
                f"trainer.workers={self.workers} is for the CPU; take trainer.accelerator=cpu, or "
                "engine=flower-simulation for several GPUs"
            )
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("trainer.accelerator=gpu, but PyTorch finds no CUDA device; take cpu or auto")
        if self.callbacks:
            try:
                self._trainer()
            except MisconfigurationException as error:
                told = f"{str(error).rstrip('.')} (for a local fit, which neither logs nor saves by itself)"
                raise PartError(f"trainer.callbacks: {told}") from error

    @property
    def device(self) -> torch.device:
        """The device that this choice of accelerator leads to."""
        gpu = torch.cuda.is_available() if self.accelerator == "auto" else self.accelerator == "gpu"
        return torch.device("cuda" if gpu else "cpu")

    def fit(self, module: pl.LightningModule, batches: Iterable[Batch]) -> None:
        """Train the module once over the batches with a silent Trainer.

        The Trainer is built anew: it costs about 10 ms and carries nothing from one site to the next.
        """
        trainer = self._trainer()
        interruptible = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, train_dataloaders=_Plain(batches), val_dataloaders=[])
            # module and Trainer refer to each other, so optimiser state would wait for the garbage collector
            trainer.strategy.optimizers = []
        except SystemExit as error:
            # Lightning ends the process when interrupted, and from then on ignores interrupts; callers decide here
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, interruptible)
            raise KeyboardInterrupt from error

    def _trainer(self) -> pl.Trainer:
        """A silent Trainer of one epoch."""
        return pl.Trainer(
            accelerator=self.device.type if self.device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            precision=self.precision,
            gradient_clip_val=self.gradient_clip,
            deterministic="warn" if self.deterministic else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=[_callback(path, settings) for path, settings in (self.callbacks or {}).items()],
        )


def _callback(path: str, settings: Mapping[str, Any]) -> pl.Callback:
    """A fresh callback.

    Raises:
        PartError: it cannot be imported or called so, or is none.
    """
    if not is_path(path):
        raise PartError(f"trainer.callbacks: {path!r} is none; write {{package.module:Name: {{}}}}")
    made = called(path, "trainer.callbacks", **settings)
    if not isinstance(made, pl.Callback):
        raise PartError(f"trainer.callbacks: {path} made {made!r}, which is no pytorch_lightning.Callback")
    return made


class Images:
    """All that an adaptation is given of a site: the images of a split, batch by batch, anew in every pass.

    Args:
        site: whose images.
        split: which of them.
    """

    def __init__(self, site: Site, split: Split) -> None:
        self._site = site
        self._split = split

    def __iter__(self) -> Iterator[Tensor]:
        return (batch["image"] for batch in self._site.input_batches(self._split))


class _Plain:
    """Hides what kind of iterable it is: Lightning takes lists apart and shuts a loader's workers down."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(cast(Sized, self._batches))


def turn(
    worker: W, site: S, task: Task, message: State, kept: State, compute: Compute, evaluate: Evaluate[W, S]
) -> tuple[Update, State]:
    """Answer one task at one site.

    Returns:
        The update that travels, and what the site keeps. After a training turn that produced a NaN or an infinity the
        update carries a refusal, and the site keeps what it had before.
    """
    start = time.perf_counter()
    site = site.at(task.round + (task.kind == "introduce"))  # which tells of what is there in the first round to come
    examples = worker.examples_at(site)
    seed_everything(derive_seed(task.seed, task.kind, task.round, site.name))
    worker.round = task.round if isinstance(task, TrainTask) else 0
    worker.receive(message, kept, site)
    answer: State
    rows: list[Row] = []
    if isinstance(task, TrainTask):
        answer = _train(worker, site, task, compute)
    elif isinstance(task, EvaluateTask):
        answer, rows = _evaluate(worker, site, task, compute, evaluate)
    else:
        answer = {"introduce": worker.introduce, "publish": worker.publish}[task.kind](site)
        if task.kind == "introduce" and task.topic == LABELS:
            answer = State({**answer.tensors, LABELS: histograms(site.covered())}, answer.scalars)
    update = Update(tensors=answer.tensors, scalars=answer.scalars, site=site.name, examples=examples, rows=rows)
    update.scalars["seconds"] = time.perf_counter() - start
    fitted = isinstance(task, EvaluateTask) and task.personalise and worker.personalises
    now_kept = worker.keep() if fitted or isinstance(task, TrainTask) else kept
    if refusal := told_non_finite(update, now_kept):
        scalars = {"seconds": update.scalars["seconds"]}
        return Update(site=site.name, examples=examples, refusal=refusal, scalars=scalars), kept
    return update, now_kept


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, without Lightning's messages and environment variables."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries below us draw from the global generator
    torch.manual_seed(seed)


def _train(worker: ClientHalf, site: Site, task: TrainTask, compute: Compute) -> State:
    labelled = worker.labelled and site.examples > 0
    full = task.steps if task.steps is not None else site.steps(task.epochs, labelled)
    steps = max(1, round(full * task.work)) if full and worker.examples_at(site) else 0
    if steps:
        seed = derive_seed(task.seed, "batches", task.round, site.name)
        compute.fit(cast(pl.LightningModule, worker), worker.batches(site, seed, steps))
    payload = worker.send(site)
    payload.scalars["steps"] = float(steps)
    return payload


def _evaluate(
    worker: W, site: S, task: EvaluateTask, compute: Compute, evaluate: Evaluate[W, S]
) -> tuple[State, list[Row]]:
    fitted = {"steps": 0.0, "fit_seconds": 0.0}

    def fit(steps: int) -> None:
        seed, start = derive_seed(task.seed, "personalise", task.round, site.name), time.perf_counter()
        compute.fit(cast(pl.LightningModule, worker), worker.batches(site, seed, steps))
        fitted["steps"] += steps
        fitted["fit_seconds"] += time.perf_counter() - start

    if task.personalise and worker.personalises and site.examples:
        worker.personalise(site, fit)
        if worker.keep().non_finite():
            return State(), []  # the turn refuses it; a diverged model has no scores
    module = cast(pl.LightningModule, worker)
    module.to(compute.device)
    if task.adapt:
        worker.adapt(Images(site, "test"))
    found = evaluate(worker, site, task)
    module.cpu()
    return State(scalars={**found.means, **fitted} if fitted["steps"] else found.means), found.rows
