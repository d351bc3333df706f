"""Masks for new images with a model that a run saved, in the images' own size and geometry."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedseg.algorithms import Algorithm
from fedseg.common.files import write_atomic
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import few
from fedseg.datamodules.new import NewImage, NewImages
from fedseg.datamodules.readers import Maker, Segment, read_codes
from fedseg.launch.draft import draft
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import NEW, Chosen, SavedModels, network_view
from fedseg.models import decide
from fedseg.reporting import ReportingError
from fedseg.reporting.environment import SUITE, suite_version
from fedseg.reporting.folder import RunFolder, file_name
from fedseg.reporting.overlays import Picture, aspect_of, draw_prediction, save_overlays

SIZES = "sizes.csv"
COLUMNS = ("image", "region", "pixels", "area_mm2", "volume_mm3")


@dataclass(frozen=True)
class PredictionRequest:
    """What is to be predicted.

    Attributes:
        run: folder of the run.
        images: a folder of images, or one image.
        out: created; must not hold anything.
        site: whose images; None: a place that took no part in the run.
        view: which model; None: the site's own where there is one, else the global one.
        checkpoint: the best saved model by validation score, or the last one.
        probabilities: write them too.
        overlay: draw a picture of every image with its contours.
        codes: a table of what regions are, for segmentations in DICOM; see `datamodules.readers.coded.read_codes`.
        settings: see `launch.folders.reopen.settings`.
    """

    run: Path
    images: Path
    out: Path
    site: str | None = None
    view: str | None = None
    checkpoint: Chosen = "best"
    probabilities: bool = False
    overlay: bool = True
    codes: Path | None = None
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Predicted:
    """One image.

    Attributes:
        number: of the image.
        image: the image.
        probabilities: (D, R, H, W) at the image's own size.
        masks: (D, R, H, W) bool.
    """

    number: int
    image: NewImage
    probabilities: NDArray[np.float32]
    masks: NDArray[np.bool_]


def predict_folder(request: PredictionRequest) -> pd.DataFrame:
    """Predict all images, and write what was wished for.

    All images are read before the first one is predicted, so that a bad one ends it before the work; the folder is
    whole or not there.

    Returns:
        One row per image and region: image, region, pixels, area_mm2 (of flat images), volume_mm3 (of volumes).

    Raises:
        ReportingError: there is no such run, site or model, or the output folder holds something.
        DataError: an image that cannot be read, or that the network does not take.
    """
    models = SavedModels(Reopened.read(RunFolder(request.run), request.settings))
    view = models.choose(request.site, request.view)
    with draft(request.out) as folder:
        return _predict_into(folder, request, models, view)


def _predict_into(folder: Path, request: PredictionRequest, models: SavedModels, view: str) -> pd.DataFrame:
    data = models.run.experiment.data
    regions = data.regions.names
    images = NewImages(data, request.images, models.channels, request.site or NEW)
    _check_names(images, regions)
    segments = _segments(images, request.codes, regions)
    _warn_of_values(images, models.values)
    _warn_of_absent(images)
    place = f"site {request.site}" if request.site else "images from elsewhere"
    print(
        f"{len(images.images)} image(s) of {place}: the {view} model of {models.title}, round "
        f"{models.round(view, request.site, request.checkpoint)}",
        flush=True,
    )
    rows = []
    for predicted in _predicted(request, models, view, images):
        rows += [dict(zip(COLUMNS, row, strict=True)) for row in sizes(predicted, regions)]
        _write(predicted, images, regions, folder, probabilities=request.probabilities)
        if images.is_series(predicted.number):
            file = folder / "masks" / f"{predicted.image.case.case}.dcm"
            images.write_segmentation(predicted.number, predicted.masks, file, segments, _maker(models, view))
        if request.overlay:
            _draw(predicted, images, regions, view, folder)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_atomic(folder / SIZES, table.to_csv(index=False, float_format="%.6g"))
    return table


def _check_names(images: NewImages, regions: Sequence[str]) -> None:
    """Refuse images whose masks would be one file.

    Raises:
        ReportingError: names both.
    """
    taken: dict[str, NewImage] = {}
    for image, region in itertools.product(images.images, regions):
        name = _name(image, region)
        other = taken.setdefault(name, image)
        if other is not image:
            raise ReportingError(
                f"{other.case.image} and {image.case.image} would both have a mask called {name}; rename one, or "
                "predict them one by one"
            )


def _segments(images: NewImages, codes: Path | None, regions: Sequence[str]) -> list[Segment]:
    """What regions are in segmentations in DICOM; none where no image is in DICOM.

    Raises:
        DataError: a table that cannot be used, or a series of which no segmentation can be written.
    """
    if not any(images.is_series(number) for number in range(len(images.images))):
        if codes is not None:
            raise DataError("--codes is for segmentations in DICOM, and no image is a DICOM series; leave it out")
        return []
    images.check_segmentable()
    return read_codes(codes, regions)


def _maker(models: SavedModels, view: str) -> Maker:
    return Maker(SUITE, suite_version(), f"{models.run.experiment.config.algorithm.preset}, {view} model")


def _warn_of_values(images: NewImages, trained: Sequence[str]) -> None:
    """8-bit values are divided by 255, others scaled to their own range: the same picture is not the same input."""
    other = [image for image in images.images if trained and image.values not in trained]
    if other:
        were, are = ("8-bit", "not") if "uint8" in trained else ("not 8-bit", "is")
        print(
            f"warning: {few([image.case.image for image in other])}: {are} 8-bit, but the images of training were "
            f"{were}; intensities are scaled otherwise, and masks may be poor: store the values as those of training",
            file=sys.stderr,
        )


def _warn_of_absent(images: NewImages) -> None:
    """Modalities that an image lacks, which the network sees as 0; those that its site lacks are no news."""
    names, known = images.data.modalities_of(images.name), images.data.lacking_here(images.name)
    for image in images.images:
        if lacking := ", ".join(names[place] for place in image.case.absent if names[place] not in known):
            print(f"warning: {image.case.case} has no {lacking}; the network sees 0 in its place", file=sys.stderr)


def _name(image: NewImage, region: str) -> str:
    return f"{image.case.case}_{file_name(region)}"


def _predicted(request: PredictionRequest, models: SavedModels, view: str, images: NewImages) -> Iterator[Predicted]:
    """All images, by one model or, where a view is fitted to every case, by one each."""
    every = range(len(images.images))
    for numbers in [[number] for number in every] if models.anew(view) else [every]:
        given = images.of(numbers[0]) if models.anew(view) else images
        worker = models.load(view, request.site, request.checkpoint, given)
        yield from predict_images(worker, view, images, numbers)


def predict_images(worker: Algorithm, view: str, images: NewImages, numbers: Iterable[int]) -> Iterator[Predicted]:
    """Predict image after image: probabilities on the network's grid, brought to the image's size, then decided.

    Args:
        worker: see `SavedModels.load`.
        view: which of its models.
        images: from which to predict.
        numbers: which of them.

    Raises:
        ReportingError: a model whose probabilities are not finite.
    """
    of_method = network_view(view)
    for number in numbers:
        image = images.images[number]
        batches = (worker.predict(batch.to(worker.device), of_method).cpu() for batch in images.batches(number))
        found = torch.cat(list(batches))
        if not found.isfinite().all():
            raise ReportingError(
                f"{image.case.image}: the {view} model's probabilities are not finite; it has diverged"
            )
        probabilities = images.at_own_size(number, found.numpy())
        masks = decide(torch.from_numpy(probabilities), worker.recipe.activation).numpy()
        yield Predicted(number, image, probabilities, masks)


def sizes(predicted: Predicted, regions: Sequence[str]) -> Iterator[tuple[str, str, int, float | None, float | None]]:
    """Pixels of every region; square or cubic millimetres where the spacing is known, else None."""
    flat = predicted.image.shape[0] == 1
    for name, mask in zip(regions, predicted.masks.swapaxes(0, 1), strict=True):
        pixels, area, volume = int(mask.sum()), None, None
        if predicted.image.spacing is not None:
            depth, height, width = predicted.image.spacing
            area = pixels * height * width if flat else None
            volume = None if flat else pixels * depth * height * width
        yield predicted.image.case.case, name, pixels, area, volume


def _write(
    predicted: Predicted, images: NewImages, regions: Sequence[str], folder: Path, *, probabilities: bool
) -> None:
    kinds: list[tuple[str, NDArray[np.bool_] | NDArray[np.float32]]] = [("masks", predicted.masks)]
    if probabilities:
        kinds.append(("probabilities", predicted.probabilities))
    for kind, maps in kinds:
        for place, region in enumerate(regions):
            images.write(predicted.number, maps[:, place], folder / kind, _name(predicted.image, region))


def _draw(predicted: Predicted, images: NewImages, regions: Sequence[str], view: str, folder: Path) -> None:
    image = predicted.image
    masks = {view: predicted.masks.swapaxes(0, 1)}
    pixels = images.read(image.case).image
    picture = Picture(images.name, image.case.case, pixels, None, masks, aspect=aspect_of(image.spacing))
    save_overlays(draw_prediction(picture, regions), folder / "overlays" / f"{image.case.case}.png")
