"""Recognition: does an image belong to a patient whose low-frequency amplitudes a site has shared (FedDG's bank)?

A peer holds the bank of a site, one entry per training image, and a candidate image: the same image as the site
augments it, or another slice of the same patient. It ranks the entries by the distance of log amplitudes. Top-1 says
how often the true entry comes first; the AUC, whether candidates of patients in the bank lie nearer to it than those
of other patients of the same site. Noise is multiplicative on every amplitude, with this standard deviation of its
logarithm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from algorithms.functional.fourier import low_frequency_amplitude
from benchmarks.attacks.scores import mean_auc
from datamodules.phantom.data import draw_case
from datamodules.phantom.style import Dials
from datamodules.transforms import load_augmentation

DIALS = Dials(appearance=0.5, annotation=0.5, structure=0.3, amount=0.5)
HALF_WIDTHS, NOISES = (0, 1, 3, 8), (0.0, 0.1, 0.5)
PATIENTS, SIZE, SLICES = 40, 64, 12


def amplitudes(images: Tensor, half_width: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """What a site publishes of (N, C, H, W) images in [0, 1]: (N, C, 2b+1, 2b+1), with multiplicative noise."""
    shown = low_frequency_amplitude(images, half_width)
    generator = torch.Generator().manual_seed(seed)
    return shown * torch.exp(noise * torch.randn(shown.shape, generator=generator))


def distances(candidates: Tensor, bank: Tensor) -> Tensor:
    """(M, N) root mean squared differences of log amplitudes."""
    logs = [tensor.clamp(min=1e-3).log().flatten(1) for tensor in (candidates, bank)]
    return torch.cdist(*logs) / logs[0].shape[1] ** 0.5


def rank_of_own(apart: Tensor) -> Tensor:
    """Place of entry i among the entries by distance from candidate i, from 1; ties are counted against it."""
    own = apart.diagonal()[:, None]
    return (apart <= own).sum(dim=1)


def fundus() -> tuple[Tensor, Tensor]:
    """Images of one site's patients, as they are and as the suite augments them: (N, 3, H, W) each."""
    drawn = [draw_case("fundus", 0, 0, index, DIALS, resolution=SIZE).image[0] for index in range(2 * PATIENTS)]
    augment = load_augmentation("light")
    again = [augment(image, None, index, 1)[0][0] for index, image in enumerate(drawn)]
    return _tensor(np.stack(drawn)), _tensor(np.stack(again))


def organ() -> tuple[Tensor, Tensor]:
    """Two neighbouring slices of each patient's volume, from its middle: (N, 1, H, W) each."""
    drawn = [
        draw_case("organ", 0, 0, index, DIALS, resolution=SIZE, slices=SLICES).image for index in range(2 * PATIENTS)
    ]
    middle = SLICES // 2
    return _tensor(np.stack([v[middle] for v in drawn])), _tensor(np.stack([v[middle + 1] for v in drawn]))


def attack(
    shared: Tensor, candidates: Tensor, half_width: int, noise: float
) -> tuple[float, tuple[float, float, float]]:
    """The first half of the patients is in the bank, the second is not.

    Returns:
        Share of the bank's patients whose entry comes first; AUC of membership with its interval.
    """
    bank = amplitudes(shared[: len(shared) // 2], half_width, noise)
    apart = distances(amplitudes(candidates, half_width), bank)
    inside, outside = apart[: len(bank)], apart[len(bank) :]
    nearest = [(-side.amin(1)).double().numpy() for side in (inside, outside)]
    return float((rank_of_own(inside) == 1).float().mean()), mean_auc([(nearest[0], nearest[1])])


def main(folder: Path) -> None:  # noqa: ARG001  (every attack is given the folder)
    """Print the table."""
    print(f"Recognition from shared amplitudes, {PATIENTS} patients in the bank (chance: top-1 {1 / PATIENTS:.3f})")
    print(f"  {'candidate':22}{'b':>3}{'noise':>7}{'top-1':>8}   AUC (95 %)")
    for name, (shared, candidates) in {"augmented image": fundus(), "next slice": organ()}.items():
        for half_width in HALF_WIDTHS:
            for noise in NOISES:
                top, (mean, low, high) = attack(shared, candidates, half_width, noise)
                print(
                    f"  {name:22}{half_width:3d}{noise:7.1f}{top:8.2f}   {mean:.2f} ({low:.2f} to {high:.2f})",
                    flush=True,
                )


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
