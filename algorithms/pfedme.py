"""pFedMe."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.repeated import Repeated
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import Share
from fedseg.federation.state import State, squared_distance
from fedseg.models.select import Selector, nothing


class PFedMe(FedAvg):
    """pFedMe (Dinh, Tran, Nguyen, NeurIPS 2020): the shared model follows personal ones through Moreau envelopes.

    For each batch the personal model theta takes `inner_steps` steps on loss + lam/2 |theta - w|^2; then the site's w
    moves to w - eta lam (w - theta). Theta starts each round at the received model. Steps of the recipe's optimiser
    count as local steps, so that a round costs what it costs with FedAvg. The paper's beta is `federation.server_lr`.
    Running statistics are the personal model's, and averaged. After the paper; the authors' program was read, and no
    numbers were compared. Their experiments on MNIST have eta 0.005 and lam 15, thus an `outer` of 0.075, over 20
    batches in a round; 0.5 is for the few batches of short rounds.

    Args:
        lam: strength of the pull between both.
        inner_steps: K, steps of the personal model on a batch.
        outer: eta lam, the share of the way to the personal model that w goes; 1, with all
            steps on one batch, is FedProx.
    """

    views = ("global", "personal")
    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self,
        *args: Any,
        lam: NonNegativeFloat = 15.0,
        inner_steps: PositiveInt = 5,
        outer: Share = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lam, self.inner_steps, self.outer = lam, inner_steps, outer
        self.twin = deepcopy(self.model)

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """Every batch as often as the personal model steps on it."""
        return Repeated(super().batches(site, seed, -(-steps // self.inner_steps)), self.inner_steps, steps)

    def on_train_start(self) -> None:
        """Both start from the received model; what the site has of its own in it stays the personal model's."""
        super().on_train_start()
        received = {**self.model.state_dict()}
        self._load(self.twin, {name: received[name] for name in (*self.parts.parameters, *self.parts.buffers)})

    def learns(self, step: int) -> Selector:
        """Nothing of the shared model: it follows."""
        return nothing

    def loss(self, batch: Batch) -> Tensor:
        """Task loss of the personal model, and its pull to the shared one."""
        shared = {name: self.model.get_parameter(name).detach() for name in self.parts.parameters}
        pull = squared_distance(dict(self.twin.named_parameters()), shared)
        return self.criterion(self.twin, batch) + self.lam / 2 * pull

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last step on a batch the shared model follows."""
        if (batch_idx + 1) % self.inner_steps and batch_idx + 1 < self.trainer.num_training_batches:
            return
        for name in self.parts.parameters:
            self.model.get_parameter(name).lerp_(self.twin.get_parameter(name), self.outer)

    def send(self, site: Site) -> State:
        """The differences, with the personal model's running statistics."""
        statistics = self.twin.state_dict()
        self._load(self.model, {name: statistics[name] for name in self.parts.buffers})
        return super().send(site)

    def network(self, view: str) -> nn.Module:
        """The shared model, or the site's own."""
        return self.twin if view == "personal" else self.model
