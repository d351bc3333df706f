"""FedALA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from fedseg.algorithms.own import LastFit
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import Fixed, PositiveShare


class FedALA(LastFit):
    """FedALA (Zhang et al., AAAI 2023): each site learns how much of the received model it takes up, weight by weight.

    A site starts its local fit from v + (w - v) * m on the last tensors of the network, v its own last model, w the
    received one, m in [0, 1] learnt by gradient on its images; all other tensors are received. m stays at the site. In
    a site's first round there is nothing to merge; the first merging takes more passes, where the authors' program
    goes on until the loss settles. The personal model is the site's own after its last fit.

    Args:
        tensors: how many of the network's last parameter tensors are merged.
        eta: step size of m; 0 is FedAvg.
        sample: share of a pass over the training images that m is learnt on.
        first_passes: of a site's first merging.
    """

    merged: Tensor

    def __init__(
        self,
        *args: Any,
        tensors: Fixed[PositiveInt] = 2,
        eta: NonNegativeFloat = 1.0,
        sample: PositiveShare = 0.8,
        first_passes: Fixed[PositiveInt] = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eta, self.sample, self.first_passes = eta, sample, first_passes
        self.upper = [name for name, _ in self.model.named_parameters() if name in self.parts.parameters][-tensors:]
        weights = [torch.ones_like(self.model.get_parameter(name), requires_grad=False) for name in self.upper]
        self.merge = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])
        self.register_buffer("merged", torch.zeros(()))  # rounds in which this site has merged
        self._sample: Iterable[Batch] = ()

    @property
    def mixes_patients(self) -> str:
        """What a site starts from is fitted to its images without noise."""
        return super().mixes_patients or "its start is fitted to patients' images without noise (merge)"

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """Those of the local fit; others are laid aside for the merging."""
        if self.trained_here and self.eta:
            self._sample = site.train_batches(seed + 1, ceil(self.sample * site.steps()))
        return super().batches(site, seed, steps)

    def on_train_start(self) -> None:
        """Merge the own and the received model."""
        super().on_train_start()
        batches, self._sample = self._sample, ()
        received = {name: self.model.get_parameter(name).detach().clone() for name in self.upper}
        own = {name: self.own.get_parameter(name) for name in self.upper}
        for _ in range(self.first_passes if not self.merged else 1):
            for batch in batches:
                self._learn_merge(self.trainer.strategy.batch_to_device(batch), own, received)
        if batches:
            self.merged += 1
            self._load(self.model, self._start(own, received))

    def _learn_merge(self, batch: Batch, own: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
        start = {name: tensor.requires_grad_() for name, tensor in self._start(own, received).items()}
        statistics = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # this pass leaves no trace
        with self.trainer.precision_plugin.train_step_context():
            logits = functional_call(self.model, {**statistics, **start}, (self.normalize(batch["image"]),))
            loss = self.task_loss(logits, batch)
        gradients = torch.autograd.grad(loss, list(start.values()))
        for weight, name, gradient in zip(self.merge, start, gradients, strict=True):
            weight.sub_(self.eta * gradient * (received[name] - own[name])).clamp_(0, 1)

    def _start(self, own: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The upper tensors, as merged so far; a weight of 1 gives the received one bit for bit."""
        pairs = zip(self.upper, self.merge, strict=True)
        return {name: torch.lerp(own[name], received[name], weight) for name, weight in pairs}
