"""IOP-FL outside the federation: build the mixture of published models, and adapt it to images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Literal

import torch
from torch import Tensor, nn

from fedseg.algorithms.functional.adaptation import (
    Objective,
    Terms,
    Views,
    adaptation_terms,
    fit_statistics,
    set_router_dropout,
    use_batch_statistics,
)
from fedseg.algorithms.functional.routing import Squash, adaptable, route
from fedseg.models.select import normalisation


@dataclass(frozen=True)
class Mixing:
    """How models are mixed.

    Attributes:
        expansion: width of a router's hidden layer over the channels of its layer, > 0.
        dropout: on a router's hidden layer, in [0, 1).
        squash: softmax or logistic mixture.
        statistics: of batch normalisation: the site's own, fitted once to its images; running ones of the global model;
            or those of the batch.
        linear: route linear layers too.
    """

    expansion: float
    dropout: float
    squash: Squash
    statistics: Literal["site", "running", "batch"]
    linear: bool

    def build(
        self, model: nn.Module, personal: Sequence[Mapping[str, Tensor]], batches: Iterable[Tensor] = ()
    ) -> nn.Module:
        """A routed copy of the global ``model`` and K personal states, in evaluation mode; routers start at random.

        Args:
            model: the global one; it stays as it is.
            personal: states of the others.
            batches: the site's images as the network takes them, for its statistics; without any, the global model's
                stay.
        """
        routed = route(
            model,
            personal,
            model.state_dict(),
            expansion=self.expansion,
            dropout=self.dropout,
            squash=self.squash,
            linear=self.linear,
        )
        if self.statistics == "batch":
            use_batch_statistics(routed)
        routed.eval()
        if self.statistics == "site":
            fit_statistics(routed, batches)
        return routed


@dataclass(frozen=True)
class Adaptation:
    """How a mixture learns from images alone.

    Attributes:
        objective: what is minimised.
        passes: over the images, >= 0.
        lr: of Adam, > 0.
        noise: deviation of the view's noise on normalised images, >= 0.
        fresh_pass: see `adaptation_terms`.
        same_draws: the same noise, views and dropout in every step.
        steps: at most so many steps, > 0; None for all of the passes.
    """

    objective: Objective
    passes: int
    lr: float
    noise: float
    fresh_pass: bool
    same_draws: bool
    steps: int | None

    @torch.enable_grad()
    def run(self, routed: nn.Module, batches: Iterable[Tensor], normalize: Callable[[Tensor], Tensor]) -> list[Terms]:
        """Fit routers, and scale and shift of normalisation layers, in place; a function of torch's global seed.

        The model is in evaluation mode but for the routers' dropout: running statistics never move.

        Args:
            routed: what `Mixing.build` returned.
            batches: images (B, C, H, W) in [0, 1]; read anew in every pass.
            normalize: images in [0, 1] -> what the network takes.

        Returns:
            The terms of every step, without gradients.
        """
        seed = torch.initial_seed()
        optimizer = torch.optim.Adam(adaptable(routed, normalisation(routed)), lr=self.lr)
        set_router_dropout(routed, True)
        history = []
        for batch in islice(chain.from_iterable(repeat(batches, self.passes)), self.steps):
            if self.same_draws:
                torch.manual_seed(seed)
            terms = self._terms(routed, normalize(batch))
            optimizer.zero_grad()
            torch.autograd.backward(terms.total)
            optimizer.step()
            history.append(Terms(terms.entropy.detach(), terms.consistency.detach(), terms.smoothness.detach()))
        set_router_dropout(routed, False)
        return history

    def _terms(self, routed: nn.Module, images: Tensor) -> Terms:
        noise = self.noise * torch.randn(images.shape).to(images)  # drawn on the CPU: the same on every device
        views = Views.draw(images, torch.default_generator)
        return adaptation_terms(routed, images, noise, views, self.objective, fresh_pass=self.fresh_pass)


class Dropping(nn.Module):
    """A mixture whose routers drop out while it predicts, as in the release; every batch meets the same draw.

    Args:
        routed: what was adapted.
        seed: of the draw.
    """

    def __init__(self, routed: nn.Module, seed: int) -> None:
        super().__init__()
        self.routed = routed
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits."""
        set_router_dropout(self.routed, True)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(self.seed)
            logits: Tensor = self.routed(images)
        return logits
