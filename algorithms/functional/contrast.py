"""Boundary-oriented contrast: features on a structure's boundary against features of its surroundings (FedDG)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Denominator = Literal["positive_and_negatives", "negatives"]
Group = Literal["batch", "image"]


def pooled_embeddings(features: Tensor, bands: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature over each band.

    Args:
        features: (B, C, h, w); resized bilinearly to the bands if smaller, so that thin bands stay exact.
        bands: (B, R, H, W), {0, 1} of any dtype.

    Returns:
        Embeddings (B, R, C), zero where a band is empty, and (B, R) bool: the band has pixels.
    """
    if features.shape[-2:] != bands.shape[-2:]:
        features = interpolate(features, size=bands.shape[-2:], mode="bilinear", align_corners=False)
    bands = bands.to(features.dtype)
    area = bands.sum((-2, -1), keepdim=True)
    shares = bands / area.clamp(min=1.0)
    return torch.einsum("bchw,brhw->brc", features, shares), area[..., 0, 0] > 0


def nt_xent(
    embeddings: Tensor, labels: Tensor, temperature: float, valid: Tensor | None = None, *, denominator: Denominator
) -> Tensor:
    """Labelled contrast with cosine similarities c: pull rows of one label together, push those of others away.

    Mean over all ordered pairs (a, p) of one label of ``-log(exp(c_ap / t) / D_a)``, where D_a sums exp(c_aq / t) over
    the rows q of other labels, and in the released form also holds the pair's own term.

    Args:
        embeddings: (..., N, C); leading dimensions are independent groups, whose pairs are averaged together.
        labels: (N,), integers.
        temperature: t > 0.
        valid: (..., N) bool; other rows leave the loss, as do rows without a direction (all zeros).
        denominator: ``"positive_and_negatives"`` (as released) or ``"negatives"`` (as in the paper; may be negative).

    Returns:
        Scalar; 0, with zero gradients, if no pair with an opposite is left.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    valid = length[..., 0] > 0 if valid is None else valid & (length[..., 0] > 0)
    direction = embeddings / torch.where(length > 0, length, 1.0)
    logits = direction @ direction.mT / temperature
    together = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    same = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    negative = together & ~same
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    pairs = together & same & ~itself & negative.any(-1, keepdim=True)
    # The lowest finite number instead of -inf keeps the gradient of rows without opposites finite.
    opposites = logits.masked_fill(~negative, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)
    if denominator == "positive_and_negatives":
        opposites = torch.logaddexp(logits, opposites)
    losses = torch.where(pairs, opposites - logits, 0.0)
    return losses.sum() / pairs.sum().clamp(min=1)


def boundary_contrast(
    features: tuple[Tensor, ...],
    inner_bands: Tensor,
    outer_bands: Tensor,
    temperature: float,
    *,
    denominator: Denominator,
    group: Group,
) -> Tensor:
    """Contrast of boundary and background embeddings over several passes of the same images, summed over structures.

    Args:
        features: one (B, C, h, w) per pass (raw images, re-styled images, ...).
        inner_bands: (B, R, H, W), boundary of each structure.
        outer_bands: (B, R, H, W), background next to each structure.
        temperature: t > 0.
        denominator: see ``nt_xent``.
        group: ``"batch"``: the images of a batch are contrasted together (as released); ``"image"``: each image with
            its own re-styled versions only (as in the paper).

    Returns:
        Scalar. An image without a band (empty or image-filling structure) leaves that structure's loss.
    """
    loss = features[0].new_zeros(())
    pooled = [pooled_embeddings(feature, bands) for bands in (inner_bands, outer_bands) for feature in features]
    embeddings = torch.stack([embedding for embedding, _ in pooled])  # (2 * passes, B, R, C), boundary first
    valid = torch.stack([present for _, present in pooled])
    boundary = torch.arange(len(pooled), device=embeddings.device) < len(features)
    for structure in range(inner_bands.shape[1]):
        rows, present = embeddings[:, :, structure], valid[:, :, structure]
        if group == "image":
            rows, present, labels = rows.transpose(0, 1), present.T, boundary
        else:
            rows, present, labels = rows.flatten(0, 1), present.flatten(), boundary.repeat_interleave(rows.shape[1])
        loss = loss + nt_xent(rows, labels, temperature, present, denominator=denominator)
    return loss
