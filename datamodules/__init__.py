"""Sites and their cases: folders, volumes and the public layouts behind one data module."""

from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.folder import FolderDataModule
from datamodules.regions import Regions
from datamodules.site import SiteData

DATASETS: dict[str, type[MultiCenterDataModule]] = {
    "folder": FolderDataModule,
}

__all__ = [
    "DATASETS",
    "Case",
    "DataError",
    "FolderDataModule",
    "MultiCenterDataModule",
    "Regions",
    "Sample",
    "SiteData",
]
