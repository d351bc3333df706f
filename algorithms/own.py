"""Methods whose personal model is the one that the site itself trained last."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.federation.contract import Site
from fedseg.federation.state import State


class LastFit(FedAvg):
    """FedAvg, and beside it the site's own model as its last fit left it, before any mean was taken.

    Attributes:
        own: that model; it stays at the site, and does not learn.
    """

    views = ("global", "personal")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = deepcopy(self.model).requires_grad_(False)

    def send(self, site: Site) -> State:
        """The differences; the model itself becomes the site's own."""
        self._load(self.own, self.model.state_dict())
        return super().send(site)

    def network(self, view: str) -> nn.Module:
        """The received model, or the site's own."""
        return self.own if view == "personal" else self.model
