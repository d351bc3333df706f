"""Images that everybody may see, the same at all sites and at the server: drawn, or those of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.fitting import Fitting
from fedseg.datamodules.new import NewImages
from fedseg.datamodules.phantom.data import Anatomy, PhantomDataModule, draw_case
from fedseg.datamodules.phantom.style import Dials
from fedseg.datamodules.transforms import to_grey

DRAWN = "phantom"
BY_CHANNELS: dict[int, Anatomy] = {1: "organ", 3: "fundus"}
USUAL = Dials(appearance=0.5, annotation=0.0, structure=0.3, amount=0.0)
BEYOND = 1_000_000  # number of a hospital that no data set of the phantom has
SMALLEST = 32  # pixels across that can be drawn


def public_images(data: MultiCenterDataModule, channels: int) -> Tensor:
    """The public images that ``data.public`` asks for, as the network takes them.

    Args:
        data: The run's data module; its own data need not be there.
        channels: Of the network's input, neighbouring slices included.

    Returns:
        (N, C, h, w) float32 in [0, 1], not normalised.

    Raises:
        DataError: There is none, or one that cannot be used.
    """
    if data.public is None:
        raise DataError("data.public is null; take data.public=phantom, or a folder of images that all may see")
    if data.public == DRAWN:
        return torch.stack(list(_drawn(data, channels)))
    path = Path(data.public).expanduser()
    if not path.is_dir():
        raise DataError(
            f"data.public={data.public}: there is no such folder; give one of images that all sites have, or "
            "data.public=phantom"
        )
    images = NewImages(data, path, channels, "public")
    numbers = _evenly(torch.arange(len(images.images)), data.public_images).tolist()
    each = ceil(data.public_images / len(numbers))
    found = [_evenly(torch.cat(images.of(number)), each) for number in numbers]
    return _evenly(torch.cat(found), data.public_images)


def _drawn(data: MultiCenterDataModule, channels: int) -> Iterator[Tensor]:
    """Images of the phantom, each of a hospital of its own; the dials are those of the run's phantom, if it has one."""
    if data.neighbours:
        raise DataError(
            f"data.public={DRAWN} draws single images, and data.neighbours={data.neighbours} takes the slices beside "
            "one; give data.public a folder of volumes, or take data.neighbours=0"
        )
    own = data if isinstance(data, PhantomDataModule) else None
    anatomy = BY_CHANNELS.get(channels) if own is None else own.anatomy
    if anatomy is None:
        raise DataError(
            f"data.public={DRAWN} draws images of 1 or 3 channels, and the network takes {channels}; give data.public "
            "a folder of images like the sites'"
        )
    dials, seed = (USUAL, 0) if own is None else (own.dials, own.phantom_seed)
    modalities = () if own is None else own.modalities
    fitting, resolution = Fitting(data.size), max(SMALLEST, *data.size)
    for index in range(data.public_images):
        sample = draw_case(anatomy, seed, BEYOND + index, 0, dials, resolution=resolution, modalities=modalities)
        if channels == 1 and sample.image.shape[-1] == 3:
            sample = to_grey(sample)
        plane = fitting(Case("public", str(index), str(index)), sample).image[0]
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(plane, -1, 0))).float().div_(255)
        yield image.expand(channels, -1, -1).clone()


def _evenly(entries: Tensor, count: int) -> Tensor:
    """At most so many entries, spread over all."""
    if len(entries) <= count:
        return entries
    return entries[torch.linspace(0, len(entries) - 1, count).round().long()]
