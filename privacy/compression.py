"""Smaller updates: half precision, and the largest coordinates with error feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from fedseg.federation.contract import ServerHalf, Transform
from fedseg.federation.state import State, Tensors, Update
from fedseg.privacy.payload import dense, flat, sparse
from fedseg.privacy.refusals import refuse_inexact

LEFT = "left"


class Cast(Transform):
    """32-bit floats travel in 16 bits.

    Args:
        to: float16 or bfloat16.
    """

    def __init__(self, to: Literal["float16", "bfloat16"]) -> None:
        self.name = to
        self.dtype = torch.float16 if to == "float16" else torch.bfloat16

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse models that go from peer to peer: what is rounded is what a site sends to a server."""
        _refuse_peers(algorithm, "compression.cast", "none")

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Round; what float16 cannot hold becomes its largest number."""
        limit = torch.finfo(self.dtype).max

        def cast(tensor: Tensor) -> Tensor:
            return tensor.clamp(-limit, limit).to(self.dtype) if tensor.dtype == torch.float32 else tensor

        return _mapped(update, cast), memory

    def on_arrival(self, update: Update) -> Update:
        """Back to 32 bits."""
        return _mapped(update, lambda tensor: tensor.float() if tensor.dtype == self.dtype else tensor)


class TopK(Transform):
    """Of every group only the largest coordinates travel; the rest waits at the site (Stich et al., NeurIPS 2018).

    Args:
        share: of the coordinates, in (0, 1].
    """

    name = "top_k"

    def __init__(self, share: float) -> None:
        self.share = share

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse methods that send more than differences: what is left out of a snapshot cannot be caught up."""
        _refuse_peers(algorithm, "compression.top_k", "null")
        if algorithm.per_site:
            groups = ", ".join(sorted(algorithm.per_site))
            raise ValueError(
                f"compression.top_k sends parts of differences, but the method shows whole tensors in the group "
                f"{groups} of each site; take compression.cast"
            )
        refuse_inexact(algorithm, "compression.top_k sends parts of differences")

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Add what was left out before, send the largest coordinates, keep the others."""
        sent: dict[str, Tensors] = {}
        left = State()
        for group, tensors in update.tensors.items():
            row = flat(tensors) + memory.get(group).get(LEFT, torch.zeros(()))
            places = row.abs().topk(ceil(self.share * len(row)), sorted=False).indices.sort().values
            sent |= sparse(group, tensors, row, places)
            left.tensors[group] = {LEFT: row.index_fill(0, places, 0.0)}
        return replace(update, tensors=sent), left

    def on_arrival(self, update: Update) -> Update:
        """Zeros where nothing was sent."""
        return dense(update)


def _refuse_peers(algorithm: ServerHalf, setting: str, off: str) -> None:
    if algorithm.among_peers:
        raise ValueError(
            f"{setting} makes smaller what goes to a server, and peers hand on whole models; take {setting}={off}"
        )


def _mapped(update: Update, function: Callable[[Tensor], Tensor]) -> Update:
    tensors = {g: {name: function(t) for name, t in ts.items()} for g, ts in update.tensors.items()}
    return replace(update, tensors=tensors)
