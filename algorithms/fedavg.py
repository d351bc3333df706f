"""FedAvg, and the pooled training it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fedseg.algorithms.base import Algorithm
from fedseg.federation.state import State, Update


class FedAvg(Algorithm):
    """FedAvg (McMahan et al., AISTATS 2017): the weighted mean of the sites' models, running statistics included.

    The mean runs over every floating tensor of the network's state. Suites that average ``parameters()`` only leave
    the running statistics local and are half FedBN.

    Args:
        weighting: examples weighs a site by its labelled training images (the paper); uniform gives every site the
            same weight, as several medical papers do.
    """

    def __init__(self, *args: Any, weighting: Literal["examples", "uniform"] = "examples", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weighting = weighting

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """By examples or uniformly; a site without labelled images has no say."""
        if self.weighting == "examples":
            return super().weigh(server, updates)
        return [float(update.examples > 0) for update in updates]


class Pooled(FedAvg):
    """Pooled training (baseline): one model on the union of all sites' training data, as if it could be shared.

    A round does as many optimiser steps as all sites together do in a federated round. Every image of the union is
    drawn equally often, so large sites dominate as they do in FedAvg by examples.
    """

    trains_on = "pool"
    splits_itself = True
