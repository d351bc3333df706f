"""Scores of whole federations with planted truths: clustered patients, luck of seeds, several methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import Gathered, Method
from fedseg.reporting.compare.options import Options

MODELS = {
    "fedavg global": "global", "fedprox global": "global", "ditto personal": "personal", "fedbn personal": "personal",
    "finetune personal": "personal", "local personal": "alone",
}  # fmt: skip
"""Model -> what kind of candidate it is."""


@dataclass(frozen=True)
class World:
    """What scores vary by, in points of 100.

    Attributes:
        sites: how many.
        seeds: how many.
        patients: of each site that test; as many validate.
        images: of a patient, at most; at least one.
        patient: deviation of a model's luck with a patient.
        image: deviation of a model's luck with an image.
        training: deviation of a model's luck with a training, at all sites.
        site: deviation of a model's luck with a training at one site.
        follow: whether another seed tests other patients, half of them the same.
    """

    sites: int = 4
    seeds: int = 3
    patients: int = 12
    images: int = 4
    patient: float = 4.0
    image: float = 4.0
    training: float = 0.7
    site: float = 1.0
    follow: bool = False

    def draw(self, number: int, truth: Mapping[str, float], options: Options | None = None) -> Analysis:
        """One federation.

        Args:
            number: of the draw.
            truth: kind of candidate ("global", "personal", "alone") -> what it adds to a score, in points.
            options: of the comparison.
        """
        random = np.random.default_rng([number, self.patients, self.seeds])
        cases = pd.concat([self._split(random, truth, split) for split in ("val", "test")], ignore_index=True)
        words = ["method", "view", "site", "split", "patient", "case"]
        cases = cases.astype(dict.fromkeys(words, "category")).assign(checkpoint="best", seen=True, metric="dice")
        methods = {m: Method(m, m, {}, tuple(range(self.seeds))) for m in (name.split()[0] for name in MODELS)}
        return Analysis(Gathered(methods, {}, cases, cases, [], []), options or Options(draws=200))

    def _split(self, random: np.random.Generator, truth: Mapping[str, float], split: str) -> pd.DataFrame:
        per_site = self.patients * (2 if self.follow else 1)
        counts = random.integers(1, self.images + 1, (self.sites, per_site))
        site, patient = (np.repeat(place.ravel(), counts.ravel()) for place in np.indices(counts.shape))
        rows, models = len(site), len(MODELS)
        score = 75 + random.normal(0, 8, counts.shape)[site, patient] + np.zeros((models, self.seeds, rows))
        score += np.array([truth.get(kind, 0.0) for kind in MODELS.values()])[:, None, None]
        score += random.normal(0, self.patient, (models, 1, *counts.shape))[:, :, site, patient]
        score += random.normal(0, self.image, (models, 1, rows)) + random.normal(0, 1, score.shape)
        score += random.normal(0, self.training, (models, self.seeds, 1))
        score += random.normal(0, self.site, (models, self.seeds, self.sites))[:, :, site]
        tests = random.random((self.seeds, *counts.shape)).argsort(axis=2)[:, site, patient] < self.patients
        model, seed, row = np.nonzero(np.broadcast_to(tests, score.shape))
        labels = [name.split() for name in MODELS]
        return pd.DataFrame({
            "method": np.array([method for method, _ in labels])[model],
            "view": np.array([view for _, view in labels])[model],
            "seed": seed,
            "split": split,
            "site": np.array([f"site_{k}" for k in range(self.sites)])[site[row]],
            "patient": np.array([f"{split}{p}" for p in range(per_site)])[patient[row]],
            "case": np.array([f"image{k}" for k in range(rows)])[row],
            "value": score[np.broadcast_to(tests, score.shape)] / 100,
        })  # fmt: skip
