"""Images in one style: what it does to images, and to whichever method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.complexity import complexity
from fedseg.algorithms.functional.styles import Amplitude, Histogram, Moments, Style
from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.state import State
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from tests.tiers import every
from tests.world import Forgetful, assert_same, assert_same_outcome, build, simulate, toy_sites

STYLES: dict[str, Style] = {"histogram": Histogram(), "fda": Amplitude(0.05), "zscore": Moments()}
Kind = Literal["histogram", "fda", "zscore"]
every_style = pytest.mark.parametrize("kind", STYLES)


def pictures(count: int = 5, shift: float = 0.0, size: int = 24, seed: int = 0) -> Tensor:
    """Smooth, noisy, and with ties."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 2, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = (0.4 * smooth + 0.1 * torch.rand(count, 2, size, size, generator=generator) + shift).clamp(0, 1)
    return (images * 255).round() / 255


@every_style
def test_an_images_own_style_changes_nothing(kind: str) -> None:
    style, images = STYLES[kind], pictures(1)
    atol = 3 / 255 if kind == "histogram" else 1e-5  # 256 levels of a quantile function
    torch.testing.assert_close(style.towards(style.told([images]))(images), images, rtol=0, atol=atol)


@every_style
def test_images_end_in_the_targets_style_and_twice_is_once(kind: str) -> None:
    style, images = STYLES[kind], pictures(4)
    target = style.told([pictures(3, 0.3, seed=1)])
    module = style.towards(target)
    once = module(images)
    for name, reached in style.told([once]).items():
        torch.testing.assert_close(reached, target[name], rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(module(once), once, rtol=0, atol=1e-2)
    assert (once - images).abs().max() > 0.05


@every_style
def test_images_are_harmonised_one_by_one_and_batches_make_no_difference(kind: str) -> None:
    style, images = STYLES[kind], pictures(5)
    module = style.towards(style.told([pictures(3, 0.3, seed=1)]))
    torch.testing.assert_close(module(images), torch.cat([module(image[None]) for image in images]))
    for name, told in style.told(images.split(2)).items():
        torch.testing.assert_close(told, style.told([images])[name])
    assert style.told([]) == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=16), st.integers(0, 100))
def test_matching_histograms_keeps_the_order_and_ties_of_values(values: list[float], seed: int) -> None:
    images = torch.tensor(values)[None, None, None]
    target = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    matched = Histogram().towards(Histogram().told([target]))(images).flatten()
    for a, b in zip(images.flatten()[:, None], matched[:, None], strict=True):
        assert bool((matched[images.flatten() == a] == b).all())
        assert bool((matched[images.flatten() > a] >= b).all())
    assert target.min() - 1e-6 <= matched.min()
    assert matched.max() <= target.max() + 1e-6


@every_style
def test_constant_images_stay_constant_and_finite(kind: str) -> None:
    style = STYLES[kind]
    done = style.towards(style.told([pictures(3, seed=1)]))(torch.full((1, 2, 24, 24), 0.25))
    if kind != "fda":  # an image without any structure takes the amplitude of structure, at phase 0
        assert done.std(dim=(2, 3)).max() < 1e-6
    assert torch.isfinite(done).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every([
    *((name, "zscore") for name, method in ALGORITHMS.items() if not method.styles_images),
    *((name, "histogram") for name in ("ditto", "scaffold", "fedsm", "perfedavg", "meanteacher")),
], at=0))  # fmt: skip
def test_every_method_takes_harmonised_images_as_its_own(name: str, kind: Kind, tmp_path: Path) -> None:
    """It is felt; nothing but the target is added; a worker rebuilt for every turn learns the same."""
    training = replace(build(name).recipe.training, harmonise=kind)
    outcome = simulate(name, tmp_path / "a", 1, training=training)
    assert not outcome.server.non_finite()
    assert_same_outcome(outcome, simulate(name, tmp_path / "b", 1, training=training, transport=Forgetful))
    plain = simulate(name, tmp_path / "c", 1)
    assert outcome.server.tensors.keys() - plain.server.tensors.keys() == {"style/target"}
    assert {row["group"] for row in outcome.observer.rows("audit")} - {
        row["group"] for row in plain.observer.rows("audit")
    } == {"style"}
    worker, there = build(name, training), {**toy_sites()}["s1"]
    before = worker.normalize(there.images)
    worker.receive(State({"style/target": outcome.server["style/target"]}), State(), there)
    assert (worker.normalize(there.images) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*STYLES, "combat"])
def test_images_change_and_masks_stay(kind: Any) -> None:
    sites, worker = toy_sites(), build("fedavg", Training(harmonise=kind))
    server = worker.init_server({name: worker.introduce(site) for name, site in sites.items()})
    worker.receive(worker.broadcast(server, "s1", EvaluateTask(1, 0)), State(), sites["s1"])
    (batch,) = sites["s1"].train_batches(0, 1)
    images, masks = batch["image"].clone(), batch["mask"].clone()
    inputs = worker.normalize(images)
    assert not torch.equal(inputs, build("fedavg").normalize(images))
    assert torch.equal(worker.loss(batch), worker.recipe.loss(worker.model(inputs), masks))
    assert torch.equal(batch["image"], images)
    assert torch.equal(batch["mask"], masks)


