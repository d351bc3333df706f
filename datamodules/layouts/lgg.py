"""FLAIR abnormality in brain MRI of lower-grade glioma (TCGA-LGG), sites by institution: the folder kaggle_3m."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedseg.common.names import nearest
from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Sample, stack_slices
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.layouts.common import PICTURES, by_stem, files, folders, paired, unexpected
from fedseg.datamodules.readers import stem_of

SEQUENCES = {"pre": slice(0, 1), "flair": slice(1, 2), "post": slice(2, 3), "all": slice(0, 3)}


class LGGDataModule(MultiCenterDataModule):
    """Brain MRI of glioma; a site is an institution, a case is a patient's stack of slices.

    Layout: ROOT/<patient>_<date>/<patient>_<date>_<slice>.tif with <patient>_<date>_<slice>_mask.tif, where a patient
    is TCGA_<institution>_<number>. The three channels are pre-contrast, FLAIR and post-contrast; where a sequence was
    not taken, the release repeats FLAIR.

    Sites: TCGA_CS (16 patients), TCGA_DU (45), TCGA_FG (14), TCGA_HT (34), and TCGA_EZ with a single patient, who
    cannot both train and test and is left out unless asked for. Most slices show no abnormality: empty masks are real
    here; foreground_slices_only trains without them. The files hold no spacing, so distances are in pixels.

    How to obtain: the "LGG MRI Segmentation" set on Kaggle, with the masks of Buda et al. (2019); the images are from
    TCGA-LGG on The Cancer Imaging Archive. Terms: CC BY-NC-SA 4.0 according to the licence of the authors' companion
    repository; check the source's terms.

    Args:
        root: The folder kaggle_3m.
        sequence: Which channel is the image: "flair", "pre", "post", or "all" three.
        leave_out: Sites that take no part.
        regions: Region name to label ids.
        label_values: Mask values to label ids.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Another layout, or a slice without mask.
    """

    def __init__(
        self,
        *,
        root: str,
        sequence: Literal["flair", "pre", "post", "all"] = "flair",
        leave_out: Sequence[str] = ["TCGA_EZ"],
        regions: Mapping[str, Sequence[int]] = {"abnormality": [1]},
        label_values: Mapping[int | str, int] = {">=1": 1},
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, label_values=label_values, **kwargs)
        if sequence not in SEQUENCES:
            raise DataError(f"data.sequence: no sequence {sequence!r}; {nearest(sequence, SEQUENCES)}")
        self.root = Path(root).expanduser().absolute()
        self.sequence = sequence
        self.leave_out = frozenset(leave_out)

    def cases(self) -> list[Case]:
        """Every patient of every site; no image is opened."""
        found: list[Case] = []
        for folder in folders(self.root):
            name = re.fullmatch(r"(TCGA_[A-Z0-9]+)_[A-Z0-9]+_\d+", folder.name)
            if name is None:
                raise unexpected(
                    self.root, "folders named TCGA_<institution>_<number>_<date>, as in kaggle_3m", folder.name
                )
            if name.group(1) not in self.leave_out:
                found.append(_stack(folder, name.group(1)))
        if not found:
            raise unexpected(self.root, "folders named TCGA_<institution>_<number>_<date>, as in kaggle_3m")
        return found

    def read(self, case: Case) -> Sample:
        """Decodes a stack and keeps the chosen sequence."""
        sample = super().read(case)
        if sample.image.shape[-1] != 3:
            raise DataError(
                f"{case} has {sample.image.shape[-1]} channels; expected 3: pre-contrast, FLAIR, post-contrast"
            )
        return replace(sample, image=sample.image[..., SEQUENCES[self.sequence]])

    def decoding(self) -> dict[str, Any]:
        """Adds the sequence."""
        return super().decoding() | {"sequence": self.sequence}


def _stack(folder: Path, site: str) -> Case:
    patient = folder.name.rpartition("_")[0]
    paths = files(folder, PICTURES)
    is_mask = {path: stem_of(path).lower().endswith("_mask") for path in paths}
    images = by_stem((path for path in paths if not is_mask[path]), site)
    masks = by_stem((path for path in paths if is_mask[path]), site, "_mask")
    slices = [Case(site, name, patient, str(image), str(mask)) for name, image, mask in paired(images, masks, site)]
    if not slices:
        raise unexpected(folder, f"{folder.name}_<slice>.tif with {folder.name}_<slice>_mask.tif")
    return stack_slices(patient, slices)
