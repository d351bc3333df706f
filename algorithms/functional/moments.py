"""Moments instead of features: what FedMoCo sends (Dong and Voiculescu, MICCAI 2021).

The paper's program is not public; the details here (draws per site, samples, clipping) are a documented reading of it.
A site sends the mean and the deviation of its features, 2 D numbers; others draw virtual keys from them. How far
training moved a site's representation gives its weight in the average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Per-dimension statistics of a site's features.

    Attributes:
        mean: (D,).
        deviation: (D,), not negative; zero for a single feature.
    """

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Moments of (N, D) features, over N.

        Raises:
            ValueError: there is no feature.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"moments need (N, D) features with N of at least 1, not {tuple(features.shape)}")
        values = features.detach()
        return Moments(values.mean(0), values.std(0, correction=0))


def virtual_keys(sites: Sequence[Moments], number: int, generator: torch.Generator) -> Tensor:
    """Draw ``number`` vectors (number, D): a site at random, each as likely, then from its diagonal Gaussian.

    Args:
        sites: moments of the other sites.
        number: how many; 0 is allowed.
        generator: on its device the draws are made; the result lies where the moments do.

    Raises:
        ValueError: there is no other site.
    """
    if not sites:
        raise ValueError("virtual keys need the moments of at least one other site")
    means = torch.stack([site.mean for site in sites])
    deviations = torch.stack([site.deviation for site in sites])
    drawn = torch.randint(len(sites), (number,), generator=generator, device=generator.device).to(means.device)
    noise = torch.randn(number, means.shape[1], generator=generator, device=generator.device).to(means)
    return means[drawn] + deviations[drawn] * noise


def representational_similarity(first: Tensor, second: Tensor) -> float:
    """How alike two encoders arrange the same samples, in [-1, 1].

    Pearson correlation between the upper triangles of the two dissimilarity matrices 1 - corr(h_a, h_b). Constant
    features correlate with nothing (dissimilarity 1); two constant triangles are alike (1), one is not (0).

    Args:
        first: (P, D) features of P samples under one encoder.
        second: (P, D') features of the same samples, in the same order, under another.

    Raises:
        ValueError: the numbers of samples differ, or there are fewer than 3.
    """
    if len(first) != len(second) or len(first) < 3:
        raise ValueError(f"the similarity needs the same 3 or more samples twice, not {len(first)} and {len(second)}")
    above = torch.triu_indices(len(first), len(first), offset=1).unbind()
    one, other = (1.0 - _correlations(features.detach().double())[above] for features in (first, second))
    if torch.allclose(one, other, atol=1e-12):
        return 1.0
    return float(_correlations(torch.stack([one, other]))[0, 1])


def similarity_weights(examples: Sequence[int], similarities: Sequence[float]) -> list[float]:
    """Weights of the average, proportional to examples times similarity, summing to one.

    Negative similarities count as 0; when no site has a positive one, the numbers of examples decide alone.

    Raises:
        ValueError: the two differ in length, or no site has examples.
    """
    products = [n * max(r, 0.0) for n, r in zip(examples, similarities, strict=True)]
    chosen = products if sum(products) > 0 else [float(n) for n in examples]
    total = sum(chosen)
    if total <= 0:
        raise ValueError("no site has examples: there is nothing to weigh")
    return [value / total for value in chosen]


def _correlations(rows: Tensor) -> Tensor:
    """Pearson correlation (P, P) between rows (P, D); 0 where a row is constant."""
    centred = rows - rows.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    constant = lengths <= 1e-12 * (1.0 + rows.abs().amax(1, keepdim=True))
    units = torch.where(constant, 0.0, centred / lengths.clamp(min=torch.finfo(rows.dtype).tiny))
    return (units @ units.T).clamp(-1.0, 1.0)
