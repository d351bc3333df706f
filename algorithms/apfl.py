"""APFL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.mixture import alpha_step
from fedseg.federation.contract import PERSONAL_LOSS, Batch
from fedseg.federation.ranges import FinitePositive, Share


class APFL(FedAvg):
    """APFL (Deng, Kamani, Mahdavi, 2020): the personal model is a mixture of an own and the shared one.

    The paper mixes weights, alpha v + (1 - alpha) w; the authors' program mixes the outputs of both networks, which
    suits networks with running statistics better, and adapts alpha at the first step of a round only. A local step is
    the program's: the shared model w takes its step on its own loss, so that the global model is FedAvg's; then the own
    model v takes one on the loss of the mixture with the w that has moved, and alpha follows. It costs about twice as
    much as FedAvg's.

    Alpha moves against the mixture's gradient: of mixed outputs as in the program, <v - w, alpha g_v + (1 - alpha) g_w>
    + 0.02 alpha, with v and w after their steps; of mixed weights its derivative, as in the paper.

    Args:
        alpha: weight of the own model at the start.
        alpha_lr: step size of alpha; null takes training.lr, as the program does, whose SGD takes steps of this size.
        mix: outputs (the authors' program) or weights (the paper).
        adapt: when alpha is adapted: at the first step of a round (the authors' program), at every step, or never.
    """

    views = ("global", "personal")
    models_per_step = 2
    leaves_out_unknown = True
    one_answer = "it mixes the answers of two models"
    alpha: Tensor

    def __init__(
        self,
        *args: Any,
        alpha: Share = 0.5,
        alpha_lr: FinitePositive | None = 0.1,
        mix: Literal["outputs", "weights"] = "outputs",
        adapt: Literal["round", "step", "never"] = "round",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alpha_lr = self.recipe.training.lr if alpha_lr is None else alpha_lr
        self.mix = mix
        self.alpha_adapts = adapt
        self.twin = deepcopy(self.model)
        self.register_buffer("alpha", torch.tensor(alpha))
        self._batch: Batch = {}  # of the step at hand, which Lightning gives to training_step alone

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The shared model's half of a local step."""
        self._batch = batch
        return super().training_step(batch, batch_idx)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The shared model's step on its own loss, then the own model's on the mixture's, and alpha's."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        plain.zero_grad()
        adapts = self.alpha_adapts == "step" or (self.alpha_adapts == "round" and batch_idx == 0)
        alpha = self.alpha.clone().requires_grad_(adapts and self.mix == "weights")
        with self.trainer.precision_plugin.train_step_context():
            loss = self.mixture_loss(self._batch, alpha, through_shared=adapts)
        self.note(loss, PERSONAL_LOSS)
        torch.autograd.backward(loss)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for parameter in self.model.parameters():
            parameter.grad = None
        self.configure_gradient_clipping(plain, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
        plain.step()
        if adapts and self.mix == "outputs":
            self.alpha.fill_(self._alpha_of_outputs(gradients))
        elif alpha.grad is not None:
            self.alpha.copy_((self.alpha - self.alpha_lr * alpha.grad).clamp(0, 1))

    def mixture_loss(self, batch: Batch, alpha: Tensor, *, through_shared: bool = False) -> Tensor:
        """Loss of the mixture.

        Args:
            batch: images and masks.
            alpha: weight of the own model.
            through_shared: also differentiate outputs by the shared model's weights.
        """
        images = self.normalize(batch["image"])
        if self.mix == "weights":
            return self.task_loss(functional_call(self.twin, self._mixed_weights(alpha), (images,)), batch)
        statistics = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # this pass leaves no trace
        with torch.set_grad_enabled(through_shared):
            shared = functional_call(self.model, statistics, (images,))
        return self.task_loss(alpha * self.twin(images) + (1 - alpha) * shared, batch)

    def _alpha_of_outputs(self, gradients: Mapping[str, Tensor]) -> float:
        """Alpha after its step.

        Args:
            gradients: of the mixture's loss by the shared parameters; those of the own ones are where they belong.
        """
        own = {name: p for name, p in self.twin.named_parameters() if p.grad is not None and name in gradients}
        shared = dict(self.model.named_parameters())
        by_own = [p.grad for p in own.values() if p.grad is not None]
        of_shared = [shared[name] for name in own], [gradients[name] for name in own]
        return alpha_step(float(self.alpha), list(own.values()), of_shared[0], by_own, of_shared[1], self.alpha_lr)

    def network(self, view: str) -> nn.Module:
        """The received model, or the mixture."""
        if view == "global":
            return self.model
        if self.mix == "outputs":
            return OutputMixture(self.twin, self.model, self.alpha)
        mixed = deepcopy(self.twin)
        mixed.load_state_dict({**mixed.state_dict(), **self._mixed_weights(self.alpha)})
        return mixed

    def _mixed_weights(self, alpha: Tensor) -> dict[str, Tensor]:
        shared = dict(self.model.named_parameters())
        return {name: alpha * v + (1 - alpha) * shared[name].detach() for name, v in self.twin.named_parameters()}


class OutputMixture(nn.Module):
    """``alpha * own(x) + (1 - alpha) * shared(x)`` on logits."""

    alpha: Tensor

    def __init__(self, own: nn.Module, shared: nn.Module, alpha: Tensor) -> None:
        super().__init__()
        self.own, self.shared = own, shared
        self.register_buffer("alpha", alpha)

    def forward(self, images: Tensor) -> Tensor:
        """Mixed logits."""
        mixed: Tensor = self.alpha * self.own(images) + (1 - self.alpha) * self.shared(images)
        return mixed
