"""Where a slice lies in its volume, and which structural partition that makes.

Slices of one partition show the same anatomical level in different volumes: the positives of structural contrast
(Wu et al., MICCAI 2021; the rule ``official`` is that of positional contrastive learning, Zeng et al., MICCAI 2021).
"""

from typing import Literal

import torch
from torch import Tensor

PartitionRule = Literal["official", "equal"]


def slice_position(index: Tensor, depth: Tensor) -> Tensor:
    """Relative position (i + 1) / D in (0, 1], float32, of slice ``index`` (from 0) among ``depth`` slices.

    Raises:
        ValueError: an index outside of its volume.
    """
    _check(index, depth)
    return (index + 1).float() / depth


def slice_partition(index: Tensor, depth: Tensor, partitions: int, rule: PartitionRule) -> Tensor:
    """Partition in 1..S of slice ``index`` (from 0) among ``depth`` slices.

    Args:
        index: (B,) integers.
        depth: (B,) integers, slices of each slice's volume.
        partitions: S; 4 in the papers.
        rule: ``equal`` cuts the volume into S equal parts, floor(S i / D) + 1. ``official`` makes parts of D / S
            slices, rounded half up (at least one), the last taking what is left: very uneven for short volumes.

    Raises:
        ValueError: an index outside of its volume, or fewer than one partition.
    """
    _check(index, depth)
    if partitions < 1:
        raise ValueError(f"a volume has at least 1 partition, not {partitions}")
    if rule == "equal":
        return torch.div(partitions * index, depth, rounding_mode="floor") + 1
    width = torch.div(2 * depth + partitions, 2 * partitions, rounding_mode="floor").clamp(min=1)
    return torch.div(index, width, rounding_mode="floor").clamp(max=partitions - 1) + 1


def _check(index: Tensor, depth: Tensor) -> None:
    if bool(((index < 0) | (index >= depth)).any()):
        raise ValueError(f"slices {index.tolist()} do not all lie within volumes of {depth.tolist()} slices")
