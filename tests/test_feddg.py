"""FedDG: what travels and to whom, the step against the authors' numbers, and what must hold on any network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.feddg import Donors, Embedding, FedDG
from fedseg.algorithms.functional.fourier import low_frequency_amplitude, mix_amplitude
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.configs.compose import compose
from fedseg.datamodules import PhantomDataModule
from fedseg.federation.client import turn
from fedseg.federation.contract import Batch, QueryTask, Task, TrainTask
from fedseg.federation.state import State, Tensors, Update
from fedseg.federation.transport import InProcess
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_model
from tests.world import CPU, POOL, Outcome, ToySite, assert_same, build, evaluate, simulate, toy_sites

OFF = {"meta_weight": 0.0, "contrast_weight": 0.0}
MOMENTUM = Training(optimizer="sgd", lr=0.05, momentum=0.9)


class Recording(InProcess):
    """Remembers what travelled."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        log = self.__dict__.setdefault("log", [])
        for update in super().ask(tasks, messages):
            log.append((tasks[update.site], update.site, messages[update.site], update))
            yield update


def method(**knobs: Any) -> FedDG:
    made = build("feddg", **knobs)
    assert isinstance(made, FedDG)
    return made


def introductions(sites: Mapping[str, ToySite], **knobs: Any) -> dict[str, State]:
    task = QueryTask("introduce", 0, 7)
    told = {}
    for name, site in sites.items():
        if name != POOL:
            told[name], kept = turn(method(**knobs), site, task, State(), State(), CPU, evaluate)
            assert not kept.tensors, "a site keeps nothing of its own introduction"
    return told  # type: ignore[return-value]


def bank(amplitudes: Tensor, size: tuple[int, int] = (12, 12)) -> Tensors:
    return {"amplitude": amplitudes, "size": torch.tensor(size)}


def with_donors(worker: FedDG, sites: int = 2, each: int = 3, size: int = 12) -> FedDG:
    """Donors of other brightness and colour than the toy sites'."""
    generator = torch.Generator().manual_seed(5)
    banks = {}
    for site in range(sites):
        images = (0.3 + 0.2 * site) * torch.rand(each, 3, size, size, generator=generator) + 0.2 * site
        banks[f"bank/d{site}"] = bank(low_frequency_amplitude(images, worker.half_width), (size, size))
    worker.donors = Donors(banks)
    return worker


def toy_batch() -> Batch:
    return toy_sites()["s1"].train_batches(seed=1, steps=1)[0]


