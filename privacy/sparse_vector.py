"""Selective sharing by the sparse vector technique."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from fedseg.federation.contract import ServerHalf, Transform
from fedseg.federation.state import State, Tensors, Update
from fedseg.privacy.accounting import Account, pure_event
from fedseg.privacy.payload import dense, flat, generator, public_scalars, sparse
from fedseg.privacy.refusals import refuse_inexact, refuse_single
from fedseg.privacy.settings import Randomness


class SparseVector(Transform):
    """Sparse-vector sharing (Li et al., MLMI 2019): a site shares a few coordinates, chosen and noised at the site.

    The update is divided by its local steps and clipped to [-g, g]. Coordinates are asked in random order whether their
    size, with noise, is above a noisy threshold; the first c that are get another noise and travel, all others are 0.
    The unit is the site's whole update, so that one change may move every coordinate. A round costs e = e1 + e2 + e3:

        threshold  Lap(g / e1)        sizes  Lap(2 c g / e2)        values  Lap(2 c g / e3)

    with e3 = e / 2 and e1 : e2 = 1 : (2c)^(2/3), which is best (Lyu, Su, Li, VLDB 2017, algorithm 1; sizes have
    sensitivity g, values 2 g). What is published differs: its epsilon is e1 only, e2 is e1 (2c)^(2/3), and the noise of
    a value is 2 g / e3 however many there are, so that a round costs e1 + e2 + c e3; it asks again until c are found
    and keeps a random part of them, more positive answers than e2 pays for; and its older release adds the noise
    before it clips, and lets coordinates that were chosen but not drawn leave as they are.

    Args:
        clip: g, largest coordinate of an update per local step.
        threshold: asked of a coordinate's size, as a share of clip.
        share: c over the number of coordinates.
        epsilon_round: e.
        account: of the releases.
        randomness: of the noise.
    """

    name = "sparse"

    def __init__(
        self,
        clip: float,
        share: float,
        epsilon_round: float,
        account: Account,
        randomness: Randomness,
        threshold: float = 0.1,
    ) -> None:
        self.clip, self.share, self.threshold = clip, share, threshold
        self.epsilon_round = epsilon_round
        self.account, self.guarantee = account, account.guarantee
        self.randomness = randomness

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse what travels past the noise, and a budget that does not suffice for one round."""
        why = "privacy.mechanism=sparse protects differences that are averaged"
        refuse_single(algorithm, why)
        refuse_inexact(algorithm, why)
        if self.account.exceeded(self.epsilon_round):
            raise ValueError(
                f"privacy.epsilon_round={self.epsilon_round} is more than "
                f"privacy.max_epsilon={self.account.guarantee.limit}"
            )

    def refusal(self, memory: State) -> str:
        """The site's budget is spent."""
        return self.account.refusal(memory)

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Choose, add noise, and send nothing else: neither loss nor number of images."""
        scale = max(update.scalars["steps"], 1.0)
        rows = {group: flat(update[group]) for group in sorted(update.tensors)}
        whole = torch.cat(list(rows.values())).double() / scale
        places, values = self.choose(whole, generator(seed, self.randomness))
        shared = torch.zeros_like(whole).index_put((places,), values).mul(scale).float()
        chosen = torch.zeros(len(whole), dtype=torch.bool).index_fill(0, places, True)
        sizes = [len(row) for row in rows.values()]
        sent: dict[str, Tensors] = {}
        for group, row, there in zip(rows, torch.split(shared, sizes), torch.split(chosen, sizes), strict=True):
            sent |= sparse(group, update[group], row, there.nonzero().flatten())
        now = self.account.charged(memory, pure_event(self.epsilon_round))
        return replace(update, tensors=sent, examples=1, scalars=public_scalars(update)), now

    def on_arrival(self, update: Update) -> Update:
        """Zeros where nothing was shared."""
        return replace(dense(update), examples=1)

    def choose(self, row: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Places of at most c coordinates, and their noised values in [-clip, clip].

        Args:
            row: (N,) coordinates of an update per step, float64.
            draws: random numbers.
        """
        clipped = row.clamp(-self.clip, self.clip).nan_to_num(0.0)
        most = max(1, ceil(self.share * len(row)))
        first, second, third = self.split(most)
        threshold = self.threshold * self.clip + laplace(1, self.clip / first, draws)
        order = torch.randperm(len(row), generator=draws)
        sizes = clipped[order].abs() + laplace(len(row), 2 * most * self.clip / second, draws)
        places = order[(sizes >= threshold).nonzero().flatten()[:most]]
        values = clipped[places] + laplace(len(places), 2 * most * self.clip / third, draws)
        return places, values.clamp(-self.clip, self.clip)

    def split(self, most: int) -> tuple[float, float, float]:
        """e1, e2, e3."""
        ratio = (2 * most) ** (2 / 3)
        first = self.epsilon_round / 2 / (1 + ratio)
        return first, first * ratio, self.epsilon_round / 2


def laplace(count: int, scale: float, draws: torch.Generator) -> Tensor:
    """(count,) draws of Lap(0, scale), float64: the difference of two exponential ones."""
    pair = torch.empty(2, count, dtype=torch.float64).exponential_(generator=draws)
    return scale * (pair[0] - pair[1])
