"""MediSecFed: what is exchanged and agreed on, what a site learns from it, and which images it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

import evaluate as rescoring
import train
from fedseg.algorithms.functional.distil import divergence
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.medisecfed import ANSWERS, TAUGHT, Lesson, MediSecFed
from fedseg.algorithms.recipe import Recipe
from fedseg.configs.compose import ConfigError, compose
from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.public import public_images
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, MessageError, Task, TrainTask
from fedseg.federation.state import State, Update
from fedseg.federation.transport import InProcess
from fedseg.launch.experiment import Experiment
from fedseg.launch.exports.trained import TrainedModel
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.launch.networks import check_sites
from fedseg.launch.run import execute, read_settings
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.site import Local
from fedseg.privacy.masked import Masked
from fedseg.reporting.folder import RunFolder
from tests.data_files import picture, save
from tests.test_across import across, assert_same_tables, grid_of, here
from tests.test_laws import Recording
from tests.tiny_run import TINY, phantom_run
from tests.world import CPU, Outcome, assert_same, build, evaluate, simulate, toy_sites, training_of

MEDIAN = {"combine": "median"}


def worker(**knobs: Any) -> MediSecFed:
    made = build("medisecfed", **knobs)
    assert isinstance(made, MediSecFed)
    return made


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------- what a site learns


def test_the_divergence_is_that_of_regions_or_of_classes() -> None:
    logits, told = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4).flip(0).sigmoid()
    expected = kl_divergence(Bernoulli(told), Bernoulli(logits=logits)).mean()
    torch.testing.assert_close(divergence(logits, told, "sigmoid", 1.0), expected, rtol=1e-4, atol=1e-6)
    classes, share = drawn(3, 3, 4, 4), drawn(3, 3, 4, 4).flip(0).softmax(dim=1)
    pair = [Categorical(share.movedim(1, -1)), Categorical(logits=classes.movedim(1, -1))]
    torch.testing.assert_close(divergence(classes, share[:, 1:], "softmax", 1.0), kl_divergence(*pair).mean())
    overfull = 1.5 * share[:, 1:] / share[:, 1:].sum(dim=1, keepdim=True)  # agreed on region by region
    assert 0 < float(divergence(classes, overfull, "softmax", 1.0)) < 100


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_who_answers_as_is_taught_has_nothing_to_learn(temperature: float) -> None:
    logits = drawn(2, 3, 4, 4).requires_grad_()
    for activation, told in (("sigmoid", logits.sigmoid()), ("softmax", logits.softmax(dim=1)[:, 1:])):
        loss = divergence(logits, told.detach(), activation, temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert abs(float(loss.detach())) < 1e-5
        assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.8, 1.0])
def test_a_low_temperature_teaches_what_is_certain_too(temperature: float) -> None:
    """What is nearly 1 rounds to 1 in float32 when it is made surer; elsewhere it is the formula in float64."""
    certain = torch.tensor([0.0, 1.0]).repeat(8).view(1, 1, 4, 4)
    logits = drawn(1, 1, 4, 4).requires_grad_()
    loss = divergence(logits, certain, "sigmoid", temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) > 0
    assert torch.isfinite(gradient).all()
    same = certain.clamp(1e-6, 1 - 1e-6).logit()
    assert abs(float(divergence(same, certain, "sigmoid", temperature))) < 1e-6
    told = drawn(2, 2, 4, 4).flip(0).sigmoid()
    wide = [z.double() / temperature for z in (drawn(2, 2, 4, 4), told.double().logit())]
    expected = temperature**2 * kl_divergence(Bernoulli(logits=wide[1]), Bernoulli(logits=wide[0])).mean()
    found = divergence(drawn(2, 2, 4, 4), told, "sigmoid", temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_high_temperature_compares_logits() -> None:
    """T^2 KL of two coins that are nearly fair is an eighth of the squared difference of their logits."""
    logits, other = drawn(2, 2, 4, 4), drawn(2, 2, 4, 4).flip(0)
    expected = (logits - other).square().mean() / 8
    torch.testing.assert_close(divergence(logits.double(), other.double().sigmoid(), "sigmoid", 100.0), expected,
                               rtol=2e-2, atol=1e-4)  # fmt: skip


def test_first_public_images_are_learnt_from_each_once_before_any_again() -> None:
    images, own = torch.arange(10.0).view(10, 1, 1, 1), [{"image": torch.zeros(1)}] * 3
    lesson = Lesson(images, -images, 5, 4, 7, own)
    batches = list(lesson)
    assert len(batches) == len(lesson) == 8
    assert [TAUGHT in batch for batch in batches] == [True] * 5 + [False] * 3
    assert all(torch.equal(batch[TAUGHT], -batch["image"]) for batch in batches[:5])
    seen = torch.cat([batch["image"] for batch in batches[:5]]).flatten().int().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_a_round_s_first_steps_bring_a_site_nearer_to_what_was_agreed() -> None:
    """With the consensus of others, that everything is background."""
    site, agreed = toy_sites()["s0"], torch.full((10, 2, 12, 12), 0.02)
    message, before = State({ANSWERS: {ANSWERS: agreed}}), worker()
    mean = {}
    for share in (0.0, 0.5):
        update, _ = turn(worker(distil_share=share), site, TrainTask(2, 0, steps=10), message, State(), CPU, evaluate)
        mean[share] = float(update[ANSWERS][ANSWERS].mean())
        assert update.scalars["steps"] == 10
    assert before.public.shape == (10, 3, 12, 12)
    assert mean[0.5] < mean[0.0] - 0.02


def test_without_lessons_it_is_local_training_bit_for_bit(tmp_path: Path) -> None:
    ours = simulate("medisecfed", tmp_path / "a", distil_share=0.0)
    local = simulate("local", tmp_path / "b")
    for site, kept in ours.kept.items():
        assert_same(State({"model": kept["model"]}), State({"model": local.kept[site]["model"]}))


def test_lessons_are_no_private_steps_as_everybody_knows_them() -> None:
    """Patients' gradients are clipped and noised; those of public images and of what was agreed need not be."""
    method = worker(private=PrivateStep(1.0, 1e6, 1.0), norm="group")
    batch = {"image": method.public[:4], TAUGHT: torch.full((4, 2, 12, 12), 0.5)}
    expected = divergence(method.model(method.normalize(batch["image"])), batch[TAUGHT], "sigmoid", 1.0)
    assert torch.equal(method.training_step(batch, 0), expected)
    assert not method.mixes_patients


