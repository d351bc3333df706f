"""A model that a run saved, as a LightningModule that opens from its own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fedseg.algorithms import Algorithm
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.algorithms.stock import StockModule
from fedseg.datamodules import Regions
from fedseg.federation.contract import Batch
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment, build_method, build_network
from fedseg.launch.folders.saved import NEW, NamedSite, network_view
from fedseg.launch.networks import network_of
from fedseg.models.window import Window


class TrainedModel(StockModule):
    """One model of a run: `TrainedModel.load_from_checkpoint("global.ckpt")` opens what `export.py` wrote.

    `forward` gives logits, `Trainer.predict` the run's probabilities; `Trainer.validate` and `test` score the cases of
    a site, `Trainer.fit` goes on training the network there with the run's loss and optimiser.

    Args:
        algorithm: the run's section `algorithm`.
        model: its section `model`.
        training: its section `training`.
        regions: name to label ids.
        exclusive: whether they are.
        channels: of the network's input.
        dimensions: 2 for images, 3 for volumes.
        window: fields of `fedseg.models.window.Window`, where the network sees patches.
        view: which of the method's models.
        rounds: of the run.
        site: whose it is; None for the global one.
        received: what the method answers with beside the network, by group and name.
        numbers: likewise.
    """

    def __init__(
        self,
        *,
        algorithm: Mapping[str, Any],
        model: Mapping[str, Any],
        training: Mapping[str, Any],
        regions: Mapping[str, list[int]],
        exclusive: bool,
        channels: int,
        view: str,
        dimensions: int = 2,
        window: Mapping[str, Any] | None = None,
        rounds: int = 1,
        site: str | None = None,
        received: Mapping[str, Mapping[str, Tensor]] | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        labels = Regions({name: tuple(ids) for name, ids in regions.items()}, exclusive)
        slides = None if window is None else Window(**window)
        self.recipe = Recipe.build(
            Training(**training), labels.activation, channels, regions=labels.names, window=slides, rounds=rounds
        )
        worker = build_method(algorithm, build_network(model, channels, labels.channels, dimensions), self.recipe)
        message = State({group: dict(tensors) for group, tensors in (received or {}).items()}, dict(numbers or {}))
        worker.receive(message, State(), NamedSite(site or NEW, seen=site is not None))
        self.views = (view,)
        self.model = worker.standalone(network_view(view))
        self._preparation = worker.preparation

    @classmethod
    def of(cls, worker: Algorithm, experiment: Experiment, channels: int, view: str, site: str | None) -> TrainedModel:
        """What a worker answers with that has received.

        Args:
            worker: see `fedseg.launch.folders.saved.SavedModels.load`; it is moved to the CPU.
            experiment: the run's.
            channels: of the network's input.
            view: which of the worker's models.
            site: whose it is.
        """
        sections: Any = OmegaConf.to_container(experiment.config)
        network: Any = OmegaConf.to_container(network_of(experiment.config, site if view == "personal" else None))
        regions, needed = experiment.data.regions, worker.cpu().answers_with()
        made = cls(
            algorithm=sections["algorithm"],
            model=network | dict.fromkeys({"encoder_weights", "encoder_weights_key"} & {*network}),
            training=sections["training"],
            regions={name: list(ids) for name, ids in regions.labels.items()},
            exclusive=regions.exclusive,
            channels=channels,
            view=view,
            dimensions=experiment.data.dimensions,
            window=None if (window := worker.recipe.window) is None else asdict(window),
            rounds=worker.recipe.rounds,
            site=site,
            received={group: {name: t.cpu() for name, t in ts.items()} for group, ts in needed.tensors.items()},
            numbers=needed.scalars,
        )
        made.model.load_state_dict(worker.standalone(network_view(view)).state_dict())
        return made.eval()

    def save(self, path: Path) -> None:
        """Write a checkpoint of Lightning's, without a training's state."""
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **quiet)
        trainer.strategy.connect(self)
        trainer.save_checkpoint(path, weights_only=True)

    def network(self, view: str) -> nn.Module:
        """The network."""
        return self.model

    @property
    def preparation(self) -> nn.Module:
        """What happens to images in [0, 1] before the network."""
        return self._preparation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The run's loss of the network."""
        return self.task_loss(self.model(self.normalize(batch["image"])), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The run's optimiser, with `training.lr`."""
        return self.recipe.training.build_optimizer(p for p in self.parameters() if p.requires_grad)
