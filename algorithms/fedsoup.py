"""FedSoup."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedseg.algorithms.own import LastFit
from fedseg.algorithms.parts import zeroed
from fedseg.federation.contract import Site
from fedseg.federation.ranges import Share
from fedseg.federation.state import Tensors


class FedSoup(LastFit):
    """FedSoup (Chen et al., MICCAI 2023): a site mixes its model with those global ones of the past that do it good.

    Each site keeps the mean P of n received models, none at first. After a local fit from w to v it compares
    (v + n P) / (n + 1) and (v + n P + w) / (n + 2) in Dice on its validation images. If the second is better, w joins
    P; the better one is the site's personal model, and is what the site sends. Running statistics are v's. A site
    without validation images takes part as with FedAvg. The rule is that of the authors' program, which was read and
    not compared; it decides on test images, here these are never seen.

    Args:
        wait: share of the run's rounds that is over before sites mix; until then it is FedAvg. The paper's is 0.75.
    """

    pooled: Tensor

    def __init__(self, *args: Any, wait: Share = 0.75, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wait = wait
        if 0 < wait < 1:
            self.over_rounds = f"algorithm.wait={wait} is a share of them"
        self.pool = zeroed(self.model)  # P
        self.register_buffer("pooled", torch.zeros(()))  # n

    @property
    def mixes_patients(self) -> str:
        """What leaves the site was chosen by patients' images without noise."""
        return super().mixes_patients or "what it sends is chosen by validation images without noise (soup)"

    def on_train_end(self) -> None:
        """Mix, where the network still computes."""
        super().on_train_end()
        if self.turn_site is not None and self.round > self.wait * self.recipe.rounds:
            self._mix(self.turn_site)

    @torch.no_grad()
    def _mix(self, site: Site) -> None:
        pool, count = dict(self.pool.named_parameters()), float(self.pooled)
        fitted = {name: self.model.get_parameter(name).clone() for name in self.parts.parameters}
        without = {name: (v + count * pool[name]) / (count + 1) for name, v in fitted.items()}
        joined = {name: (v + count * pool[name] + self.reference[name]) / (count + 2) for name, v in fitted.items()}
        before, after = self._dice_of(without, site), self._dice_of(joined, site)
        if before is None or after is None or after <= before:
            self._load(self.model, without)
            return
        self._load(self.pool, {n: (count * pool[n] + self.reference[n]) / (count + 1) for n in fitted})
        self.pooled += 1

    def _dice_of(self, mixed: Tensors, site: Site) -> float | None:
        self._load(self.model, mixed)
        return self.mean_dice(self.model, site.eval_batches("val"))
