"""The one currency: what a server holds, a site keeps, or a message carries.

One type gives one serialiser (safetensors: nothing that is loaded can run code), one byte counter and one home for
arithmetic. Tensors live in named groups. Two names have a meaning everywhere: ``model`` holds shared parameters and
``buffers`` shared running statistics; in an `Update` both are differences (trained minus received).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedseg.common.text import quoted

Tensors = dict[str, Tensor]
LARGEST_HEADER, HIGHEST_RANK = 2**24, 16
"""Bytes that the names and shapes of a serialised state may take, and the dimensions of a tensor."""


@dataclass
class State:
    """Named groups of tensors and named numbers.

    Attributes:
        tensors: group -> tensor name -> tensor, on the CPU.
        scalars: name -> number.
    """

    tensors: dict[str, Tensors] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, group: str) -> Tensors:
        return self.tensors[group]

    def get(self, group: str) -> Tensors:
        """The tensors of a group, or none."""
        return self.tensors.get(group, {})

    def clone(self) -> State:
        """A copy that shares no storage with this one."""
        tensors = {group: {name: t.clone() for name, t in named.items()} for group, named in self.tensors.items()}
        return State(tensors, dict(self.scalars))

    def sizes(self) -> dict[str, int]:
        """Bytes of each group, as they travel."""
        return {group: sum(t.numel() * t.element_size() for t in ts.values()) for group, ts in self.tensors.items()}

    def non_finite(self) -> list[str]:
        """``group/name`` of every tensor that holds a NaN or an infinity."""
        return [
            f"{group}/{name}"
            for group, named in self.tensors.items()
            for name, tensor in named.items()
            if tensor.is_floating_point() and not _finite(tensor)
        ]


def told_non_finite(*states: State) -> str:
    """Says how many tensors hold a NaN or an infinity, and quotes the first, whose name may be a site's; or nothing."""
    broken = [name for state in states for name in state.non_finite()]
    return f"{len(broken)} tensors are not finite, the first is {quoted(broken[0])}" if broken else ""


@dataclass(kw_only=True)
class Update(State):
    """What one site sends back.

    Attributes:
        site: who sends.
        examples: training images behind this update (its weight in FedAvg), see `examples_at`.
        refusal: why the site itself withdraws its update; empty when it stands.
        rows: of scores, for the run's tables.
        seal: what a site on a machine of its own signed beside the tensors, and its signature (`federation.ledger`).
        beside: what else came in its message: name -> how many entries, bytes.
    """

    site: str
    examples: int
    refusal: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    seal: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)


def add(a: Tensors, b: Tensors, scale: float = 1.0) -> Tensors:
    """``a + scale * b``, name by name; both must name the same tensors."""
    _same_names(a, b)
    return {name: torch.add(a[name], b[name], alpha=scale) for name in a}


def subtract(a: Tensors, b: Tensors) -> Tensors:
    """``a - b``, name by name; both must name the same tensors."""
    _same_names(a, b)
    return {name: a[name] - b[name] for name in a}


def squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Sum over the tensors of ``b`` of the squared Euclidean distance to their namesakes in ``a``; 0 of none."""
    if not b:
        return torch.zeros(())
    return torch.stack([(a[name] - b[name]).pow(2).sum() for name in b]).sum()


class Mean:
    """Weighted mean of updates that arrive one by one, so that only one of them is in memory.

    Groups in ``per_site`` are filed as ``group/site`` instead of averaged. In ``uniform`` groups every update with a
    positive weight counts the same. Weights need not sum to one.
    """

    def __init__(self, per_site: Iterable[str] = (), uniform: Iterable[str] = ()) -> None:
        self.per_site = frozenset(per_site)
        self.uniform = frozenset(uniform)
        self.total = 0.0
        self._count = 0
        self._groups: frozenset[str] | None = None
        self._sums: dict[str, Tensors] = {}
        self._filed: dict[str, Tensors] = {}
        self._scalars: dict[str, float] = {}

    def add(self, update: Update, weight: float) -> None:
        """Take one update in.

        Raises:
            ValueError: the weight is negative, or the update holds other tensors than those before it.
        """
        if weight < 0:
            raise ValueError(f"site {update.site!r} has the negative weight {weight}")
        shared = {group: ts for group, ts in update.tensors.items() if group not in self.per_site}
        if self._groups is None:
            self._groups = frozenset(shared)
        if shared.keys() != self._groups:
            raise ValueError(
                f"site {update.site!r} sent the groups {sorted(shared)}, the others {sorted(self._groups)}"
            )
        for group, tensors in shared.items():
            share = float(weight > 0) if group in self.uniform else weight
            if group not in self._sums:
                self._sums[group] = {name: tensor * share for name, tensor in tensors.items()}
                continue
            _same_names(self._sums[group], tensors)
            for name, tensor in tensors.items():
                self._sums[group][name].add_(tensor, alpha=share)
        for group in self.per_site & update.tensors.keys():
            self._filed[f"{group}/{update.site}"] = update.tensors[group]
        for name, value in update.scalars.items():
            self._scalars[name] = self._scalars.get(name, 0.0) + weight * value
        self.total += weight
        self._count += weight > 0

    def result(self) -> State:
        """The mean of what was taken in.

        Raises:
            ValueError: no update with a positive weight was taken in.
        """
        if not self.total:
            raise ValueError("there is nothing to average: no update with a positive weight arrived")
        totals = {group: self._count if group in self.uniform else self.total for group in self._sums}
        mean = {group: {k: t / totals[group] for k, t in ts.items()} for group, ts in self._sums.items()}
        return State({**mean, **self._filed}, {k: v / self.total for k, v in self._scalars.items()})


def filed(state: State, kind: str) -> dict[str, float]:
    """The numbers of a server's state that are filed under sites' names, ``kind/site``, by site."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): number for name, number in state.scalars.items() if name.startswith(prefix)}


