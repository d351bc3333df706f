"""ComBat of grey values: what sets sites apart goes, how images of a site differ stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedseg.algorithms.functional.combat import Combat, adjustments
from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.state import State, Tensors
from tests.lines import golden
from tests.test_harmonised import pictures
from tests.world import Forgetful, assert_same, assert_same_outcome, build, simulate, toy_sites

COMBAT = Training(lr=1e-2, harmonise="combat")


def sums(features: Tensor, times: int = 1) -> Tensors:
    """What a site tells of images with these features, each of which it has so many times."""
    return {
        "images": torch.tensor(times * len(features)),
        "sum": times * features.sum(0),
        "squares": times * features.square().sum(0),
    }


def random_sites(seed: int = 0) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    shape = {"a": 5, "b": 9, "c": 30}
    return {
        s: torch.tensor(random.normal(0.4 + 0.1 * i, 0.1 + 0.05 * i, (n, 20))) for i, (s, n) in enumerate(shape.items())
    }


def adjusted(sites: dict[str, Tensor], found: dict[str, Tensors]) -> dict[str, Tensor]:
    return {site: found[site]["scale"] * features + found[site]["shift"] for site, features in sites.items()}


def test_features_are_adjusted_as_by_neurocombat_up_to_a_constant() -> None:
    """The archive holds what neuroCombat 0.2.12 makes of the pooled features, iterated to 1e-10 instead of 1e-4."""
    data = golden("combat_neurocombat")
    features, site = data["features"], data["site"]
    sites = {str(number): features[site == number] for number in range(3)}
    ours = torch.cat(list(adjusted(sites, adjustments({name: sums(rows) for name, rows in sites.items()})).values()))
    count, centre = len(features), features.mean(dim=0)
    theirs = centre + (data["adjusted"] - centre) * (count / (count - len(sites))) ** 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - features).abs().max() > 0.1


def test_with_many_images_nothing_is_shrunk_and_sites_are_standardised_one_by_one() -> None:
    sites = random_sites()
    every = adjusted(sites, adjustments({site: sums(rows, 10**9) for site, rows in sites.items()}))
    counts = torch.tensor([len(rows) for rows in sites.values()], dtype=torch.float64)
    centre = torch.cat(list(sites.values())).mean(dim=0)
    within = torch.stack([rows.var(0, correction=0) for rows in sites.values()])
    spread = ((counts[:, None] * within).sum(dim=0) / counts.sum()).sqrt()
    for site, rows in sites.items():
        standard = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
        torch.testing.assert_close(every[site], centre + spread * standard, rtol=0, atol=1e-4)


def test_with_few_images_locations_and_scales_are_drawn_together() -> None:
    sites = random_sites()
    few, many = (adjustments({site: sums(rows, n) for site, rows in sites.items()}) for n in (1, 10**6))
    for site in sites:
        assert few[site]["scale"].std() < 0.9 * many[site]["scale"].std()


@pytest.mark.parametrize("count", [2, 30])
def test_sites_alike_are_left_alone(count: int) -> None:
    style, images = Combat(), pictures(count)
    told = style.told(images.split(4))
    found = adjustments(dict.fromkeys("abc", told))
    for target in found.values():
        torch.testing.assert_close(target["scale"], torch.ones_like(target["scale"]))
        torch.testing.assert_close(target["shift"], torch.zeros_like(target["shift"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(style.towards(found["a"])(images), images, rtol=0, atol=4 / 255)  # 256 quantiles
    features = style.features.quantiles(images).double()
    for name, expected in sums(features).items():
        torch.testing.assert_close(told[name], expected)
    assert style.told([]) == {}


def test_devices_go_and_patients_stay() -> None:
    """Devices differ in brightness and contrast; within a site images differ by a brightness of their own."""
    style, shades = Combat(), torch.linspace(-0.1, 0.1, 8)[:, None, None, None]
    base = pictures(8) + shades
    sites = {"dark": 0.5 * base, "plain": base, "bright": 0.6 * pictures(8, seed=1) + 0.6 * shades + 0.3}
    found = adjustments({site: style.told([images]) for site, images in sites.items()})
    done = {site: style.towards(found[site])(images) for site, images in sites.items()}

    def apart(images: dict[str, Tensor]) -> float:
        means = torch.stack([found.mean() for found in images.values()])
        return float(means.max() - means.min())

    assert apart(done) < 0.1 * apart(sites)
    for site, images in sites.items():
        before, after = (x.mean(dim=(1, 2, 3)) for x in (images, done[site]))
        assert torch.equal(before.argsort(), after.argsort())
        assert after.std() > 0.5 * base.mean(dim=(1, 2, 3)).std()
        for image, result in zip(images.flatten(2).flatten(0, 1), done[site].flatten(2).flatten(0, 1), strict=True):
            assert (result[image.argsort()].diff() >= -1e-6).all()  # the order of grey values


def test_what_does_not_vary_within_sites_is_shifted_and_copies_of_one_image_are_no_trouble() -> None:
    flat = {"a": torch.full((4, 3), 0.2), "b": torch.full((4, 3), 0.6)}
    for site, rows in adjusted(flat, adjustments({site: sums(rows.double()) for site, rows in flat.items()})).items():
        torch.testing.assert_close(rows, torch.full_like(rows, 0.4), msg=site)
    copies = {"a": pictures(1).expand(4, -1, -1, -1), "b": pictures(6, seed=1)}
    found = adjustments({site: Combat().told([images]) for site, images in copies.items()})
    for site, images in copies.items():
        assert torch.isfinite(Combat().towards(found[site])(images)).all()


@pytest.mark.slow
def test_every_site_gets_its_own_adjustment_and_others_none(tmp_path: Path) -> None:
    run = simulate("fedavg", tmp_path / "a", 2, training=COMBAT)
    assert_same_outcome(run, simulate("fedavg", tmp_path / "b", 2, training=COMBAT, transport=Forgetful))
    simulate("fedavg", tmp_path / "c", 1, training=COMBAT)
    assert_same(simulate("fedavg", tmp_path / "c", 2, training=COMBAT).server, run.server)
    worker, plain, sites = build("fedavg", COMBAT), build("fedavg").normalize, toy_sites()
    told = adjustments({name: worker.style.told([site.images]) for name, site in sites.items() if name.startswith("s")})
    for name in ("s0", "s1", "s2", "new"):
        site = sites.get(name, sites["s0"])
        message = worker.broadcast(run.server, name, EvaluateTask(1, 0))
        worker.receive(message, State(), site)
        if name == "new":
            assert torch.equal(worker.normalize(site.images), plain(site.images))
        else:
            assert_same(State({"": message["style/target"]}), State({"": told[name]}))
            assert (worker.normalize(site.images) - plain(site.images)).abs().max() > 0.05
    rows = run.observer.rows("traffic")
    assert {row["bytes"] for row in rows if row["round"] == 0} == {8 * (2 * 3 * 256 + 1)}
    assert {row["bytes"] for row in rows if row["group"] == "style/target"} == {4 * 2 * 3 * 256}
    first = [row for row in run.observer.rows("audit") if row["task"] == "introduce" and row["group"] != "(numbers)"]
    assert {row["group"] for row in first} == {"style"}


@pytest.mark.parametrize(("name", "training", "cure"), [
    ("pooled", COMBAT, r"take training\.harmonise=histogram"),
    ("feddg", COMBAT, r"take training\.harmonise=none"),
    ("fedavg", replace(COMBAT, harmonise_target="least_complex"), r"take training\.harmonise_target=mean"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(name: str, training: Training, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        build(name, training)
    build(name, Training(harmonise="none" if name == "feddg" else "histogram"))


def test_a_site_with_one_image_cannot_say_how_its_images_differ() -> None:
    method, one, more = build("fedavg", COMBAT), Combat().told([pictures(1)]), Combat().told([pictures(2)])
    with pytest.raises(ValueError, match=r"site 'b' has one training image.* give it another one, or take training"):
        method.agreed({"a": State({"style": more}), "b": State({"style": one})})
    assert len(method.agreed({"a": State({"style": more}), "b": State({"style": more})}).tensors) == 2
