"""M-FedLO."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from fedseg.algorithms.functional.consistency import pseudo_label_loss
from fedseg.algorithms.functional.deepest import with_deepest
from fedseg.algorithms.semi import SemiSupervised, finest
from fedseg.federation.contract import Site
from fedseg.federation.ranges import Fixed, Share
from fedseg.federation.state import State
from fedseg.models.select import require_parts


class MFedLO(SemiSupervised):
    """M-FedLO (Pan, Zhong, Li, 2024), its semi-supervised part: the received model teaches on images without labels.

    The model as received, frozen and in evaluation mode, labels a view of the image; the site's own learns these labels
    on a noised view, where the teacher is sure, and its deepest map is drawn to the teacher's. After the abstract,
    which says that global labels guide local models so that their features approach the global model's: losses,
    threshold, ramp and weights of sites are chosen here. The paper's branches, one for each label, are not built;
    answers at several scales are `model.deep_supervision`. A step costs a second batch forward and back, and the
    teacher's pass forward; nothing is kept.

    Args:
        threshold: least probability with which the teacher must decide, for its decision to be learnt.
        features: weight of the mean squared difference of the deepest maps, beside that of the labels; 0 leaves it out.
    """

    def __init__(
        self, *args: Any, threshold: Fixed[Share] = 0.9, features: NonNegativeFloat = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if features:
            require_parts(self.model, "algorithm=mfedlo (algorithm.features)", "encoder")
        self.threshold, self.features = threshold, features
        self._global: list[nn.Module] = []  # the received model, of this turn

    def receive(self, message: State, kept: State, site: Site) -> None:
        """The teacher is that of this turn."""
        super().receive(message, kept, site)
        self._global = []

    def on_train_start(self) -> None:
        """The teacher is copied before any hook for a step hangs on the model."""
        super().on_train_start()
        if self.learns_unlabelled:
            self.teacher_now()

    def teacher_now(self) -> nn.Module:
        """The model as it was before the first step of this turn."""
        if not self._global:
            self._global = [deepcopy(self.model).requires_grad_(False)]
        return self._global[0]

    def says(self, network: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits, and the deepest map where it counts."""
        if not self.features:
            return super().says(network, inputs)
        answer, deepest = with_deepest(network, inputs)
        return finest(answer), deepest

    def disagreement(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """Cross entropy with the teacher's sure decisions, and the distance of the deepest maps."""
        loss = pseudo_label_loss(student[0], teacher[0], self.recipe.activation, self.threshold)
        for own, other in zip(student[1:], teacher[1:], strict=True):
            loss = loss + self.features * (own.float() - other.float()).square().mean()
        return loss
