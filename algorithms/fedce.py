"""FedCE."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.contribution import Version, cosines_to_others, shares
from fedseg.federation.contract import Average, Site, Task
from fedseg.federation.state import State, Update, filed

ALONE, SHARE = "error_without", "share"  # numbers that travel
AWAY = "away"  # away/<site>, a number at the server: it had no part in the last mean


class FedCE(FedAvg):
    """FedCE (Jiang et al., CVPR 2023): sites weigh by what they contribute, to the direction and to the score.

    A site contributes where its update points away from the others' (1 - cosine, mean over rounds), and where the model
    without it is bad at its own validation images (1 - Dice, mean over rounds; the model without it is
    (w - c w_last) / (1 - c), with its weight c and its last local model). Both parts are normalised over the sites, and
    added or multiplied. In a site's first round the Dice counts as 0, and stays in the mean, as in both programs. They
    have all sites in every round; here, where a site missed the last one, the model without it is the received one.

    Args:
        join: plus adds both parts, times multiplies them.
        version: of the program. 2023 compares an update with the plain mean of the others and raises small weights
            after normalising, so that the step may exceed the mean; nvflare compares it with the others as they weighed
            last, and weights sum to 1.
    """

    needed_numbers = frozenset({ALONE})
    dice_so_far: Tensor

    def __init__(
        self, *args: Any, join: Literal["plus", "times"] = "plus", version: Version = "nvflare", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.join = join
        self.version = version
        self.last = deepcopy(self.model).requires_grad_(False)
        self.register_buffer("dice_so_far", torch.zeros(2))  # sum over rounds, and how many

    def check_site(self, site: Site) -> None:
        """A site that learns needs validation images.

        Raises:
            ValueError: it has none.
        """
        if site.examples and next(iter(site.eval_batches("val")), None) is None:
            raise ValueError(
                f"site {site.name!r} has no validation images, on which algorithm=fedce scores the model without it; "
                "move some there with data.split, or take another method"
            )

    def on_train_end(self) -> None:
        """Score the received model without this site, where the network still computes."""
        super().on_train_end()
        if self.turn_site is None:
            return
        share = self.received.scalars.get(SHARE, 1.0)
        found = self.dice_without(self.turn_site, share) if self.trained_here and share < 1 else 0.0
        self.dice_so_far += torch.tensor([found, 1.0], device=self.dice_so_far.device)
        self._load(self.last, self.model.state_dict())

    def send(self, site: Site) -> State:
        """The differences, and how bad the model without this site is, mean over rounds."""
        answer = super().send(site)
        total, rounds = self.dice_so_far.tolist()
        answer.scalars[ALONE] = 1 - total / max(rounds, 1.0)
        return answer

    @torch.no_grad()
    def dice_without(self, site: Site, share: float) -> float:
        """Mean Dice, on a site's validation images, of the received model without the site's last one."""
        received = {**self.received.get("model"), **self.received.get("buffers")}
        last = self.last.state_dict()
        rest = {name: minus(tensor.to(self.device), last[name], share) for name, tensor in received.items()}
        for name in self.parts.variances & rest.keys():
            rest[name].clamp_(min=0.0)
        network = deepcopy(self.model).eval()
        self._load(network, rest)
        return self.mean_dice(network, site.eval_batches("val")) or 0.0

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model, and for training the site's weight in the last round, 0 if it missed that."""
        message = super().broadcast(server, site, task)
        share = server.scalars.get(f"{SHARE}/{site}")
        if task.kind != "train" or share is None:
            return message
        return State(message.tensors, {**message.scalars, SHARE: 0.0 if f"{AWAY}/{site}" in server.scalars else share})

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Weigh the updates by what they contribute, and remember their cosines and weights."""
        usable = [update for update in updates if update.examples]
        uniform = 1 / len(usable)
        past = [server.scalars.get(f"{SHARE}/{update.site}", uniform) for update in usable]
        others = past if self.version == "nvflare" else [uniform] * len(usable)
        cosines = cosines_to_others([update.get("model") for update in usable], others)
        told = {}
        for update, cosine in zip(usable, cosines, strict=True):
            for name, more in ((f"cosines/{update.site}", cosine), (f"rounds/{update.site}", 1.0)):
                told[name] = server.scalars.get(name, 0.0) + more
        away = [1 - told[f"cosines/{update.site}"] / told[f"rounds/{update.site}"] for update in usable]
        alone = [min(max(update.scalars[ALONE], 0.0), 1.0) for update in usable]
        found = dict(zip([u.site for u in usable], shares(away, alone, self.join, self.version), strict=True))
        told |= {f"{SHARE}/{site}": weight for site, weight in found.items()}
        missed = filed(server, SHARE).keys() - found.keys()
        past_scalars = {name: x for name, x in server.scalars.items() if not name.startswith(f"{AWAY}/")}
        told |= {f"{AWAY}/{site}": 1.0 for site in missed}
        weights = [found.get(update.site, 0.0) for update in updates]
        mean, cohort = average(weights)
        moved = {group: {k: t * sum(weights) for k, t in mean.get(group).items()} for group in ("model", "buffers")}
        moved = {group: tensors for group, tensors in moved.items() if tensors}
        state = State(server.tensors, {**past_scalars, **told})
        return super().advance(state, State({**mean.tensors, **moved}, mean.scalars), cohort)


def minus(whole: Tensor, part: Tensor, share: float) -> Tensor:
    """A weighted mean without the part that has this share of it."""
    return (whole - share * part) / (1 - share)
