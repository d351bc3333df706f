"""Contrastive losses on feature vectors, and the bank of features they compare with.

Structural contrast between sites (Wu et al., MICCAI 2021), MoCo's InfoNCE (He et al., CVPR 2020), where a slice has no
other positive than itself, and supervised contrast (Khosla et al., NeurIPS 2020). All sums of exponentials are taken as
log-sum-exp.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Denominator = Literal["all", "other_partitions", "all_once"]
FOREIGN = -1  # item number of a feature whose slice is not known here: it came from another site


@dataclass(frozen=True)
class Features:
    """Unit feature vectors of slices.

    Attributes:
        vectors: (N, D), of length one.
        partitions: (N,) int64, the structural partition of each slice, 0..255.
        items: (N,) int64, which slice of this site each vector shows, `FOREIGN` when it is another site's. Two views of
            a slice share their number. Never sent.
    """

    vectors: Tensor
    partitions: Tensor
    items: Tensor

    def __post_init__(self) -> None:
        sizes = {len(self.vectors), len(self.partitions), len(self.items)}
        if self.vectors.ndim != 2 or len(sizes) != 1:
            shapes = [tuple(t.shape) for t in (self.vectors, self.partitions, self.items)]
            raise ValueError(f"features need (N, D) vectors with (N,) partitions and items, not {shapes}")

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: Tensor | slice) -> "Features":
        return Features(self.vectors[index], self.partitions[index], self.items[index])

    @staticmethod
    def join(parts: Iterable["Features"]) -> "Features":
        """All of them, one after the other."""
        every = list(parts)
        return Features(
            torch.cat([part.vectors for part in every]),
            torch.cat([part.partitions for part in every]),
            torch.cat([part.items for part in every]),
        )

    def sample(self, size: int, generator: torch.Generator) -> "Features":
        """At most ``size`` of them, uniformly without replacement and in random order."""
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        return self[order[:size].to(self.vectors.device)]

    def payload(self) -> dict[str, Tensor]:
        """What may travel: float32 vectors and uint8 partitions, 4 D + 1 bytes each; no slice numbers."""
        return {"vectors": self.vectors.float(), "partitions": self.partitions.to(torch.uint8)}

    @staticmethod
    def received(payload: dict[str, Tensor]) -> "Features":
        """Features of another site, from its `payload`."""
        partitions = payload["partitions"].long()
        return Features(payload["vectors"], partitions, torch.full_like(partitions, FOREIGN))


class FeatureBank:
    """The newest features of a site, first in, first out; without gradients, of unit length, float32.

    Args:
        capacity: how many are kept.
        dimensions: length of a vector (D).
    """

    def __init__(self, capacity: int, dimensions: int) -> None:
        if capacity < 1:
            raise ValueError(f"a feature bank holds at least 1 vector, not {capacity}")
        self.capacity = capacity
        none = torch.zeros(0, dtype=torch.int64)
        self.features = Features(torch.zeros(0, dimensions), none, none)

    def push(self, vectors: Tensor, partitions: Tensor, items: Tensor) -> None:
        """Add the newest features, in order; the oldest beyond the capacity are dropped.

        Args:
            vectors: (N, D), of any length but zero; the bank moves to their device.
            partitions: (N,), see `Features`.
            items: (N,), see `Features`.

        Raises:
            ValueError: shapes that do not fit, or vectors that are zero or not finite.
        """
        vectors = vectors.detach().float()
        if vectors.ndim != 2 or vectors.shape[1] != self.features.vectors.shape[1]:
            raise ValueError(
                f"this bank takes (N, {self.features.vectors.shape[1]}) vectors, not {tuple(vectors.shape)}"
            )
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            raise ValueError("a feature is zero or not finite: the encoder that made it has diverged or is dead")
        device = vectors.device
        new = Features(vectors / lengths, partitions.to(device, torch.int64), items.to(device, torch.int64))
        old = self.features
        kept = Features(old.vectors.to(device), old.partitions.to(device), old.items.to(device))
        self.features = Features.join([kept, new])[-self.capacity :]


def prototypes(features: Features, at_least: int) -> Features:
    """One mean direction per partition that holds ``at_least`` features or more; smaller partitions send nothing."""
    numbers = torch.unique(features.partitions)
    groups = [features.vectors[features.partitions == number] for number in numbers]
    enough = torch.tensor([len(group) >= at_least for group in groups], dtype=torch.bool, device=numbers.device)
    means = [functional.normalize(group.mean(0), dim=0) for group in groups if len(group) >= at_least]
    vectors = torch.stack(means) if means else features.vectors[:0]
    return Features(vectors, numbers[enough], torch.full_like(numbers[enough], FOREIGN))


def obfuscate(features: Features, sigma: float, generator: torch.Generator) -> Features:
    """Add Gaussian noise of deviation ``sigma`` to every coordinate and bring the vectors back to unit length."""
    noise = torch.randn(features.vectors.shape, generator=generator, device=generator.device)
    noisy = functional.normalize(features.vectors + sigma * noise.to(features.vectors), dim=1)
    return Features(noisy, features.partitions, features.items)


def masked_contrast(
    query: Tensor, positives: Tensor, is_positive: Tensor, negatives: Tensor, is_negative: Tensor, temperature: float
) -> Tensor:
    """-(1/|P|) sum_{k in P} log(e^(q.k/t) / (e^(q.k/t) + sum_{n in N} e^(q.n/t))) for every query.

    Args:
        query: (B, D).
        positives: (M, D).
        is_positive: (B, M) boolean, P of each query. A query without positives has loss 0 and gradient 0.
        negatives: (N, D).
        is_negative: (B, N) boolean, N of each query; without any, its loss is 0.
        temperature: t > 0.

    Returns:
        (B,) losses.
    """
    to_negatives = (query @ negatives.T / temperature).masked_fill(~is_negative, -torch.inf)
    background = torch.logsumexp(to_negatives, dim=1, keepdim=True)
    to_positives = query @ positives.T / temperature
    return _mean_over(is_positive, torch.logaddexp(to_positives, background) - to_positives)


def supervised_contrast(
    query: Tensor, positives: Tensor, is_positive: Tensor, negatives: Tensor, is_negative: Tensor, temperature: float
) -> Tensor:
    """-(1/|P|) sum_{k in P} log(e^(q.k/t) / sum_{a in P and N} e^(q.a/t)) for every query.

    Each feature is in the denominator once, the other positives too. Arguments and result are `masked_contrast`'s; with
    one positive, so is the value.
    """
    to_positives, to_negatives = (query @ features.T / temperature for features in (positives, negatives))
    counted = [to_positives.masked_fill(~is_positive, -torch.inf), to_negatives.masked_fill(~is_negative, -torch.inf)]
    background = torch.logsumexp(torch.cat(counted, dim=1), dim=1, keepdim=True)
    return _mean_over(is_positive, background - to_positives)


def structural_contrast(
    query: Features,
    own: Features,
    pool: Features,
    *,
    temperature: float,
    denominator: Denominator,
    own_slice_positive: bool,
    reach: int = 0,
) -> tuple[Tensor, Tensor]:
    """The local and the remote term of federated contrastive learning.

    Local: positives are the own site's features of the query's partition. Remote (global structural matching):
    positives are the pool's features of that partition. Both are told from the features of the pool.

    Args:
        query: B features of the encoder that learns.
        own: features of the own bank.
        pool: the sample Q' from the union of all banks; may hold own features.
        temperature: t > 0.
        denominator: ``all`` counts every feature of the pool as a negative, same partition or not, as the formula is
            written; ``other_partitions`` only those of other partitions; ``all_once`` these and the positives.
        own_slice_positive: may features of the query's own slice take part? Otherwise they are left out everywhere.
        reach: how far partition numbers may differ and still count as the same; above 0 for positional contrast,
            where the numbers are fine positions.

    Returns:
        (B,) local losses and (B,) remote losses; 0 where a query has no positive.
    """
    in_own = _near(query.partitions, own.partitions, reach)
    in_pool = _near(query.partitions, pool.partitions, reach)
    is_negative = torch.ones_like(in_pool) if denominator == "all" else ~in_pool
    if not own_slice_positive:
        others = ~_same(query.items, pool.items) | (pool.items == FOREIGN)
        in_own = in_own & (~_same(query.items, own.items) | (own.items == FOREIGN))
        in_pool, is_negative = in_pool & others, is_negative & others
    contrast = supervised_contrast if denominator == "all_once" else masked_contrast
    local = contrast(query.vectors, own.vectors, in_own, pool.vectors, is_negative, temperature)
    remote = contrast(query.vectors, pool.vectors, in_pool, pool.vectors, is_negative, temperature)
    return local, remote


def _mean_over(chosen: Tensor, values: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)


def _same(first: Tensor, second: Tensor) -> Tensor:
    return first[:, None] == second[None, :]


def _near(first: Tensor, second: Tensor, reach: int) -> Tensor:
    return (first[:, None] - second[None, :]).abs() <= reach
