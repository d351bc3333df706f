"""A run's models for use elsewhere: weights, a program that runs without this suite, and a card that describes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedseg.algorithms import Algorithm
from fedseg.common.files import write_atomic
from fedseg.datamodules.new import NewImages
from fedseg.launch.draft import draft
from fedseg.launch.exports.bundle import reads_plainly, write_bundle
from fedseg.launch.exports.card import Card
from fedseg.launch.exports.onnx import answers, check_onnx, write_onnx
from fedseg.launch.exports.trained import TrainedModel
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import NEW, Chosen, SavedModels, network_view
from fedseg.models import Activation, probabilities
from fedseg.models.lora import merged
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder, file_name
from fedseg.reporting.summary import OWN_STATISTICS

TOLERANCE = 1e-4
"""Largest difference that may lie between the answers of a model and of its exported form."""


class Deployed(nn.Module):
    """All from images to answers in one module: (B, C, H, W) in [0, 1] -> (B, R, H, W) probabilities.

    Where a window slides, overlapping answers are averaged before they become probabilities: then the scores are given.

    Args:
        algorithm: a worker that has received; it is moved to the CPU.
        view: which of its models.
    """

    def __init__(self, algorithm: Algorithm, view: str) -> None:
        super().__init__()
        algorithm.cpu()
        self.normalize = algorithm.preparation
        self.network = merged(algorithm.standalone(network_view(view)))
        self.activation: Activation | None = None if algorithm.recipe.window else algorithm.recipe.activation
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities of the regions, or the scores that become these."""
        scores: Tensor = self.network(self.normalize(images))
        return scores if self.activation is None else probabilities(scores, self.activation)


@dataclass(frozen=True)
class Exported:
    """One model, as written.

    Attributes:
        name: of its files, without type.
        view: global, personal or own-statistics.
        site: whose it is; None for the global one.
        round: after which it was saved.
        gap: largest difference between the answers of program and model: in probability, of patches in their scores.
        card: what must be known of it.
    """

    name: str
    view: str
    site: str | None
    round: int
    gap: float
    card: Card


def export_models(
    run: Path,
    out: Path,
    *,
    sites: Sequence[str] = (),
    images: Path | None = None,
    checkpoint: Chosen = "best",
    terms: str | None = None,
    bundle: bool = False,
    onnx: bool = False,
) -> list[Exported]:
    """Write the global model and every site's own, each in four files.

    These are NAME.safetensors, NAME.pt (TorchScript), NAME.ckpt (Lightning's) and NAME.md (its card); beside them, if
    asked for, NAME.onnx, and the folder NAME: a MONAI bundle.

    The data of the run need not be there. Adapted models are no part of it: they exist for the images only from which
    they were made (`predict.py --view adapted`).

    Args:
        run: the run's folder.
        out: created, whole or not at all; must not hold anything.
        sites: of the sites' own models only theirs, beside the global one; none for all.
        images: of a place that took no part, a folder or one: also write the global model with their statistics.
        checkpoint: the best saved models by validation score, or the last ones.
        terms: under which the models may be used, for the cards; None says that nobody stated them.
        bundle: also write each model as a MONAI bundle.
        onnx: also write each model as ONNX.

    Raises:
        ReportingError: no such run or site, no model to export, a file that does not answer as its model does, or a
            model that ONNX has no words for.
        DataError: an image that cannot be read, or that the network does not take.
    """
    if onnx:
        check_onnx()
    models = SavedModels(Reopened.read(RunFolder(run)))
    if bundle and not reads_plainly(data := models.run.experiment.data):
        raise ReportingError(
            f"{models.title}: {type(data).__name__} reads files in a way of its own, which a bundle does not know; "
            "export without --bundle"
        )
    wanted: list[tuple[str, str | None, NewImages | None]] = [(*model, None) for model in _wanted(models, sites)]
    if images is not None:
        view = models.choose(None, OWN_STATISTICS)
        given = NewImages(models.run.experiment.data, images, models.channels, NEW)
        if models.anew(view) and len(given.images) > 1:
            raise ReportingError(
                f"{images} holds {len(given.images)} cases, each of which gets a model of its own "
                "(evaluation.statistics_per=case), and an exported one is of one; give that case alone, or take "
                f"predict.py --view {view}"
            )
        wanted.append((view, None, given))
    with draft(out) as folder:
        found = [_export(models, view, site, folder, checkpoint, terms, given, onnx) for view, site, given in wanted]
        for card in (one.card for one in found if bundle):
            write_bundle(folder / card.name, folder / f"{card.name}.pt", card, models.run.experiment.data.batch_size)
        return found


