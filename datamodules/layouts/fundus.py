"""Optic disc and cup in fundus photographs of four sites: the layout of DoFE, and the arrays that FedDG makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Sample, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import PICTURES, by_stem, files, found_in_sites, paired

OFFICIAL: tuple[Split, ...] = ("train", "test")


class FundusDataModule(MultiCenterDataModule):
    """Disc and cup at four sites, in either of two layouts.

    DoFE: ROOT/Domain{1..4}/{train,test}/ROIs/{image,mask}/NAME.png, crops around the disc. A mask has three grey
    levels: 0 cup, 128 rim of the disc, 255 background. The split into train and test is honoured; val is carved out of
    train.
    FedDG: ROOT/<client>/data_npy/*.npy, arrays (H, W, 5) of red, green, blue, disc, cup; no split.

    Sites have their folder's name. In DoFE: Domain1 is Drishti-GS (101 images), Domain2 RIM-ONE r3 (159), Domain3 the
    training set of REFUGE (400), Domain4 the validation set of REFUGE (400). Nobody knows which images are of one
    patient, so each image counts as a patient.

    How to obtain: the authors of DoFE ("Domain-oriented Feature Embedding", Wang et al., TMI 2020) link the archive
    from their code repository. Terms: those of the three sources; check them there.

    Args:
        root: The folder that holds the sites.
        regions: Region name to label ids; 1 is the rim, 2 the cup.
        label_values: Grey levels of the DoFE masks to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, or an image without mask.
    """

    def __init__(
        self,
        *,
        root: str,
        regions: Mapping[str, Sequence[int]] = {"disc": [1, 2], "cup": [2]},
        label_values: Mapping[int | str, int] = {0: 2, 128: 1, 255: 0},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()

    def cases(self) -> list[Case]:
        """Every case of every site; no image is opened."""
        expected = (
            "<site>/{train,test}/ROIs/{image,mask}/*.png, as in DoFE's Fundus/Domain1, or <site>/data_npy/*.npy, as "
            "FedDG makes them"
        )
        return found_in_sites(self.root, expected, _pictures, _arrays)

    def read(self, case: Case) -> Sample:
        """Decodes a picture with its mask, or an array that holds both."""
        return _read_array(case) if case.image.endswith(".npy") else super().read(case)

    def read_new(self, case: Case) -> Sample:
        """Decodes a picture, or an array of three channels."""
        return super().read(case)


def _pictures(site: Path) -> list[Case]:
    cases: list[Case] = []
    for split in OFFICIAL:
        crops = site / split / "ROIs"
        images = by_stem(files(crops / "image", PICTURES), site.name)
        masks = by_stem(files(crops / "mask", PICTURES), site.name)
        for name, image, mask in paired(images, masks, site.name):
            cases.append(Case(site.name, name, name, str(image), str(mask), split))
    return cases


def _arrays(site: Path) -> list[Case]:
    arrays = by_stem(files(site / "data_npy", (".npy",)), site.name)
    return [Case(site.name, name, name, str(path), str(path)) for name, path in arrays.items()]


def _read_array(case: Case) -> Sample:
    """Splits an array of five channels; colours may run to 255 or to 1."""
    try:
        array = np.load(case.image, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{case}: {case.image} cannot be read ({error}); replace the file or leave it out") from error
    if array.ndim != 3 or array.shape[2] != 5:
        raise DataError(f"{case}: {case.image} is {array.shape}; expected (H, W, 5): red, green, blue, disc, cup")
    colours = array[..., :3].astype(np.float32)
    low, high = float(colours.min()), float(colours.max())
    if not (np.isfinite(colours).all() and low >= 0 and high <= 255):
        raise DataError(
            f"{case}: the colours of {case.image} run from {low:g} to {high:g}; expected 0 to 255, or 0 to 1"
        )
    disc, cup = array[..., 3] > 0.5, array[..., 4] > 0.5
    labels = np.where(cup, 2, disc).astype(np.uint8)
    return Sample((colours / np.float32(255 if high > 1 else 1))[None], labels[None], None)
