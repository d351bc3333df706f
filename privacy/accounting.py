"""The account of what was released: one for all mechanisms, kept as plain numbers, computed by Opacus.

A ledger counts events by what they cost: ``gaussian/NOISE/RATE`` for a Gaussian mechanism whose deviation is NOISE
times its sensitivity, over a Poisson sample of that rate, and ``pure/EPSILON`` for a mechanism with pure epsilon.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from fedseg.federation.contract import Guarantee
from fedseg.federation.state import State
from fedseg.federation.transforms import EPSILON, SPENT

GAUSSIAN, PURE = "gaussian", "pure"
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
        if not pure:
            return _opacus(gaussian, self.guarantee.delta, self.kind) if gaussian else 0.0
        joint = _joint(gaussian, pure, self.guarantee.delta)
        return joint if gaussian else min(joint, sum(epsilon * count for epsilon, count in pure))

    def charged(self, memory: State, event: str, count: float = 1) -> State:
        """A memory after that many more events; ``spent`` says that as much again would be above the limit."""
        ledger = events_of(memory)
        ledger[event] = ledger.get(event, 0.0) + count
        again = {**ledger, event: ledger[event] + count}
        state = State(memory.tensors, {**ledger, EPSILON: self.epsilon(ledger)})
        state.scalars[SPENT] = float(self.exceeded(self.epsilon(again)))
        return state

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
    return {name: n for name, n in memory.scalars.items() if name.startswith((f"{GAUSSIAN}/", f"{PURE}/"))}


def gaussian_event(noise: float, rate: float) -> str:
    """A Gaussian mechanism over a Poisson sample."""
    return f"{GAUSSIAN}/{noise!r}/{rate!r}"


def pure_event(epsilon: float) -> str:
    """A mechanism with pure epsilon."""
    return f"{PURE}/{epsilon!r}"


def _gaussian(ledger: Ledger) -> list[tuple[float, float, int]]:
    """Opacus's history: noise multiplier, sampling rate, steps."""
    parts = [(name.split("/"), count) for name, count in ledger.items() if name.startswith(f"{GAUSSIAN}/")]
    return [(float(noise), float(rate), int(count)) for (_, noise, rate), count in parts]


def _pure(ledger: Ledger) -> list[tuple[float, float]]:
    return [(float(name.split("/")[1]), count) for name, count in ledger.items() if name.startswith(f"{PURE}/")]


def _opacus(history: list[tuple[float, float, int]], delta: float, kind: str) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(kind)
    accountant.history = history
    with _quiet():
        return float(accountant.get_epsilon(delta))


def _joint(gaussian: list[tuple[float, float, int]], pure: list[tuple[float, float]], delta: float) -> float:
    """Both kinds in Renyi terms: pure epsilon is (a, min(epsilon, a epsilon^2 / 2)) (Bun and Steinke, 2016)."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    divergence: Any = sum(count * _pure_divergence(epsilon, orders) for epsilon, count in pure)
    for noise, rate, steps in gaussian:
        divergence = divergence + rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    with _quiet():
        epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=divergence, delta=delta)
    return float(epsilon)


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus tells that more orders could make the bound tighter; it is a bound all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def _pure_divergence(epsilon: float, orders: list[float]) -> Any:
    import numpy as np

    return np.minimum(epsilon, np.asarray(orders) * epsilon**2 / 2)
