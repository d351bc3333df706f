"""Differential privacy of every patient, by private training at the site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedseg.federation.contract import NOISE, ServerHalf, Transform
from fedseg.federation.state import State, Update
from fedseg.federation.transforms import EPSILON, SPENT
from fedseg.privacy.accounting import (
    Account,
    Ledger,
    chosen_event,
    events_of,
    gaussian_event,
    joint,
    orders_of,
    pure_event,
)
from fedseg.privacy.payload import public_scalars
from fedseg.privacy.refusals import refuse_single


class PatientLevel(Transform):
    """DP-SGD (Abadi et al., CCS 2016) whose unit is a patient, with all slices; every site keeps its own account.

    The private steps are the training's (`algorithms.functional.private`); here they are counted, and what else would
    tell of patients stays at the site: the training loss. A site weighs by its images as the method says.

    Where every step chooses one of several noises, the choice is charged, and the step by the noise that it chose. A
    turn begins, and its update leaves, only if it would do so with the least noise in every step: that does not tell
    what was chosen.

    Args:
        noises: deviation of the noise over the largest gradient of a patient; several of which each step chose one.
        account: of the local steps.
        epsilon_choice: epsilon of one choice, for a patient whose loss is read.
    """

    name = "patient"
    hides_time = True  # it grows with the slices of the patients drawn, who are drawn in secret

    def __init__(self, noises: Sequence[float], account: Account, epsilon_choice: float = 0.0) -> None:
        self.noises, self.epsilon_choice = noises, epsilon_choice
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
        if sum(n for name, n in update.scalars.items() if name.startswith(NOISE)) > steps:
            told = "its optimiser takes more than one private gradient a step, and one is charged; take"
            return replace(update, refusal=f"{told} training.optimizer=sgd, adam or adamw"), memory
        ledger = events_of(memory)
        most, cost = self._costs(ledger, update, steps)
        epsilon = self.account.epsilon(joint(ledger, most))
        if self.account.exceeded(epsilon):
            setting = "privacy.noise" if len(self.noises) == 1 else "privacy.noises"
            told = f"{steps} steps take epsilon to {epsilon:.3g}, above privacy.max_epsilon; raise {setting}"
            return replace(update, refusal=told), State(memory.tensors, {EPSILON: 0.0, **memory.scalars, SPENT: 1.0})
        return replace(update, scalars=scalars), self.account.charged_all(memory, cost, most)

    def _costs(self, ledger: Ledger, update: Update, steps: int) -> tuple[Ledger, Ledger]:
        """What the turn's steps could have cost at most, and what they cost; the order is that of the first turn."""
        rate = update.scalars["rate"]
        if len(self.noises) == 1:
            event = {gaussian_event(self.noises[0], rate): float(steps)}
            return event, event
        order = next(iter(orders_of(ledger)), None) or self.account.order(self.noises, rate)
        chosen = {float(name.removeprefix(NOISE)): n for name, n in update.scalars.items() if name.startswith(NOISE)}
        choices = {pure_event(self.epsilon_choice, rate): float(steps)}
        most = joint(choices, {chosen_event(min(self.noises), rate, order): float(steps)})
        return most, joint(choices, {chosen_event(noise, rate, order): n for noise, n in chosen.items()})
