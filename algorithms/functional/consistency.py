"""How far a student's answers to images without labels are from its teacher's, and how much that counts in a run.

Answers are logits (B, R, ...) of regions that may overlap ("sigmoid"), or (B, R + 1, ...) of background and exclusive
regions ("softmax").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedseg.models.heads import Activation

STEEPNESS = 5.0


def ramp_up(done: float) -> float:
    """exp(-5 (1 - t)^2), the ramp-up of Laine and Aila (ICLR 2017) that Mean Teacher took over.

    Args:
        done: t, the share of the ramp-up that is over; from 1 on the factor is 1.
    """
    return math.exp(-STEEPNESS * (1 - min(1.0, done)) ** 2)


def squared_difference(student: Tensor, teacher: Tensor, activation: Activation) -> Tensor:
    """Mean squared difference of the probabilities, over images, pixels and outputs, the background's included."""
    chances: Callable[[Tensor], Tensor] = torch.sigmoid if activation == "sigmoid" else _softmax
    return (chances(student.float()) - chances(teacher.float())).square().mean()


def pseudo_label_loss(student: Tensor, teacher: Tensor, activation: Activation, threshold: float) -> Tensor:
    """Cross entropy with what the teacher decides, where it is sure; a mean over all pixels, the others count as 0.

    Args:
        student: logits that learn.
        teacher: logits of the same images.
        activation: of both.
        threshold: least probability of the teacher's decision, that of region or no region under "sigmoid".
    """
    if activation == "sigmoid":
        chances = teacher.float().sigmoid()
        labels = (chances > 0.5).float()
        terms = binary_cross_entropy_with_logits(student.float(), labels, reduction="none")
        sure = torch.maximum(chances, 1 - chances) >= threshold
    else:
        highest, classes = _softmax(teacher.float()).max(dim=1)
        terms = cross_entropy(student.float(), classes, reduction="none")
        sure = highest >= threshold
    return (terms * sure).mean()


def with_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise on every pixel of images in [0, 1], which stay there; a channel of zeros stays as it is.

    Args:
        images: (B, C, ...); a modality that a case lacks is 0.
        deviation: of the noise; 0 leaves everything as it is.
        generator: of the noise.
    """
    if not deviation:
        return images
    there = (images != 0).flatten(2).any(dim=2).view(*images.shape[:2], *[1] * (images.ndim - 2))
    noise = torch.randn(images.shape, generator=generator)
    return (images + deviation * there * noise).clamp(0, 1)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)
