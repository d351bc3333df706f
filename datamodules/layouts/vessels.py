"""Vessels in fundus photographs: DRIVE, CHASE_DB1, STARE and HRF, each a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import PICTURES, by_stem, files, folders, one_of, paired, unexpected
from fedseg.datamodules.readers import stem_of


class VesselsDataModule(MultiCenterDataModule):
    """Retinal vessels; each public set is a site, and those whose folder is there take part.

    * drive (40 images): ROOT/DRIVE/{training,test}/{images/*.tif, 1st_manual/*.gif}. The official split is honoured,
      val is carved out of train. A test set without 1st_manual is not labelled: test is carved out of training too.
    * chasedb1 (28 images of 14 children): ROOT/CHASE_DB1/{Image_01L.jpg, Image_01L_1stHO.png, ...}; both eyes of a
      child stay together.
    * stare (20 images): ROOT/STARE/stare-images/im0001.ppm (or images) with labels-ah/im0001.ah.ppm; unpack *.gz first.
    * hrf (45 images): ROOT/HRF/images/01_dr.JPG with manual1/01_dr.tif.

    The first observer's outlines are used. Fields of view (the folders named mask) are not: the dark border counts as
    background.

    How to obtain: from the page of each set. Terms: check them there; third parties state CC BY 4.0 for CHASE_DB1 and
    HRF, no licence text was seen for STARE, and for DRIVE none was looked at.

    Args:
        root: The folder that holds DRIVE, CHASE_DB1 (or CHASEDB1), STARE, HRF, or some of them.
        regions: Region name to label ids.
        label_values: Mask values to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, or an image without mask.
    """

    def __init__(
        self,
        *,
        root: str,
        regions: Mapping[str, Sequence[int]] = {"vessel": [1]},
        label_values: Mapping[int | str, int] = {">=1": 1},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()

    def cases(self) -> list[Case]:
        """Every case of every set that is there; no image is opened."""
        found: list[Case] = []
        for folder in folders(self.root):
            reader = _SETS.get(folder.name.upper())
            if reader is None:
                raise unexpected(self.root, _NAMES, folder.name)
            cases = reader(folder)
            if not cases:
                raise unexpected(folder, f"the layout of {folder.name}: {_EXPECTED[reader]}")
            found += cases
        if not found:
            raise unexpected(self.root, _NAMES)
        return found


def _drive(folder: Path) -> list[Case]:
    cases: list[Case] = []
    splits: dict[str, Split] = {"training": "train", "test": "test"}
    for part, split in splits.items():
        images = by_stem(files(folder / part / "images", PICTURES), "drive", f"_{part}")
        if split == "test" and not (folder / part / "1st_manual").is_dir():
            cases += [Case("drive", name, name, str(image), None, split) for name, image in images.items()]
            continue
        masks = by_stem(files(folder / part / "1st_manual", PICTURES), "drive", "_manual1")
        cases += [
            Case("drive", n, n, str(image), str(mask), split) for n, image, mask in paired(images, masks, "drive")
        ]
    return cases


def _chase(folder: Path) -> list[Case]:
    paths = files(folder, PICTURES)
    images = by_stem((path for path in paths if not stem_of(path).endswith("HO")), "chasedb1")
    masks = by_stem((path for path in paths if stem_of(path).endswith("_1stHO")), "chasedb1", "_1stHO")
    pairs = paired(images, masks, "chasedb1")
    return [Case("chasedb1", name, name.rstrip("LR"), str(image), str(mask)) for name, image, mask in pairs]


def _stare(folder: Path) -> list[Case]:
    place = one_of(folder, ("stare-images", "images")) or folder
    if packed := sorted(place.glob("*.gz")):
        raise DataError(f"site 'stare': {packed[0]} is compressed; unpack it and its neighbours with gunzip")
    images = by_stem(files(place, PICTURES), "stare")
    masks = by_stem(files(folder / "labels-ah", PICTURES), "stare", ".ah")
    return [Case("stare", n, n, str(image), str(mask)) for n, image, mask in paired(images, masks, "stare")]


def _hrf(folder: Path) -> list[Case]:
    images, masks = (by_stem(files(folder / kind, PICTURES), "hrf") for kind in ("images", "manual1"))
    return [Case("hrf", name, name, str(image), str(mask)) for name, image, mask in paired(images, masks, "hrf")]


_SETS: dict[str, Callable[[Path], list[Case]]] = {
    "DRIVE": _drive,
    "CHASE_DB1": _chase,
    "CHASEDB1": _chase,
    "STARE": _stare,
    "HRF": _hrf,
}
_NAMES = "folders named DRIVE, CHASE_DB1, STARE, HRF, or some of them"
_EXPECTED: dict[Callable[[Path], list[Case]], str] = {
    _drive: "{training,test}/images/*.tif with {training,test}/1st_manual/*.gif",
    _chase: "Image_01L.jpg with Image_01L_1stHO.png",
    _stare: "stare-images/im0001.ppm with labels-ah/im0001.ah.ppm",
    _hrf: "images/01_dr.JPG with manual1/01_dr.tif",
}
