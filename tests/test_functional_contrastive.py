"""Contrastive pre-training's mathematics: losses, feature bank, partitions, moments and probes."""

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedseg.algorithms.contrastive import POSITIONS
from fedseg.algorithms.functional.infonce import (
    FOREIGN,
    FeatureBank,
    Features,
    masked_contrast,
    obfuscate,
    prototypes,
    structural_contrast,
)
from fedseg.algorithms.functional.moments import Moments, representational_similarity, similarity_weights, virtual_keys
from fedseg.algorithms.functional.partitions import slice_partition, slice_position
from fedseg.algorithms.functional.probes import alignment, cross_site_accuracy, linear_accuracy, uniformity
from fedseg.algorithms.functional.trajectory import follow
from tests.lines import golden

pytestmark = pytest.mark.filterwarnings("ignore:.timm-. encoders are deprecated:DeprecationWarning")
DENOMINATORS = ("all", "other_partitions", "all_once")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1)


def features(vectors: Tensor, partitions: Tensor, items: Tensor | None = None) -> Features:
    return Features(vectors, partitions, torch.full_like(partitions, FOREIGN) if items is None else items)


def contrast(query: Features, own: Features, pool: Features, denominator: str) -> tuple[Tensor, Tensor]:
    return structural_contrast(query, own, pool, temperature=0.1, denominator=denominator, own_slice_positive=False)


# Federated contrastive loss


@pytest.mark.parametrize("name", ["fcl_loss_s63", "fcl_loss_s64"])
@pytest.mark.parametrize("own_slice_positive", [True, False])
def test_structural_contrast_equals_the_reference(name: str, own_slice_positive: bool) -> None:
    data = golden(name)
    client = int(data["client"])
    pool = features(data["banks"].flatten(0, 1), data["bank_partition"].flatten())[data["selected_index"]]
    own = features(data["banks"][client], data["bank_partition"][client])
    vectors = data["query"].clone().requires_grad_()
    query = features(vectors, data["query_partition"], torch.arange(len(vectors)))
    for denominator, suffix in (("all", ""), ("other_partitions", "_trueneg")):
        local, remote = structural_contrast(
            query,
            own,
            pool,
            temperature=float(data["temperature"]),
            denominator=denominator,
            own_slice_positive=own_slice_positive,
        )
        close(local, data[f"loss_local{suffix}"])
        close(remote, data[f"loss_remote{suffix}"])
        if denominator == "all":
            total = (local + remote).mean()
            close(total, data["loss_total"])
            total.backward()
            close(vectors.grad, data["grad_query"])


@pytest.mark.parametrize("name", ["pcl_supcon_s61", "pcl_supcon_s62"])
@pytest.mark.parametrize("pairs", ["simclr", "gcl", "pcl"])
def test_every_feature_once_is_the_contrast_of_pcls_program(name: str, pairs: str) -> None:
    """Every view of every slice is a query, and all other views are what it is compared with."""
    data, views = golden(name), 2
    temperature, slices = float(data["temperature"]), len(data["features"])
    codes = {
        "simclr": torch.arange(slices),
        "gcl": data["partition"],
        "pcl": (data["position"] * POSITIONS).round().long(),
    }
    reach = math.ceil(float(data["threshold"]) * POSITIONS) - 1 if pairs == "pcl" else 0
    given = data["features"].clone().requires_grad_()
    every = features(functional.normalize(given, dim=-1).flatten(0, 1), codes[pairs].repeat_interleave(views))
    terms = []
    for anchor in range(views * slices):
        others = every[torch.arange(views * slices) != anchor]
        query = every[anchor : anchor + 1]
        terms += structural_contrast(
            query,
            others,
            others,
            temperature=temperature,
            denominator="all_once",
            own_slice_positive=True,
            reach=reach,
        )
    local, remote = torch.cat(terms).view(-1, 2).T * temperature / float(data["base_temperature"])
    close(local, remote, 1e-12)
    close(local.mean(), data[f"loss_{pairs}"])
    (gradient,) = torch.autograd.grad(local.mean(), given)
    close(gradient, data[f"grad_{pairs}"])


