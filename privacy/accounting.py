"""The account of what was released: one for all mechanisms, kept as plain numbers, computed by Opacus.

A ledger counts events by what they cost: ``gaussian/NOISE/RATE`` for a Gaussian mechanism whose deviation is NOISE
times its sensitivity, over a Poisson sample of that rate; ``chosen/NOISE/RATE/ORDER`` for one whose noise was chosen by
what was released before it; and ``pure/EPSILON`` for a mechanism with pure epsilon.

Where noise is chosen, the cost itself tells of the data, and the Renyi order at which it is least does, too. For an
order a that was fixed before, costs may be added up all the same (Feldman and Zrnic, NeurIPS 2021; Lecuyer,
arXiv:2103.01379): between neighbours exp((a - 1)(loss - sum)) never grows on average, so that by Ville's inequality the
loss of privacy is above

    sum of the events' divergences of order a + log(1 / delta) / (a - 1)

at any time with probability delta at most, whatever was chosen and whenever one looks. ORDER is a. In a ledger of
several runs the order that was fixed first holds for all events: a later one was fixed by people, and for a limit, that
have seen what earlier runs released, and the least of several bounds could fail more often than with delta.

Such an epsilon follows from what was released, and is no more than that: a bound that the loss stays below. That a run
is (epsilon, delta)-differentially private holds for an epsilon that was fixed before: its limit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from fedseg.federation.contract import Guarantee
from fedseg.federation.state import State
from fedseg.federation.transforms import EPSILON, SPENT

GAUSSIAN, CHOSEN, PURE = "gaussian", "chosen", "pure"
Ledger = Mapping[str, float]


@dataclass(frozen=True)
class Account:
    """How an account is kept.

    Attributes:
        guarantee: what it is about, and its limit.
        kind: Opacus's accountant.
    """

    guarantee: Guarantee
    kind: Literal["rdp", "prv"] = "rdp"

    def __post_init__(self) -> None:
        if find_spec("opacus") is None:
            raise ValueError('differential privacy needs Opacus for its account; pip install -e ".[privacy]"')

    def epsilon(self, ledger: Ledger) -> float:
        """What the ledger's events cost together; 0 for none."""
        gaussian, pure = _gaussian(ledger), _pure(ledger)
        if _gaussian(ledger, CHOSEN):
            every = [*gaussian, *_gaussian(ledger, CHOSEN)]
            return _whatever_was_chosen(every, pure, orders_of(ledger)[0], self.guarantee.delta)
        if not gaussian and not pure:
            return 0.0
        if not pure and self.kind != "rdp":  # of which `_together` has the same numbers, and keeps what a step costs
            return _opacus(gaussian, self.guarantee.delta, self.kind)
        together = _together(gaussian, pure, self.guarantee.delta)
        return together if gaussian else min(together, sum(epsilon * count for epsilon, count in pure))

    def charged(self, memory: State, event: str, count: float = 1) -> State:
        """A memory after that many more events; ``spent`` says that as much again would be above the limit."""
        return self.charged_all(memory, {event: count}, {event: count})

    def charged_all(self, memory: State, events: Ledger, coming: Ledger) -> State:
        """A memory after these events; ``spent`` says that with those that may come it would be above the limit."""
        ledger = joint(events_of(memory), events)
        state = State(memory.tensors, {**ledger, EPSILON: self.epsilon(ledger)})
        state.scalars[SPENT] = float(self.exceeded(self.epsilon(joint(ledger, coming))))
        return state

    def order(self, noises: Sequence[float], rate: float) -> float:
        """The order by which steps that choose one of these noises are charged: at which most of them fit the limit.

        It is meant for steps that choose each noise as often; it holds for all others.
        """
        from opacus.accountants import RDPAccountant

        orders = RDPAccountant.DEFAULT_ALPHAS
        step = _divergence([(noise, rate, 1) for noise in noises], [], orders)
        room = [(self.guarantee.limit or math.inf) - _rest(order, self.guarantee.delta) for order in orders]
        return float(max(zip(room, step, orders, strict=True), key=lambda one: one[0] / one[1])[2])

    def exceeded(self, epsilon: float) -> bool:
        """Whether that is more than may be spent."""
        return self.guarantee.limit is not None and epsilon > self.guarantee.limit

    def refusal(self, memory: State) -> str:
        """Why nothing more may be released; empty while it may."""
        return self.told(memory.scalars[EPSILON]) if memory.scalars.get(SPENT) else ""

    def told(self, epsilon: float) -> str:
        """The state of the budget in words."""
        g = self.guarantee
        return f"epsilon {epsilon:.3g} of {g.limit} at delta {g.delta:g} ({g.unit}) is spent: too little is left"


