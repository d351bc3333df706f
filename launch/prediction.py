"""Masks for new images with a model that a run saved, in the images' own size and geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from algorithms import Algorithm
from datamodules.new import NewImage, NewImages
from launch.reopen import Reopened
from launch.saved import NEW, Chosen, SavedModels
from models import decide
from reporting import ReportingError
from reporting.folder import RunFolder, file_name, write_atomic
from reporting.overlays import Picture, draw_overlays, save_overlays

SIZES = "sizes.csv"
COLUMNS = ("image", "region", "pixels", "area_mm2", "volume_mm3")


@dataclass(frozen=True)
class Wish:
    """What is to be predicted.

    Attributes:
        run: folder of the run.
        images: a folder of images, or one image.
        out: created; must not hold anything.
        site: whose images; None: a place that took no part in the run.
        view: which model; None: the site's own where there is one, else the global one.
        checkpoint: the best saved model by validation Dice, or the last one.
        probabilities: write them too.
        overlay: draw a picture of every image with its contours.
    """

    run: Path
    images: Path
    out: Path
    site: str | None = None
    view: str | None = None
    checkpoint: Chosen = "best"
    probabilities: bool = False
    overlay: bool = True


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


def predict_folder(wish: Wish) -> pd.DataFrame:
    """Predict all images, and write what was wished for.

    All images are read before the first one is predicted, so that a bad one ends it before anything is written.

    Returns:
        One row per image and region: image, region, pixels, area_mm2 (of flat images), volume_mm3 (of volumes).

    Raises:
        ReportingError: there is no such run, site or model, or the output folder holds something.
        DataError: an image that cannot be read, or that the network does not take.
    """
    models = SavedModels(Reopened.read(RunFolder(wish.run)))
    view = models.choose(wish.site, wish.view)
    if wish.out.exists() and (not wish.out.is_dir() or any(wish.out.iterdir())):
        raise ReportingError(f"{wish.out} is not empty; choose another --out")
    data = models.run.experiment.data
    images = NewImages(data, wish.images, models.channels, wish.site or NEW)
    worker = models.load(view, wish.site, wish.checkpoint, images)
    place = f"site {wish.site}" if wish.site else "images from elsewhere"
    print(
        f"{len(images.images)} image(s) of {place}: the {view} model of {models.title}, round "
        f"{models.round(view, wish.site, wish.checkpoint)}",
        flush=True,
    )
    regions = data.regions.names
    rows = []
    for predicted in predict_images(worker, view, images):
        rows += [dict(zip(COLUMNS, row, strict=True)) for row in sizes(predicted, regions)]
        _write(predicted, images, regions, wish)
        if wish.overlay:
            _draw(predicted, images, regions, view, wish.out)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_atomic(wish.out / SIZES, table.to_csv(index=False))
    return table


def predict_images(worker: Algorithm, view: str, images: NewImages) -> Iterator[Predicted]:
    """Predict image after image: probabilities on the network's grid, brought to the image's size, then decided.

    Raises:
        ReportingError: a model whose probabilities are not finite.
    """
    for number, image in enumerate(images.images):
        batches = (worker.predict(batch.to(worker.device), view).cpu() for batch in images.batches(number))
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


def _write(predicted: Predicted, images: NewImages, regions: Sequence[str], wish: Wish) -> None:
    kinds: list[tuple[str, NDArray[np.bool_] | NDArray[np.float32]]] = [("masks", predicted.masks)]
    if wish.probabilities:
        kinds.append(("probabilities", predicted.probabilities))
    for kind, maps in kinds:
        for place, region in enumerate(regions):
            name = f"{predicted.image.case.case}_{file_name(region)}"
            images.write(predicted.number, maps[:, place], wish.out / kind, name)


def _draw(predicted: Predicted, images: NewImages, regions: Sequence[str], view: str, out: Path) -> None:
    case = predicted.image.case
    image = images.read(case).image
    picture = Picture(images.name, case.case, image, None, {view: predicted.masks.swapaxes(0, 1)}, role="image")
    save_overlays(draw_overlays([picture], regions), out / "overlays" / f"{case.case}.png")
