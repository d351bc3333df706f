"""Recognition: does an image belong to a patient of whom a site shared something: low-frequency amplitudes or features?

A peer holds the bank of a site, one entry per training image, and a candidate image: the same image as the site
augments it, or another slice of the same patient. It ranks the entries by the distance of log amplitudes. Top-1 says
how often the true entry comes first; the AUC, whether candidates of patients in the bank lie nearer to it than those
of other patients of the same site. Noise is multiplicative on every amplitude, with this standard deviation of its
logarithm.

Contrastive pre-training shares features (``exchange=features``). The peer has the encoder and the projector, as all
have, embeds the next slice of a patient's volume and ranks the shared vectors by cosine. Noise is the method's own:
Gaussian on every coordinate of a vector, which returns to unit length.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attacks.scores import mean_auc
from fedseg.algorithms.contrastive import Contrastive
from fedseg.algorithms.functional.fourier import low_frequency_amplitude
from fedseg.algorithms.functional.infonce import Features, obfuscate
from fedseg.configs.compose import compose
from fedseg.datamodules.phantom.data import draw_case
from fedseg.datamodules.phantom.style import Dials
from fedseg.datamodules.transforms import load_augmentation
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Scored, Silent, TrainTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA

DIALS = Dials(appearance=0.5, annotation=0.5, structure=0.3, amount=0.5)
HALF_WIDTHS, NOISES = (0, 1, 3, 8), (0.0, 0.1, 0.5)
FEATURE_NOISES = (0.0, 0.05, 0.1, 0.2)
PATIENTS, SIZE, SLICES = 40, 64, 12
TRAINING = (
    "algorithm=contrastive", "data=phantom", "data.anatomy=organ", f"data.slices={SLICES}", "data.n_sites=2",
    f"data.cases_per_site={PATIENTS}", "data.amount=0", f"data.size={SIZE}", f"data.resolution={SIZE}",
    "data.batch_size=16", "federation.rounds=10", "federation.local_steps=10", "federation.evaluate_every=100",
    "trainer.threads=1", "trainer.accelerator=cpu",
)  # fmt: skip


def amplitudes(images: Tensor, half_width: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """What a site publishes of (N, C, H, W) images in [0, 1]: (N, C, 2b+1, 2b+1), with multiplicative noise."""
    shown = low_frequency_amplitude(images, half_width)
    generator = torch.Generator().manual_seed(seed)
    return shown * torch.exp(noise * torch.randn(shown.shape, generator=generator))


def distances(candidates: Tensor, bank: Tensor) -> Tensor:
    """(M, N) root mean squared differences of log amplitudes."""
    one, other = (tensor.clamp(min=1e-3).log().flatten(1) for tensor in (candidates, bank))
    apart: Tensor = torch.cdist(one, other) / one.shape[1] ** 0.5
    return apart


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


def features(images: Tensor, network: Contrastive, noise: float = 0.0, seed: int = 0) -> Tensor:
    """What a site shows of (N, C, H, W) images in [0, 1], one slice each: (N, D), unit length."""
    with torch.no_grad():
        vectors = network.learner.eval()(network.normalize(images))
    none = torch.zeros(len(vectors), dtype=torch.long)
    shown = Features(vectors, none, none)
    return obfuscate(shown, noise, torch.Generator().manual_seed(seed)).vectors if noise else vectors


def pretrained(pairing: str) -> Contrastive:
    """An encoder that two sites of the phantom trained together; the site that is attacked is the first of them."""
    dials = [f"data.{name}={getattr(DIALS, name)}" for name in ("appearance", "annotation", "structure")]
    experiment = Experiment(compose([*TRAINING, *dials, f"algorithm.pairing={pairing}"], SCHEMA))
    experiment.data.setup()
    with tempfile.TemporaryDirectory() as folder:
        federation = experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), Silent())
        server = federation.run()
    worker, site = experiment.algorithm(), experiment.data.site(experiment.data.sites[0])
    task = TrainTask(experiment.schedule.rounds, 0)
    worker.receive(federation.algorithm.broadcast(server, site.name, task), State(), site)
    assert isinstance(worker, Contrastive)
    return worker


def attack(bank: Tensor, apart: Tensor) -> tuple[float, tuple[float, float, float]]:
    """The first half of the candidates belongs to patients in the bank, the second does not.

    Args:
        bank: N entries.
        apart: (2 N, N) distances of candidates and entries.

    Returns:
        Share of the bank's patients whose entry comes first; AUC of membership with its interval.
    """
    inside, outside = apart[: len(bank)], apart[len(bank) :]
    nearest = [(-side.amin(1)).double().numpy() for side in (inside, outside)]
    return float((rank_of_own(inside) == 1).float().mean()), mean_auc([(nearest[0], nearest[1])])


def main(_folder: Path) -> None:
    """Print both tables."""
    print(f"Recognition from shared amplitudes, {PATIENTS} patients in the bank (chance: top-1 {1 / PATIENTS:.3f})")
    print(f"  {'candidate':26}{'':12}{'noise':>6}{'top-1':>8}   AUC (95 %)")
    for name, (shared, candidates) in {"augmented image": fundus(), "next slice": organ()}.items():
        for half_width in HALF_WIDTHS:
            for noise in NOISES:
                bank = amplitudes(shared[:PATIENTS], half_width, noise)
                row(name, f"b={half_width}", noise, bank, distances(amplitudes(candidates, half_width), bank))
    print("Recognition from shared features, candidate: next slice")
    shared, candidates = organ()
    for pairing in ("partition", "instance"):
        network = pretrained(pairing)
        for noise in FEATURE_NOISES:
            bank = features(shared[:PATIENTS], network, noise)
            row("next slice", pairing, noise, bank, torch.cdist(features(candidates, network), bank))


def row(candidate: str, kind: str, noise: float, bank: Tensor, apart: Tensor) -> None:
    """One line of a table."""
    top, (mean, low, high) = attack(bank, apart)
    print(f"  {candidate:26}{kind:12}{noise:6.2f}{top:8.2f}   {mean:.2f} ({low:.2f} to {high:.2f})", flush=True)


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
