"""A run's folder, opened again: its settings, its saved models and, if asked, its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from omegaconf import DictConfig

from fedseg.configs.compose import ConfigError, compose, parsed
from fedseg.datamodules import DataError
from fedseg.federation.checkpoint import Checkpoint, Snapshot
from fedseg.federation.contract import Silent
from fedseg.federation.engine import Federation
from fedseg.launch.experiment import Experiment, Scoring
from fedseg.launch.folders.restore import check_data, check_states
from fedseg.launch.run import saved_config
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.circumstance import ELSEWHERE
from fedseg.reporting.folder import RunFolder, flattened


def settings(folder: RunFolder, overrides: Sequence[str] = (), besides: Sequence[str] = ()) -> DictConfig:
    """The settings of a run, for scoring it on this machine.

    Args:
        folder: the run's folder.
        overrides: of `ELSEWHERE` and ``besides``. A run made on a GPU is scored on the CPU where there is none, unless
            an accelerator is given.
        besides: further settings that may be given.

    Raises:
        ConfigError: another setting, which would score another run; or a damaged config.
        ReportingError: the folder holds no run.
    """
    saved = saved_config(folder)
    given, may_change = parsed(overrides, SCHEMA), (*ELSEWHERE, *besides)
    if strange := [key for key in flattened(given) if key not in may_change]:
        raise ConfigError(f"{strange[0]} belongs to the run; only {', '.join(may_change)} may change")
    missing = saved.trainer.accelerator == "gpu" and not torch.cuda.is_available()
    fallback = ["trainer.accelerator=cpu"] if missing else []
    return compose([*fallback, *overrides], SCHEMA, base=saved)


@dataclass(frozen=True)
class Reopened:
    """A run that has come to a checkpoint.

    Attributes:
        folder: where it lies.
        experiment: its settings.
        checkpoint: its saved models.
    """

    folder: RunFolder
    experiment: Experiment
    checkpoint: Checkpoint

    @classmethod
    def read(cls, folder: RunFolder, overrides: Sequence[str] = (), besides: Sequence[str] = ()) -> Reopened:
        """Open a folder; no data is read.

        Args:
            folder: the run's folder.
            overrides: see `settings`.
            besides: likewise.

        Raises:
            ReportingError: it holds no run, or no checkpoint.
            CheckpointError: its checkpoint is damaged.
        """
        experiment = Experiment(settings(folder, overrides, besides))
        if (checkpoint := Checkpoint(folder.checkpoints)).round:
            return cls(folder, experiment, checkpoint)
        if experiment.config.protocol == "leave_one_site_out":
            folds = ", ".join(fold.path.name for fold in folder.folds()) or "none yet"
            raise ReportingError(f"{folder.path} holds folds, each with models of its own: {folds}")
        raise ReportingError(f"{folder.path} holds no checkpoint yet; its run was stopped before the first one")

    @cached_property
    def snapshot(self) -> Snapshot:
        """Where the run stood last: what all sites kept, read from disk.

        Raises:
            CheckpointError: a file is damaged or gone.
        """
        snapshot = self.checkpoint.load()
        assert snapshot is not None  # `read` refuses a run without
        return snapshot

    def prepare_data(self) -> None:
        """Read the run's data again.

        Raises:
            ReportingError: it cannot be read any more, or it changed since the run began.
            ConfigError: a setting of the run can no longer be used.
        """
        self.experiment.check()
        try:
            self.experiment.data.setup()
        except DataError as error:
            raise ReportingError(
                f"{self.folder.path}: the data of this run can no longer be read ({error}); put it back where it "
                "was, or say where it is now, with data.root=DIR or data.manifest=FILE"
            ) from error
        check_data(self.folder, self.experiment.data)

    def federation(self, evaluate: Scoring) -> Federation:
        """The federation as it stood last, its data prepared before; ``evaluate`` is given every view at a site.

        Raises:
            CheckpointError: a saved state is damaged, or of another network.
        """
        made = self.experiment
        check_states(made.algorithm(), self.checkpoint, made.sites(), made.others())
        federation = self.experiment.federation(self.checkpoint, evaluate, Silent())
        federation.transport.restore(self.snapshot.kept)
        return federation
