"""A method that is easy to copy: say only what is new.

Outside the repository this file is all: ``algorithm=my_methods:MyMethod`` runs a copy called ``my_methods.py``. To make
the method part of the suite, save it as ``algorithms/mymethod.py`` and follow the steps of CONTRIBUTING.md, "Add a
method"; ``tests/test_laws.py`` then holds it to the laws of the suite, and ``train.py --help`` lists it with its knobs.
"""

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Batch


class MyMethod(FedAvg):
    """MyMethod (Author et al., Venue Year): what it adds to federated averaging, in one line.

    What differs between paper and released code, and what is implemented here. What travels besides the model, if
    anything. What a local step costs compared with FedAvg's.

    Args:
        strength: of the new term; 0 is FedAvg.
    """

    leaves_out_unknown = (
        True  # its loss takes no pixel into account whose label is not known: task_loss leaves them out
    )
    adds_up = True  # its loss is a mean over images: a batch may be computed in pieces (training.pieces)

    def __init__(self, *args: Any, strength: NonNegativeFloat = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength = strength

    def loss(self, batch: Batch) -> Tensor:
        """Task loss, plus a term of your own; here the squared norm of the network's output."""
        logits = self.model(self.normalize(batch["image"]))
        return self.task_loss(logits, batch) + self.strength * logits.square().mean()
