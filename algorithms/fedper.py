"""Methods that split the network into a shared and a personal part."""

from __future__ import annotations

from typing import Any

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.ranges import Share
from fedseg.models.select import Selector, complement, part


class FedPer(FedAvg):
    """FedPer (Arivazhagan et al., 2019): a shared body and a personal head, trained together.

    The head is ``segmentation_head`` (two tensors of an smp network). U-Nets are sensitive to where the cut is:
    ``algorithm.personal=part:decoder,segmentation_head`` makes the decoder personal too.
    """

    personal = staticmethod(part("segmentation_head"))


class FedRep(FedPer):
    """FedRep (Collins et al., ICML 2021): a personal head is fitted first, then the shared body for the fixed head.

    Frozen tensors do not move, momentum included; running statistics of the frozen body still follow the images, as
    in the authors' code. That fits the head for four of a round's five passes and the body for one, a `head_share` of
    0.8; the default departs from it.

    Args:
        head_share: share of the local steps that fit the head; the rest fits the body.
    """

    def __init__(self, *args: Any, head_share: Share = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_share = head_share
        self._body = complement(self.personal)

    def learns(self, step: int) -> Selector:
        """First the personal part, then the shared one."""
        return self.personal if step < round(self.head_share * self.trainer.num_training_batches) else self._body


class LGFedAvg(FedAvg):
    """LG-FedAvg (Liang et al., 2020): personal representation (encoder), shared decoder and head."""

    personal = staticmethod(part("encoder"))