def _wanted(models: SavedModels, sites: Sequence[str]) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = [("global", None)] if "global" in models.method.views else []
    for site in sites or models.seen:
        if "personal" in models.views(site):
            found.append(("personal", site))
        elif sites:
            raise ReportingError(
                f"{models.title}: site {site!r} has no model of its own; there is: "
                f"{', '.join(models.views(site)) or 'none'}"
            )
    if not found:
        raise ReportingError(f"{models.title} has no model that segments: there is nothing to export")
    return found


def _export(
    models: SavedModels,
    view: str,
    site: str | None,
    out: Path,
    checkpoint: Chosen,
    terms: str | None,
    images: NewImages | None,
    onnx: bool,
) -> Exported:
    name = view if site is None else f"personal-{file_name(site)}"
    worker = models.load(view, site, checkpoint, images)
    deployed = Deployed(worker, view)
    size = models.run.experiment.data.size
    module = _as_lightning(models, worker, view, site)
    program, gap = traced(deployed, models.channels, size, name)
    if onnx:
        gap = max(gap, _as_onnx(deployed, models.channels, size, out / f"{name}.onnx"))
    card = Card(models, view, site, checkpoint, name, terms, len(images.images) if images is not None else 0)
    program.save(str(out / f"{name}.pt"))
    tensors = {key: t.detach().clone().contiguous() for key, t in deployed.network.state_dict().items()}
    facts = {key: _text(value) for key, value in card.facts().items()}
    (out / f"{name}.safetensors").write_bytes(save(tensors, facts))
    write_atomic(out / f"{name}.md", card.markdown())
    module.save(out / f"{name}.ckpt")
    _check_checkpoint(out / f"{name}.ckpt", worker, models, view)
    return Exported(name, view, site, models.round(view, site, checkpoint), gap, card)


def _as_lightning(models: SavedModels, worker: Algorithm, view: str, site: str | None) -> TrainedModel:
    try:
        return TrainedModel.of(worker, models.run.experiment, models.channels, view, site)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ReportingError(f"{models.title}: {_needs_more(models)} ({error})") from error


def _needs_more(models: SavedModels) -> str:
    method = type(models.method).__name__
    return f"{method} cannot answer from its network alone; let {method}.answers_with() return what came beside it"


def _check_checkpoint(path: Path, worker: Algorithm, models: SavedModels, view: str) -> None:
    """Open it again, and let it answer.

    Raises:
        ReportingError: it answers differently.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, models.channels, *models.run.experiment.data.size, generator=generator)
    again = TrainedModel.load_from_checkpoint(path, map_location="cpu")
    if not torch.equal(again.predict(images, again.own_view), worker.predict(images, network_view(view))):
        raise ReportingError(f"{models.title}: {_needs_more(models)}")


def traced(deployed: nn.Module, channels: int, size: Sequence[int], name: str) -> tuple[Any, float]:
    """A TorchScript program, tried on other images than it was traced with, and its largest error.

    Raises:
        ReportingError: it answers differently.
    """
    example, other = _examples(channels, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are fixed, and that TorchScript will be replaced one day
        trace: Any = torch.jit.trace  # PyTorch leaves it untyped
        program = trace(deployed, example, check_trace=False)
        return program, _gap(program(other), deployed(other), name)


def _as_onnx(deployed: nn.Module, channels: int, size: Sequence[int], path: Path) -> float:
    """Write it as ONNX, tried on other images than it was made with; returns its largest error.

    Raises:
        ReportingError: it cannot be written, or answers differently.
    """
    example, other = _examples(channels, size)
    write_onnx(deployed, example, path)
    with torch.no_grad():
        return _gap(answers(path, other), deployed(other), path.name)


def _examples(channels: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images to export with, and others to try."""
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.rand(count, channels, *size, generator=generator) for count in (2, 3))
    return example, other


def _gap(answer: Tensor, expected: Tensor, name: str) -> float:
    gap = float((answer - expected).abs().max())
    if not gap <= TOLERANCE:
        raise ReportingError(f"{name}: the exported program answers differently ({gap:.2g}); it is not written")
    return gap


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
