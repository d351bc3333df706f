"""The encoder of an earlier run, as the start of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from fedseg.algorithms.parts import FROZEN
from fedseg.common.text import written
from fedseg.configs.compose import ConfigError, load
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.state import Tensors
from fedseg.models.lora import adapted
from fedseg.models.select import lora
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder

PREFIX = "encoder."
BUILDS_ENCODER = ("encoder", "encoder_depth", "norm", "groups")
ADAPTS = ("lora_rank", "lora_layers")


@dataclass(frozen=True)
class PretrainedEncoder:
    """The shared encoder of a run, after its last round.

    Attributes:
        source: the run's folder.
        round: rounds done.
        tensors: names within the encoder -> weights and running statistics; counters of batches are not among them.
        model: the run's settings of the network.
        dataset: the name of the run's data set.
    """

    source: Path
    round: int
    tensors: Tensors
    model: DictConfig
    dataset: str

    @classmethod
    def read(cls, source: str) -> PretrainedEncoder:
        """Read it from a run's folder.

        Raises:
            ConfigError: there is no such run, it has not come to a checkpoint, or its encoder is not shared.
            CheckpointError: its checkpoint is damaged.
        """
        folder = RunFolder(source)
        try:
            config = load(folder.read_config(), source=str(folder.config_path))
        except (ReportingError, FileNotFoundError) as error:
            raise ConfigError(f"pretrained={source} is not the folder of a run: {error}") from error
        snapshot = Checkpoint(folder.checkpoints).load()
        if snapshot is None:
            raise ConfigError(f"pretrained={source}: this run was stopped before its first checkpoint")
        shared = {name: t for group in ("model", "buffers", FROZEN) for name, t in snapshot.server.get(group).items()}
        tensors = {name.removeprefix(PREFIX): t for name, t in shared.items() if name.startswith(PREFIX)}
        return cls(Path(source), snapshot.round, tensors, config.model, str(config.data.name))

    def check(self, model: DictConfig) -> None:
        """Compare the settings that make the encoder.

        Raises:
            ConfigError: they differ, or weights come from a file as well.
        """
        if own := [key for key in BUILDS_ENCODER if key not in model or key not in self.model]:
            raise ConfigError(
                f"pretrained={self.source}: an encoder passes between networks of this suite only "
                f"(model.{own[0]} is none of model={model.name if own[0] not in model else self.model.name})"
            )
        builds = BUILDS_ENCODER + (ADAPTS if self.model.get("lora_rank") else ())  # without any, new ones begin at 0
        other = [f"model.{key}={written(self.model[key])}" for key in builds if self.model[key] != model[key]]
        if other:
            raise ConfigError(f"pretrained={self.source} has another encoder; take {' '.join(other)} as that run did")
        if model.encoder_weights is not None:
            raise ConfigError("pretrained and model.encoder_weights both give the encoder its weights; leave one out")

    def check_splits(self, rows: Sequence[Mapping[str, Any]], before: pd.DataFrame | None = None) -> None:
        """Make sure that nothing which scores this run was learnt from, with or without labels, by the earlier one.

        Args:
            rows: of this run's splits.csv, over the same data set.
            before: the earlier run's splits.csv; None reads it from its folder.

        Raises:
            ConfigError: a validation or test case was a training image there.
        """
        before = RunFolder(self.source).splits() if before is None else before
        trained = before[(before["split"] == "train") & before["seen"]]
        known = set(zip(trained["site"], trained["case"], strict=True))
        leaked = [row for row in rows if row["split"] in ("val", "test") and (row["site"], row["case"]) in known]
        if leaked:
            first = leaked[0]
            raise ConfigError(
                f"pretrained={self.source} learnt from images of {len(leaked)} cases that validate or test here (site "
                f"{first['site']!r}, case {first['case']!r} ...); take that run's data.split, data.split_seed and "
                "data.unseen"
            )

    def load_into(self, network: nn.Module) -> int:
        """Copy the encoder, bit for bit; counters of batches stay at zero.

        Returns:
            How many tensors were copied: all that the encoder has, but for the counters, and for adapters where that
            run had none.

        Raises:
            ConfigError: the tensors do not fit, or the run kept some of them at its sites.
        """
        encoder = network.get_submodule("encoder")
        begin = lora(encoder) if adapted(encoder) and not self.model.get("lora_rank") else frozenset[str]()
        state = {name: t for name, t in encoder.state_dict().items() if t.is_floating_point() and name not in begin}
        missing = sorted(state.keys() - self.tensors.keys())
        if missing:
            raise ConfigError(
                f"pretrained={self.source} shares {len(self.tensors)} of the encoder's {len(state)} tensors "
                f"(not, for example, {missing[0]}): its sites keep the others; take a run that shares its encoder"
            )
        wrong = [n for n, t in state.items() if t.shape != self.tensors[n].shape] + sorted(self.tensors.keys() - state)
        if wrong:
            had, has = (tuple(t[wrong[0]].shape) if wrong[0] in t else "nothing" for t in (self.tensors, state))
            raise ConfigError(
                f"pretrained={self.source} does not fit: its encoder has {had} for {wrong[0]}, this one {has}; images "
                "of both runs need the same number of channels (data.channels, data.neighbours)"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(self.tensors[name])
        return len(state)

    def told(self) -> str:
        """One line about what was loaded."""
        numbers = sum(t.numel() for t in self.tensors.values())
        return f"encoder of {self.source}, round {self.round}: {len(self.tensors)} tensors, {numbers:,} numbers"
