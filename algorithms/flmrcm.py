"""FL-MRCM."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, binary_cross_entropy_with_logits

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.deepest import unmoved, with_deepest
from fedseg.federation.contract import Batch, Site, Task
from fedseg.federation.ranges import FinitePositive
from fedseg.federation.state import State
from fedseg.models.select import require_parts

FEATURES = "features"
POOLED = 2  # cells along every axis, as in the authors' program
SLOPE = 0.2
HIDDEN = 256


class FLMRCM(FedAvg):
    """FL-MRCM (Guo et al., CVPR 2021): a site's features are to pass for those of the other sites.

    A discriminator tells the deepest maps of the encoder, pooled to two cells along every axis, from those of the other
    sites; task loss + adversarial times the loss of a discriminator that is fooled. It learns in the same step, stays
    at the site and sees the others' features of the round before: their last training images', never the images. Who
    did not train in that round is not among them, so that all features are of encoders of about one age; where one
    model travels (federation.order) whoever trained earlier in the same round is. The authors' program, for
    reconstruction, gives every site the raw images of one target site, averages uniformly
    (algorithm.weighting=uniform) and takes RMSprop and adversarial=1.

    Args:
        adversarial: weight of the loss of the discriminator that is fooled; 0 is FedAvg, and no features leave.
        features: of how many training images a site shows the others, at most.
        discriminator_lr: learning rate of the discriminator, in units of the network's.
    """

    per_site = frozenset({FEATURES})
    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self,
        *args: Any,
        adversarial: NonNegativeFloat = 0.1,
        features: PositiveInt = 64,
        discriminator_lr: FinitePositive = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_parts(self.model, "algorithm=flmrcm", "encoder")
        self.adversarial, self.features, self.discriminator_lr = adversarial, features, discriminator_lr
        if not adversarial:
            self.per_site = frozenset()
        elif why := unmoved(self.model):
            self.adds_nothing = f"{why}; take model.freeze_encoder=false, or algorithm=fedavg"
        axes = max(p.ndim for p in self.model.parameters()) - 2
        encoder: Any = self.model.get_submodule("encoder")
        self.discriminator = discriminator(encoder.out_channels[-1] * POOLED**axes)
        self._seen: list[Tensor] = []  # features of this turn's batches
        self._others = torch.zeros(0)

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came, the others' features among it."""
        super().receive(message, kept, site)
        found = [t for group, ts in message.tensors.items() if group.startswith(f"{FEATURES}/") for t in ts.values()]
        self._seen, self._others = [], torch.cat(found) if found else torch.zeros(0)

    def loss(self, batch: Batch) -> Tensor:
        """Task loss, and those of fooling the discriminator and of teaching it."""
        if not self.adversarial:
            return super().loss(batch)
        logits, own = pooled_features(self.model, self.normalize(batch["image"]))
        self._seen.append(own.detach().float().cpu())
        task = self.task_loss(logits, batch)
        if not len(self._others):
            return task
        self.note(task)
        others = self._others.to(own.device)
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = [functional_call(self.discriminator, fixed, (z,)) for z in (own, others)]
        taught = [self.discriminator(z) for z in (own.detach(), others)]
        return task + self.adversarial * domain_loss(*fooled, fooled=True) + domain_loss(*taught, fooled=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's, with another learning rate for the discriminator."""
        optimizer = super().configure_optimizers()
        (whole,) = optimizer.param_groups
        judge = list(self.discriminator.parameters())
        whole["params"] = [p for p in whole["params"] if all(p is not other for other in judge)]
        settings = {name: value for name, value in whole.items() if name not in ("params", "lr")}
        optimizer.add_param_group({**settings, "params": judge, "lr": whole["lr"] * self.discriminator_lr})
        return optimizer

    def send(self, site: Site) -> State:
        """The differences, and the features of the last images under the round's number."""
        answer = super().send(site)
        if self._seen:
            answer.tensors[FEATURES] = {str(self.round): torch.cat(self._seen)[-self.features :]}
        return answer

    # ---------------------------------------------------------------- server half

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model, and for training the features of the other sites, unless they are of an earlier round."""
        message = super().broadcast(server, site, task)
        if task.kind == "train":
            recent = {str(task.round - 1), str(task.round), FEATURES}  # the last: as earlier versions filed them
            for group, ts in server.tensors.items():
                shown = {name: t for name, t in ts.items() if name in recent}
                if shown and group.startswith(f"{FEATURES}/") and group != f"{FEATURES}/{site}":
                    message.tensors[group] = shown
        return message


def discriminator(width: int) -> nn.Sequential:
    """Two outputs, one for each of two kinds of features; the second activation is the authors' too."""
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.LeakyReLU(SLOPE), nn.Linear(HIDDEN, 2), nn.LeakyReLU(SLOPE))


def pooled_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the deepest map of the network's encoder, pooled: (B, channels times cells)."""
    logits, deepest = with_deepest(network, images)
    pool = adaptive_avg_pool3d if deepest.ndim == 5 else adaptive_avg_pool2d
    return logits, pool(deepest, POOLED).flatten(1)


def domain_loss(own: Tensor, others: Tensor, *, fooled: bool) -> Tensor:
    """Mean binary cross entropy of both outputs over own and others' features; who is fooled takes one for the other.

    Args:
        own: (B, 2) of the discriminator.
        others: (M, 2).
        fooled: whether the codes are those that the encoder wants.
    """
    codes = own.new_tensor([[1.0, 0.0], [0.0, 1.0]])
    told = codes if fooled else codes.flip(0)
    losses = [
        binary_cross_entropy_with_logits(logits, code.expand_as(logits))
        for logits, code in zip((own, others), told, strict=True)
    ]
    return torch.stack(losses).mean()