def gradient(worker: FedDG, batch: Batch, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The loss of a batch and its gradient, as one vector."""
    torch.manual_seed(seed)
    worker.zero_grad()
    loss = worker.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in worker.model.parameters()]
    return loss.detach(), torch.cat([g.flatten() for g in found])


# ------------------------------------------------------------------------------------------------------ what travels


def test_f17_a_bank_is_the_crop_of_every_training_image_and_its_size_no_more() -> None:
    site = toy_sites()["s1"]
    told = introductions({"s1": site}, half_width=2)["s1"]
    assert set(told.tensors) == {"bank"}
    assert set(told["bank"]) == {"amplitude", "size"}
    crops = told["bank"]["amplitude"]
    assert crops.shape == (6, 3, 5, 5)
    assert crops.dtype == torch.float32
    assert told["bank"]["size"].tolist() == [12, 12]
    assert told.sizes() == {"bank": 6 * 3 * 25 * 4 + 2 * 8}
    expected = torch.fft.fftshift(torch.fft.fft2(site.images.double()).abs(), dim=(-2, -1))[..., 4:9, 4:9]
    order = [int((expected - crop).abs().amax((1, 2, 3)).argmin()) for crop in crops]
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(crops.double(), expected[order], rtol=1e-5, atol=1e-4)


def test_a_bank_is_in_random_order_and_may_be_a_share() -> None:
    site = ToySite.make("s9", 0, count=20)
    everything = introductions({"s9": site})["s9"]["bank"]["amplitude"]
    in_order = low_frequency_amplitude(site.images, 1)
    assert not torch.equal(everything, in_order)
    torch.testing.assert_close(everything.sum(0), in_order.sum(0))
    assert len(introductions({"s9": site}, bank_share=0.125)["s9"]["bank"]["amplitude"]) == math.floor(20 / 8)
    assert len(introductions({"s9": site}, bank_share=0.01)["s9"]["bank"]["amplitude"]) == 1
    assert_same(*(State(introductions({"s9": site})["s9"].tensors) for _ in range(2)))


def test_the_window_may_be_a_share_of_the_spectrum() -> None:
    told = introductions({"s1": toy_sites()["s1"]}, window=0.26)["s1"]
    assert told["bank"]["amplitude"].shape[-1] == 2 * math.floor(0.26 * 12) + 1


def journey(tmp_path: Path, **knobs: Any) -> tuple[Outcome, list[tuple[Task, str, State, Update]]]:
    sites = {**toy_sites(), "out": replace(ToySite.make("out", 3), seen=False)}
    trained = {name: site for name, site in sites.items() if site.seen}
    outcome = simulate("feddg", tmp_path, transport=Recording, sites=trained, **knobs)
    way: Any = outcome.federation.transport
    way.sites = sites
    outcome.federation.evaluate(outcome.server, outcome.federation.schedule.rounds, ["out"], ("test",))
    return outcome, way.log


def groups(state: State) -> set[str]:
    return {group for group in state.tensors if group.startswith("bank")}


@pytest.mark.slow
def test_f7_a_site_receives_every_others_bank_once_and_never_its_own(tmp_path: Path) -> None:
    outcome, log = journey(tmp_path, rounds=3)
    everybody = {"bank/s0", "bank/s1", "bank/s2"}
    for task, site, message, update in log:
        first = task.kind == "train" and task.round == 1
        assert groups(message) == (everybody - {f"bank/{site}"} if first else set()), (task, site)
        assert groups(update) == ({"bank"} if task.kind == "introduce" else set()), (task, site)
    for site, kept in outcome.kept.items():
        if site in ("s0", "s1", "s2"):
            assert groups(kept) == everybody - {f"bank/{site}"}
    travelled = {
        (row["round"], row["site"], row["direction"], row["group"], row["bytes"])
        for row in outcome.observer.rows("traffic")
        if row["group"].startswith("bank")
    }
    size = {"s0": 4, "s1": 6, "s2": 8}
    size = {site: images * 3 * 9 * 4 + 16 for site, images in size.items()}
    up = {(0, site, "up", "bank", size[site]) for site in size}
    down = {(1, site, "down", f"bank/{other}", size[other]) for site in size for other in size if other != site}
    assert travelled == up | down


def test_an_unseen_site_neither_gives_nor_receives(tmp_path: Path) -> None:
    _, log = journey(tmp_path)
    visits = [(task, message, update) for task, site, message, update in log if site == "out"]
    assert [task.kind for task, _, _ in visits] == ["evaluate"]
    assert not any(groups(message) or groups(update) for _, message, update in visits)
    worker = method()
    server = worker.init_server(introductions(toy_sites()))
    assert not groups(worker.broadcast(server, "out", TrainTask(1, 7)))


def test_a_site_that_joins_late_receives_the_banks_when_it_does(tmp_path: Path) -> None:
    _, log = journey(tmp_path, rounds=6, schedule={"fraction": 0.34})
    turns: dict[str, list[bool]] = {}
    for task, site, message, _ in log:
        if task.kind == "train":
            turns.setdefault(site, []).append(bool(groups(message)))
    assert len(turns) > 1
    assert any(len(received) > 1 for received in turns.values())
    for received in turns.values():
        assert received == [True] + [False] * (len(received) - 1)


def test_a_site_that_lost_its_banks_is_told_so() -> None:
    worker = method()
    server = worker.init_server(introductions(toy_sites()))
    server.scalars["bank_held/s1"] = 1.0
    message = worker.broadcast(server, "s1", TrainTask(2, 7, steps=1))
    with pytest.raises(RuntimeError, match="site 's1' holds 0 spectra of other sites, not the 12 "):
        turn(method(), toy_sites()["s1"], TrainTask(2, 7, steps=1), message, State(), CPU, evaluate)


def test_a_site_without_labels_lends_its_style(tmp_path: Path) -> None:
    sites = toy_sites()
    sites["s2"] = replace(sites["s2"], labelled=False)
    outcome = simulate("feddg", tmp_path, sites=sites)
    assert len(outcome.server["bank/s2"]["amplitude"]) == 8
    assert {row["site"]: row["steps"] for row in outcome.observer.rows("rounds")} == {"s0": 3, "s1": 3, "s2": 0}
    assert_same(outcome.kept["s0"], simulate("feddg", tmp_path, sites=sites).kept["s0"])


def test_plain_batches_are_all_training_images_as_they_are() -> None:
    data = PhantomDataModule(
        n_sites=2, cases_per_site=12, resolution=32, size=32, batch_size=4, augment="strong", labelled_patients=2
    )
    data.setup()
    site = data.site("site_01")
    batches = list(site.plain_batches())
    names = [name for batch in batches for name in batch["case"]]
    rows = [row for row in data.splits() if row["site"] == "site_01" and row["split"] == "train"]
    assert sorted(names) == sorted(row["case"] for row in rows)
    assert len(names) == site.training_images > site.examples
    assert not any("mask" in batch for batch in batches)
    for name, image in zip(names, torch.cat([batch["image"] for batch in batches]), strict=True):
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), site.image(name)[0])


# ------------------------------------------------------------------------------------------------------ re-styling


def test_every_style_is_a_mixture_with_a_donor_of_another_site() -> None:
    worker = with_donors(method(donor_weight=0.7, styles=3), sites=3)
    images = toy_batch()["image"]
    torch.manual_seed(3)
    restyled = worker.restyle(images)
    assert restyled.shape == (3 * len(images), 3, 12, 12)
    assert restyled.min() >= 0
    assert restyled.max() <= 1
    for index, image in enumerate(images):
        used = set()
        for style in restyled[index :: len(images)]:
            found = [
                name
                for name, donors in worker.donors.banks.items()
                for crop in donors["amplitude"]
                if torch.allclose(mix_amplitude(image[None], crop[None], 0.7)[0].clamp(0, 1), style, atol=1e-5)
            ]
            assert len(found) == 1
            used.add(found[0])
        assert used == set(worker.donors.banks), "each site serves once before any serves again"


def test_donor_sites_and_their_spectra_are_drawn_uniformly() -> None:
    torch.manual_seed(0)
    donors = Donors({f"bank/{n}": bank(torch.arange(n, n + count).float().view(-1, 1, 1, 1)) for n, count in SIZES})
    drawn = donors.draw(12000, 1).flatten().long()
    for start, count in SIZES:
        mine = drawn[(drawn >= start) & (drawn < start + count)]
        assert len(mine) / 12000 == pytest.approx(1 / 3, abs=0.03)
        shares = torch.bincount(mine - start, minlength=count) / len(mine)
        torch.testing.assert_close(shares, torch.full((count,), 1 / count), rtol=0, atol=0.03)


SIZES = [(100, 1), (200, 4), (300, 16)]


def test_rates_are_continuous_and_their_own_for_every_image() -> None:
    worker = with_donors(method(half_width=0), sites=1, each=1)
    dark = torch.full((400, 3, 12, 12), 0.2)
    shift = worker.restyle(dark).mean((1, 2, 3)) - 0.2
    full = with_donors(method(half_width=0, donor_weight=1.0), sites=1, each=1).restyle(dark[:1]).mean() - 0.2
    rates = shift / full
    assert len(rates.unique()) > 390
    assert 0 <= rates.min() < 0.05
    assert 0.95 < rates.max() <= 1.001
    assert float(rates.mean()) == pytest.approx(0.5, abs=0.05)


def test_the_release_swaps_the_mean_colour_and_nothing_else() -> None:
    worker = with_donors(method(**released()), sites=1, each=1)
    image = 0.5 + 0.05 * torch.rand(1, 3, 12, 12)
    shift = worker.restyle(image) - image
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
    (donors,) = worker.donors.banks.values()
    expected = donors["amplitude"].flatten() / 144 - image.mean((2, 3)).flatten()
    torch.testing.assert_close(shift.mean((2, 3)).flatten(), expected, rtol=0, atol=1e-5)


def test_f1_without_a_donors_share_the_outer_image_is_the_inner_one() -> None:
    images = toy_batch()["image"]
    torch.testing.assert_close(with_donors(method(donor_weight=0.0)).restyle(images), images, rtol=0, atol=1e-5)
    assert torch.equal(method().restyle(images), images)


# ------------------------------------------------------------------------------------------------------ the local step


class Golden(nn.Module):
    """The network of the golden episode, with logits instead of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.segmentation_head = nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmentation_head(self.c2(self.c1(images).relu()).relu())
        return logits


def plain_recipe() -> Recipe:
    recipe = Recipe.build(Training(channels_last=False), "sigmoid", 3)
    return replace(recipe, normalize=nn.Identity())


@pytest.mark.parametrize("prefix", ["a", "b"])
@pytest.mark.parametrize("second_order", [False, True])
def test_f10_f12_the_step_equals_the_authors(prefix: str, second_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(Path(__file__).parent / "golden" / "feddg_episode.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    network = Golden().double()
    weights = {key[2:].replace("seg.", "segmentation_head."): t for key, t in arrays.items() if key.startswith("w_")}
    network.load_state_dict(weights)
    step, clip = arrays[f"{prefix}_alpha_clip"].tolist()
    worker = FedDG(network, plain_recipe(), **{**released(), "step": step, "clip": clip, "second_order": second_order})
    monkeypatch.setattr(worker, "restyle", lambda images: arrays["image_shifted"].double())
    loss = worker.loss({"image": arrays["image"].double(), "mask": arrays["label"].double()})
    loss.backward()  # type: ignore[no-untyped-call]
    # the method's probabilities are float32, whatever its network is; tests of the functional parts go to 1e-8
    order = "so" if second_order else "fo"
    assert loss.item() == pytest.approx(float(arrays[f"{prefix}_{order}_losses"][3]), abs=1e-6)
    for name, weight in network.named_parameters():
        expected = arrays[f"{prefix}_{order}_grad_{name.replace('segmentation_head.', 'seg.')}"]
        torch.testing.assert_close(weight.grad, expected.double(), rtol=0, atol=1e-7)
        assert torch.equal(weight, weights[name])


def test_second_order_and_first_order_differ_where_the_step_is_large() -> None:
    def at(step: float, second_order: bool) -> Tensor:
        torch.manual_seed(0)
        return gradient(with_donors(method(step=step, second_order=second_order)), toy_batch())[1]

    assert torch.equal(at(0.0, False), at(0.0, True))
    assert not torch.allclose(at(0.5, False), at(0.5, True), rtol=1e-2)
    torch.testing.assert_close(at(1e-5, False), at(1e-5, True), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("training", [Training(lr=1e-2), MOMENTUM], ids=["adam", "momentum"])
def test_without_an_episode_it_is_fedavg_bit_for_bit(tmp_path: Path, training: Training) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", training=training).server
    server = simulate("feddg", tmp_path / "b", training=training, **OFF).server
    assert_same(State({group: server[group] for group in fedavg.tensors}), fedavg)
    changed = simulate("feddg", tmp_path / "c", training=training).server
    assert not torch.equal(changed["model"]["encoder.0.weight"], fedavg["model"]["encoder.0.weight"])


def test_f13_without_step_and_style_the_meta_loss_is_the_task_loss_again() -> None:
    batch = toy_batch()
    twice, _ = gradient(method(step=0.0, contrast_weight=0.0, meta_weight=1.0), batch)
    once, _ = gradient(method(**OFF), batch)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moves", [False, True])
def test_running_statistics_come_from_raw_images_unless_asked(moves: bool) -> None:
    batch = toy_batch()
    worker, plain = with_donors(method(outer_updates_statistics=moves)), method(**OFF)
    gradient(worker, batch)
    gradient(plain, batch)
    found, expected = dict(worker.model.named_buffers()), dict(plain.model.named_buffers())
    assert all(torch.equal(found[name], expected[name]) for name in expected) is not moves


@pytest.mark.parametrize("preset", ["ours", "paper", "released"])
def test_empty_and_image_filling_structures_leave_everything_finite(preset: str) -> None:
    presets = {"ours": {}, "paper": {"denominator": "negatives"}, "released": released()}
    worker = with_donors(method(**presets[preset]))
    batch = toy_batch()
    batch["mask"] = batch["mask"].clone()
    batch["mask"][0] = 0  # nothing in one image
    batch["mask"][:, 1] = 0  # a region that no image has
    for fill in (batch["mask"], torch.zeros_like(batch["mask"]), torch.ones_like(batch["mask"])):
        loss, grad = gradient(worker, {**batch, "mask": fill})
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


@pytest.mark.parametrize("denominator", ["positive_and_negatives", "negatives"])
def test_the_contrast_alone_pulls_boundary_and_background_apart(denominator: str) -> None:
    torch.manual_seed(0)
    worker = with_donors(method(meta_weight=0.0, contrast_weight=5.0, denominator=denominator))
    batch = toy_batch()
    optimizer = torch.optim.SGD(worker.parameters(), lr=0.05)

    def contrast() -> float:
        with torch.no_grad():
            return float(
                worker.contrast((Embedding(worker.model)(worker.normalize(batch["image"]))[1],) * 2, batch["mask"])
            )

    before = contrast()
    for _ in range(20):
        gradient(worker, batch)
        optimizer.step()
    after = contrast()
    assert after < before - 1 if denominator == "negatives" else 0 <= after < before / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "stride"), [("unet", 1), ("unetplusplus", 1), ("fpn", 4), ("deeplabv3plus", 4), ("pspnet", 8)]
)
def test_any_network_learns_from_a_step(architecture: str, stride: int) -> None:
    torch.manual_seed(0)
    encoder = "tu-resnet10t" if architecture != "pspnet" else "resnet18"
    network = create_model(3, 2, architecture=architecture, encoder=encoder)
    worker = with_donors(FedDG(network, Recipe.build(Training(), "sigmoid", 3)), size=64)
    mask = torch.zeros(2, 2, 64, 64)
    mask[:, :, 20:44, 20:44] = 1
    images = torch.rand(2, 3, 64, 64)
    _, features = Embedding(network)(worker.normalize(images))
    assert features.shape[-1] * stride == 64
    loss, grad = gradient(worker, {"image": images, "mask": mask})
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(p.grad is not None for p in network.get_submodule("segmentation_head").parameters())
    assert len(list(network.get_submodule("segmentation_head")._forward_pre_hooks)) == 0


@pytest.mark.parametrize("released_loss", [False, True])
def test_exclusive_regions_and_frozen_parts(released_loss: bool) -> None:
    torch.manual_seed(0)
    network = create_model(3, 3, encoder="tu-resnet10t", encoder_depth=3, decoder_channels=[16, 8, 8])
    network.get_submodule("encoder").requires_grad_(False)
    recipe = Recipe.build(Training(), "softmax", 3)
    worker = with_donors(FedDG(network, recipe, task_loss="released" if released_loss else "recipe"), size=32)
    mask = torch.zeros(2, 2, 32, 32)
    mask[:, 0, :16], mask[:, 1, 16:24] = 1, 1
    loss, _ = gradient(worker, {"image": torch.rand(2, 3, 32, 32), "mask": mask})
    assert loss.isfinite()
    assert all(p.grad is None for p in network.get_submodule("encoder").parameters())


# ------------------------------------------------------------------------------------------------------ server, presets


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((159, 400, 400), (0.17, 0.42, 0.41)),
        ((101, 400, 400), (0.11, 0.44, 0.45)),
        ((101, 159, 400), (0.15, 0.24, 0.61)),
    ],
)
def test_f15_weights_are_exact_or_rounded_as_released(counts: tuple[int, ...], expected: tuple[float, ...]) -> None:
    updates = [Update(site=f"s{i}", examples=n) for i, n in enumerate(counts)]
    assert method().weigh(State(), updates) == list(map(float, counts))
    assert not method().reads_updates
    rounded = method(weighting="rounded")
    assert rounded.weigh(State(), updates) == pytest.approx(expected, abs=1e-12)
    assert rounded.reads_updates
    assert rounded.weigh(State(), [Update(site="s0", examples=0)]) == [0.0]