def example(seed: int = 0) -> tuple[Features, Features, Features]:
    generator = seeded(seed)
    sizes = (6, 12, 30)
    parts = [torch.randint(1, 5, (size,), generator=generator) for size in sizes]
    return tuple(features(unit(n, 8, seed=seed + i), parts[i]) for i, n in enumerate(sizes))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_structural_contrast_knows_neither_order_nor_names_of_partitions(denominator: str) -> None:
    query, own, pool = example()
    expected = contrast(query, own, pool, denominator)
    shuffled = contrast(query, own.sample(12, seeded(1)), pool.sample(30, seeded(2)), denominator)
    renamed = [features(f.vectors, torch.tensor([0, 9, 7, 1, 3])[f.partitions]) for f in (query, own, pool)]
    for other in (shuffled, contrast(*renamed, denominator)):
        for mine, theirs in zip(expected, other, strict=True):
            close(theirs, mine, 1e-12)


def test_structural_contrast_without_remote_positive_is_finite_and_zero() -> None:
    query, own, pool = example()
    pool = features(pool.vectors, torch.full_like(pool.partitions, 99))
    vectors = query.vectors.clone().requires_grad_()
    results = [contrast(features(vectors, query.partitions), own, pool, d) for d in DENOMINATORS]
    close(results[0][0], results[1][0], 0.0)
    assert bool((results[2][0] >= results[1][0]).all())  # the other positives of the own bank count, too
    for local, remote in results:
        assert torch.equal(remote, torch.zeros(6, dtype=torch.float64))
        assert bool(local.isfinite().all())
        (gradient,) = torch.autograd.grad(remote.sum(), vectors)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_structural_contrast_survives_empty_banks_and_one_partition(denominator: str) -> None:
    query, own, pool = example()
    vectors = query.vectors.clone().requires_grad_()
    mine = features(vectors, torch.ones(6, dtype=torch.int64))
    alike = features(pool.vectors, torch.ones(30, dtype=torch.int64))
    for other_own, other_pool in ((own[:0], pool[:0]), (own, pool[:0]), (own[:0], alike), (alike, alike)):
        local, remote = contrast(mine, other_own, other_pool, denominator)
        (gradient,) = torch.autograd.grad((local + remote).sum(), vectors)
        assert bool(torch.stack([local, remote]).isfinite().all())
        assert bool(gradient.isfinite().all())


def test_half_precision_does_not_overflow() -> None:
    query, own, pool = example()
    query, own, pool = (features(f.vectors.half(), f.partitions) for f in (query, own, pool))
    local, remote = structural_contrast(query, own, pool, temperature=0.05, denominator="all", own_slice_positive=False)
    assert bool(torch.stack([local, remote]).isfinite().all())


def test_less_similar_negatives_and_more_similar_positives_never_raise_the_loss() -> None:
    similar = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    query = features(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))

    def at(cosine: Tensor) -> Tensor:
        return torch.stack([cosine, (1 - cosine**2).sqrt()]).unsqueeze(0)

    def loss(positive: Tensor, negative: Tensor) -> float:
        pool = features(torch.cat([at(positive), at(negative)]), torch.tensor([1, 2]))
        return sum(term.item() for term in contrast(query, pool[:1], pool, "other_partitions"))

    by_negative = [loss(similar[3], c) for c in similar]
    by_positive = [loss(c, similar[3]) for c in similar]
    assert by_negative == sorted(by_negative)
    assert by_positive == sorted(by_positive, reverse=True)
    assert by_positive[0] > by_positive[-1]


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_the_own_slice_takes_no_part_unless_asked(denominator: str) -> None:
    query, own, pool = example()
    items, bank_items = torch.arange(6), torch.arange(100, 112)
    mine = features(query.vectors, query.partitions, items)
    bank = features(own.vectors, own.partitions, bank_items)
    expected = contrast(mine, bank, pool, denominator)
    with_self, pool_with_self = Features.join([bank, mine]), Features.join([pool, mine])
    for each in range(6):
        one = mine[each : each + 1]
        rest = mine.items != each
        reference = contrast(one, Features.join([bank, mine[rest]]), Features.join([pool, mine[rest]]), denominator)
        actual = contrast(one, with_self, pool_with_self, denominator)
        for a, b in zip(actual, reference, strict=True):
            close(a, b, 1e-12)
    own_view = structural_contrast(
        mine, with_self, pool_with_self, temperature=0.1, denominator=denominator, own_slice_positive=True
    )
    assert not torch.allclose(own_view[0], expected[0])


