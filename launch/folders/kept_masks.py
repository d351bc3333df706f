"""The masks that final scores are of, kept in a run's folder: `evaluation.predictions=true`."""

from __future__ import annotations

from pathlib import Path

from fedseg.datamodules import MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.new import write_map
from fedseg.evaluation import CaseMasks
from fedseg.evaluation.metrics import Mask
from fedseg.launch.experiment import Experiment
from fedseg.reporting.folder import RunFolder, file_name


class KeptMasks:
    """Writes a site's masks: FOLDER/SITE/VIEW/CASE_REGION, in the format of `predict.py`.

    The last models come first, and the best ones take their places where they are others: at the end the masks are
    those of the best models.

    Args:
        folder: for all sites.
        data: of the run.
    """

    def __init__(self, folder: Path, data: MultiCenterDataModule) -> None:
        self.folder = folder
        self.data = data

    def write(self, site: str, view: str, masks: CaseMasks) -> None:
        """One case: a file for each region; of a stack of 2-D images a file for each image and region."""
        folder = self.folder / file_name(site) / file_name(view)
        for region, mask in zip(self.data.regions.names, masks.prediction, strict=True):
            for part, own in _parts(masks.case, mask):
                name = f"{file_name(part.case)}_{file_name(region)}"
                write_map(own, part.image, self.data.reading_of(part.site).at(part.frame), folder, name)


def _parts(case: Case, mask: Mask) -> list[tuple[Case, Mask]]:
    """The image files of a case, each with its part of the mask."""
    if not case.slices:
        return [(case, mask)]
    return [(part, mask[number : number + 1]) for number, part in enumerate(case.slices)]


def kept_masks(experiment: Experiment, folder: RunFolder) -> KeptMasks | None:
    """What keeps the masks of a run, if it is to."""
    return KeptMasks(folder.predictions, experiment.data) if experiment.evaluation.predictions else None
