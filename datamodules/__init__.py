"""Sites and their cases: folders, volumes and the public layouts behind one data module."""

from fedseg import one_copy
from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.folder import FolderDataModule
from fedseg.datamodules.layouts.acdc import ACDCDataModule
from fedseg.datamodules.layouts.fets import FeTSDataModule
from fedseg.datamodules.layouts.fundus import FundusDataModule
from fedseg.datamodules.layouts.lgg import LGGDataModule
from fedseg.datamodules.layouts.mnms import MnMsDataModule
from fedseg.datamodules.layouts.polyp import PolypDataModule
from fedseg.datamodules.layouts.prostate import ProstateDataModule
from fedseg.datamodules.layouts.vessels import VesselsDataModule
from fedseg.datamodules.phantom.data import PhantomDataModule
from fedseg.datamodules.regions import Regions
from fedseg.datamodules.site import SiteData

DATASETS: dict[str, type[MultiCenterDataModule]] = {
    "phantom": PhantomDataModule,
    "folder": FolderDataModule,
    "fundus": FundusDataModule,
    "prostate": ProstateDataModule,
    "polyp": PolypDataModule,
    "vessels": VesselsDataModule,
    "lgg": LGGDataModule,
    "fets": FeTSDataModule,
    "mnms": MnMsDataModule,
    "acdc": ACDCDataModule,
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

one_copy(__name__)
