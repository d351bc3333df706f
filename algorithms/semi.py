"""What methods share that learn from images with and without labels in one step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.consistency import ramp_up, with_noise
from fedseg.common.seeds import derive_seed
from fedseg.federation.contract import Batch, Site
from fedseg.federation.ranges import Fixed, Share

VIEWS = "views"
"""Of a batch: (B, 2, C, ...) views of images without labels, the teacher's and the student's."""
TEACHER, STUDENT = range(2)


class SemiSupervised(FedAvg):
    """Task loss of a labelled batch + consistency times a disagreement with a teacher about a batch without labels.

    Both views of an image have one geometry, so that pixels correspond, and differ by what data.augment does to
    appearance, and by noise. All training images are drawn without labels, those that have one, too. A site without
    any label learns from the disagreement alone. Without consistency the method is FedAvg, bit for bit: the labelled
    batches are FedAvg's in any case. The labelled and the other batch pass the network one after the other, so that
    each is normalised by its own statistics; running statistics follow both.

    Args:
        consistency: weight of the disagreement once it has risen; 0 is FedAvg, and sites without labels do not train.
        ramp: rounds in which it rises, as exp(-5 (1 - round / ramp)^2); with 0 it is whole from the first.
        noise: deviation of Gaussian noise on views, whose values are in [0, 1].
        unlabelled_weight: what a training image without a label counts in the mean over sites, where a labelled one
            counts 1; with 0 a site without any label does not train.
    """

    learns_unlabelled = True
    leaves_out_unknown = True
    adds_up = True
    teacher_sees_noise = False
    """Whether the teacher's views are noised, too."""

    def __init__(
        self,
        *args: Any,
        consistency: NonNegativeFloat = 1.0,
        ramp: Fixed[NonNegativeFloat] = 5.0,
        noise: NonNegativeFloat = 0.05,
        unlabelled_weight: Fixed[Share] = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.consistency, self.ramp, self.noise = consistency, ramp, noise
        self.unlabelled_weight = unlabelled_weight
        self.learns_unlabelled = consistency > 0

    @abstractmethod
    def teacher_now(self) -> nn.Module:
        """Who teaches in the step at hand; its mode is seen to."""

    @abstractmethod
    def disagreement(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """How far what `says` returned of the model is from what it returned of the teacher: a mean over images."""

    def says(self, network: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
        """What of a network is compared: its logits, the finest if there are several."""
        return (finest(network(inputs)),)

    @property
    def weight(self) -> float:
        """Of the disagreement in this round; outside of rounds it is whole."""
        return self.consistency * (ramp_up(self.round / self.ramp) if self.round and self.ramp else 1.0)

    def examples_at(self, site: Site) -> int:
        """Labelled training images, and the others by their weight."""
        labelled = super().examples_at(site)
        others = site.training_images - labelled if self.learns_unlabelled else 0
        return labelled + math.ceil(self.unlabelled_weight * others - 1e-9)

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """FedAvg's batches, where there are labels, and beside each of them views of images without labels."""
        if not self.learns_unlabelled:
            return super().batches(site, seed, steps)
        apart = derive_seed(seed, "unlabelled")
        images = site.unlabelled_batches(apart, steps, views=2)
        labelled = super().batches(site, seed, steps) if site.examples else None
        noised = (TEACHER, STUDENT) if self.teacher_sees_noise else (STUDENT,)
        return Pairs(labelled, images, apart, self.noise, noised)

    def loss(self, batch: Batch) -> Tensor:
        """Task loss where there are masks, and disagreement where there are views; a stock Trainer gives none."""
        if VIEWS not in batch:
            return super().loss(batch)
        views = batch[VIEWS].unbind(dim=1)
        teacher = self.teacher_now()
        training = teacher.training
        teacher.eval()
        with torch.no_grad():
            told = self.says(teacher, self.normalize(views[TEACHER]))
        teacher.train(training)
        loss = self.weight * self.disagreement(self.says(self.model, self.normalize(views[STUDENT])), told)
        return super().loss(batch) + loss if "mask" in batch else loss


@dataclass(frozen=True)
class Pairs:
    """A labelled batch and views of images without labels, step by step.

    Attributes:
        labelled: None at a site without labels: a batch then holds views alone, and what the student sees as `image`.
        unlabelled: of as many batches, (B, 2, C, ...) each.
        seed: of the noise.
        deviation: of the noise.
        noised: which of the views.
    """

    labelled: Iterable[Batch] | None
    unlabelled: Iterable[Batch]
    seed: int
    deviation: float
    noised: tuple[int, ...]

    def __len__(self) -> int:
        return len(cast(Sized, self.unlabelled))

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.labelled is None:
            for batch in self.unlabelled:
                views = self._noised(batch["image"], generator)
                yield {**batch, "image": views[:, STUDENT], VIEWS: views}
            return
        for batch, other in zip(self.labelled, self.unlabelled, strict=True):
            yield {**batch, VIEWS: self._noised(other["image"], generator)}

    def _noised(self, views: Tensor, generator: torch.Generator) -> Tensor:
        seen = list(views.unbind(dim=1))
        for place in self.noised:
            seen[place] = with_noise(seen[place], self.deviation, generator)
        return torch.stack(seen, dim=1)


def finest(answer: Any) -> Tensor:
    """Logits; of several, from fine to coarse, the first."""
    logits: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return logits