def test_f16_rounded_weights_run_and_everybody_receives_the_same_model(tmp_path: Path) -> None:
    _, log = journey(tmp_path, weighting="rounded")
    for round in (1, 2):
        received = [message for task, _, message, _ in log if task.kind == "train" and task.round == round]
        assert len(received) == 3
        for message in received[1:]:
            assert_same(State({"model": message["model"]}), State({"model": received[0]["model"]}))


def released() -> dict[str, Any]:
    config = compose(["algorithm=feddg_released"], SCHEMA)
    return {str(key): value for key, value in config.algorithm.items() if key not in ("name", "preset")}


def test_presets_say_what_they_should() -> None:
    ours, paper = (compose([f"algorithm={name}"], SCHEMA).algorithm for name in ("feddg", "feddg_paper"))
    assert {key for key in paper if paper[key] != ours[key]} == {"preset", "denominator", "styles", "second_order"}
    assert (paper.denominator, ours.denominator) == ("negatives", "positive_and_negatives")
    assert (paper.styles, paper.second_order) == (None, True)
    program = compose(["algorithm=feddg_released"], SCHEMA).algorithm
    differ = {key for key in ours if ours[key] != program[key]} - {"preset"}
    assert differ == {"half_width", "bank_share", "donor_weight", "group", "task_loss", "weighting"}
    common = {"temperature": 0.05, "contrast_weight": 0.1, "step": 1e-3, "clip": 100}
    assert {key: paper[key] for key in common} == {key: program[key] for key in common} == common
    assert (program.half_width, program.donor_weight, program.bank_share) == (0, 1, 0.125)


