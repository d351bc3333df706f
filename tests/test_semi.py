"""Methods that learn from images with and without labels in one step: a mean teacher, and M-FedLO's global one."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import export
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.consistency import pseudo_label_loss, ramp_up, squared_difference, with_noise
from fedseg.algorithms.meanteacher import MeanTeacher
from fedseg.algorithms.mfedlo import MFedLO
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.algorithms.semi import STUDENT, TEACHER, VIEWS, SemiSupervised
from fedseg.configs.compose import compose
from fedseg.federation.client import turn
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_monai_model
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import TINY, phantom_run
from tests.world import CPU, POOL, ToySite, assert_same, build, evaluate, simulate, toy_sites

NAMES = ("meanteacher", "mfedlo")
both = pytest.mark.parametrize("name", NAMES)


def some_without_labels() -> dict[str, ToySite]:
    """The last one has no label."""
    return {name: replace(site, labelled=name != "s2") for name, site in toy_sites().items() if name != POOL}


def made(name: str, **knobs: Any) -> SemiSupervised:
    return cast(SemiSupervised, build(name, **knobs))


def ready(name: str, site: ToySite, **knobs: Any) -> SemiSupervised:
    """A worker at a site in the first round."""
    worker = made(name, **knobs)
    worker.round = 1
    worker.receive(worker.broadcast(worker.init_server({}), site.name, TrainTask(1, 7)), State(), site)
    return worker


def rows(outcome: Any, key: str) -> list[Any]:
    return [row[key] for row in outcome.observer.rows("rounds") if row["task"] == "train" and row["round"] == 1]


# ------------------------------------------------------------------------------------------------------ mathematics


def test_disagreements_are_those_counted_by_hand() -> None:
    student, teacher = torch.tensor([0.0, math.log(3)]), torch.tensor([math.log(3), math.log(19)])
    shaped = student.view(1, 1, 1, 2), teacher.view(1, 1, 1, 2)  # 1/2 and 3/4; 3/4 and 19/20
    assert squared_difference(*shaped, "sigmoid").item() == pytest.approx((0.25**2 + 0.2**2) / 2)
    assert pseudo_label_loss(*shaped, "sigmoid", 0.9).item() == pytest.approx(-math.log(0.75) / 2)
    assert pseudo_label_loss(*shaped, "sigmoid", 0.7).item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    of_two = (torch.stack([torch.zeros(1, 1, 2), t.view(1, 1, 2)], dim=1) for t in (student, teacher))
    own, other = of_two  # the same chances, of a region beside the background
    assert squared_difference(own, other, "softmax").item() == pytest.approx((0.25**2 + 0.2**2) / 2)
    assert pseudo_label_loss(own, other, "softmax", 0.9).item() == pytest.approx(-math.log(0.75) / 2)
    assert pseudo_label_loss(-own, -other, "softmax", 0.9).item() == pytest.approx(-math.log(0.75) / 2)
    assert [ramp_up(t) for t in (0.0, 0.5, 1.0, 7.0)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0, 1.0])


def test_noise_leaves_a_modality_that_a_case_lacks_and_the_range_of_values() -> None:
    images = torch.full((2, 2, 8, 8), 0.5)
    images[0, 1] = 0
    found = with_noise(images, 0.3, torch.Generator().manual_seed(0))
    assert not found[0, 1].any()
    assert 0 <= found.min() < 0.2 < 0.8 < found.max() <= 1
    assert (found[1] != 0.5).float().mean() > 0.9
    assert with_noise(images, 0.0, torch.Generator()) is images


# ------------------------------------------------------------------------------------------------------ one step


@both
def test_a_step_has_fedavgs_labelled_batch_and_two_views_of_one_geometry(name: str) -> None:
    told = ["data=phantom", *TINY, "data.n_sites=2", "data.labelled_patients=1", f"algorithm={name}"]
    batches = {}
    for noise in (0.0, 0.1):
        experiment = Experiment(compose([*told, f"algorithm.noise={noise}"], SCHEMA))
        experiment.data.setup()
        site = experiment.data.site("site_01")
        found: Any = experiment.algorithm().batches(site, 3, 4)
        batches[noise] = list(found)
        assert len(found) == 4  # a trainer asks
        for batch, again in zip(batches[noise], found, strict=True):  # read again
            assert torch.equal(batch[VIEWS], again[VIEWS])
        for batch, fedavgs in zip(batches[noise], site.train_batches(3, 4), strict=True):
            assert batch["case"] == fedavgs["case"]
            assert torch.equal(batch["image"], fedavgs["image"])
            assert torch.equal(batch["mask"], fedavgs["mask"])
    for plain, noised in zip(batches[0.0], batches[0.1], strict=True):  # flips alone: views differ by noise
        teacher, student = plain[VIEWS].unbind(dim=1)
        assert torch.equal(teacher, student)
        assert torch.equal(noised[VIEWS][:, TEACHER], teacher) == (name == "mfedlo")
        assert 0 < (noised[VIEWS][:, STUDENT] - student).abs().mean() < 0.2
    cases = {tuple(image.flatten().tolist()) for batch in batches[0.0] for image in batch[VIEWS][:, 0].flip(-1)}
    assert len(cases) > 2  # more images than the one that has a label


@both
@pytest.mark.parametrize("labels", ["all", "some", "none"])
def test_a_steps_loss_is_the_one_counted_by_hand_and_the_teacher_learns_nothing_of_it(name: str, labels: str) -> None:
    site = replace(toy_sites()["s1"], labelled=labels != "none")
    if labels == "some":
        site.known = (torch.rand(site.masks.shape, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    worker = ready(name, site, consistency=3.0, ramp=4.0, **({"threshold": 0.6} if name == "mfedlo" else {}))
    (batch,) = worker.batches(site, 5, 1)
    with torch.no_grad():  # a teacher that has seen other weights
        worker.teacher_now()
        for parameter in worker.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    student, teacher = deepcopy(worker.model).train(), deepcopy(worker.teacher_now()).eval()
    expected = torch.zeros(())
    if labels != "none":
        expected = worker.task_loss(student(worker.normalize(batch["image"])), batch)
        assert ("known" in batch) == (labels == "some")
    own, other = (
        student(worker.normalize(batch[VIEWS][:, STUDENT])),
        teacher(worker.normalize(batch[VIEWS][:, TEACHER])),
    )
    if name == "meanteacher":
        away = (own.sigmoid() - other.sigmoid()).square().mean()
    else:
        sure = (other.sigmoid() - 0.5).abs() >= 0.1
        assert 0 < sure.float().mean() < 1
        away = (binary_cross_entropy_with_logits(own, (other > 0).float(), reduction="none") * sure).mean()
        maps = [net.encoder(worker.normalize(batch[VIEWS][:, v]))[-1] for net, v in ((student, 1), (teacher, 0))]
        away = away + 0.1 * (maps[0] - maps[1]).square().mean()
    found = worker.loss(batch)
    weight = 3.0 * math.exp(-5 * (1 - 1 / 4) ** 2)  # round 1 of the first 4
    torch.testing.assert_close(found, expected + weight * away)
    found.backward()
    assert all(p.grad is not None for p in worker.model.parameters())
    teachers = worker.teacher_now()
    assert all(p.grad is None and not p.requires_grad for p in teachers.parameters())
    assert all(torch.equal(t, teachers.state_dict()[key]) for key, t in teacher.state_dict().items())
    assert all(module.training for module in worker.modules())


def test_the_teacher_is_the_moving_average_of_the_steps_and_begins_as_what_came() -> None:
    worker = cast(MeanTeacher, ready("meanteacher", toy_sites()["s0"], decay=0.7))
    start = {key: p.detach().clone() for key, p in worker.model.named_parameters()}
    expected = start
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in worker.model.parameters():
                parameter.add_(1.0)
            worker.model.get_buffer("encoder.1.running_mean").fill_(float(step))
        worker.on_train_batch_end(None, {}, step - 1)
        decay = (1 / 2, 2 / 3, 0.7, 0.7, 0.7)[step - 1]
        expected = {key: decay * old + (1 - decay) * (start[key] + step) for key, old in expected.items()}
        for key, parameter in worker.teacher.named_parameters():
            torch.testing.assert_close(parameter, expected[key])
        assert worker.teacher.get_buffer("encoder.1.running_mean").eq(step).all()
    kept = worker.keep()
    late, moved = build("meanteacher"), worker.broadcast(worker.init_server({}), "s0", TrainTask(2, 7))
    late.receive(moved, State(), toy_sites()["s0"])  # a site that joins: the received model teaches it
    for key, tensor in late.network("personal").state_dict().items():
        assert torch.equal(tensor, late.model.state_dict()[key])
    late.receive(moved, kept, toy_sites()["s0"])
    for key, tensor in late.network("personal").state_dict().items():
        assert torch.equal(tensor, worker.teacher.state_dict()[key])


def test_mfedlos_teacher_is_the_received_model_through_the_whole_turn() -> None:
    worker, site = cast(MFedLO, build("mfedlo")), toy_sites()["s1"]
    for round in (1, 2):  # another turn has another teacher
        server = worker.init_server({})
        server.tensors["model"] = {key: t + 0.01 * round for key, t in server["model"].items()}
        turn(worker, site, TrainTask(round, 7, steps=3), server, State(), CPU, evaluate)
        teacher = dict(worker.teacher_now().named_parameters())
        assert all(torch.equal(teacher[key], t) for key, t in server["model"].items())
        assert not any(torch.equal(p, teacher[key]) for key, p in worker.model.named_parameters() if p.dim() > 1)


@both
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_volumes_exclusive_regions_and_auxiliary_heads_are_served(name: str, activation: Any) -> None:
    torch.manual_seed(0)
    recipe = Recipe.build(Training(normalize="none"), activation, 1, regions=("a",))
    outputs = 1 if activation == "sigmoid" else 2
    network = create_monai_model(1, outputs, architecture="dynunet", width=4, norm="batch", deep_supervision=2)
    worker = ALGORITHMS[name](network, recipe)
    batch: Batch = {"image": torch.rand(2, 1, 16, 16, 16), "mask": torch.rand(2, 1, 16, 16, 16).round()}
    plain = worker.loss(batch)  # as a stock Trainer gives it
    with_views = worker.loss({**batch, VIEWS: torch.rand(2, 2, 1, 16, 16, 16)})
    with_views.backward()
    assert with_views > plain > 0
    assert all(p.grad is not None for p in network.parameters())


# ------------------------------------------------------------------------------------------------------ federations


@both
def test_without_consistency_it_is_fedavg_bit_for_bit_and_sites_without_labels_do_not_train(
    name: str, tmp_path: Path
) -> None:
    sites, schedule = some_without_labels(), {"local_steps": None}
    fedavg = simulate("fedavg", tmp_path / "a", sites=sites, schedule=schedule)
    own = simulate(name, tmp_path / "b", sites=sites, schedule=schedule, consistency=0.0)
    assert_same(own.server, fedavg.server)
    for key in ("examples", "steps", "loss"):
        assert str(rows(own, key)) == str(rows(fedavg, key))
    assert rows(own, "steps") == [2, 3, 0]
    assert not made(name, consistency=0.0, norm="group").mixes_patients


@both
def test_sites_without_labels_train_count_as_said_and_change_the_model(name: str, tmp_path: Path) -> None:
    sites, schedule = some_without_labels(), {"local_steps": None}
    outcome = simulate(name, tmp_path / "a", sites=sites, schedule=schedule)
    assert rows(outcome, "examples") == [4, 6, 4]  # of the last one's 8 images half
    assert rows(outcome, "steps") == [2, 3, 4]  # all its images once
    alone = simulate(name, tmp_path / "b", sites=sites, schedule=schedule, unlabelled_weight=0.0)
    assert rows(alone, "steps") == [2, 3, 0]
    assert any(not torch.equal(t, alone.server["model"][key]) for key, t in outcome.server["model"].items())
    masks = {s: replace(site, masks=torch.rand_like(site.masks)) for s, site in sites.items() if s == "s2"}
    blind = simulate(name, tmp_path / "c", sites={**sites, **masks}, schedule=schedule)
    assert_same(blind.server, outcome.server)  # what its masks hold makes no difference


@both
def test_a_site_counts_by_its_labels_and_half_its_other_images(name: str) -> None:
    told = ["data=phantom", *TINY, "data.n_sites=2", "data.labelled_patients=1", "data.unlabelled=[site_02]"]
    experiment = Experiment(compose([*told, f"algorithm={name}"], SCHEMA))
    experiment.data.setup()
    sites = [experiment.data.site(site) for site in experiment.data.sites]
    images = sites[0].training_images
    assert [(site.examples, site.training_images) for site in sites] == [(1, images), (0, images)]
    counts = [experiment.algorithm().examples_at(site) for site in sites]
    assert counts == [1 + math.ceil((images - 1) / 2), math.ceil(images / 2)]


@pytest.mark.slow
@both
def test_masked_sums_are_the_open_ones(name: str, tmp_path: Path) -> None:
    sites = some_without_labels()
    plain = simulate(name, tmp_path / "a", 1, sites=sites)
    chain = build_transforms(Privacy(aggregation="masked"), Compression(), 1.0)
    hidden = simulate(name, tmp_path / "b", 1, sites=sites, transforms=chain)
    for group, tensors in plain.server.tensors.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(hidden.server[group][key], tensor, rtol=1e-3, atol=1e-4, check_dtype=False)


@pytest.mark.slow
def test_a_run_scores_and_tells_of_sites_without_labels(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = ("algorithm=meanteacher", "data.unlabelled=[site_02]", "data.labelled_patients=1")
    execute(phantom_run(3, folder, *told))
    scores = RunFolder(folder).scores()
    assert set(scores[scores["view"] == "personal"]["site"]) == {"site_01", "site_02"}
    models = SavedModels(Reopened.read(RunFolder(folder)))
    assert models.trained == {"site_01", "site_02"}
    assert models.load("personal", "site_02").trained_here
    assert export.main([str(folder), "--out", str(tmp_path / "out"), "--site", "site_02"]) == 0
    card = (tmp_path / "out" / "personal-site_02.md").read_text()
    found = (
        RunFolder(folder).splits().query("split == 'train' and seen").groupby("site")["labelled"].agg(["size", "sum"])
    )
    assert list(found["sum"]) == [1, 0]
    for site, count in found["size"].items():
        assert f"| {site} | {count} | {count} | {found['sum'][site]} |" in card
