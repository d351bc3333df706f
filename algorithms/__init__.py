"""The methods: one file each, and the only table of their names."""

from fedseg import one_copy
from fedseg.algorithms.apfl import APFL
from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.braintorrent import BrainTorrent
from fedseg.algorithms.cfl import CFL
from fedseg.algorithms.condistfl import ConDistFL
from fedseg.algorithms.contrastive import Contrastive
from fedseg.algorithms.ditto import Ditto
from fedseg.algorithms.fedala import FedALA
from fedseg.algorithms.fedamp import FedAMP
from fedseg.algorithms.fedavg import FedAvg, Pooled
from fedseg.algorithms.fedawa import FedAWA
from fedseg.algorithms.fedbn import FedBN, SiloBN
from fedseg.algorithms.fedce import FedCE
from fedseg.algorithms.fedcost import FedCost
from fedseg.algorithms.feddg import FedDG
from fedseg.algorithms.feddyn import FedDyn
from fedseg.algorithms.fednova import FedNova
from fedseg.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedseg.algorithms.fedper import FedPer, FedRep, LGFedAvg
from fedseg.algorithms.fedprox import FedProx
from fedseg.algorithms.fedrdn import FedRDN
from fedseg.algorithms.fedrod import FedRoD
from fedseg.algorithms.fedsam import FedSAM
from fedseg.algorithms.fedsm import FedSM
from fedseg.algorithms.fedsoup import FedSoup
from fedseg.algorithms.fedvss import FedVSS
from fedseg.algorithms.finetune import FedBABU, FineTune
from fedseg.algorithms.flmrcm import FLMRCM
from fedseg.algorithms.ga import GA
from fedseg.algorithms.harmofl import HarmoFL
from fedseg.algorithms.iopfl import IOPFL
from fedseg.algorithms.lcfed import LCFed
from fedseg.algorithms.local import Local
from fedseg.algorithms.meanteacher import MeanTeacher
from fedseg.algorithms.medisecfed import MediSecFed
from fedseg.algorithms.mfedlo import MFedLO
from fedseg.algorithms.moe import MixtureOfExperts
from fedseg.algorithms.moon import Moon
from fedseg.algorithms.perfedavg import PerFedAvg
from fedseg.algorithms.pfedme import PFedMe
from fedseg.algorithms.prrfl import PRRFL
from fedseg.algorithms.qffl import QFFL
from fedseg.algorithms.scaffold import Scaffold
from fedseg.algorithms.softpull import SoftPull
from fedseg.algorithms.tensornorm import TensorNorm

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "local": Local,
    "pooled": Pooled,
    "fedavg": FedAvg,
    "finetune": FineTune,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "tensornorm": TensorNorm,
    "feddyn": FedDyn,
    "moon": Moon,
    "flmrcm": FLMRCM,
    "fedsam": FedSAM,
    "fedvss": FedVSS,
    "harmofl": HarmoFL,
    "fedrdn": FedRDN,
    "fedce": FedCE,
    "fedcost": FedCost,
    "qffl": QFFL,
    "ga": GA,
    "fedawa": FedAWA,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedbn": FedBN,
    "silobn": SiloBN,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbabu": FedBABU,
    "lgfedavg": LGFedAvg,
    "ditto": Ditto,
    "apfl": APFL,
    "fedala": FedALA,
    "pfedme": PFedMe,
    "perfedavg": PerFedAvg,
    "fedrod": FedRoD,
    "moe": MixtureOfExperts,
    "fedamp": FedAMP,
    "softpull": SoftPull,
    "fedsm": FedSM,
    "fedsoup": FedSoup,
    "braintorrent": BrainTorrent,
    "medisecfed": MediSecFed,
    "cfl": CFL,
    "prrfl": PRRFL,
    "feddg": FedDG,
    "iopfl": IOPFL,
    "lcfed": LCFed,
    "meanteacher": MeanTeacher,
    "mfedlo": MFedLO,
    "condistfl": ConDistFL,
    "contrastive": Contrastive,
}

one_copy(__name__)
