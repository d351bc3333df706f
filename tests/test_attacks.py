"""The attacks at their extremes, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.attacks.inversion import Inversion, Shield, Situation, attack, match, phantom_images
from benchmarks.attacks.recognition import amplitudes, distances, rank_of_own
from benchmarks.attacks.scores import auc, mean_auc


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 3], [2, 2]) == 0.5
    assert auc([2, 2], [2]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        auc([], [1.0])


def test_scores_of_one_distribution_are_at_chance_and_the_interval_says_so() -> None:
    rng = np.random.default_rng(0)
    mean, low, high = mean_auc([(rng.normal(size=60), rng.normal(size=60)) for _ in range(4)], draws=300)
    assert abs(mean - 0.5) < 0.06
    assert low < 0.5 < high
    assert high - low < 0.2


def test_the_entry_of_the_same_image_comes_first_and_noise_hides_it() -> None:
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for half_width in (0, 1, 3):
        own = distances(amplitudes(images, half_width), amplitudes(images, half_width))
        assert (rank_of_own(own) == 1).all()
    loud = distances(amplitudes(images, 0), amplitudes(images, 0, noise=5.0))
    assert (rank_of_own(loud) == 1).float().mean() < 0.5


def test_a_rank_counts_ties_against_the_true_entry() -> None:
    assert rank_of_own(torch.zeros(4, 4)).tolist() == [4, 4, 4, 4]


def test_shields_do_what_they_say() -> None:
    update = [torch.tensor([3.0, -4.0]).double(), torch.tensor([[0.25]]).double()]
    assert [t.tolist() for t in Shield()(update, 0)] == [[3.0, -4.0], [[0.25]]]
    assert [t.tolist() for t in Shield(top=0.34)(update, 0)] == [[0.0, -4.0], [[0.0]]]
    zeros = [torch.zeros(50_000).double(), torch.ones(1).double()]
    assert float(Shield(noise=0.5)(zeros, 0)[0].std()) == pytest.approx(0.5, rel=0.02)


def test_matching_undoes_an_order() -> None:
    images, _ = phantom_images(3, 16)
    found = match(images[[2, 0, 1]], images)
    assert torch.equal(found.rebuilt, images)
    assert min(found.psnr) > 90
    assert min(found.ssim) == pytest.approx(1.0)


@pytest.mark.slow
def test_one_image_comes_back_from_one_gradient_and_not_from_a_noisy_one() -> None:
    images, _ = phantom_images(9, 16)
    guess = match(images[1:].mean(0, keepdim=True), images[:1]).psnr[0]
    bare, truth = attack(Situation("bare"), 16, 0, Inversion(evaluations=250))
    assert torch.equal(truth, images[:1])
    assert bare.psnr[0] > guess + 3
    noisy, _ = attack(Situation("noise", shield=Shield(noise=0.1)), 16, 0, Inversion(evaluations=60))
    assert noisy.psnr[0] < guess
