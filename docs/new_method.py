"""A method that is easy to copy: save it as ``algorithms/mymethod.py`` and say only what is new.

1. Copy this file, and rename the class after the published name.
2. Add one line to the table in ``algorithms/__init__.py``: ``"mymethod": MyMethod``.
3. Only if it departs from its own defaults somewhere: ``configs/algorithm/mymethod_paper.yaml`` with ``name: mymethod``
   and the knobs that differ.
4. Put its bytes and its memory, as formulas, into the tables of ``docs/methods/costs.md``.

``tests/test_laws.py`` then holds it to the laws of the suite, and ``train.py --help`` lists it with its knobs.
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
