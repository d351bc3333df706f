"""Two heads, as in FedRoD."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import PERSONAL_LOSS, Batch
from fedseg.models.embedding import Embedding
from fedseg.models.select import require_parts


class FedRoD(FedAvg):
    """Two heads, as in FedRoD (Chen and Chao, ICLR 2022): a shared model, and a head beside its own that stays.

    The body and the shared head are FedAvg's, bit for bit. The site's head sees the same features, adds its logits to
    the shared head's, and learns from the task loss of the sum, from which neither features nor shared logits learn;
    it starts at zero. The paper's shared head has a loss balanced over classes; here it is the recipe's, whose Dice
    counts regions alike whatever their size. After the paper; no code was compared.
    """

    views = ("global", "personal")
    leaves_out_unknown = True
    one_answer = "its second head adds to what the first one answers"
    adds_up = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_parts(self.model, "algorithm=fedrod", "segmentation_head")
        self.head = deepcopy(self.model.get_submodule("segmentation_head"))
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()

    def loss(self, batch: Batch) -> Tensor:
        """Task loss of the shared model, and of both heads together."""
        logits, features = Embedding(self.model)(self.normalize(batch["image"]))
        shared = self.task_loss(logits, batch)
        own = self.task_loss(logits.detach() + self.head(features.detach()), batch)
        self.note(shared)
        self.note(own, PERSONAL_LOSS)
        return shared + own

    def network(self, view: str) -> nn.Module:
        """The shared model, or both heads."""
        return TwoHeads(self.model, self.head) if view == "personal" else self.model


class TwoHeads(nn.Module):
    """A network whose logits are those of its head and of another one.

    Args:
        network: with a ``segmentation_head``.
        head: takes what enters that.
    """

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> logits."""
        logits, features = Embedding(self.network)(images)
        both: Tensor = logits + self.head(features)
        return both
