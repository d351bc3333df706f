"""Batches in another order than a site gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from fedseg.federation.contract import Batch


class Repeated:
    """Every batch several times in a row.

    Args:
        batches: read anew in every pass.
        times: how often each comes.
        total: how many there are in all.
    """

    def __init__(self, batches: Iterable[Batch], times: int, total: int) -> None:
        self._batches, self._times, self._total = batches, times, total

    def __iter__(self) -> Iterator[Batch]:
        return islice((batch for batch in self._batches for _ in range(self._times)), self._total)

    def __len__(self) -> int:
        return self._total


class Paired:
    """Two batches at a time: the second lies in the first, under a name.

    Args:
        batches: read anew in every pass; an even number.
        name: of the second.
        total: how many pairs there are.
    """

    def __init__(self, batches: Iterable[Batch], name: str, total: int) -> None:
        self._batches, self._name, self._total = batches, name, total

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        return ({**first, self._name: second} for first, second in zip(batches, batches, strict=True))

    def __len__(self) -> int:
        return self._total
