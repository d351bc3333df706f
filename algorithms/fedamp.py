"""FedAMP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from fedseg.algorithms.answers import SingleAnswers, weighted
from fedseg.algorithms.functional.rows import row_of
from fedseg.algorithms.own import LastFit
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import FinitePositive, Fixed, Share
from fedseg.federation.state import State, Tensors, squared_distance


class FedAMP(LastFit, SingleAnswers):
    """FedAMP (Huang et al., AAAI 2021): a site is pulled to a mean in which others weigh by their likeness to it.

    u_i = (1 - sum_j xi_ij) w_i + sum_j xi_ij w_j with xi_ij = share / (K - 1) exp(-|w_i - w_j|^2 / sigma), which is the
    paper's alpha A'(|w_i - w_j|^2) for its A(x) = 1 - exp(-x / sigma); a site goes on from its own model with
    loss + lam/2 |w - u_i|^2. Each site counts the same. After the paper; no code was compared.

    Args:
        share: largest weight that all others together have at a site; 0 with lam at 0 is local training.
        sigma: squared distance at which weights fall to 1/e; null takes the round's mean over pairs of sites. Not
            tuned: distances grow with the network, so that no range serves all.
        lam: strength of the pull.
    """

    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self,
        *args: Any,
        share: Share = 0.5,
        sigma: Fixed[FinitePositive | None] = None,
        lam: NonNegativeFloat = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.share, self.sigma, self.lam = share, sigma, lam
        self._goes_on = False

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; the site's own model is the one that learns."""
        super().receive(message, kept, site)
        self._goes_on = self.trained_here

    def on_train_start(self) -> None:
        """Go on from the own model."""
        super().on_train_start()
        if self._goes_on:
            self._load(self.model, self.own.state_dict())

    def loss(self, batch: Batch) -> Tensor:
        """Task loss and pull."""
        pull = squared_distance(dict(self.model.named_parameters()), self.reference)
        return super().loss(batch) + self.lam / 2 * pull

    def replies(self, trained: Mapping[str, Tensors], shares: Sequence[float], rounds: int) -> dict[str, Tensors]:
        """For each site, the mean by likeness."""
        models = list(trained.values())
        found = likeness(models, self.share, self.sigma)
        return {site: weighted(models, row) for site, row in zip(trained, found, strict=True)}


def likeness(models: Sequence[Tensors], share: float, sigma: float | None) -> list[list[float]]:
    """Weights of all models at each; rows sum to one."""
    count = len(models)
    rows = [row_of(model) for model in models]
    apart = [[float((a - b).pow(2).sum()) for b in rows] for a in rows]
    others = max(count - 1, 1)
    scale = sigma if sigma is not None else sum(map(sum, apart)) / (count * others)
    found = []
    for i, distances in enumerate(apart):
        row = [share / others * exp(-d / scale) if scale else share / others for d in distances]
        row[i] = 1 - (sum(row) - row[i])
        found.append(row)
    return found