def without_sites(state: State, sites: Collection[str]) -> State:
    """A server's state without what is filed under sites' names: groups ``group/site``, numbers ``number/site``."""

    def stays(name: str) -> bool:
        return not any(name.endswith(f"/{site}") for site in sites)

    tensors = {group: ts for group, ts in state.tensors.items() if stays(group)}
    return State(tensors, {name: value for name, value in state.scalars.items() if stays(name)})


def in_one_piece(state: State) -> State:
    """The same tensors as they travel; trained ones may lie in another order, and to collect them twice costs twice."""
    return State(
        {g: {n: t.detach().cpu().contiguous() for n, t in ts.items()} for g, ts in state.tensors.items()}, state.scalars
    )


def to_bytes(state: State) -> bytes:
    """Serialise to safetensors; names may hold any character."""
    groups = list(state.tensors)
    flat: Tensors = {}
    storages: set[int] = set()
    for index, group in enumerate(groups):
        for name, tensor in state.tensors[group].items():
            plain = tensor.detach().cpu().contiguous()
            storage = plain.untyped_storage().data_ptr()
            flat[f"{index}:{name}"] = plain.clone() if storage in storages else plain
            storages.add(storage)
    return save_tensors(flat, metadata={"groups": json.dumps(groups), "scalars": json.dumps(state.scalars)})


def from_bytes(data: bytes) -> State:
    """Read what `to_bytes` wrote, from anybody: nothing is executed, and memory is bounded by a few times the data.

    Types, shapes and offsets are checked by safetensors: tensors lie one after the other, without gap or overlap, and
    fill the data.

    Raises:
        ValueError: the bytes are not a serialised state.
    """
    try:
        names, groups, scalars = _read_header(data)
        tensors: dict[str, Tensors] = {group: {} for group in groups}
        loaded = load_tensors(data)
        if loaded.keys() != names.keys():
            raise ValueError("the header names other tensors than the data hold")
        for key, tensor in loaded.items():
            group, name = names[key]
            tensors[groups[group]][name] = tensor
    except Exception as error:
        raise ValueError(f"these {len(data)} bytes are not a serialised state: {str(error)[:200]!a}") from error
    return State(tensors, scalars)


def _read_header(data: bytes) -> tuple[dict[str, tuple[int, str]], list[str], dict[str, float]]:
    """Tensors of the file -> place of their group, and name; groups; numbers."""
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= min(len(data) - 8, LARGEST_HEADER):
        raise ValueError("its header has no size that makes sense")
    header = _strict_json(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    groups, scalars = _strict_json(metadata["groups"]), _strict_json(metadata["scalars"])
    if not isinstance(groups, list) or not all(isinstance(g, str) for g in groups) or len({*groups}) != len(groups):
        raise ValueError("its groups are not named once each")
    if not isinstance(scalars, dict) or not all(type(value) in (float, int) for value in scalars.values()):
        raise ValueError("its scalars are not numbers")
    names: dict[str, tuple[int, str]] = {}
    for key, entry in header.items():
        index, name = key.split(":", 1)
        if not index.isdecimal() or str(int(index)) != index or int(index) >= len(groups):
            raise ValueError("a tensor belongs to no group")
        if len(entry["shape"]) > HIGHEST_RANK:
            raise ValueError(f"a tensor has more than {HIGHEST_RANK} dimensions")
        names[key] = int(index), name
    return names, groups, {name: float(value) for name, value in scalars.items()}


def _strict_json(text: str | bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _finite(tensor: Tensor) -> bool:
    # a NaN or an infinity never leaves a finite sum, and a sum is ten times cheaper; large numbers may overflow it
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"the two sides name different tensors, for example {odd[:3]}")
