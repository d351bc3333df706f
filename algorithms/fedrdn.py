"""FedRDN."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.styles import FLAT, Moments
from fedseg.algorithms.harmonised import check_alike, mean_style
from fedseg.federation.contract import Batch, Site, Task
from fedseg.federation.ranges import Share
from fedseg.federation.state import State, Tensors
from fedseg.models.normalize import Affine

STATISTICS = "statistics"
"""What a site tells once; ``statistics/<site>``: of all sites, at the server and in a message to one that trains;
``statistics``, in a message: what the receiver's images are normalised by."""


class FedRDN(FedAvg):
    """FedRDN (Yan et al., CVPR 2025): a training image is normalised by statistics of random sites.

    Before round 1 every site tells the mean and the standard deviation of each channel, means over its training images.
    In training both are drawn for every image, each from any site, the own one too; in scoring and use images are
    normalised by the site's own. Those of a site that told nothing, as one that took no part, by the mean over the
    sites. This takes the place of `training.normalize`. The authors' program, which was read and not compared, draws
    once for a batch, and its deviations divide by the pixels less one.

    Args:
        share: of the training images whose statistics are drawn, the others have the own ones; 0 is FedAvg on images
            normalised by site.
    """

    styles_images = True
    prepares = "images are normalised by the mean and deviation of the site's images, or of all sites'"
    prepares_by_site = True
    leaves_out_unknown = True
    adds_up = True

    def __init__(self, *args: Any, share: Share = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (kind := self.recipe.training.normalize) != "none":
            raise ValueError(
                f"training.normalize={kind} would normalise images once more, which FedRDN normalises by statistics of "
                "sites; take training.normalize=none"
            )
        self.share = share
        self._own: Sequence[nn.Module] = ()  # in a tuple: it is no part of the method's state
        self._theirs: Tensors = {}  # of all sites, a row for each

    # ---------------------------------------------------------------- client half

    def introduce(self, site: Site) -> State:
        """Mean and deviation of every channel."""
        told = Moments().told(batch["image"].flatten(2).unsqueeze(-1) for batch in site.plain_batches())
        return State({STATISTICS: {name: numbers.flatten() for name, numbers in told.items()}} if told else {})

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; images are normalised by the site's statistics."""
        super().receive(message, kept, site)
        own = message.get(STATISTICS)
        self._own = (Affine(tuple(own["mean"].tolist()), tuple(_safe(own["std"]).tolist())),) if own else ()
        theirs = [message[group] for group in sorted(message.tensors) if group.startswith(f"{STATISTICS}/")]
        self._theirs = {name: torch.stack([told[name] for told in theirs]) for name in (own if theirs else ())}

    def answers_with(self) -> State:
        """The statistics that images are normalised by."""
        needed = super().answers_with()
        own = {STATISTICS: self.received[STATISTICS]} if self._own else {}
        return State({**needed.tensors, **own}, needed.scalars)

    @property
    def preparation(self) -> nn.Module:
        """Normalise by the site's statistics."""
        return self._own[0] if self._own else super().preparation

    def loss(self, batch: Batch) -> Tensor:
        """Task loss of images normalised by drawn statistics."""
        images = batch["image"]
        drawn = self.in_layout(self.redrawn(images)) if self.share and self._theirs else self.normalize(images)
        return self.task_loss(self.model(drawn), batch)

    def redrawn(self, images: Tensor) -> Tensor:
        """Normalise each image by a mean and a deviation drawn independently.

        Args:
            images: (B, C, ...) in [0, 1].
        """
        own = torch.rand(len(images), 1) >= self.share
        picked = []
        for name in ("mean", "std"):
            theirs = self._theirs[name]
            numbers = theirs[torch.randint(len(theirs), (len(images),))]
            numbers = torch.where(own, self.received[STATISTICS][name], numbers)
            picked.append(numbers.view(*numbers.shape, *[1] * (images.ndim - 2)).to(images))
        mean, std = picked
        return (images - mean) / _safe(std)

    # ---------------------------------------------------------------- server half

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """FedAvg's state, and what every site told.

        Raises:
            ValueError: sites differ in their number of channels.
        """
        return _with_statistics(super().init_server(introductions), introductions)

    @property
    def founders_only(self) -> str:
        """Newcomers' statistics join the others."""
        return super().founders_only

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """From now on images are normalised by the statistics of the sites that are there.

        Raises:
            ValueError: sites differ in their number of channels.
        """
        return _with_statistics(super().regrouped(server, arrived, left), arrived)

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model and the site's statistics; for training those of all."""
        message = super().broadcast(server, site, task)
        told = {g: ts for g, ts in server.tensors.items() if g.startswith(f"{STATISTICS}/")}
        if not told:
            return message
        own = told.get(f"{STATISTICS}/{site}") or mean_style(told)
        return State({**message.tensors, STATISTICS: own, **(told if task.kind == "train" else {})}, message.scalars)


def _with_statistics(server: State, told: Mapping[str, State]) -> State:
    """A server's state, and what sites told."""
    groups = {f"{STATISTICS}/{site}": given[STATISTICS] for site, given in told.items() if STATISTICS in given.tensors}
    before = {group: ts for group, ts in server.tensors.items() if group.startswith(f"{STATISTICS}/")}
    if together := {group.partition("/")[2]: ts for group, ts in {**before, **groups}.items()}:
        check_alike(together)
    return State({**server.tensors, **groups}, server.scalars)


def _safe(std: Tensor) -> Tensor:
    """Deviations to divide by: a channel without any must not become amplified noise."""
    return std.clamp_min(FLAT)
