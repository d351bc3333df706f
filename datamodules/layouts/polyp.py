"""Polyps in colonoscopy images: the collection released with PraNet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import PICTURES, by_stem, files, folders, one_of, paired, unexpected

TEST_FOLDERS = {
    "Kvasir": "kvasir",
    "CVC-ClinicDB": "clinicdb",
    "CVC-ColonDB": "colondb",
    "ETIS-LaribPolypDB": "etis",
    "CVC-300": "cvc300",
}
WITH_TRAINING = ("kvasir", "clinicdb")


class PolypDataModule(MultiCenterDataModule):
    """Polyps; each source of the PraNet collection is a site.

    Layout: ROOT/TrainDataset/{image,mask}/*.png (or images, masks) and
    ROOT/TestDataset/{CVC-300,CVC-ClinicDB,CVC-ColonDB,ETIS-LaribPolypDB,Kvasir}/{images,masks}/*.png.

    TrainDataset mixes two sources, told apart by name: Kvasir-SEG's begin with a c, CVC-ClinicDB's are numbers.
    Sites: kvasir (900 train, 100 test), clinicdb (550, 62), colondb (380), etis (196) and, when asked for, cvc300 (60).
    kvasir and clinicdb keep the official split, val is carved out of train; the others are split by data.split.

    The collection does not tell which frames are of one video, so frames of one sequence may be on both sides of a
    split: scores on clinicdb, colondb and etis are too high to count as scores on new patients. With a table of
    sequences, use data=folder and a manifest with a group column. CVC-300 and CVC-ColonDB may share videos, which is
    why cvc300 is left out unless asked for.

    How to obtain: the authors of PraNet (Fan et al., MICCAI 2020) link both archives from their code repository.
    Terms: those of each source; check them there.

    Args:
        root: The folder that holds TrainDataset and TestDataset.
        cvc300: Whether CVC-300 is a site too.
        regions: Region name to label ids.
        label_values: Mask values to label ids; compressed masks have values near 0 and 255.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, an image without mask, or a training image of unknown source.
    """

    def __init__(
        self,
        *,
        root: str,
        cvc300: bool = False,
        regions: Mapping[str, Sequence[int]] = {"polyp": [1]},
        label_values: Mapping[int | str, int] = {">=128": 1, "<128": 0},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.cvc300 = cvc300

    def cases(self) -> list[Case]:
        """Every case of every site; no image is opened."""
        names = {path.name for path in folders(self.root)}
        expected = "TrainDataset/{image,mask} and TestDataset/{" + ",".join(TEST_FOLDERS) + "}/{images,masks}"
        if not {"TrainDataset", "TestDataset"} <= names:
            raise unexpected(self.root, expected)
        train = [
            Case(source_of(name, image), name, name, str(image), str(mask), "train")
            for name, image, mask in _pairs(self.root / "TrainDataset", "TrainDataset")
        ]
        return train + [case for folder in folders(self.root / "TestDataset") for case in self._test(folder)]

    def _test(self, folder: Path) -> list[Case]:
        if folder.name not in TEST_FOLDERS:
            raise unexpected(folder.parent, f"folders named {', '.join(TEST_FOLDERS)}", folder.name)
        site = TEST_FOLDERS[folder.name]
        if site == "cvc300" and not self.cvc300:
            return []
        split: Split | None = "test" if site in WITH_TRAINING else None
        return [Case(site, name, name, str(image), str(mask), split) for name, image, mask in _pairs(folder, site)]


def source_of(name: str, image: Path) -> str:
    """Site of a training image, by its name.

    Raises:
        DataError: A name of neither source.
    """
    if re.fullmatch(r"c[0-9a-z]+", name):
        return "kvasir"
    if name.isdigit():
        return "clinicdb"
    raise DataError(
        f"{image} belongs to no known source: in TrainDataset, Kvasir-SEG's names begin with c and CVC-ClinicDB's are "
        "numbers; remove the file, or use data=folder with a manifest"
    )


def _pairs(folder: Path, site: str) -> list[tuple[str, Path, Path]]:
    images, masks = one_of(folder, ("image", "images")), one_of(folder, ("mask", "masks"))
    if images is None or masks is None:
        raise unexpected(folder, "the folders image (or images) and mask (or masks)")
    return paired(by_stem(files(images, PICTURES), site), by_stem(files(masks, PICTURES), site), site)