def test_a_lesson_may_be_computed_in_pieces() -> None:
    batch = {"image": worker().public[:4], TAUGHT: drawn(4, 2, 12, 12).sigmoid()}
    gradients = []
    for pieces in (1, 2):
        method = worker(training=training_of("medisecfed", pieces=pieces), norm="group")
        method.training_step(batch, 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- what is agreed on


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two rounds with the median, to be read only."""
    return simulate("medisecfed", tmp_path_factory.mktemp("medisecfed"), schedule=MEDIAN, transport=Recording)


def told(outcome: Outcome) -> list[tuple[State, Update]]:
    way = outcome.federation.transport
    assert isinstance(way, Recording)
    return [(message, update) for _, message, update in way.travelled if ANSWERS in update.tensors]


def test_nothing_but_answers_travels_and_the_median_of_a_round_is_the_next_one_s_lesson(recorded: Outcome) -> None:
    way = recorded.federation.transport
    assert isinstance(way, Recording)
    assert {group for _, message, update in way.travelled for group in (*message.tensors, *update.tensors)} == {ANSWERS}
    first, second = told(recorded)[:3], told(recorded)[3:]
    assert not any(message.tensors for message, _ in first)
    for (message, _), (_, update) in zip(second, first, strict=True):
        assert set(update[ANSWERS]) == {ANSWERS}
        median = torch.stack([u[ANSWERS][ANSWERS] for _, u in first]).median(dim=0).values
        torch.testing.assert_close(message[ANSWERS][ANSWERS], median)


def test_a_look_at_a_site_shows_its_own_model_and_needs_no_public_images(recorded: Outcome) -> None:
    message = recorded.federation.algorithm.broadcast(recorded.server, "s1", EvaluateTask(2, 7))
    assert not message.tensors
    blind = worker()
    blind.recipe = Recipe.build(training_of("medisecfed"), "sigmoid", in_channels=3)
    blind.receive(message, recorded.kept["s1"], toy_sites()["s1"])
    held = dict(blind.network("personal").state_dict())
    assert_same(State({"model": held}), State({"model": recorded.kept["s1"]["model"]}))
    with pytest.raises(ValueError, match=r"there are none; take data\.public=phantom, or a folder"):
        blind.send(toy_sites()["s1"])


class Lying(InProcess):
    """One site of three says something else about public images than what it found."""

    lie: Any = staticmethod(lambda answers: 1 - answers)

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for update in super().ask(tasks, messages):
            if update.site == "s2" and ANSWERS in update.tensors:
                update.tensors[ANSWERS] = {ANSWERS: self.lie(update[ANSWERS][ANSWERS])}
            yield update


def test_a_lie_stays_within_what_honest_sites_say_and_outside_of_it_without_the_median(tmp_path: Path) -> None:
    honest = simulate("medisecfed", tmp_path / "honest", 1, transport=Recording)
    said = torch.stack([update[ANSWERS][ANSWERS] for _, update in told(honest)[:2]])
    inside = {}
    for rule in ("median", "mean"):
        outcome = simulate("medisecfed", tmp_path / rule, 1, transport=Lying, schedule={"combine": rule})
        agreed = outcome.server[ANSWERS][ANSWERS]
        inside[rule] = bool(((agreed >= said.min(dim=0).values) & (agreed <= said.max(dim=0).values)).all())
    assert inside == {"median": True, "mean": False}


def test_answers_that_are_no_probabilities_are_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    class Loud(Lying):
        lie = staticmethod(lambda answers: 1e6 * answers)

    outcome = simulate("medisecfed", tmp_path, 1, transport=Loud)
    (event,) = [row for row in outcome.observer.rows("events") if row["event"] == "refused"]
    assert (event["site"], event["detail"]) == ("s2", "its answers are no probabilities")
    assert float(outcome.server[ANSWERS][ANSWERS].max()) <= 1


def test_the_mean_may_be_hidden_in_a_sum(tmp_path: Path) -> None:
    plain, masked = (simulate("medisecfed", tmp_path / str(i), 1, transforms=t) for i, t in enumerate(([], [Masked()])))
    torch.testing.assert_close(masked.server[ANSWERS], plain.server[ANSWERS], rtol=0, atol=1e-5)


def test_other_public_images_at_a_site_are_refused() -> None:
    method, site = worker(), toy_sites()["s0"]
    method.recipe = Recipe.build(training_of("medisecfed"), "sigmoid", in_channels=3, public=worker().public * 0.99)
    server = worker().init_server({})
    message = worker().broadcast(server, "s0", TrainTask(1, 0, steps=1))
    with pytest.raises(MessageError, match=r"its public images \(data\.public\) are not those of the server"):
        method.receive(message, State(), site)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"order": "cyclic"}, "order=cyclic has no meaning .*: a consensus .*; take federation.order=together"),
        ({"server_lr": 0.5}, "server_lr=0.5 has no meaning .*: no model is moved; take federation.server_lr=1"),
        ({"select_unbiased": True, "selection": "heterogeneity", "fraction": 0.7}, "take .*select_unbiased=false"),
        ({"combine": "norm_bound"}, "shortens differences of models, .*; take federation.combine=median"),
    ],
)  # fmt: skip
def test_settings_of_models_are_refused(schedule: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        simulate("medisecfed", tmp_path, schedule=schedule)


# ------------------------------------------------------------------------------------------- public images


def experiment(*settings: str) -> Experiment:
    return Experiment(compose([*TINY, "algorithm=medisecfed", *settings], SCHEMA))


def test_public_images_are_drawn_anew_alike_and_are_no_site_s(tmp_path: Path) -> None:
    data = experiment("data.public_images=5", "data.n_sites=2").data
    images = public_images(data, 3)
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images, public_images(experiment("data.public_images=5").data, 3))
    assert torch.equal(images[:3], public_images(experiment("data.public_images=3").data, 3))
    data.setup()
    own = torch.cat([batch["image"] for name in data.sites for batch in data.site(name).plain_batches()])
    assert min(float((image - own).abs().amax(dim=(1, 2, 3)).min()) for image in images) > 0.1
    grey = public_images(experiment("data.public_images=2", "data.anatomy=organ").data, 1)
    assert grey.shape == (2, 1, 32, 32)
    assert 0 <= float(grey.min()) < float(grey.max()) <= 1


def test_public_images_of_a_folder_are_spread_over_its_files(tmp_path: Path) -> None:
    for number in range(7):
        save(tmp_path / f"{number}.png", picture(number))
    every, some = (
        public_images(experiment(f"data.public={tmp_path}", f"data.public_images={count}").data, 3) for count in (9, 4)
    )
    assert every.shape == (7, 3, 32, 32)
    assert torch.equal(some, every[[0, 2, 4, 6]])


@pytest.mark.slow
def test_public_images_may_lie_elsewhere_and_must_be_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save(tmp_path / "there" / f"{number}.png", picture(number))
    run = [f"output={tmp_path / 'run'}"]
    first = [*TINY, "algorithm=medisecfed", f"data.public={tmp_path / 'there'}", "federation.rounds=1"]
    assert train.main([*first, *run]) == 0
    (tmp_path / "there").rename(tmp_path / "here")
    here = f"data.public={tmp_path / 'here'}"
    assert rescoring.main([str(tmp_path / "run"), here]) == 0
    assert train.main([*run, "resume=true", "federation.rounds=2", here]) == 0
    capsys.readouterr()
    save(tmp_path / "here" / "1.png", picture(9))
    assert train.main([*run, "resume=true", "federation.rounds=3", here]) == 2
    assert "its public images (data.public) are not those of the server" in capsys.readouterr().err
    assert train.main([*run, "resume=true", "federation.rounds=2", here, "data.public_images=2"]) == 2
    assert "data.public_images: 64 in the folder, 2 now" in capsys.readouterr().err


def test_public_images_that_are_none_are_told_with_the_cure(tmp_path: Path) -> None:
    cases = [
        (["data.public=null"], r"exchanges answers about public images; take data\.public=phantom.*FOLDER"),
        (["algorithm=fedavg", "data.public=phantom"], r"=fedavg looks at no public images; take data.public=null"),
        (["algorithm=fedavg", "data.public_images=9"], r"public_images=9 is of data.public.*data.public_images=64"),
    ]  # fmt: skip
    for settings, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            experiment(*settings).check()
    experiment().check()
    unread: list[tuple[dict[str, Any], int, str]] = [
        ({"public": str(tmp_path / "gone")}, 3, "there is no such folder; give one of images that all sites have"),
        ({"public": str(tmp_path)}, 3, "holds no image"),
        ({"public": "phantom"}, 5, "draws images of 1 or 3 channels, and the network takes 5"),
        ({"public": "phantom", "neighbours": 1}, 9, r"takes the slices beside one; .* or take data\.neighbours=0"),
    ]
    for settings, channels, reason in unread:
        with pytest.raises(DataError, match=reason):
            public_images(FolderDataModule(root="there", regions={"a": [1]}, size=32, **settings), channels)


# ------------------------------------------------------------------------------------------- networks of single sites

OTHER = "model.norm=group model.encoder_depth=3 model.decoder_channels=[32,16,16]"


@pytest.mark.slow
def test_sites_may_train_different_networks_and_the_run_goes_on_and_is_used_as_any(tmp_path: Path) -> None:
    settings = ["algorithm=medisecfed", "data.public_images=6", "evaluation.test=false", f"networks.site_02={OTHER}"]
    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    execute(phantom_run(3, whole.path, *settings))
    execute(phantom_run(3, halves.path, *settings, "federation.rounds=1"))
    execute(read_settings([f"output={halves.path}", "resume=true", "federation.rounds=2"]))
    kept = {run: Checkpoint(run.checkpoints).load().kept for run in (whole, halves)}
    for site, state in kept[whole].items():
        assert_same(state, kept[halves][site])
    first, second = (set(kept[whole][site]["model"]) for site in ("site_01", "site_02"))
    assert not first <= second
    pd.testing.assert_frame_equal(whole.scores(), halves.scores())
    models = SavedModels(Reopened.read(whole))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for site in ("site_01", "site_02"):
        opened = models.load("personal", site, "last")
        held = dict(opened.network("personal").state_dict())
        assert_same(State({"model": held}), State({"model": kept[whole][site]["model"]}))
    TrainedModel.of(opened, models.run.experiment, 3, "personal", "site_02").save(tmp_path / "own.ckpt")
    again = TrainedModel.load_from_checkpoint(tmp_path / "own.ckpt")
    torch.testing.assert_close(again.predict(images, "personal"), opened.predict(images, "personal"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["algorithm=fedavg"], "fedavg shares tensors of one network; .* take .*=medisecfed or algorithm=local"),
        (["algorithm=braintorrent"], "braintorrent shares tensors of one network"),
        (["networks.site_01=model.encodr=resnet18"], "networks.site_01: unknown key 'model.encodr'"),
        (["networks.site_01=training.lr=1"], "networks.site_01: 'training.lr=1' cannot be said of one site"),
        (["networks.site_01=model.architecture=fpn"], "networks.site_01: fpn has no decoder_channels"),
        (["model.freeze_encoder=true"], "take model.freeze_encoder=false"),
        (["networks.site_01=model='unet"], "networks.site_01: \"model='unet\" cannot be read .No closing quotation"),
    ],
)  # fmt: skip
def test_networks_that_cannot_differ_are_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Experiment(
            compose([*TINY, "algorithm=medisecfed", "networks.site_01=model.norm=group", *settings], SCHEMA)
        ).check()


def test_a_network_of_a_site_that_does_not_train_is_refused() -> None:
    config = compose([*TINY, "algorithm=local", "networks.site_09=model.norm=group"], SCHEMA)
    with pytest.raises(ConfigError, match=r"networks: no site 'site_09' trains; .*site_01"):
        check_sites(config, ["site_01", "site_02"])


def test_a_site_imports_no_network_that_it_has_not_agreed_to(tmp_path: Path) -> None:
    config = compose([*TINY, "algorithm=local", "networks.site_01=model=elsewhere:Net"], SCHEMA)
    with pytest.raises(ConfigError, match=r"the run uses networks=elsewhere:Net, .* imports it once"):
        Local("site_01", tmp_path).applied(config)


@pytest.mark.exhaustive
def test_across_machines_answers_are_those_of_one_process_and_each_site_has_its_own_copy_of_the_images(
    tmp_path: Path,
) -> None:
    for number in range(5):
        for copy in ("ours", "theirs"):
            save(tmp_path / copy / f"{number}.png", picture(number))
    settings = ["algorithm=medisecfed", f"data.public={tmp_path / 'ours'}", "networks.site_02=model.norm=group"]
    grid = grid_of(tmp_path / "sites", settings=f"data.public={tmp_path / 'theirs'}")
    run = across(tmp_path, *settings, grid=grid)
    assert_same_tables(run, here(tmp_path, *settings))
    assert set(run.traffic()["group"]) == {"answers"}
