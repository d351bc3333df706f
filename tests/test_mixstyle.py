"""MixStyle: the paper's formula, in local steps alone, in every method's own way of stepping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.functional.mixstyle import mixed
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import EvaluateTask
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from tests.test_harmonised import pictures
from tests.tiers import every
from tests.world import Forgetful, assert_same, assert_same_outcome, build, simulate, toy_sites, training_of

PARTS = ("encoder.0", "decoder")
AFTER = pytest.mark.parametrize("after", [(), PARTS], ids=["images", "features"])


def mixing(name: str = "fedavg", probability: float = 1.0, after: tuple[str, ...] = ()) -> Training:
    return training_of(name, harmonise="mixstyle", mixstyle_probability=probability, mixstyle_after=after)


def as_published(x: Tensor, alpha: float) -> Tensor:
    """The lines of the paper's program, in its order of draws, after that of whether to mix."""
    torch.rand(())
    mu, sig = x.mean(dim=[2, 3], keepdim=True), (x.var(dim=[2, 3], keepdim=True) + 1e-6).sqrt()
    perm = torch.randperm(x.size(0))
    lmda = torch.distributions.Beta(alpha, alpha).sample((x.size(0), 1, 1, 1))
    mu_mix, sig_mix = mu * lmda + mu[perm] * (1 - lmda), sig * lmda + sig[perm] * (1 - lmda)
    return (x - mu) / sig * sig_mix + mu_mix


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_it_is_the_formula_of_the_papers_program(alpha: float) -> None:
    images = pictures(6)
    torch.manual_seed(3)
    ours = mixed(images, 1.0, alpha)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, as_published(images, alpha), rtol=0, atol=1e-4)
    assert (ours - images).abs().max() > 0.01
    volumes = images.unflatten(-1, (4, 6))
    torch.manual_seed(3)
    torch.testing.assert_close(mixed(volumes, 1.0, alpha).flatten(-2), ours)
    torch.testing.assert_close(mixed(images[:1], 1.0, alpha), images[:1])


def test_a_batch_is_mixed_as_often_as_said_and_nothing_is_drawn_for_never() -> None:
    images = pictures(4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert mixed(images, 0.0, 0.1) is images
    assert torch.equal(torch.get_rng_state(), before)
    assert 60 < sum(mixed(images, 0.25, 0.1) is not images for _ in range(400)) < 140


@pytest.mark.slow
@pytest.mark.parametrize("name", every(["fedavg", "ditto", "apfl", "fedsam", "prrfl"], ["fedavg", "prrfl"]))
@AFTER
def test_it_is_felt_in_training_alone_and_told_to_nobody(name: str, after: tuple[str, ...], tmp_path: Path) -> None:
    """Methods that step in ways of their own, too; a worker rebuilt for every turn learns the same."""
    run = simulate(name, tmp_path / "a", 2, training=mixing(name, after=after))
    training = mixing(name, after=after)
    assert_same_outcome(run, simulate(name, tmp_path / "b", 2, training=training, transport=Forgetful))
    plain = simulate(name, tmp_path / "c", 2)
    assert run.server.tensors.keys() == plain.server.tensors.keys()
    assert any(not torch.equal(tensor, plain.server["model"][key]) for key, tensor in run.server["model"].items())
    assert not run.server.non_finite()
    assert {row["group"] for row in run.observer.rows("audit")} == {
        row["group"] for row in plain.observer.rows("audit")
    }
    site, answers = toy_sites()["s1"], []
    for worker in (build(name, training), build(name)):
        worker.receive(worker.broadcast(run.server, "s1", EvaluateTask(2, 0)), run.kept["s1"], site)
        answers.append(worker.predict(site.images, worker.own_view))
    assert torch.equal(*answers)


@AFTER
def test_never_mixed_is_as_without(after: tuple[str, ...], tmp_path: Path) -> None:
    never = simulate("fedavg", tmp_path / "a", training=mixing(probability=0.0, after=after))
    assert_same(never.server, simulate("fedavg", tmp_path / "b").server)


@AFTER
def test_only_local_steps_mix_and_masks_stay(after: tuple[str, ...]) -> None:
    method, batch = build("fedavg", mixing(after=after)), next(iter(toy_sites()["s1"].train_batches(0, 1)))
    masks, hooks = batch["mask"].clone(), [len(m._forward_hooks) for m in method.modules()]

    def outputs() -> Tensor:
        torch.manual_seed(1)
        method.model.train()
        return method.model(method.normalize(batch["image"])).detach()

    before = outputs()
    method.on_train_batch_start(batch, 0)
    during, scored = outputs(), method.predict(batch["image"], "global")
    method.on_train_batch_end(None, batch, 0)
    assert not torch.equal(before, during)
    assert torch.equal(before, outputs())
    assert [len(m._forward_hooks) for m in method.modules()] == hooks
    assert torch.equal(batch["mask"], masks)
    assert torch.isfinite(scored).all()


def test_parts_that_are_none_or_have_no_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.9' is no part of the network; did you mean 'encoder\.\d'"):
        build("fedavg", mixing(after=("encoder.9",)))
    method = build("fedavg", mixing(after=("encoder",)))
    batch = next(iter(toy_sites()["s1"].train_batches(0, 1)))
    method.on_train_batch_start(batch, 0)
    with pytest.raises(ValueError, match="name a part inside it"):
        method.loss(batch)


OFF = {"harmonise": "none", "mixstyle_probability": Training().mixstyle_probability}


@pytest.mark.parametrize(("name", "training", "cure", "better"), [
    ("feddg", mixing("feddg"), r"take training\.harmonise=none", OFF),
    ("contrastive", mixing(), r"take training\.harmonise=none", OFF),
    ("fedavg", replace(mixing(), normalize="zscore"), r"take training\.normalize=imagenet", {"normalize": "imagenet"}),
    ("fedavg", replace(mixing(), normalize="zscore"), r"or name parts of the network", {"mixstyle_after": PARTS}),
    ("fedavg", replace(mixing(), harmonise_target="least_complex"), r"take training\.harmonise_target=mean",
     {"harmonise_target": "mean"}),
    ("fedavg", replace(mixing(), pieces=2), r"take training\.pieces=1", {"pieces": 1}),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(name: str, training: Training, cure: str, better: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=cure):
        build(name, training)
    build(name, replace(training, **better))


def test_steps_that_are_private_by_patient_are_refused_and_secure_aggregation_is_not() -> None:
    private, masked = Privacy(mechanism="patient"), Privacy(aggregation="masked")
    method = build("fedavg", mixing(), norm="group", private=PrivateStep(clip=1.0, noise=1.0, patients=1.5))
    with pytest.raises(ValueError, match="styles of different patients' images are mixed"):
        build_transforms(private, Compression(), 1.0)[0].check(method)
    build_transforms(masked, Compression(), 1.0)[0].check(build("fedavg", mixing()))
