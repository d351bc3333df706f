"""HarmoFL: amplitudes and losses against the authors' arrays, and what sites tell of their images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedseg.algorithms.functional.styles import Amplitude
from fedseg.algorithms.recipe import Training
from fedseg.algorithms.stock import dice
from fedseg.federation.contract import Batch, EvaluateTask
from fedseg.federation.state import State
from fedseg.launch.folders.saved import NamedSite
from fedseg.models.losses import build_loss
from fedseg.models.select import everything
from tests.lines import golden
from tests.world import ToySite, assert_same, build, simulate, toy_sites

ARCHIVES = pytest.mark.parametrize("archive", ["harmofl_ampnorm_s11", "harmofl_ampnorm_s12"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@dataclass
class StyledSite(ToySite):
    """Its images went through a module, batch by batch: an FFT of several images rounds with their number."""

    module: nn.Module = field(default_factory=nn.Identity)

    def _batch(self, pick: Tensor) -> Batch:
        batch = super()._batch(pick)
        return {**batch, "image": self.module(batch["image"])}


def half(amplitude: Tensor) -> Tensor:
    """An amplitude of the whole transform, as styles hold it."""
    return amplitude[..., : amplitude.shape[-1] // 2 + 1] / amplitude[0].numel()


@ARCHIVES
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_running_amplitude_is_the_programs_or_the_intended_one(archive: str, batches: int) -> None:
    data = golden(archive)
    for momentum, running in ((0.0, "official_running"), (0.1, "ema01_running")):
        told = Amplitude(None, momentum).told(data["x"][:batches])["amplitude"]
        close(told, half(data[running][batches - 1]))


@ARCHIVES
def test_images_take_the_programs_amplitude(archive: str) -> None:
    data = golden(archive)
    official = Amplitude(0.0, 0.0)
    module = official.towards(official.told(data["x"]))
    for images, expected in zip(data["x"], data["official_out"], strict=True):
        close(module(images), expected)
    close(module(data["x"][2]), data["official_fixed_out_last"])
    for fraction, name in ((0.0, "normalize_L000"), (0.1, "normalize_L010"), (0.25, "normalize_L025"),
                           (0.5, "normalize_L050"), (None, "full_swap")):  # fmt: skip
        style = Amplitude(fraction, 0.1)
        close(style.towards(style.told(data["x"]))(data["x"][0]), data[name])


def test_the_programs_loss_is_that_of_two_settings() -> None:
    data = golden("harmofl_loss_s31")
    logits, mask = data["logits"].float().requires_grad_(), data["label"].float()
    dice, joint = (build_loss(name, "softmax") for name in ("smooth_dice", "ce"))
    value = dice(logits, mask)
    loss = (value + joint(logits, mask)) / 2
    assert value.item() == pytest.approx(float(data["dice_loss"]), rel=1e-5)
    assert loss.item() == pytest.approx(float(data["joint_loss"]), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0].double(), data["joint_grad"], rtol=1e-3, atol=1e-7)


def test_the_programs_score_is_the_suites_dice_with_the_background_as_a_region() -> None:
    """But for the 1e-5 that the program adds below; both classes are in every image."""
    data = golden("harmofl_loss_s31")
    answer, mask = (
        one_hot(classes.long(), 2).movedim(-1, 1) for classes in (data["logits"].argmax(dim=1), data["label"][:, 0])
    )
    found = dice(answer.bool(), mask.double())
    assert len(found) == mask.shape[0] * 2
    assert found.mean().item() == pytest.approx(float(data["dice_coef_incl_bg"]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("amplitude", ["official", "window", "full"])
def test_unperturbed_it_is_fedavg_on_images_of_the_mean_amplitude(amplitude: str, tmp_path: Path) -> None:
    harmofl = simulate("harmofl", tmp_path / "a", rho=0.0, amplitude=amplitude)
    target = harmofl.server.tensors.pop("style/target")
    module = build("harmofl", amplitude=amplitude).style.towards(target)
    sites = {name: StyledSite(**vars(site), module=module) for name, site in toy_sites().items()}
    assert_same(harmofl.server, simulate("fedavg", tmp_path / "b", sites=sites).server)


@pytest.mark.slow
def test_sites_tell_amplitudes_once_and_the_target_is_their_mean(tmp_path: Path) -> None:
    outcome = simulate("harmofl", tmp_path, momentum=0.5)
    told = [row for row in outcome.observer.rows("audit") if row["group"] == "style"]
    assert [(row["site"], row["round"], row["task"]) for row in told] == [(f"s{i}", 0, "introduce") for i in range(3)]
    style = Amplitude(0.1, 0.5)
    single = [style.told(batch["image"] for batch in toy_sites()[f"s{i}"].plain_batches()) for i in range(3)]
    mean = torch.stack([one["amplitude"] for one in single]).mean(dim=0)
    assert torch.equal(outcome.server["style/target"]["amplitude"], mean)
    sent = {row["direction"] for row in outcome.observer.rows("traffic") if row["group"].startswith("style")}
    assert sent == {"up", "down"}


def test_a_site_without_training_images_tells_nothing_and_takes_the_target() -> None:
    worker, site = build("harmofl"), toy_sites()["s1"]
    empty = NamedSite("s2")
    told = {"s1": worker.introduce(site), "s2": worker.introduce(empty)}
    assert not told["s2"].tensors
    message = worker.broadcast(worker.init_server(told), "s2", EvaluateTask(1, 7))
    before = worker.normalize(site.images)
    worker.receive(message, State(), empty)
    assert not torch.equal(worker.normalize(site.images), before)


def test_styles_of_two_shapes_are_refused_by_the_sites_name() -> None:
    worker, site = build("harmofl"), toy_sites()["s1"]
    other = replace(site, images=site.images.repeat(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"site 's2' tells a style of .* site 's1' one of .*data\.size"):
        worker.init_server({"s1": worker.introduce(site), "s2": worker.introduce(other)})


def test_a_mean_grey_that_normalising_takes_away_is_refused() -> None:
    training = Training(normalize="zscore")
    with pytest.raises(ValueError, match=r"take training\.normalize=imagenet, or algorithm\.amplitude=window"):
        build("harmofl", training, amplitude="official")
    build("harmofl", training, amplitude="window")
    build("harmofl", Training(normalize="imagenet"), amplitude="official")


def test_a_target_is_no_part_of_the_model() -> None:
    worker = build("harmofl")
    told = worker.introduce(toy_sites()["s1"])
    worker.receive(worker.init_server({"s1": told}), State(), toy_sites()["s1"])
    assert worker.state_dict().keys() == build("fedavg").state_dict().keys()
    assert everything(worker.model) == everything(build("fedavg").model)
