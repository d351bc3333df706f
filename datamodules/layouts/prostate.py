"""Prostate in T2-weighted MRI of six sites: NIfTI volumes, or the slices cut from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Split, stack_slices
from fedseg.datamodules.layouts.common import PICTURES, by_stem, files, found_in_sites, paired
from fedseg.datamodules.readers import VOLUMES, stem_of

OFFICIAL: tuple[Split, ...] = ("train", "test")
MASK = "_segmentation"


class ProstateDataModule(MultiCenterDataModule):
    """Prostate at six sites, in either of two layouts; a case is a patient's volume.

    Volumes: ROOT/<site>/CaseXX.nii.gz with CaseXX_segmentation.nii.gz (also _Segmentation, also .nii). Labels above 1
    name parts of the prostate and count as prostate. No split is given.
    Slices: ROOT/<site>/{train,test}/{image,mask}/CASE_SLICE.png, masks 0 and 255. The split is honoured; the slices of
    a case form one stack. They hold no spacing, so distances are in pixels.

    Sites have their folder's name: BIDMC, HK, I2CVB, BMC (or ISBI_1.5), RUNMC (or ISBI), UCL. The images come from
    NCI-ISBI 2013 (BMC, RUNMC), I2CVB, and PROMISE12 (UCL, BIDMC, HK). Lists of 116 cases circulate: BIDMC 12, HK 12,
    I2CVB 19, RUNMC 30, BMC 30, UCL 13.

    How to obtain: the authors of SAML ("Shape-aware Meta-learning", Liu et al., MICCAI 2020) offer the collection of
    volumes on their page. Terms: those of the three sources; check them there.

    Published figures often use only slices that show prostate, in test too. Here training uses only those when
    foreground_slices_only is set, as in configs/data/prostate.yaml; scores are over whole volumes.

    Args:
        root: The folder that holds the sites.
        regions: Region name to label ids.
        label_values: Mask values to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, or a file without its partner.
    """

    def __init__(
        self,
        *,
        root: str,
        regions: Mapping[str, Sequence[int]] = {"prostate": [1]},
        label_values: Mapping[int | str, int] = {">=1": 1},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        self.root = Path(root).expanduser().absolute()

    def cases(self) -> list[Case]:
        """Every case of every site; no image is opened."""
        expected = (
            "<site>/CaseXX.nii.gz with <site>/CaseXX_segmentation.nii.gz, or "
            "<site>/{train,test}/{image,mask}/CASE_SLICE.png"
        )
        return found_in_sites(self.root, expected, _volumes, _stacks)


def _volumes(site: Path) -> list[Case]:
    paths = files(site, VOLUMES)
    is_mask = {path: stem_of(path).lower().endswith(MASK) for path in paths}
    images = by_stem((path for path in paths if not is_mask[path]), site.name)
    masks = by_stem((path for path in paths if is_mask[path]), site.name, MASK)
    return [
        Case(site.name, name, name, str(image), str(mask)) for name, image, mask in paired(images, masks, site.name)
    ]


def _stacks(site: Path) -> list[Case]:
    stacks: list[Case] = []
    for split in OFFICIAL:
        images = by_stem(files(site / split / "image", PICTURES), site.name)
        masks = by_stem(files(site / split / "mask", PICTURES), site.name)
        patients: dict[str, list[Case]] = {}
        for name, image, mask in paired(images, masks, site.name):
            patient = name.rpartition("_")[0] or name
            patients.setdefault(patient, []).append(Case(site.name, name, patient, str(image), str(mask), split))
        stacks += [stack_slices(patient, slices) for patient, slices in patients.items()]
    return stacks
