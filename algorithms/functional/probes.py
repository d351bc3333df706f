"""Quality of a representation without labels: does it know where a slice lies, and at every site alike?

Alignment and uniformity follow Wang and Isola (ICML 2020), with same-partition pairs of different sites in the place of
two views. Chance level of both accuracies is 1 / S.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 1024  # queries compared at once: bounds the memory, does not change the result


def alignment(features: Tensor, partitions: Tensor, sites: Tensor) -> float:
    """Mean cosine of all pairs of the same partition and different sites, in [-1, 1]; NaN without such a pair.

    Args:
        features: (N, D).
        partitions: (N,) integers.
        sites: (N,) integers.
    """
    units = functional.normalize(features.detach().double(), dim=1)
    total, pairs = 0.0, 0
    for partition in torch.unique(partitions):
        inside = partitions == partition
        groups = [units[inside & (sites == site)] for site in torch.unique(sites[inside])]
        sums = torch.stack([group.sum(0) for group in groups])
        counts = [len(group) for group in groups]
        total += float(sums.sum(0).square().sum() - sums.square().sum())  # all ordered pairs minus those within a site
        pairs += sum(counts) ** 2 - sum(count**2 for count in counts)
    return total / pairs if pairs else float("nan")


def uniformity(features: Tensor) -> float:
    """Log of the mean of exp(-2 |x - y|^2) over all pairs on the unit sphere: 0 when collapsed, lower is more even.

    Args:
        features: (N, D), N of at least 2.

    Raises:
        ValueError: fewer than two features.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"uniformity compares pairs: it needs at least 2 features, not {count}")
    units = functional.normalize(features.detach().double(), dim=1)
    sums = [(-2.0 * torch.cdist(rows, units).square()).exp().sum() for rows in torch.split(units, ROWS)]
    return float(((torch.stack(sums).sum() - count) / (count * (count - 1))).log())


def linear_accuracy(
    train_features: Tensor, train_partitions: Tensor, test_features: Tensor, test_partitions: Tensor, penalty: float
) -> float:
    """Accuracy on the test features of a linear classifier of partitions, fitted to the training features.

    The classifier is ridge regression on the one-hot partitions of standardised features, in closed form: no learning
    rate, no seed.

    Args:
        train_features: (N, D).
        train_partitions: (N,) integers.
        test_features: (M, D), of other patients.
        test_partitions: (M,) integers.
        penalty: ridge per training sample, > 0.

    Raises:
        ValueError: the penalty is not positive, or a set is empty.
    """
    if penalty <= 0 or not len(train_features) or not len(test_features):
        raise ValueError("the linear probe needs training and test features and a positive penalty")
    mean, deviation = train_features.double().mean(0), train_features.double().std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    inputs, others = ((f.detach().double() - mean) / scale for f in (train_features, test_features))
    classes, targets = torch.unique(train_partitions, return_inverse=True)
    wanted = functional.one_hot(targets, len(classes)).double()
    offset = wanted.mean(0)
    covariance = inputs.T @ inputs
    ridge = penalty * len(inputs) * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    weights = torch.linalg.solve(covariance + ridge, inputs.T @ (wanted - offset))
    chosen = classes[(others @ weights + offset).argmax(1)]
    return float((chosen == test_partitions).double().mean())


def cross_site_accuracy(features: Tensor, partitions: Tensor, sites: Tensor, neighbours: int) -> float:
    """Share of features whose nearest neighbours at OTHER sites vote for its partition, in [0, 1].

    The direct measure of structural matching between sites. Neighbours by cosine; each votes with its cosine plus one.

    Args:
        features: (N, D).
        partitions: (N,) integers.
        sites: (N,) integers.
        neighbours: k; less where the other sites hold fewer features.

    Raises:
        ValueError: fewer than two sites, or fewer than one neighbour.
    """
    if len(torch.unique(sites)) < 2 or neighbours < 1:
        raise ValueError("cross-site retrieval needs at least two sites and one neighbour")
    units = functional.normalize(features.detach().double(), dim=1)
    classes, codes = torch.unique(partitions, return_inverse=True)
    hits = 0
    for rows in torch.split(torch.arange(len(units), device=units.device), ROWS):
        cosine = (units[rows] @ units.T).masked_fill(sites[rows][:, None] == sites[None, :], -torch.inf)
        nearest, index = cosine.topk(min(neighbours, len(units)), dim=1)
        ballots = torch.where(nearest.isfinite(), nearest + 1.0, 0.0)
        votes = ballots.new_zeros(len(rows), len(classes)).scatter_add_(1, codes[index], ballots)
        hits += int((votes.argmax(1) == codes[rows]).sum())
    return hits / len(units)
