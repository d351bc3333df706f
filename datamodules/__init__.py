"""Sites and their cases: folders, volumes and the public layouts behind one data module."""

import datamodules.installed  # noqa: F401 (imported for its effect, before any library: it says which one is missing)
from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case, Sample
from datamodules.errors import DataError
from datamodules.folder import FolderDataModule
from datamodules.layouts.fundus import FundusDataModule
from datamodules.layouts.lgg import LGGDataModule
from datamodules.layouts.polyp import PolypDataModule
from datamodules.layouts.prostate import ProstateDataModule
from datamodules.layouts.vessels import VesselsDataModule
from datamodules.phantom.data import PhantomDataModule
from datamodules.regions import Regions
from datamodules.site import SiteData

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
