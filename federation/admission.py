"""What a server lets in: an update is held against what its site was asked for, before anything is computed with it.

Bytes are checked when they are read (`federation.state.from_bytes`); here their meaning is. Shared tensors must be
those that the server holds, name by name, of the same shape and type. Groups that a method files per site have no
counterpart there; they are bounded in number, rank and size, and hold plain numbers. Refusals name what is wrong and
nothing of the content; text that came from a site is quoted and cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fedseg.common.text import quoted
from fedseg.federation.state import State, Tensors, Update, told_non_finite

PLAIN = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    }
)
"""Types of tensors that a group without a counterpart at the server may hold."""
RANK = 8


@dataclass(frozen=True)
class Limits:
    """Bounds of what a site may send beyond the tensors that the server already holds.

    Attributes:
        filed_bytes: of all groups that are filed per site together.
        filed_tensors: how many tensors these hold.
        scalars: how many named numbers.
        name: characters of a name.
        examples: training images that a site may claim.
    """

    filed_bytes: int = 2**28
    filed_tensors: int = 10_000
    scalars: int = 10_000
    name: int = 200
    examples: int = 10**9


class Admission:
    """What an update of one round may hold.

    Args:
        server: the server's state; its groups without a slash are what sites share.
        per_site: groups that the method files per site.
        limits: bounds of the rest.
        unread: whether something else adds updates up unread, and looks at their tensors itself.
        needed: names of numbers that every update must tell.
    """

    def __init__(
        self,
        server: State,
        per_site: Iterable[str] = (),
        limits: Limits | None = None,
        unread: bool = False,
        needed: Iterable[str] = (),
    ) -> None:
        self.needed = frozenset(needed)
        self.per_site = frozenset(per_site)
        self.shared = {
            group: tensors
            for group, tensors in server.tensors.items()
            if tensors and "/" not in group and group not in self.per_site
        }
        self.limits = limits or Limits()
        self.unread = unread

    def refusal(self, update: Update) -> str:
        """Why an update cannot be used; empty if it can."""
        checks = [self._examples, self._scalars, *([] if self.unread else [self._groups, self._filed])]
        return next((reason for check in checks if (reason := check(update))), "")

    def _examples(self, update: Update) -> str:
        examples = update.examples
        if not isinstance(examples, int) or isinstance(examples, bool) or not 0 <= examples <= self.limits.examples:
            return f"its number of images is none between 0 and {self.limits.examples}"
        return ""

    def _scalars(self, update: Update) -> str:
        if len(update.scalars) > self.limits.scalars:
            return f"it sent {len(update.scalars)} numbers, at most {self.limits.scalars} are let in"
        if missing := sorted(self.needed - update.scalars.keys()):
            return f"it left out its number {quoted(missing[0])}"
        for name, value in update.scalars.items():
            if reason := self._name(name):
                return reason
            if not isinstance(value, float | int) or not math.isfinite(value):
                return f"its number {quoted(name)} is not finite"
            least, most = bounds(name)
            if not least <= value <= most:
                return f"its number {quoted(name)} is {value:g}, none between {least:g} and {most:g}"
        return ""

    def _groups(self, update: Update) -> str:
        if missing := sorted(self.shared.keys() - update.tensors.keys()):
            return f"it left out the group {quoted(missing[0])}"
        for group, tensors in update.tensors.items():
            if group in self.per_site:
                continue
            if group not in self.shared:
                known = sorted({*self.shared, *self.per_site})
                return f"it sent the group {quoted(group)}, which nobody asked for (known: {', '.join(known)})"
            if reason := _differs(group, tensors, self.shared[group]):
                return reason
        return ""

    def _filed(self, update: Update) -> str:
        filed = {group: tensors for group, tensors in update.tensors.items() if group in self.per_site}
        count = sum(len(tensors) for tensors in filed.values())
        if count > self.limits.filed_tensors:
            return f"it sent {count} tensors of its own, at most {self.limits.filed_tensors} are let in"
        size = sum(State(filed).sizes().values())
        if size > self.limits.filed_bytes:
            return f"it sent {size} bytes of its own tensors, at most {self.limits.filed_bytes} are let in"
        for group, tensors in filed.items():
            for name, tensor in tensors.items():
                if reason := self._name(name):
                    return reason
                if tensor.dtype not in PLAIN or tensor.ndim > RANK:
                    return f"its tensor {quoted(f'{group}/{name}')} is of a type or rank that is not let in"
        return ""

    def _name(self, name: str) -> str:
        if len(name) > self.limits.name or not name.isprintable():
            return f"its name {quoted(name)} is too long or holds control characters"
        return ""


def bounds(name: str) -> tuple[float, float]:
    """Least and largest value of a number that a site tells, by the last part of its name."""
    last = name.rpartition("/")[2]
    if last in ("dice", "iou", "nsd", "lesion_f1"):
        return 0.0, 1.0
    if last in ("seconds", "fit_seconds", "steps"):
        return 0.0, 1e9
    return -1e12, 1e12


def unbounded(answer: Update, limits: Limits | None = None) -> str:
    """Why an answer without a counterpart at the server is too much or no plain finite numbers; empty if it is fine."""
    own = Admission(State(), answer.tensors, limits)
    unnamed = next((reason for group in answer.tensors if (reason := own._name(group))), "")
    return unnamed or own.refusal(answer) or told_non_finite(answer)


def _differs(group: str, tensors: Tensors, expected: Mapping[str, torch.Tensor]) -> str:
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        return f"its group {quoted(group)} names other tensors than it was sent, for example {quoted(odd[0])}"
    for name, tensor in tensors.items():
        own = expected[name]
        if tensor.shape != own.shape or not _fits(tensor.dtype, own.dtype):
            return f"its tensor {quoted(f'{group}/{name}')} is {_kind(tensor)}, the one it was sent is {_kind(own)}"
    return ""


def _fits(dtype: torch.dtype, expected: torch.dtype) -> bool:
    """The same type, or a shorter float: a transform may round what travels."""
    shorter = dtype.is_floating_point and expected.is_floating_point and dtype.itemsize <= expected.itemsize
    return dtype == expected or (shorter and dtype in PLAIN)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)[: RANK + 1]}"
