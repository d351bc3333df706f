"""The knobs of privacy and of compression; both are off by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedseg.federation.ranges import FinitePositive, PositiveShare, ReadBy, check_ranges, check_read, without_reader

Randomness = Literal["seeded", "secret"]
READ_BY: ReadBy = {
    "clip": ("mechanism", ("site", "patient", "sparse")),
    "noise": ("mechanism", ("site", "patient")),
    "epsilon_round": ("mechanism", ("sparse",)),
    "share": ("mechanism", ("sparse",)),
    "threshold": ("mechanism", ("sparse",)),
    "patients_per_step": ("mechanism", ("patient",)),
    "pass_steps": ("mechanism", ("patient",)),
    "noises": ("mechanism", ("patient",)),
    "epsilon_choice": ("mechanism", ("patient",)),
    "loss_bound": ("mechanism", ("patient",)),
    "delta": ("mechanism", ("site", "patient", "sparse")),
    "max_epsilon": ("mechanism", ("site", "patient", "sparse")),
    "accountant": ("mechanism", ("site", "patient")),
    "randomness": ("mechanism", ("site", "patient", "sparse")),
}
"""Which mechanisms read a setting."""
PROMISES = ("delta", "max_epsilon", "randomness")
"""Settings that promise something, and are refused where nothing keeps it; others that are not read are said."""


@dataclass(frozen=True)
class Privacy:
    """What is promised of what leaves a site; see docs/privacy.md.

    Attributes:
        mechanism: none; site clips whole updates and adds noise to their mean, at a trusted server; patient trains with
            DP-SGD at every site, a patient being the unit; sparse shares a few coordinates, chosen and noised at the
            site by the sparse vector technique.
        clip: largest L2 norm of a whole update (site), of a patient's gradient or of the sum of gradients along its
            pass (patient), or of a coordinate of the update per step (sparse).
        noise: deviation of the Gaussian noise over clip (site, patient).
        epsilon_round: epsilon that a site spends on one update (sparse); half of it chooses, half releases values.
        share: largest share of the coordinates that a site shares in a round (sparse).
        threshold: that a coordinate's size is asked to pass, as a share of clip (sparse).
        patients_per_step: patients in a local step, on average (patient).
        pass_steps: steps that a patient's own pass takes from the site's model, over its slices, before its part in a
            local step is clipped (patient; P3SGD); 1 takes its gradient.
        noises: of which every local step takes one, chosen privately by the loss of patients drawn for that (patient;
            P3SGD), such as [1, 2]; none takes noise.
        epsilon_choice: epsilon of one such choice, for a patient who was drawn.
        loss_bound: patients' losses above it count as it in the choice.
        delta: probability with which the bound may fail; take less than one over the number of units.
        max_epsilon: the run ends before more than this is spent; null for no limit.
        accountant: of Opacus: rdp, or prv, which is tighter (not for sparse).
        randomness: seeded repeats the noise of a run, for simulation only, since whoever knows the seed can subtract
            it; secret draws from the system, with site also who takes part (federation.sampling=poisson), and is what a
            deployment needs.
        aggregation: plain; masked: the server sees the sum of a round's updates only, by masks that cancel (secure
            aggregation); or encrypted: it adds up CKKS ciphertexts that it cannot read (simulation only).
    """

    mechanism: Literal["none", "site", "patient", "sparse"] = "none"
    clip: PositiveFloat = 1.0
    noise: PositiveFloat = 1.0
    epsilon_round: PositiveFloat = 1.0
    share: PositiveShare = 0.1
    threshold: NonNegativeFloat = 0.1
    patients_per_step: PositiveFloat = 4.0
    pass_steps: PositiveInt = 1
    noises: tuple[float, ...] = ()
    epsilon_choice: Annotated[float, Field(gt=0, le=100)] = 0.1
    loss_bound: FinitePositive = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_epsilon: PositiveFloat | None = None
    accountant: Literal["rdp", "prv"] = "rdp"
    randomness: Randomness = "seeded"
    aggregation: Literal["plain", "masked", "encrypted"] = "plain"

    def __post_init__(self) -> None:
        check_ranges(Privacy, vars(self), "privacy")
        if self.mechanism == "sparse" and self.accountant == "prv":
            raise ValueError("privacy.accountant=prv composes Gaussian noise only; privacy.mechanism=sparse needs rdp")
        check_read(self, "privacy", {name: READ_BY[name] for name in PROMISES}, leave_first=True)
        self._check_choice()

    def without_effect(self) -> list[str]:
        """Strengths that the mechanism does not read: mechanisms are compared with each other and with none."""
        strengths = {name: by for name, by in READ_BY.items() if name not in PROMISES}
        return without_reader(self, "privacy", strengths)

    @property
    def candidates(self) -> tuple[float, ...]:
        """The noises that a step may take."""
        return tuple(map(float, self.noises)) or (self.noise,)

    def _check_choice(self) -> None:
        """Refuse a choice that the account does not cover, or that nobody makes.

        Raises:
            ValueError: with the cure.
        """
        usual = {one.name: one.default for one in fields(self)}
        if any(not 0 < noise < math.inf for noise in self.noises) or len(set(self.noises)) < len(self.noises):
            raise ValueError(f"privacy.noises={list(self.noises)}: name numbers above 0, each once")
        if self.mechanism not in READ_BY["noises"][1]:
            return
        if self.noises and self.noise != usual["noise"]:
            raise ValueError("privacy.noise has no effect beside privacy.noises; leave one of them out")
        if len(self.candidates) > 1 and self.accountant == "prv":
            raise ValueError(
                "privacy.accountant=prv composes noise that was fixed before; privacy.noises needs rdp, or one noise"
            )
        if len(self.candidates) > 1 and self.max_epsilon is None:
            raise ValueError("privacy.noises: an account of chosen noise is made for a limit; say privacy.max_epsilon")
        for name in ("epsilon_choice", "loss_bound"):
            if len(self.candidates) == 1 and getattr(self, name) != usual[name]:
                raise ValueError(
                    f"privacy.{name} has no effect where no noise is chosen; name two or more in privacy.noises, or "
                    "leave it out"
                )


@dataclass(frozen=True)
class Compression:
    """How updates are made smaller on their way to the server.

    Attributes:
        cast: send floats in 16 bits: float16 keeps 11 significant bits and saturates at 65504, bfloat16 keeps 8 and the
            range of float32.
        top_k: share of the coordinates of each group that a site sends in a round, the largest ones; what is left out
            is kept there and added the next time (error feedback). Null sends all.
    """

    cast: Literal["none", "float16", "bfloat16"] = "none"
    top_k: PositiveShare | None = None

    def __post_init__(self) -> None:
        check_ranges(Compression, vars(self), "compression")
