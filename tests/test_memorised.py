"""What is made of patients' images leaves a site only if it is no copy of any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fedseg.privacy.memorised import FEWEST, Likeness, MemorisedError, may_leave, medoids

SIDE = 32


def images(seed: int, count: int) -> Tensor:
    """(count, 3, SIDE, SIDE) clouds, each of its own."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=random)
    return interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)


TRAINING, HELD_OUT = images(1, 40), images(2, 20)
NOISE = torch.randn(TRAINING.shape, generator=torch.Generator().manual_seed(3))
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "mirrored": lambda x: x.flip(3),
    "turned": lambda x: x.flip(2, 3),
    "noised": lambda x: (x + 0.05 * NOISE).clamp(0, 1),
    "blurred": lambda x: avg_pool2d(x, 3, 1, 1),
    "darkened": lambda x: 0.8 * x,
    "shifted": lambda x: x.roll(1, 3),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_generator_that_gives_back_its_images_is_refused(how: str) -> None:
    with pytest.raises(MemorisedError, match="40 of 40 made images lie as near"):
        may_leave(COPIES[how](TRAINING), TRAINING, HELD_OUT, 5)


def test_copies_are_held_back_from_among_new_images() -> None:
    new = images(4, 40)
    assert (Likeness(TRAINING).distances(new) > 0.05).all()
    mixed = torch.cat([COPIES["noised"](TRAINING)[:15], new])
    chosen = may_leave(mixed, TRAINING, HELD_OUT, 12)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.min() >= 15
    assert len(chosen) == 12
    with pytest.raises(MemorisedError, match="ask for fewer"):
        may_leave(mixed, TRAINING, HELD_OUT, 41)
    with pytest.raises(ValueError, match=r"4 held-out images are too few .* data\.split"):
        may_leave(mixed, TRAINING, HELD_OUT[: FEWEST - 1], 12)


def test_medoids_stand_for_all_rows() -> None:
    random = torch.Generator().manual_seed(5)
    middles = torch.nn.functional.normalize(torch.randn(4, 16, generator=random), dim=1)
    rows = middles.repeat_interleave(10, dim=0) + 0.05 * torch.randn(40, 16, generator=random)
    features = torch.nn.functional.normalize(rows, dim=1)
    found = medoids(features, 4)
    assert sorted((found // 10).tolist()) == [0, 1, 2, 3]
    for place in found.tolist():  # in a group of rows no other has a smaller sum of distances
        own = features[place // 10 * 10 :][:10]
        assert int((1 - own @ own.T).sum(dim=1).argmin()) == place % 10
    alike = torch.nn.functional.normalize(torch.ones(6, 16), dim=1)
    assert len(set(medoids(alike, 6).tolist())) == 6
