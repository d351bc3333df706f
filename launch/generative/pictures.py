"""Images on the network's grid, of a site's cases, and the same written as data of their own."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.findings import few
from fedseg.datamodules.shapes import Labels
from fedseg.models.generative.networks import check_side
from fedseg.reporting.folder import file_name

TABLE = "sites.csv"
COLUMNS = ("site", "image", "mask", "patient", "split")
COLOURS = (1, 3)
"""Channels that a picture may have."""


@dataclass(frozen=True)
class Planes:
    """A case on the network's grid.

    Attributes:
        name: of the case.
        patient: whose it is.
        split: train, val or test.
        images: (D, C, h, w) in [0, 1].
        labels: (D, h, w) label ids; None where the case has none, or is not to learn from.
    """

    name: str
    patient: str
    split: str
    images: Tensor
    labels: Labels | None


def prepared(data: MultiCenterDataModule) -> MultiCenterDataModule:
    """The data, set up.

    Raises:
        DataError: generative networks cannot make such images.
    """
    if data.dimensions == 3 or data.patches is not None:
        raise DataError("generative networks make whole images on one grid; take data.dimensions=2 and data.fit=resize")
    try:
        check_side(*data.size)
    except ValueError as error:
        raise DataError(f"data.size: {error}") from error
    data.setup()
    if data.image_channels not in COLOURS:
        raise DataError(f"images of {data.image_channels} channels cannot be written as pictures; 1 or 3 can")
    for site in (*data.sites, *data.unseen_sites):
        if lacking := data.absent_at(site):
            raise DataError(
                f"site {site!r} lacks {few([*lacking])}, and generative networks would paint what is not there; take "
                "modalities that every image has"
            )
    return data


def sites_of(data: MultiCenterDataModule, only: str) -> list[str]:
    """Names of all sites, or of only one.

    Raises:
        ConfigError: there is no such site.
    """
    present = [*data.sites, *data.unseen_sites]
    if only and only not in present:
        raise ConfigError(f"site={only}: there is no such site; there is {', '.join(present)}")
    return [only] if only else present


def cases_of(data: MultiCenterDataModule, site: str, split: str = "") -> Iterable[Planes]:
    """The cases of a site that a run reads, of one split or of all.

    Args:
        data: set up.
        site: of the data.
        split: one; empty for all.

    Raises:
        DataError: of masks of several raters one would be drawn each time anew.
    """
    held = data.site(site)
    for row in data.splits():
        if row["site"] == site and row["split"] != "unused" and split in ("", row["split"]):
            stored = torch.from_numpy(np.moveaxis(held.image(row["case"]), -1, 1).copy())
            images = stored.float() / 255 if stored.dtype == torch.uint8 else stored
            images = images.expand(-1, data.image_channels, -1, -1)
            mask = held.taught if row["split"] == "train" else held.truth
            labels = mask(row["case"]) if row["labelled"] else None
            yield Planes(row["case"], row["patient"], row["split"], images, labels)


def images_of(data: MultiCenterDataModule, site: str, split: str) -> Tensor:
    """(N, C, h, w) all images of a split, with a mask or without.

    Raises:
        DataError: there is none.
    """
    found = [case.images for case in cases_of(data, site, split)]
    if not found:
        raise DataError(f"site {site!r}: no {split} images; name a site that trains, and see data.split")
    return torch.cat(found)


def write_site(
    data: MultiCenterDataModule,
    site: str,
    folder: Path,
    changed: Callable[[Tensor], Tensor],
    added: Iterable[Planes] = (),
) -> None:
    """Write a site's cases as a data set of pictures: images, masks, and a table with the same patients and splits.

    Args:
        data: set up.
        site: of the data.
        folder: of all sites; what other sites wrote there stays.
        changed: makes the images of it, (D, C, h, w) in [0, 1].
        added: further cases of the site.

    Raises:
        ConfigError: the folder holds something of the site already, or another table.
    """
    refuse_written(folder, site)
    rows = []
    for case in cases_of(data, site):
        rows += _written(folder, site, case, changed(case.images))
    for case in added:
        rows += _written(folder, site, case, case.images)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *_listed(folder), *rows])
    write_atomic(folder / TABLE, text.getvalue())


def _listed(folder: Path) -> list[list[str]]:
    """Rows of the table of other sites.

    Raises:
        ConfigError: it is a table of something else.
    """
    table = folder / TABLE
    if not table.exists():
        return []
    header, *rows = [*csv.reader(table.read_text(encoding="utf-8", errors="replace").splitlines())] or [[]]
    if tuple(header) != COLUMNS:
        raise ConfigError(f"output={folder} holds a {TABLE} of other data, which would be lost; name another folder")
    return rows


def refuse_written(folder: Path, site: str) -> None:
    """Before anything is trained.

    Raises:
        ConfigError: the folder holds something of the site already, or a table of something else.
    """
    listed = any(row[:1] == [site] for row in _listed(folder))
    if listed or (folder / file_name(site)).exists():
        raise ConfigError(f"output={folder} holds {site} already; name another folder, or take that one away")


def _written(folder: Path, site: str, case: Planes, images: Tensor) -> list[tuple[str, ...]]:
    """Rows of the table, one for each slice.

    Raises:
        ConfigError: there is such a case already.
    """
    home = Path(file_name(site))
    rows: list[tuple[str, ...]] = []
    for place, image in enumerate(images):
        name = file_name(case.name) + (f"_{place:04d}" if len(images) > 1 else "") + ".png"
        picture, mask = home / "images" / name, home / "masks" / name
        if (folder / picture).exists():
            raise ConfigError(f"site {site!r} has two cases that would be {picture}; rename one of them")
        write_picture(folder / picture, image)
        if case.labels is not None:
            _write_png(folder / mask, case.labels[place])
        rows.append(
            (site, picture.as_posix(), "" if case.labels is None else mask.as_posix(), case.patient, case.split)
        )
    return rows


def write_picture(path: Path, image: Tensor) -> None:
    """A (C, h, w) image in [0, 1] as a PNG of 8 bit."""
    values = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    _write_png(path, values[..., ::-1] if values.shape[-1] == 3 else values[..., 0])


def _write_png(path: Path, values: NDArray[Any]) -> None:
    write_atomic(path, cv2.imencode(".png", np.ascontiguousarray(values))[1].tobytes())


def read_pictures(folder: Path, channels: int, size: Sequence[int]) -> Tensor:
    """(N, C, h, w) in [0, 1]: the PNGs of a folder, in the order of their names.

    Raises:
        DataError: there is none, or one of another size or kind.
    """
    found = []
    for path in sorted(folder.glob("*.png")):
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != np.uint8:
            raise DataError(f"{path} is no PNG of 8 bit; take the folder that give= wrote")
        planes = values[..., None] if values.ndim == 2 else values[..., ::-1]
        if planes.shape != (*size, channels):
            raise DataError(
                f"{path} has {' x '.join(map(str, planes.shape))} values, this site's images on the network's grid "
                f"{' x '.join(map(str, (*size, channels)))}; give all sites one data.size and data.channels"
            )
        found.append(torch.from_numpy(np.ascontiguousarray(planes)).permute(2, 0, 1).float() / 255)
    if not found:
        raise DataError(f"given={folder} holds no PNG; take the folder that give= wrote")
    return torch.stack(found)
