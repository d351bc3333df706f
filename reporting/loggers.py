"""Lightning's loggers: they are told of a round what W&B is told."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fedseg.common.parts import PartError, called, imported, is_path
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

LIGHTNING = "pytorch_lightning.loggers"
SETTING = "loggers"
NEEDS = {"csv": ("pytorch_lightning",), "tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}
"""Libraries by name, of which one must be there."""


class RoundLoggers:
    """Loggers of one run. One that fails is told and given up; the run goes on, as its folder has all numbers.

    Args:
        names: csv, tensorboard, mlflow, or `package.module:Name` of a logger that takes `save_dir`.
        folder: the run's folder, where they write.
        settings: the run's, dotted name -> value.

    Raises:
        ReportingError: one cannot be opened.
    """

    def __init__(self, names: Sequence[str], folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._open = {name: _opened(name, folder) for name in names}
        self._each("took no settings", lambda logger: logger.log_hyperparams(dict(settings)))

    def log_round(self, round: int, values: Mapping[str, float]) -> None:
        """Numbers of a round; those that are none are left out."""
        known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._each(f"took no numbers of round {round}", lambda logger: _written(logger, known, round))

    def finish(self, exit_code: int) -> None:
        """Close them."""
        self._each("was not closed", lambda logger: logger.finalize("failed" if exit_code else "success"))
        self._open = {}

    def _each(self, failed: str, do: Callable[[Logger], object]) -> None:
        for name, logger in list(self._open.items()):
            with self._guarded(name, failed):
                do(logger)

    @contextmanager
    def _guarded(self, name: str, failed: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever disks, servers and libraries come up with
            del self._open[name]
            told = f"{type(error).__name__}: {error}"
            print(f"warning: the logger {name} {failed} and is given up ({told}); the run goes on", file=sys.stderr)


def check_loggers(names: Sequence[str]) -> None:
    """Look for what loggers need, before a run begins.

    Raises:
        ReportingError: a library is missing.
        PartError: one of somebody's own cannot be imported.
    """
    for name in names:
        if is_path(name):
            imported(name, SETTING)
        elif not any(map(find_spec, NEEDS[name])):
            raise ReportingError(f"{SETTING}=[{name}] needs a library that is not installed: pip install {name}")


def _written(logger: Logger, values: dict[str, float], round: int) -> None:
    logger.log_metrics(values, step=round)
    logger.save()


def _opened(name: str, folder: RunFolder) -> Logger:
    from pytorch_lightning.loggers import Logger

    path, arguments = _built_in(folder).get(name, (name, {"save_dir": str(folder.path)}))
    try:
        made = called(path, SETTING, **arguments)
    except PartError:
        raise
    except Exception as error:  # whatever servers and libraries come up with
        raise ReportingError(f"{SETTING}=[{name}] cannot be opened: {error}") from error
    if not isinstance(made, Logger):
        raise PartError(f"{SETTING}=[{name}] made {made!r}, which is no {LIGHTNING}.Logger")
    return made


def _built_in(folder: RunFolder) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and arguments by name."""
    place = str(folder.path)
    tracking = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.path.resolve() / 'mlflow.db'}")
    return {
        "csv": (f"{LIGHTNING}:CSVLogger", {"save_dir": place, "name": "csv"}),
        "tensorboard": (f"{LIGHTNING}:TensorBoardLogger", {"save_dir": place, "name": "tensorboard", "version": ""}),
        "mlflow": (
            f"{LIGHTNING}:MLFlowLogger",
            {"experiment_name": "federated-segmentation", "run_name": folder.path.name, "tracking_uri": tracking},
        ),
    }
