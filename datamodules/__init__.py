"""Sites and their cases: folders, volumes and the public layouts behind one data module."""

from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.folder import FolderDataModule
from datamodules.fundus import FundusDataModule
from datamodules.lgg import LGGDataModule
from datamodules.phantom import PhantomDataModule
from datamodules.polyp import PolypDataModule
from datamodules.prostate import ProstateDataModule
from datamodules.regions import Regions
from datamodules.site import SiteData
from datamodules.vessels import VesselsDataModule

DATASETS: dict[str, type[MultiCenterDataModule]] = {
    "phantom": PhantomDataModule,
    "folder": FolderDataModule,
    "fundus": FundusDataModule,
    "prostate": ProstateDataModule,
    "polyp": PolypDataModule,
    "vessels": VesselsDataModule,
    "lgg": LGGDataModule,
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
