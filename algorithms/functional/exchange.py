"""What a site shows of its features, and what another site makes of it.

From most to least that is shown: every vector (features), one mean direction per partition (prototypes), mean and
deviation per partition (moments), nothing (none).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedseg.algorithms.functional.infonce import FOREIGN, Features, obfuscate, prototypes
from fedseg.algorithms.functional.moments import Moments, virtual_keys

Exchange = Literal["none", "moments", "prototypes", "features"]
Payload = Mapping[str, Tensor]


def pack(
    features: Features, exchange: Exchange, *, most: int, at_least: int, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The payload of a site; empty where there is nothing to show.

    Args:
        features: N features of the site, on the CPU.
        exchange: how much is shown.
        most: features sent at most; they are drawn and shuffled, so that their order says nothing about patients.
        at_least: a partition with fewer features than that has no prototype and no moments.
        noise: deviation of the Gaussian noise on every coordinate that travels; vectors return to unit length.
        generator: of draws and noise.

    Returns:
        ``vectors`` float32 (M, D) and ``partitions`` uint8 (M,), that is M (4 D + 1) bytes; for moments ``mean`` and
        ``deviation`` float32 (P, D) and ``partitions`` uint8 (P,).
    """
    if exchange == "none" or not len(features):
        return {}
    if exchange == "moments":
        return _pack_moments(features, at_least, noise, generator)
    shown = features.sample(most, generator) if exchange == "features" else prototypes(features, at_least)
    if noise > 0:
        shown = obfuscate(shown, noise, generator)
    return shown.payload() if len(shown) else {}


def unpack(
    payloads: Sequence[Payload], exchange: Exchange, *, keys: int, generator: torch.Generator
) -> Features | None:
    """The features of other sites that a site contrasts with; None where nobody sent any.

    Args:
        payloads: what other sites packed, in an order of the caller's.
        exchange: as packed.
        keys: virtual features drawn from moments, shared out over their partitions (ceiling).
        generator: of the draws.
    """
    if not payloads:
        return None
    if exchange == "moments":
        return _draw(payloads, keys, generator)
    return Features.join([Features.received(dict(payload)) for payload in payloads])


def _pack_moments(features: Features, at_least: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    numbers, counts = torch.unique(features.partitions, return_counts=True)
    numbers = numbers[counts >= at_least]
    if not len(numbers):
        return {}
    found = [Moments.of(features.vectors[features.partitions == number]) for number in numbers]
    mean, deviation = torch.stack([m.mean for m in found]), torch.stack([m.deviation for m in found])
    if noise > 0:
        mean = mean + noise * torch.randn(mean.shape, generator=generator)
        deviation = (deviation + noise * torch.randn(deviation.shape, generator=generator)).clamp(min=0)
    return {"mean": mean.float(), "deviation": deviation.float(), "partitions": numbers.to(torch.uint8)}


def _draw(payloads: Sequence[Payload], keys: int, generator: torch.Generator) -> Features:
    by_partition: dict[int, list[Moments]] = {}
    for payload in payloads:
        for row, number in enumerate(payload["partitions"].tolist()):
            by_partition.setdefault(number, []).append(Moments(payload["mean"][row], payload["deviation"][row]))
    each = -(-keys // len(by_partition))
    drawn = [virtual_keys(by_partition[number], each, generator) for number in sorted(by_partition)]
    partitions = torch.tensor(sorted(by_partition)).repeat_interleave(each).to(drawn[0].device)
    vectors = functional.normalize(torch.cat(drawn), dim=1)
    return Features(vectors, partitions, torch.full_like(partitions, FOREIGN))