@pytest.mark.slow
def test_a_preset_and_every_option_survive_two_rounds(tmp_path: Path) -> None:
    options = {"styles": None, "second_order": True, "outer_updates_statistics": True, "window": 0.2}
    for index, knobs in enumerate((released(), options)):
        outcome = simulate("feddg", tmp_path / str(index), **knobs)
        assert not outcome.server.non_finite()


@pytest.mark.slow
def test_it_resumes_bit_for_bit_where_sites_take_turns(tmp_path: Path) -> None:
    knobs = {"schedule": {"fraction": 0.34}}
    whole = simulate("feddg", tmp_path / "a", rounds=5, **knobs)
    simulate("feddg", tmp_path / "b", rounds=2, **knobs)
    parts = simulate("feddg", tmp_path / "b", rounds=5, **knobs)
    assert_same(whole.server, parts.server)
    assert any(name.startswith("bank_held/") for name in whole.server.scalars)


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_single_site_has_nobody_to_borrow_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'s0' is the only one"):
        simulate("feddg", tmp_path, sites=toy_sites(1))


def test_sites_of_different_sizes_are_refused_before_training(tmp_path: Path) -> None:
    sites = {"s0": ToySite.make("s0", 0), "s1": ToySite.make("s1", 1, size=16)}
    with pytest.raises(ValueError, match=r"\(12, 12\).* at site 's0', but .*\(16, 16\).* at 's1'"):
        simulate("feddg", tmp_path, sites=sites)
    with pytest.raises(ValueError, match="images of 16 x 16 pixels, but the banks are of 12 x 12"):
        with_donors(method()).loss(sites["s1"].train_batches(0, 1)[0])


def test_a_window_wider_than_the_images_is_refused_with_the_sites_name() -> None:
    with pytest.raises(ValueError, match=r"site 's0': algorithm\.half_width 7 does not fit images of 12 x 12"):
        method(half_width=7).check_site(toy_sites()["s0"])
    method(half_width=6).check_site(toy_sites()["s0"])


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("half_width", -1),
        ("window", 0.6),
        ("bank_share", 0.0),
        ("donor_weight", 1.5),
        ("styles", 0),
        ("meta_weight", -1.0),
        ("contrast_weight", math.nan),
        ("temperature", 0.0),
        ("boundary_steps", 0),
        ("background_steps", 0),
        ("step", -1e-3),
        ("clip", 0.0),
    ],
)
def test_knobs_out_of_range_are_refused_by_name(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{knob}={value}"):
        ALGORITHMS["feddg"](nn.Conv2d(3, 2, 1), plain_recipe(), **{knob: value})