def events_of(memory: State) -> dict[str, float]:
    """The ledger in what a transform remembers."""
    kinds = tuple(f"{kind}/" for kind in (GAUSSIAN, CHOSEN, PURE))
    return {name: n for name, n in memory.scalars.items() if name.startswith(kinds)}


def orders_of(ledger: Ledger) -> list[float]:
    """The orders that were fixed for noise that is chosen; the first one first."""
    return list(dict.fromkeys(float(event.rpartition("/")[2]) for event in ledger if event.startswith(f"{CHOSEN}/")))


def joint(one: Ledger, other: Ledger) -> dict[str, float]:
    """The events of both."""
    return {**one, **{event: one.get(event, 0.0) + count for event, count in other.items()}}


def dearest(events: Ledger, noise: float) -> dict[str, float]:
    """What events would cost at most in which noise was chosen, by the least noise that may be chosen.

    Whether they are let through must not depend on what was chosen: it would tell of it, and stand in no account.
    """
    most: dict[str, float] = {}
    for event, count in events.items():
        kind, *numbers = event.split("/")
        least = chosen_event(noise, *map(float, numbers[1:])) if kind == CHOSEN else event
        most = joint(most, {least: count})
    return most


def gaussian_event(noise: float, rate: float) -> str:
    """A Gaussian mechanism over a Poisson sample."""
    return f"{GAUSSIAN}/{noise!r}/{rate!r}"


def chosen_event(noise: float, rate: float, order: float) -> str:
    """A Gaussian mechanism over a Poisson sample, whose noise was chosen by what was released before it."""
    return f"{CHOSEN}/{noise!r}/{rate!r}/{order!r}"


def pure_event(epsilon: float, rate: float = 1.0) -> str:
    """A mechanism with pure epsilon, over a Poisson sample of that rate.

    For one unit more or less it costs log(1 + rate (e^epsilon - 1)) (Balle, Barthe and Gaboardi, NeurIPS 2018).
    """
    return f"{PURE}/{epsilon if rate == 1.0 else math.log1p(rate * math.expm1(epsilon))!r}"


def _gaussian(ledger: Ledger, kind: str = GAUSSIAN) -> list[tuple[float, float, int]]:
    """Opacus's history: noise multiplier, sampling rate, steps."""
    parts = [(name.split("/"), count) for name, count in ledger.items() if name.startswith(f"{kind}/")]
    return [(float(noise), float(rate), int(count)) for (_, noise, rate, *_), count in parts]


def _pure(ledger: Ledger) -> list[tuple[float, float]]:
    return [(float(name.split("/")[1]), count) for name, count in ledger.items() if name.startswith(f"{PURE}/")]


def _opacus(history: list[tuple[float, float, int]], delta: float, kind: str) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(kind)
    accountant.history = history
    with _quiet():
        return float(accountant.get_epsilon(delta))


def _together(gaussian: list[tuple[float, float, int]], pure: list[tuple[float, float]], delta: float) -> float:
    """Either kind or both, none of them chosen by what the others released."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    with _quiet():
        epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=_divergence(gaussian, pure, orders), delta=delta)
    return float(epsilon)


def _whatever_was_chosen(
    gaussian: list[tuple[float, float, int]], pure: list[tuple[float, float]], order: float, delta: float
) -> float:
    """Both kinds, the noise chosen along the way: the module's docstring."""
    return float(_divergence(gaussian, pure, [order])[0]) + _rest(order, delta)


def _rest(order: float, delta: float) -> float:
    """By how much the loss of privacy may be above the divergence of that order, but for a probability of delta."""
    return math.log(1 / delta) / (order - 1)


def _divergence(gaussian: list[tuple[float, float, int]], pure: list[tuple[float, float]], orders: list[float]) -> Any:
    """Of each order: pure epsilon is (a, min(epsilon, a epsilon^2 / 2)) (Bun and Steinke, 2016)."""
    import numpy as np

    divergence: Any = sum(count * _pure_divergence(epsilon, orders) for epsilon, count in pure)
    for noise, rate, steps in gaussian:
        divergence = divergence + steps * np.array([_of_one_step(noise, rate, order) for order in orders])
    return divergence


@lru_cache(maxsize=10_000)
def _of_one_step(noise: float, rate: float, order: float) -> float:
    from opacus.accountants.analysis import rdp

    return float(rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[order])[0])  # often a series


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus tells that more orders could make the bound tighter; it is a bound all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def _pure_divergence(epsilon: float, orders: list[float]) -> Any:
    import numpy as np

    return np.minimum(epsilon, np.asarray(orders) * epsilon**2 / 2)
