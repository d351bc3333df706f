"""Mean teacher."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.consistency import squared_difference
from fedseg.algorithms.functional.trajectory import follow
from fedseg.algorithms.semi import SemiSupervised
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import Searched, Share
from fedseg.federation.state import State


class MeanTeacher(SemiSupervised):
    """Federated mean teacher (Tarvainen and Valpola, NeurIPS 2017): a site's model agrees with its own moving average.

    After a local step the site's teacher becomes d teacher + (1 - d) model, d = min(decay, 1 - 1 / (steps + 1)), a
    plain average at first; running statistics are the model's. The disagreement is the mean squared difference of
    probabilities on images without labels, the teacher's and the student's views noised each by itself. The teacher
    stays at the site through all rounds, is its personal model, and begins as what the site first receives. No
    published federated method is meant: it is FedAvg over the paper's local step. The teacher is in evaluation mode,
    where the authors' program normalises by batches, and the weight rises over rounds, not steps. A step costs a
    second batch forward and back, and the teacher's pass forward.

    Args:
        decay: of the moving average, per local step.
    """

    views = ("global", "personal")
    teacher_sees_noise = True
    taught: Tensor

    def __init__(
        self, *args: Any, decay: Annotated[Share, Searched(0.9, 0.999, log=False)] = 0.99, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.decay = decay
        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.register_buffer("taught", torch.zeros(()))

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came and the teacher; before its first step that is the received model."""
        super().receive(message, kept, site)
        if not self.taught:
            self._load(self.teacher, self.model.state_dict())

    def teacher_now(self) -> nn.Module:
        """The moving average."""
        return self.teacher

    def disagreement(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """Mean squared difference of probabilities."""
        return squared_difference(student[0], teacher[0], self.recipe.activation)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The teacher follows the model, once per step, in however many pieces that came."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.taught += 1
        follow(self.teacher, self.model, min(self.decay, 1 - 1 / (float(self.taught) + 1)))

    def network(self, view: str) -> nn.Module:
        """The shared model, or the site's teacher."""
        return self.teacher if view == "personal" else self.model
