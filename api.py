"""The suite from Python: what `train.py`, `predict.py`, `export.py` and `compare.py` do, with tables as answers.

Settings are those of the command line, as text (``"algorithm=ditto"``) or by name (``**{"data.size": 64}``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from fedseg.configs.words import written
from fedseg.launch.compare import compare as compare_places
from fedseg.launch.compare import requested
from fedseg.launch.experiment import Experiment
from fedseg.launch.export import Deployed, Exported, export_models
from fedseg.launch.exports.trained import TrainedModel
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import Chosen, SavedModels
from fedseg.launch.prediction import PredictionRequest, predict_folder
from fedseg.launch.run import default_folder, execute, read_settings
from fedseg.launch.settings import DATA, METHODS
from fedseg.reporting.compare.report import Report
from fedseg.reporting.curves import draw_curves
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.habits import habits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedseg.datamodules import MultiCenterDataModule

__all__ = ["Run", "TrainedModel", "compare", "data_sets", "load_sites", "methods", "open_run", "run"]


def methods() -> list[str]:
    """Names of the methods, for ``algorithm=NAME``."""
    return list(METHODS)


def data_sets() -> list[str]:
    """Names of the data sets, for ``data=NAME``."""
    return list(DATA)


def load_sites(*settings: str, **more: Any) -> MultiCenterDataModule:
    """Read and check the data of all sites, as a run would.

    Args:
        settings: such as ``"data=folder"`` and ``"data.root=DIR"``.
        more: the same by name.

    Returns:
        The prepared data module: ``sites``, ``site(name)``, ``splits()``, ``findings``, ``of(name)`` for a Trainer.

    Raises:
        ConfigError: settings that cannot be used.
        DataError: data that cannot be used, naming site, file and cure.
    """
    data = Experiment(read_settings(_words(settings, more))).data
    data.setup()
    return data


def run(*settings: str, **more: Any) -> Run:
    """Train, score and report, as ``python train.py``.

    Args:
        settings: such as ``"algorithm=ditto"``; ``"output=DIR"`` says where, ``"resume=true"`` goes on with a run.
        more: the same by name.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError, ReportingError, RoundError: with a message that names the cure.
        ValueError: the settings describe several runs.
    """
    config = read_settings(_words(settings, more))
    if config.stages or config.protocol != "personalised":
        raise ValueError("stages and protocol=leave_one_site_out make several runs; start them with python train.py")
    folder = config.output or str(default_folder(config))
    execute(read_settings(_words([*settings, f"output={folder}"], more)))
    return Run(Path(folder))


def open_run(path: Path | str) -> Run:
    """A run's folder, of this machine or another.

    Raises:
        ReportingError: it holds no run.
    """
    found = Run(Path(path))
    found.folder.settings()
    return found


def compare(*runs: Run | Path | str, **options: Any) -> Report:
    """Which model should each site use? As ``python compare.py``; the report's folder is ``output``.

    Args:
        runs: runs, or folders that hold them at any depth.
        options: of ``compare.py``, such as ``metric="hd95"``, ``pictures=False`` or ``output="report"``.

    Raises:
        ConfigError: an option that does not exist.
        ReportingError: runs that cannot be compared.
    """
    places = [str(one.path if isinstance(one, Run) else one) for one in runs]
    return compare_places(*requested([*places, *_words((), options)]))


@dataclass(frozen=True)
class Run:
    """A run that has come to a checkpoint.

    Attributes:
        path: its folder; docs/run-folder.md explains every table in it.
    """

    path: Path

    @property
    def folder(self) -> RunFolder:
        """The folder's tables: ``scores()``, ``rounds()``, ``splits()``, ``traffic()``, ``events()`` ..."""
        return RunFolder(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted name -> value."""
        return self.folder.settings()

    def scores(self, checkpoint: Chosen = "best", split: str = "test") -> pd.DataFrame:
        """Every score of every case: site, view, case, region, metric, value, unit, grid.

        Args:
            checkpoint: the best models by validation, or the last ones.
            split: train, val or test.
        """
        table = self.folder.scores()
        return table[(table["checkpoint"] == checkpoint) & (table["split"] == split)].reset_index(drop=True)

    def by_site(self, metric: str = "dice", checkpoint: Chosen = "best", split: str = "test") -> pd.DataFrame:
        """Mean over a site's cases and regions: a row for each site, a column for each view."""
        table = self.scores(checkpoint, split)
        means = table[table["metric"] == metric].groupby(["site", "view"])["value"].mean()
        return means.unstack("view")

    def habits(self) -> pd.DataFrame:
        """By how much each site outlines larger than the others: site, region, larger, error, cases, unit.

        Of runs with `offset` among `evaluation.metrics`; empty of others (docs/imperfect.md).
        """
        return habits(self.folder.scores())

    def plot(self) -> Figure | None:
        """Validation scores and losses over rounds; None where nothing was validated."""
        return draw_curves(self.folder.scores(), self.folder.rounds(), title=self.path.name)

    def model(self, site: str | None = None, view: str | None = None, checkpoint: Chosen = "best") -> nn.Module:
        """A saved model: (B, C, H, W) images in [0, 1], of the network's size, to (B, R, H, W) probabilities.

        Args:
            site: whose images it is for; None: a place that took no part.
            view: which model; None: the site's own where there is one, else the global one.
            checkpoint: the best by validation, or the last.

        Raises:
            ReportingError: no such site or model.
        """
        models = SavedModels(Reopened.read(self.folder))
        chosen = models.choose(site, view)
        return Deployed(models.load(chosen, site, checkpoint), chosen)

    def predict(self, images: Path | str, out: Path | str, site: str | None = None, **more: Any) -> pd.DataFrame:
        """Masks of new images in their own size and geometry, as ``python predict.py``.

        Args:
            images: a folder of images, or one image.
            out: created; must not hold anything.
            site: where they come from; None: a place that took no part.
            more: fields of `fedseg.launch.prediction.PredictionRequest`, such as ``probabilities=True``.

        Returns:
            A row for each image and region: pixels, and millimetres where they are known.
        """
        return predict_folder(PredictionRequest(self.path, Path(images), Path(out), site, **more))

    def export(
        self,
        out: Path | str,
        sites: Sequence[str] = (),
        terms: str | None = None,
        images: Path | str | None = None,
        bundle: bool = False,
        onnx: bool = False,
        checkpoint: Chosen = "best",
    ) -> list[Exported]:
        """Models for use elsewhere, with their cards, as ``python export.py``.

        Args:
            out: created; must not hold anything.
            sites: of the sites' own models only theirs, beside the global one; none for all.
            terms: under which the models may be used, for the cards.
            images: of a place that took no part: also the global model with their statistics.
            bundle: also as MONAI bundles.
            onnx: also as ONNX.
            checkpoint: the best models by validation, or the last ones.
        """
        given = None if images is None else Path(images)
        return export_models(
            self.path,
            Path(out),
            sites=sites,
            images=given,
            checkpoint=checkpoint,
            terms=terms,
            bundle=bundle,
            onnx=onnx,
        )


def _words(settings: Sequence[str], more: Mapping[str, Any]) -> list[str]:
    return [*settings, *(f"{key}={written(value)}" for key, value in more.items())]
