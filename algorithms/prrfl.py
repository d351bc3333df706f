"""PRR-FL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.answers import SingleAnswers, weighted
from fedseg.algorithms.functional.deputy import Stage, divergence, next_stage, share_low_frequencies
from fedseg.federation.contract import PERSONAL_LOSS, Batch, Site
from fedseg.federation.ranges import Fixed, Share
from fedseg.federation.state import Tensors
from fedseg.models.select import normalisation


class PRRFL(SingleAnswers):
    """PRR-FL (Chen et al., MICCAI 2021): a site's own model stays; a deputy travels, and they teach each other.

    The server answers every site with a deputy of its own: weights of layers take the mean amplitude of all deputies at
    low frequencies and keep their own beyond, and their phases; all other tensors are averaged; normalisation stays.
    Whoever is ahead in Dice on the training images teaches: at first the own model alone (recover), then both
    (exchange), then the deputy alone (sublimate). Each site goes through these stages by itself, and anew in every
    round; with less than two epochs in a round it is always both. The paper's models classify and are scored by F1;
    its program averages uniformly (algorithm.weighting=uniform) over just four sites.

    Args:
        transfer: weight of the divergence from the teacher; 0 makes the own model a local one.
        recover: alpha 1 of the paper, a share of the own model's score: a deputy below it is taught alone.
        sublimate: alpha 2, not below the first: a deputy below it does not teach alone.
        window: share of the spectrum that is averaged at first.
        last_window: share at the end.
        window_rounds: rounds over which it grows, thereafter it stays; null takes the run's.

    Raises:
        ValueError: recover is above sublimate.
    """

    personal = staticmethod(normalisation)
    views = ("personal",)
    unseen_views = ()
    models_per_step = 2
    leaves_out_unknown = True
    one_answer = "its two models learn from each other's answers"

    def __init__(
        self,
        *args: Any,
        transfer: NonNegativeFloat = 1.0,
        recover: Fixed[Share] = 0.7,
        sublimate: Fixed[Share] = 0.9,
        window: Fixed[Share] = 0.7,
        last_window: Fixed[Share] = 0.95,
        window_rounds: Fixed[PositiveInt | None] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if recover > sublimate:
            raise ValueError(
                f"algorithm.recover={recover} is above algorithm.sublimate={sublimate}: the stage in which both teach "
                f"has no place; take algorithm.recover={sublimate} or less, or algorithm.sublimate={recover} or more"
            )
        self.transfer, self.thresholds = transfer, (recover, sublimate)
        self.window, self.last_window = window, last_window
        self.window_rounds = window_rounds or self.recipe.rounds
        if window_rounds is None and window != last_window:
            self.over_rounds = "algorithm.window grows over them, as no algorithm.window_rounds was said when it began"
        self.twin = deepcopy(self.model)
        self._stage = Stage.NEW
        self._epoch = 0  # steps of one; 0 where a round has less than two

    # ---------------------------------------------------------------- client half

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """Those of the local fit; how many make an epoch."""
        epoch = site.steps()
        self._epoch = epoch if steps >= 2 * epoch else 0
        self._stage = Stage.NEW if self._epoch else Stage.EXCHANGE
        return super().batches(site, seed, steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A step of both models; before an epoch, who teaches."""
        if self._epoch and batch_idx % self._epoch == 0:
            deputy, own = (self.training_dice(network) for network in (self.model, self.twin))
            self._stage = next_stage(self._stage, deputy, own, *self.thresholds)
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Batch) -> Tensor:
        """Task loss of both models, and the divergence of those that learn from the other one."""
        images = self.normalize(batch["image"])
        deputy, own = self.model(images), self.twin(images)
        activation = self.recipe.activation
        losses = [self.task_loss(logits, batch) for logits in (deputy, own)]
        self.note(losses[0])
        self.note(losses[1], PERSONAL_LOSS)
        if self.transfer and self._stage != Stage.SUBLIMATE:
            losses.append(self.transfer * divergence(deputy, own, activation))
        if self.transfer and self._stage != Stage.RECOVER:
            losses.append(self.transfer * divergence(own, deputy, activation))
        return torch.stack(losses).sum()

    def training_dice(self, network: nn.Module) -> float:
        """Mean Dice of a network on the site's training images."""
        return (self.mean_dice(network, self.turn_site.eval_batches("train")) or 0.0) if self.turn_site else 0.0

    def network(self, view: str) -> nn.Module:
        """The own model."""
        return self.twin

    # ---------------------------------------------------------------- server half

    def ratio(self, done: float) -> float:
        """The window's share of the spectrum, after so many rounds."""
        return self.window + min(done / self.window_rounds, 1.0) * (self.last_window - self.window)

    def replies(self, trained: Mapping[str, Tensors], shares: Sequence[float], rounds: int) -> dict[str, Tensors]:
        """A deputy for every site."""
        made: dict[str, Tensors] = {site: {} for site in trained}
        mean = weighted(list(trained.values()), shares)
        for name, averaged in mean.items():
            given = [averaged] * len(made)
            if averaged.ndim > 1:
                given = share_low_frequencies([one[name] for one in trained.values()], shares, self.ratio(rounds))
            for deputy, tensor in zip(made.values(), given, strict=True):
                deputy[name] = tensor
        return made
