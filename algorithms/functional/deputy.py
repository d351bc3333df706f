"""What a site's own model and the deputy that speaks for it do with each other (PRR-FL: Chen et al., MICCAI 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


class Stage(IntEnum):
    """Who teaches whom; NEW is before a round's first epoch."""

    NEW, RECOVER, EXCHANGE, SUBLIMATE = range(4)


def next_stage(stage: Stage, deputy: float, personal: float, recover: float, sublimate: float) -> Stage:
    """The stage of the next epoch.

    Args:
        stage: of the epoch before it.
        deputy: score of the deputy on the training images.
        personal: score of the own model there.
        recover: alpha 1; a deputy below this share of the own model's score learns from it alone.
        sublimate: alpha 2; one below this share does not yet teach alone.
    """
    if stage == Stage.NEW or deputy < recover * personal:
        return Stage.RECOVER
    if stage == Stage.RECOVER or deputy < sublimate * personal:
        return Stage.EXCHANGE
    return Stage.SUBLIMATE


def divergence(student: Tensor, teacher: Tensor, activation: Literal["sigmoid", "softmax"]) -> Tensor:
    """KL of the student's answer from the teacher's, which does not learn: mean over pixels, sum over regions.

    Args:
        student: (B, C, H, W) logits.
        teacher: of the same shape.
        activation: softmax over C, or sigmoid for each.
    """
    both = (student, teacher.detach())
    if activation == "sigmoid":
        answer, target = (torch.stack([functional.logsigmoid(z), functional.logsigmoid(-z)]) for z in both)
    else:
        answer, target = (z.log_softmax(dim=1)[None] for z in both)
    terms = target.exp() * (target - answer)
    return terms.sum(dim=(0, 2)).mean()


def share_low_frequencies(tensors: Sequence[Tensor], weights: Sequence[float], ratio: float) -> list[Tensor]:
    """Weights of a layer, one tensor per site: the mean amplitude at low frequencies, their own elsewhere.

    A convolution's (out, in, k, k) is the matrix of (in, k) rows and (k, out) columns, any other one as it stands.
    Phases are the site's own everywhere.

    Args:
        tensors: one per site, of two dimensions or more.
        weights: of the sites in the mean, which sum to one.
        ratio: of the window to the spectrum, in both directions.
    """
    stacked = torch.stack(list(tensors))
    matrices = stacked.permute(0, 2, 3, 4, 1).flatten(1, 2).flatten(2) if stacked.ndim == 5 else stacked.flatten(2)
    spectra = torch.fft.fftshift(torch.fft.fft2(matrices), dim=(1, 2))
    rows, columns = (_window(size, ratio) for size in matrices.shape[1:])
    inside = spectra[:, rows, columns]
    mean = torch.einsum("i,ihw->hw", inside.abs().new_tensor(weights), inside.abs())
    spectra[:, rows, columns] = torch.polar(mean.expand_as(inside.real).contiguous(), inside.angle())
    blended = torch.fft.ifft2(torch.fft.ifftshift(spectra, dim=(1, 2))).real
    if stacked.ndim == 5:
        _, out, into, height, width = stacked.shape
        blended = blended.reshape(-1, into, height, width, out).permute(0, 4, 1, 2, 3)
    return list(blended.reshape(stacked.shape).contiguous())


def _window(size: int, ratio: float) -> slice:
    """The middle of a shifted spectrum; half-open, as in the authors' program."""
    half, centre = int(size * ratio / 2), size // 2
    return slice(centre - half, centre + half)