def test_foreign_features_never_count_as_the_own_slice() -> None:
    query, own, pool = example()
    foreign = features(query.vectors, query.partitions)
    excluded = contrast(foreign, own, pool, "all")
    included = structural_contrast(foreign, own, pool, temperature=0.1, denominator="all", own_slice_positive=True)
    for a, b in zip(excluded, included, strict=True):
        close(a, b, 0.0)


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """MoCo's loss as it is written: which of the products is the one with the own key?"""
    own = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([own, query @ negatives.T], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def test_instance_pairs_alone_are_moco() -> None:
    query, key, queue = unit(5, 8), unit(5, 8, seed=1), unit(40, 8, seed=2)
    own_key = torch.eye(5, dtype=torch.bool)
    every = torch.ones(5, 40, dtype=torch.bool)
    close(masked_contrast(query, key, own_key, queue, every, 0.2).mean(), info_nce(query, key, queue, 0.2), 1e-12)
    # the same through the structural loss: every slice is its own partition, the queue holds other ones
    local, remote = structural_contrast(
        features(query, torch.arange(5), torch.arange(5)),
        features(key, torch.arange(5), torch.arange(5)),
        features(queue, torch.full((40,), 99)),
        temperature=0.2,
        denominator="other_partitions",
        own_slice_positive=True,
    )
    close(local.mean(), info_nce(query, key, queue, 0.2), 1e-12)
    assert torch.count_nonzero(remote) == 0


# MoCo


def test_instance_contrast_equals_the_reference() -> None:
    data = golden("moco_infonce_s65")
    own_key = torch.eye(len(data["q"]), dtype=torch.bool)
    every = torch.ones(len(data["q"]), len(data["queue"]), dtype=torch.bool)
    loss = masked_contrast(data["q"], data["k"], own_key, data["queue"], every, float(data["temperature"]))
    close(loss.mean(), data["loss"])
    assert not masked_contrast(data["q"], data["k"], own_key, data["queue"][:0], every[:, :0], 0.2).any()


def test_momentum_encoder_equals_the_reference() -> None:
    data = golden("moco_infonce_s65")
    leader, follower = (nn.ParameterList([nn.Parameter(data[key].clone())]) for key in ("theta_q", "theta_k"))
    follow(follower, leader, float(data["momentum"]))
    close(follower[0].detach(), data["theta_k_new"])
    close(leader[0].detach(), data["theta_q"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["resnet18", "timm-mobilenetv3_small_100"])
def test_momentum_averages_parameters_and_copies_buffers(encoder: str) -> None:
    torch.manual_seed(0)
    leader, follower = (smp.encoders.get_encoder(encoder, in_channels=1, depth=5, weights=None) for _ in range(2))
    with torch.no_grad():
        leader.train()(torch.rand(2, 1, 64, 64))
    before = {name: p.detach().clone() for name, p in follower.named_parameters()}
    follow(follower, leader, 0.9)
    for name, parameter in follower.named_parameters():
        close(parameter.detach(), 0.9 * before[name] + 0.1 * leader.get_parameter(name).detach(), 1e-6)
        assert parameter.requires_grad
    for name, buffer in follower.named_buffers():
        assert torch.equal(buffer, leader.get_buffer(name))
        assert buffer.data_ptr() != leader.get_buffer(name).data_ptr()
    assert any("num_batches_tracked" in name and int(b) == 1 for name, b in follower.named_buffers())


def test_momentum_refuses_other_networks() -> None:
    with pytest.raises(ValueError, match="different parameters"):
        follow(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
    with pytest.raises(ValueError, match="different buffers"):
        follow(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), 0.9)
    with pytest.raises(ValueError, match="momentum must lie"):
        follow(nn.Linear(2, 2), nn.Linear(2, 2), 1.1)


# The bank


def test_bank_is_first_in_first_out_as_in_the_reference() -> None:
    data = golden("moco_infonce_s65")
    bank = FeatureBank(capacity=16, dimensions=8)
    numbers = torch.arange(20)
    bank.push(data["queue"], numbers[:16] % 4, numbers[:16])
    bank.push(data["k"], numbers[16:] % 4, numbers[16:])
    close(bank.features.vectors.double(), data["queue_fifo_after_oldest_first"], 1e-6)
    assert bank.features.items.tolist() == list(range(4, 20))
    assert torch.equal(bank.features.partitions, bank.features.items % 4)


def test_bank_holds_unit_vectors_without_gradient() -> None:
    bank = FeatureBank(capacity=5, dimensions=3)
    assert len(bank.features) == 0
    bank.push(3.0 * torch.randn(9, 3, requires_grad=True, dtype=torch.float64), torch.ones(9), torch.arange(9))
    vectors = bank.features.vectors
    assert (len(vectors), vectors.dtype, vectors.requires_grad) == (5, torch.float32, False)
    close(vectors.norm(dim=1), torch.ones(5), 1e-6)


def test_bank_refuses_dead_or_misshapen_features() -> None:
    bank = FeatureBank(capacity=5, dimensions=3)
    for vectors in (torch.zeros(1, 3), torch.full((1, 3), torch.nan), torch.full((1, 3), torch.inf)):
        with pytest.raises(ValueError, match="zero or not finite"):
            bank.push(vectors, torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"takes \(N, 3\) vectors"):
        bank.push(torch.ones(1, 4), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="need"):
        bank.push(torch.ones(2, 3), torch.ones(1), torch.zeros(2))
    with pytest.raises(ValueError, match="at least 1"):
        FeatureBank(capacity=0, dimensions=3)
    assert len(bank.features) == 0


def test_partitions_travel_with_their_features_through_shuffling() -> None:
    vectors = torch.eye(8)
    all_of_them = Features(vectors, torch.arange(8), 10 * torch.arange(8))
    drawn = all_of_them.sample(5, seeded())
    assert len(drawn) == 5
    assert torch.equal(drawn.vectors.argmax(1), drawn.partitions)
    assert torch.equal(drawn.items, 10 * drawn.partitions)
    assert len(torch.unique(drawn.partitions)) == 5
    assert len(all_of_them.sample(99, seeded())) == 8
    assert drawn.partitions.tolist() != sorted(drawn.partitions.tolist())


def test_payload_names_no_slice_and_counts_its_bytes() -> None:
    sent = Features(unit(7, 16), torch.arange(1, 8), torch.arange(7)).payload()
    assert set(sent) == {"vectors", "partitions"}
    assert sum(t.numel() * t.element_size() for t in sent.values()) == 7 * (4 * 16 + 1)
    back = Features.received(sent)
    assert torch.equal(back.partitions, torch.arange(1, 8))
    assert torch.equal(back.items, torch.full((7,), FOREIGN))


def test_prototypes_are_mean_directions_of_large_enough_partitions() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    some = Features(vectors, torch.tensor([3, 3, 1]), torch.arange(3))
    every = prototypes(some, at_least=1)
    assert every.partitions.tolist() == [1, 3]
    close(every.vectors, torch.tensor([[0.6, 0.8], [math.sqrt(0.5), math.sqrt(0.5)]]), 1e-6)
    assert prototypes(some, at_least=2).partitions.tolist() == [3]
    assert prototypes(some, at_least=3).vectors.shape == (0, 2)
    assert set(every.items.tolist()) == {FOREIGN}


def test_noise_keeps_unit_length_and_repeats() -> None:
    some = features(unit(50, 8), torch.ones(50, dtype=torch.int64))
    noisy, again = (obfuscate(some, 0.3, seeded(1)) for _ in range(2))
    assert torch.equal(noisy.vectors, again.vectors)
    close(noisy.vectors.norm(dim=1), torch.ones(50, dtype=torch.float64), 1e-12)
    cosine = (noisy.vectors * some.vectors).sum(1).mean().item()
    assert 0.6 < cosine < 0.9  # 1 / sqrt(1 + 7 * 0.3^2) = 0.78
    close(obfuscate(some, 0.0, seeded(1)).vectors, some.vectors, 1e-12)


# Partitions


def test_partitions_equal_the_reference() -> None:
    data = golden("pcl_partition")
    depths = sorted(int(key[-3:]) for key in data if key.startswith("partition"))
    assert len(depths) == 6
    for depth in depths:
        index, depths_of = torch.arange(depth), torch.full((depth,), depth)
        assert torch.equal(slice_partition(index, depths_of, 4, "official"), data[f"partition_D{depth:03d}"])
        close(slice_position(index, depths_of).double(), data[f"position_D{depth:03d}"], 1e-6)


@pytest.mark.parametrize("rule", ["official", "equal"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_every_slice_of_every_volume_has_a_partition(rule: str, count: int) -> None:
    for depth in range(1, 60):
        index, depths = torch.arange(depth), torch.full((depth,), depth)
        partition, position = slice_partition(index, depths, count, rule), slice_position(index, depths)
        assert partition.dtype == torch.int64
        assert int(partition.min()) >= 1
        assert int(partition.max()) <= count
        assert bool((partition.diff() >= 0).all())
        assert float(position.min()) > 0
        assert float(position.max()) == 1.0
        if rule == "equal" and depth >= count:
            sizes = torch.bincount(partition, minlength=count + 1)[1:]
            assert int(sizes.max() - sizes.min()) <= 1


def test_partitions_of_volumes_of_different_depth_in_one_batch() -> None:
    index, depth = torch.tensor([0, 0, 1, 2, 9]), torch.tensor([1, 2, 2, 3, 10])
    assert slice_partition(index, depth, 4, "equal").tolist() == [1, 1, 3, 3, 4]
    assert slice_partition(index, depth, 4, "official").tolist() == [1, 1, 2, 3, 4]


def test_partitions_refuse_slices_outside_their_volume() -> None:
    for index in (-1, 5):
        with pytest.raises(ValueError, match="within volumes"):
            slice_partition(torch.tensor([index]), torch.tensor([5]), 4, "equal")
    with pytest.raises(ValueError, match="at least 1 partition"):
        slice_partition(torch.tensor([0]), torch.tensor([5]), 0, "equal")


# Moments


def test_moments_describe_and_virtual_keys_follow_them() -> None:
    near, far = Moments.of(torch.randn(500, 3) * 0.1), Moments.of(torch.randn(500, 3) * 0.1 + 10.0)
    close(far.mean, torch.full((3,), 10.0), 0.05)
    close(far.deviation, torch.full((3,), 0.1), 0.02)
    keys = virtual_keys([near, far], 4000, seeded())
    from_far = keys.mean(1) > 5
    assert 0.45 < from_far.double().mean().item() < 0.55
    close(keys[from_far].mean(0), far.mean, 0.02)
    close(keys[from_far].std(0), far.deviation, 0.02)
    assert torch.equal(keys, virtual_keys([near, far], 4000, seeded()))
    assert virtual_keys([near], 0, seeded()).shape == (0, 3)


def test_moments_of_one_feature_have_no_spread_and_of_none_are_refused() -> None:
    single = Moments.of(torch.ones(1, 4, requires_grad=True))
    assert torch.equal(single.deviation, torch.zeros(4))
    assert not single.mean.requires_grad
    with pytest.raises(ValueError, match="at least 1"):
        Moments.of(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="at least one other site"):
        virtual_keys([], 3, seeded())


def test_representational_similarity_equals_its_definition() -> None:
    first, second = torch.randn(9, 6, generator=seeded(1)), torch.randn(9, 4, generator=seeded(2))
    above = np.triu_indices(9, 1)
    expected = np.corrcoef(1 - np.corrcoef(first.numpy())[above], 1 - np.corrcoef(second.numpy())[above])[0, 1]
    assert representational_similarity(first, second) == pytest.approx(expected, abs=1e-6)
    assert representational_similarity(first, 3.0 * first + 2.0) == pytest.approx(1.0, abs=1e-6)


def test_representational_similarity_of_dead_features_is_finite() -> None:
    alive = torch.randn(5, 6)
    assert representational_similarity(torch.zeros(5, 6), alive) == 0.0
    assert representational_similarity(torch.zeros(5, 6), torch.ones(5, 6)) == 1.0
    with pytest.raises(ValueError, match="3 or more"):
        representational_similarity(alive[:2], alive[:2])
    with pytest.raises(ValueError, match="3 or more"):
        representational_similarity(alive, alive[:4])


def test_similarity_weights() -> None:
    assert similarity_weights([10, 30], [1.0, 1.0]) == pytest.approx([0.25, 0.75])
    assert similarity_weights([10, 30, 20], [0.9, 0.3, -0.5]) == pytest.approx([0.5, 0.5, 0.0])
    assert similarity_weights([10, 30], [-0.1, 0.0]) == pytest.approx([0.25, 0.75])
    with pytest.raises(ValueError, match="no site has examples"):
        similarity_weights([0, 0], [1.0, 1.0])


# Probes


def layered(sites: int, spread: float, shift: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features around one axis per partition; ``shift`` moves each site along an axis of its own."""
    generator = seeded(seed)
    partition = torch.arange(1, 5).repeat(sites * 10)
    site = torch.arange(sites).repeat_interleave(40)
    vectors = functional.one_hot(partition - 1, 4 + sites).double()
    vectors = vectors + shift * functional.one_hot(site + 4, 4 + sites)
    return vectors + spread * torch.randn(vectors.shape, generator=generator), partition, site


def test_alignment_equals_the_sum_over_pairs() -> None:
    vectors, partition, site = layered(3, 0.5, 0.7)
    units = functional.normalize(vectors, dim=1)
    pairs = (partition[:, None] == partition) & (site[:, None] != site)
    assert alignment(vectors, partition, site) == pytest.approx((units @ units.T)[pairs].mean().item(), abs=1e-12)
    assert math.isnan(alignment(vectors, partition, torch.zeros_like(site)))
    assert alignment(*layered(2, 0.0, 0.0)) == pytest.approx(1.0)
    assert alignment(*layered(2, 0.0, 1.0)) == pytest.approx(0.5)


def test_uniformity_equals_the_mean_over_pairs_and_is_zero_when_collapsed() -> None:
    vectors = unit(30, 4)
    expected = math.log((-2 * torch.pdist(vectors).square()).exp().mean().item())
    assert uniformity(vectors) == pytest.approx(expected, abs=1e-9)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        uniformity(vectors[:1])


def test_probes_compare_in_chunks_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, partition, site = layered(3, 0.5, 0.7)
    whole = uniformity(vectors), cross_site_accuracy(vectors, partition, site, 5)
    monkeypatch.setattr("fedseg.algorithms.functional.probes.ROWS", 7)
    assert (uniformity(vectors), cross_site_accuracy(vectors, partition, site, 5)) == pytest.approx(whole)


def test_linear_probe_reads_partitions_where_there_are_any() -> None:
    train, partition, _ = layered(2, 0.1, 3.0)
    test, truth, _ = layered(2, 0.1, 3.0, seed=1)
    assert linear_accuracy(train, partition, test, truth, 1e-3) == 1.0
    noise = torch.randn(400, 6, generator=seeded(4), dtype=torch.float64)
    labels = torch.arange(1, 5).repeat(100)
    assert linear_accuracy(noise[:200], labels[:200], noise[200:], labels[200:], 1e-3) < 0.4
    dead = torch.ones(80, 3)
    assert linear_accuracy(dead, partition, dead, partition, 1e-3) == 0.25
    with pytest.raises(ValueError, match="positive penalty"):
        linear_accuracy(train, partition, test, truth, 0.0)


def test_cross_site_retrieval_looks_at_other_sites_only() -> None:
    aligned = layered(3, 0.1, 0.3)
    assert cross_site_accuracy(*aligned, neighbours=5) == 1.0
    vectors, partition, site = layered(2, 0.05, 0.0)
    swapped = vectors.clone()
    swapped[site == 1] = vectors[site == 1].roll(1, dims=0)  # site 1 arranges its levels in another order
    assert cross_site_accuracy(swapped, partition, site, neighbours=5) == 0.0
    same_place = torch.cat([vectors, vectors]), torch.cat([partition, partition]), torch.cat([site, site])
    assert cross_site_accuracy(*same_place, neighbours=999) <= 1.0
    with pytest.raises(ValueError, match="at least two sites"):
        cross_site_accuracy(vectors, partition, torch.zeros_like(site), neighbours=5)


@pytest.mark.slow
def test_remote_term_brings_two_sites_together() -> None:
    """Two sites see the same levels through different rotations; only global matching can undo that."""
    generator = seeded(5)
    base = functional.one_hot(torch.arange(4).repeat(12), 4).double()
    inputs = base + 0.2 * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    partition = torch.arange(1, 5).repeat(12)
    turned = inputs[:, [1, 2, 3, 0]]
    both, twice = torch.stack([inputs, turned]), partition.repeat(2)
    site = torch.arange(2).repeat_interleave(48)

    def trained(weight: float) -> Tensor:
        torch.manual_seed(0)
        maps = [nn.Linear(4, 4).double() for _ in range(2)]
        optimizer = torch.optim.Adam([p for m in maps for p in m.parameters()], lr=0.05)
        for _ in range(40):
            encoded = [functional.normalize(m(x), dim=1) for m, x in zip(maps, both, strict=True)]
            banks = [features(e.detach(), partition) for e in encoded]
            pool = Features.join(banks)
            loss = torch.zeros((), dtype=torch.float64)
            for vectors, bank in zip(encoded, banks, strict=True):
                local, remote = structural_contrast(
                    features(vectors, partition, torch.arange(48)),
                    bank,
                    pool,
                    temperature=0.2,
                    denominator="other_partitions",
                    own_slice_positive=True,
                )
                loss = loss + (local + weight * remote).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.cat([m(x).detach() for m, x in zip(maps, both, strict=True)])

    apart, together = trained(0.0), trained(1.0)
    assert alignment(together, twice, site) > alignment(apart, twice, site) + 0.2
    assert cross_site_accuracy(together, twice, site, 5) > 0.9
