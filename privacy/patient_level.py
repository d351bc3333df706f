"""Differential privacy of every patient, by private training at the site."""

from __future__ import annotations

from dataclasses import replace

from fedseg.federation.contract import ServerHalf, Transform
from fedseg.federation.state import State, Update
from fedseg.federation.transforms import EPSILON, SPENT
from fedseg.privacy.accounting import Account, gaussian_event
from fedseg.privacy.payload import public_scalars
from fedseg.privacy.refusals import refuse_single


class PatientLevel(Transform):
    """DP-SGD (Abadi et al., CCS 2016) whose unit is a patient, with all slices; every site keeps its own account.

    The private steps are the training's (`algorithms.functional.private`); here they are counted, and what else would
    tell of patients stays at the site: the training loss. A site weighs by its images as the method says.

    Args:
        noise: deviation of the noise over the largest gradient of a patient.
        account: of the local steps.
    """

    name = "patient"

    def __init__(self, noise: float, account: Account) -> None:
        self.noise = noise
        self.account, self.guarantee = account, account.guarantee

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse methods whose steps are not sums over patients, and what travels past them."""
        why = "privacy.mechanism=patient trains on patients' clipped gradients"
        refuse_single(algorithm, why)
        if reason := algorithm.mixes_patients:
            raise ValueError(f"{why}, but {type(algorithm).__name__} cannot: {reason}")

    def refusal(self, memory: State) -> str:
        """The patients' budget is spent."""
        return self.account.refusal(memory)

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Charge the steps of this turn; an update that would cost too much does not leave."""
        scalars = public_scalars(update)
        steps = int(scalars["steps"])
        if not steps:
            return replace(update, scalars=scalars), memory
        now = self.account.charged(memory, gaussian_event(self.noise, update.scalars["rate"]), steps)
        epsilon = now.scalars[EPSILON]
        if self.account.exceeded(epsilon):
            told = f"{steps} steps take epsilon to {epsilon:.3g}, above privacy.max_epsilon; raise privacy.noise"
            return replace(update, refusal=told), State(memory.tensors, {**memory.scalars, SPENT: 1.0})
        return replace(update, scalars=scalars), now
