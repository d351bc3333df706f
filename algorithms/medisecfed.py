"""MediSecFed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from pydantic import PositiveInt
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.distil import divergence
from fedseg.algorithms.parts import mark
from fedseg.algorithms.semi import finest
from fedseg.federation.contract import Batch, Cohort, MessageError, Site, Task
from fedseg.federation.ranges import FinitePositive, ProperShare
from fedseg.federation.state import State, Update
from fedseg.models.select import everything

ANSWERS = "answers"
"""The group of (N, R, ...) probabilities of the regions in N public images: a site's, or the consensus."""
PUBLIC, AGREED = "public", "agreed"
"""Numbers: the mark that tells public images from others, and whether sites have agreed on answers yet."""
OTHER_IMAGES = (
    "its public images (data.public) are not those of the server and of the consensus; take the same files, and the "
    "same versions of the libraries that read them, on all machines"
)
TAUGHT = "taught"
"""Of a batch of public images: the consensus about them."""


class MediSecFed(FedAvg):
    """MediSecFed (Kumar et al., 2022): sites exchange answers about public images, never models, and learn from them.

    After the abstract; what it leaves open is a choice of this suite. Of a round's local steps, the first lower
    T^2 KL(consensus^(1/T) || answers^(1/T)) on public images; the others are those of local training. Running
    statistics follow both. Then the site sends its probabilities of the regions in every public image
    (``data.public``), and the server makes a consensus of them as ``federation.combine`` says: with the preset the
    median of sites, pixel by pixel. Before the first consensus all steps are local ones. No tensor of a network
    travels: a site can say nothing but what it takes for true about known images, and networks may differ
    (``networks``). Left out: public images made by inverting models.

    Args:
        distil_share: share of a round's local steps that learn from the consensus; with 0 a site trains as locally.
        temperature: T: above 1 it softens both sides, so that doubts count more.
        public_batch: public images in such a step.
    """

    personal = staticmethod(everything)
    views = ("personal",)
    splits_itself = True
    exchanges_answers = True
    exact_groups = frozenset({ANSWERS})
    leaves_out_unknown = True
    adds_up = True
    slices_only = "its public images are slices"

    def __init__(
        self,
        *args: Any,
        distil_share: ProperShare = 0.25,
        temperature: FinitePositive = 1.0,
        public_batch: PositiveInt = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distil_share, self.temperature, self.public_batch = distil_share, temperature, public_batch

    @property
    def shares(self) -> bool:
        """Answers are averaged."""
        return True

    @property
    def public(self) -> Tensor:
        """(N, C, ...) the public images.

        Raises:
            ValueError: there are none.
        """
        if self.recipe.public is None:
            raise ValueError(
                "algorithm=medisecfed exchanges answers about public images, and there are none; take "
                "data.public=phantom, or a folder of images that all sites have"
            )
        return self.recipe.public

    @cached_property
    def _mark(self) -> float:
        return mark({"image": self.public})

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load the site's own model.

        Raises:
            MessageError: the public images here are not those that the consensus is about.
        """
        if PUBLIC in message.scalars and message.scalars[PUBLIC] != self._mark:
            raise MessageError(OTHER_IMAGES)
        super().receive(message, kept, site)

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """First public images with what was agreed about them, then the site's own."""
        agreed = self.received.get(ANSWERS)
        taught = int(self.distil_share * steps) if agreed else 0
        own = super().batches(site, seed, steps - taught)
        return Lesson(self.public, agreed[ANSWERS], taught, self.public_batch, seed, own) if taught else own

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A local step; what is learnt from public images is neither hidden from anybody nor a loss of patients."""
        if TAUGHT in batch:
            return self.descended(self._disagreement, batch)[0]
        return super().training_step(batch, batch_idx)

    def _disagreement(self, batch: Batch) -> Tensor:
        logits = finest(self.model(self.normalize(batch["image"])))
        return divergence(logits, batch[TAUGHT], self.recipe.activation, self.temperature)

    def send(self, site: Site) -> State:
        """What the trained network answers about the public images, and the mean loss."""
        answer = super().send(site)
        answer.tensors[ANSWERS] = {ANSWERS: self._asked(self.public)}
        return answer

    def _asked(self, images: Tensor) -> Tensor:
        parts = [self.answers(self.model, part.to(self.device)) for part in torch.split(images, self.public_batch)]
        return torch.cat(parts).cpu()

    # ---------------------------------------------------------------- server half

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """Nothing is agreed yet; the form that answers have."""
        server = super().init_server(introductions)
        one = self._asked(self.public[:1])
        server.tensors[ANSWERS] = {ANSWERS: torch.zeros(len(self.public), *one.shape[1:])}
        return State(server.tensors, {**server.scalars, PUBLIC: self._mark})

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """To train: the consensus, once there is one, and which images it is about."""
        message = super().broadcast(server, site, task)
        if task.kind == "train":
            message.scalars[PUBLIC] = server.scalars[PUBLIC]
            if AGREED in server.scalars:
                message.tensors[ANSWERS] = server[ANSWERS]
        return message

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """As FedAvg's updates.

        Raises:
            ValueError: answers are no probabilities: in a mean, one site could outvote all others with them.
        """
        for update in updates:
            if any(answers.min() < 0 or answers.max() > 1 for answers in update.get(ANSWERS).values()):
                raise ValueError("its answers are no probabilities")
        return super().weigh(server, updates)

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """The consensus; sums that were hidden may be rounded beyond what probabilities can be."""
        after = super().advance(server, mean, cohort)
        if ANSWERS not in mean.tensors:
            return after
        agreed = {name: answers.clamp(0, 1) for name, answers in mean[ANSWERS].items()}
        return State({**after.tensors, ANSWERS: agreed}, {**after.scalars, AGREED: 1.0})


@dataclass(frozen=True)
class Lesson:
    """Public images with the consensus about them, and after them a site's own batches.

    Attributes:
        images: (N, C, ...) all public images.
        taught: (N, R, ...) the consensus.
        steps: batches of public images; each is seen once before any comes again.
        size: of a batch, if there are so many.
        seed: of their order.
        own: the site's batches.
    """

    images: Tensor
    taught: Tensor
    steps: int
    size: int
    seed: int
    own: Iterable[Batch]

    def __len__(self) -> int:
        return self.steps + len(cast(Any, self.own))

    def __iter__(self) -> Iterator[Batch]:
        generator, order = torch.Generator().manual_seed(self.seed), torch.zeros(0, dtype=torch.int64)
        size = min(self.size, len(self.images))
        for _ in range(self.steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.images), generator=generator)])
            drawn, order = order[:size], order[size:]
            yield {"image": self.images[drawn], TAUGHT: self.taught[drawn]}
        yield from self.own