@pytest.mark.slow
@every_style
def test_a_resumed_run_is_harmonised_as_it_began(kind: Kind, tmp_path: Path) -> None:
    training = Training(lr=1e-2, harmonise=kind)
    whole = simulate("fedavg", tmp_path / "a", 3, training=training)
    simulate("fedavg", tmp_path / "b", 1, training=training)
    assert_same(simulate("fedavg", tmp_path / "b", 3, training=training).server, whole.server)


def test_sites_that_differ_in_brightness_and_contrast_alone_become_alike() -> None:
    images = pictures(4)
    for kind, style in STYLES.items():
        bright = (0.5 * images + 0.3).clamp(0, 1)
        target = style.told([images])
        module = style.towards(target)
        apart = (module(bright) - module(images)).abs().mean()
        assert apart < (0.2 if kind == "fda" else 0.05) * (bright - images).abs().mean()


def test_complexity_is_the_entropy_of_histograms_and_the_variance_of_means() -> None:
    images = pictures(4)
    shares = [np.bincount((channel * 255).round().long().flatten().numpy(), minlength=256) / 24**2
              for image in images for channel in image]  # fmt: skip
    entropies = [-(share[share > 0] * np.log2(share[share > 0])).sum() for share in shares]
    told = complexity(images.split(3))
    assert float(told["entropy"]) == pytest.approx(np.mean(entropies))
    assert float(told["spread"]) == pytest.approx(images.mean(dim=(1, 2, 3)).var(correction=0).item(), rel=1e-5)
    flat, noise = torch.full((1, 1, 16, 16), 0.3), torch.arange(256).view(1, 1, 16, 16) / 255
    assert [float(complexity([one])["entropy"]) for one in (flat, noise)] == [0, 8]
    assert complexity([]) == {}


@pytest.mark.slow
@every_style
def test_the_least_complex_site_is_the_target_and_keeps_its_images(kind: Kind, tmp_path: Path) -> None:
    """Of what sites say nothing but its style is left; a worker rebuilt for every turn learns the same."""
    sites = toy_sites()
    sites["s1"].images = (sites["s1"].images * 8).round() / 8  # few grey levels, hence little entropy
    training = Training(lr=1e-2, harmonise=kind, harmonise_target="least_complex")
    run = simulate("fedavg", tmp_path / "a", 1, training=training, sites=sites)
    assert_same_outcome(run, simulate("fedavg", tmp_path / "b", 1, training=training, sites=sites, transport=Forgetful))
    worker = build("fedavg", training)
    own = worker.style.told([sites["s1"].images])
    for name, tensor in run.server["style/target"].items():
        torch.testing.assert_close(tensor, own[name])
    plain = build("fedavg").normalize
    for name in ("s0", "s1", "s2", "new"):
        site = sites.get(name, sites["s0"])
        worker.receive(worker.broadcast(run.server, name, EvaluateTask(1, 0)), State(), site)
        assert torch.equal(worker.normalize(site.images), plain(site.images)) == (name == "s1")
    told = [row for row in run.observer.rows("audit") if row["task"] == "introduce"]
    assert {row["group"] for row in told if row["group"] != "(numbers)"} == {"style", "complexity"}
    assert {row["group"] for row in run.observer.rows("traffic") if row["round"] == 0} == {"style", "complexity"}


def test_of_equally_complex_sites_the_one_of_even_images_is_the_target() -> None:
    method = build("fedavg", Training(harmonise="zscore", harmonise_target="least_complex"))
    style = Moments().told([pictures(1)])
    told = {site: State({"style": style, "complexity": {"entropy": torch.tensor(5.0), "spread": torch.tensor(spread)}})
            for site, spread in (("a", 0.2), ("c", 0.1), ("b", 0.1))}  # fmt: skip
    assert method.agreed(told).scalars == {"style/target/b": 5.0}


@pytest.mark.parametrize(("name", "training", "cure"), [
    ("pooled", Training(harmonise="fda", harmonise_target="least_complex"), r"take training\.harmonise_target=mean"),
    ("feddg", Training(harmonise="fda"), r"take training\.harmonise=none"),
    ("harmofl", Training(harmonise="histogram"), r"take training\.harmonise=none"),
    ("fedavg", Training(normalize="zscore", harmonise="zscore"),
     r"take training\.harmonise=none, or training\.normalize=imagenet"),
])  # fmt: skip
def test_what_would_be_undone_is_refused(name: str, training: Training, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        build(name, training)
    build(name, replace(training, harmonise="none", harmonise_target="mean"))
    if name == "pooled":
        build(name, replace(training, harmonise_target="mean"))
    if name == "fedavg":
        build(name, replace(training, normalize="imagenet"))


@pytest.mark.parametrize("promise", [Privacy(aggregation="masked"), Privacy(mechanism="site")])
def test_promises_that_what_sites_tell_would_break_are_refused(promise: Privacy) -> None:
    (transform,) = build_transforms(promise, Compression(), 1.0)
    transform.check(build("fedavg"))
    with pytest.raises(ValueError, match=r"\(introduces\)"):
        transform.check(build("fedavg", Training(harmonise="fda")))
