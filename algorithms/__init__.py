"""The methods: one file each, and the only table of their names."""

from algorithms.apfl import APFL
from algorithms.base import Algorithm
from algorithms.contrastive import Contrastive
from algorithms.ditto import Ditto
from algorithms.fedavg import FedAvg, Pooled
from algorithms.fedbn import FedBN, SiloBN
from algorithms.feddg import FedDG
from algorithms.fedper import FedPer, FedRep, LGFedAvg
from algorithms.fedprox import FedProx
from algorithms.finetune import FedBABU, FineTune
from algorithms.iopfl import IOPFL
from algorithms.lcfed import LCFed
from algorithms.local import Local

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "local": Local,
    "pooled": Pooled,
    "fedavg": FedAvg,
    "finetune": FineTune,
    "fedprox": FedProx,
    "fedbn": FedBN,
    "silobn": SiloBN,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbabu": FedBABU,
    "lgfedavg": LGFedAvg,
    "ditto": Ditto,
    "apfl": APFL,
    "feddg": FedDG,
    "iopfl": IOPFL,
    "lcfed": LCFed,
    "contrastive": Contrastive,
}
