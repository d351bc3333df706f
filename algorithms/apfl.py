"""APFL."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from algorithms.fedavg import FedAvg
from algorithms.functional.mixture import alpha_step
from federation.contract import Batch
from federation.ranges import Share


class APFL(FedAvg):
    """APFL (Deng, Kamani, Mahdavi, 2020): the personal model is a mixture of an own and the shared one.

    The paper mixes weights, alpha v + (1 - alpha) w; the authors' code mixes the outputs of both networks, which
    suits networks with running statistics better, and adapts alpha at the first step of a round only. The shared
    model w takes no gradient from the mixture, so the global model is FedAvg's. A local step costs about twice as much.

    Args:
        alpha: weight of the own model at the start.
        alpha_lr: step size of alpha; null takes training.lr, as the authors' code does.
        mix: outputs (the authors' code) or weights (the paper).
        adapt: when alpha is adapted: at the first step of a round (the authors' code), at every step, or never.
    """

    views = ("global", "personal")
    leaves_out_unknown = True
    alpha: Tensor

    def __init__(
        self,
        *args: Any,
        alpha: Share = 0.5,
        alpha_lr: float | None = None,
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

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the shared model, plus loss of the mixture."""
        images = self.normalize(batch["image"])
        shared = self.model(images)
        if self.mix == "outputs":
            mixed = self.alpha * self.twin(images) + (1 - self.alpha) * shared.detach()
        else:
            mixed = functional_call(self.twin, self._mixed_weights(), (images,))
        return self.task_loss(shared, batch) + self.task_loss(mixed, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adapt alpha from the gradients of both models."""
        if self.alpha_adapts == "never" or (self.alpha_adapts == "round" and self.trainer.global_step > 0):
            return
        pairs = [(v, w) for v, w in zip(self.twin.parameters(), self.model.parameters(), strict=True)]
        pairs = [(v, w) for v, w in pairs if v.grad is not None and w.grad is not None]
        own, shared = [v for v, _ in pairs], [w for _, w in pairs]
        own_grad = [v.grad for v in own if v.grad is not None]
        shared_grad = [w.grad for w in shared if w.grad is not None]
        alpha = alpha_step(float(self.alpha), own, shared, own_grad, shared_grad, self.alpha_lr)
        self.alpha.fill_(alpha)

    def network(self, view: str) -> nn.Module:
        """The received model, or the mixture."""
        if view == "global":
            return self.model
        if self.mix == "outputs":
            return OutputMixture(self.twin, self.model, self.alpha)
        mixed = deepcopy(self.twin)
        mixed.load_state_dict({**mixed.state_dict(), **self._mixed_weights()})
        return mixed

    def _mixed_weights(self) -> dict[str, Tensor]:
        shared = dict(self.model.named_parameters())
        return {
            name: self.alpha * v + (1 - self.alpha) * shared[name].detach() for name, v in self.twin.named_parameters()
        }


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
