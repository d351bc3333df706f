"""Differential privacy of a site as a whole, at a trusted server."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedseg.federation.contract import Cohort, ServerHalf, Transform
from fedseg.federation.state import State, Update
from fedseg.privacy.accounting import Account, gaussian_event
from fedseg.privacy.payload import clipped, generator, public_scalars
from fedseg.privacy.refusals import refuse_inexact, refuse_single
from fedseg.privacy.settings import Randomness


class SiteLevel(Transform):
    """DP-FedAvg (McMahan et al., ICLR 2018): updates are clipped as wholes, and their mean gets Gaussian noise.

    The norm runs over every group that travels, running statistics included, and the server clips again what arrives.
    Sites weigh the same, and a sum is divided by the number of sites that a round is to have, whoever is there; one
    site therefore moves the mean by clip / expected at most. The training loss stays at the site.

    Args:
        clip: largest norm of an update.
        noise: deviation of the noise over clip.
        account: of the releases.
        rate: probability that a site takes part: below 1 only where sites are drawn independently and in secret.
        randomness: of the noise, and of the sites that are drawn.
    """

    name = "site"

    def __init__(self, clip: float, noise: float, account: Account, rate: float, randomness: Randomness) -> None:
        self.clip, self.noise = clip, noise
        self.account, self.guarantee = account, account.guarantee
        self.event = gaussian_event(noise, rate)
        self.randomness, self.secret_rounds = randomness, randomness == "secret"

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse what travels past the noise, and a budget that does not suffice for one round."""
        why = "privacy.mechanism=site adds noise to a mean"
        refuse_single(algorithm, why)
        refuse_inexact(algorithm, why)
        first = self.account.epsilon({self.event: 1})
        if self.account.exceeded(first):
            raise ValueError(
                f"one round costs epsilon {first:.3g}, more than privacy.max_epsilon={self.account.guarantee.limit}; "
                f"raise privacy.noise={self.noise}"
            )

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Clip the payload; keep back the loss and the number of images."""
        return replace(clipped(update, self.clip), examples=1, scalars=public_scalars(update)), memory

    def on_arrival(self, update: Update) -> Update:
        """Clip at the server, too: the bound must not hang on every site's good will."""
        return replace(clipped(update, self.clip), examples=1)

    def on_server(self, mean: State, cohort: Cohort, memory: State, seed: int) -> tuple[State, State]:
        """Divide by the expected number of sites, and add the noise."""
        share = cohort.usable / cohort.expected
        deviation = self.noise * self.clip / cohort.expected
        draws = generator(seed, self.randomness)
        noised = {
            group: {
                n: t * share + torch.randn(t.shape, generator=draws) * deviation for n, t in sorted(tensors.items())
            }
            for group, tensors in sorted(mean.tensors.items())
        }
        return State(noised), self.account.charged(memory, self.event)
