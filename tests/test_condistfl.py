"""ConDistFL: what a site did not annotate is taught by the received model, and nothing else is."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedseg.algorithms.condistfl import ConDistFL
from fedseg.algorithms.functional.conditional import conditional_dice_loss
from fedseg.federation.contract import TrainTask
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute, read_settings, unused
from fedseg.reporting.folder import RunFolder
from tests.lines import golden
from tests.tiny_run import TINY
from tests.world import CPU, ToySite, assert_same_outcome, build, simulate, toy_sites

ARCHIVE = "condistfl_s304"


def of_regions(labels: Tensor, count: int) -> Tensor:
    """Masks (B, R, ...) of labels (B, 1, ...), the background left out."""
    return one_hot(labels[:, 0].long(), count + 1).movedim(-1, 1)[:, 1:].float()


@pytest.mark.parametrize("case", ["2d", "3d", "warm"])
def test_loss_and_gradient_are_the_release_s(case: str) -> None:
    data = {key.removeprefix(f"{case}_"): value for key, value in golden(ARCHIVE).items() if key.startswith(case)}
    student = data["student"].clone().requires_grad_()
    mask = of_regions(data["truth"], student.shape[1] - 1)
    known = torch.zeros_like(mask)
    known[:, data["foreground"].long() - 1] = 1
    loss = conditional_dice_loss(student, data["teacher"], mask, known, "softmax", float(data["temperature"]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, data["gradient"], rtol=1e-4, atol=1e-7)


def drawn(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a student and a teacher, masks of three disjoint regions, of which the second is not annotated."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, channels, 6, 6, generator=generator)
    mask = of_regions(torch.randint(0, 4, (3, 1, 6, 6), generator=generator), 3)
    known = torch.ones_like(mask)
    known[:, 1] = 0
    return student.requires_grad_(), teacher, mask * known, known


def test_exclusive_regions_are_compared_where_no_annotated_one_is() -> None:
    student, teacher, mask, known = drawn(4)
    conditional_dice_loss(student, teacher, mask, known, "softmax", 2.0).backward()
    assert student.grad is not None
    decided = teacher.argmax(dim=1)
    elsewhere = (mask.sum(dim=1) > 0) | (decided == 1) | (decided == 3)
    assert float(student.grad.movedim(1, -1)[elsewhere].abs().max()) == 0.0
    assert float(student.grad.movedim(1, -1)[~elsewhere].abs().min()) > 0.0


def test_regions_that_may_overlap_are_compared_each_by_itself() -> None:
    student, teacher, mask, known = drawn(3)
    conditional_dice_loss(student, teacher, mask, known, "sigmoid", 2.0).backward()
    assert student.grad is not None
    moved = student.grad.abs().amax(dim=(0, 2, 3)) > 0
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize(("activation", "channels"), [("sigmoid", 3), ("softmax", 4)])
def test_pixels_that_do_not_count_and_images_that_lack_nothing_make_no_difference(
    activation: Any, channels: int
) -> None:
    student, teacher, mask, known = drawn(channels)
    known[0] = 1  # this image is annotated in full
    known[1, :, :2] = 0  # of these pixels nothing is known
    before = conditional_dice_loss(student, teacher, mask, known, activation, 2.0)
    other = student.detach().clone()
    other[0] += torch.randn_like(other[0])
    other[1, :, :2] += torch.randn_like(other[1, :, :2])
    torch.testing.assert_close(conditional_dice_loss(other, teacher, mask, known, activation, 2.0), before.detach())
    assert float(conditional_dice_loss(other, teacher, mask, torch.ones_like(known), activation, 2.0)) == 0.0


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_surer_student_that_agrees_is_nearer(activation: Any) -> None:
    _, _, mask, known = drawn(4)
    there = torch.zeros(3, 6, 6)
    there[:, 2:4] = 1 - mask[:, :, 2:4].amax(dim=1)  # where the region is that nobody outlined here
    everywhere = torch.stack([mask[:, 0], there, mask[:, 2]], dim=1)
    teacher = torch.cat([1 - everywhere.sum(dim=1, keepdim=True), everywhere], dim=1)
    teacher = teacher if activation == "softmax" else 2 * teacher[:, 1:] - 1
    losses = [
        float(conditional_dice_loss(surety * teacher, 8 * teacher, mask, known, activation, 1.0))
        for surety in (0, 1, 8)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05


def partly_annotated() -> dict[str, ToySite]:
    """Sites of which the first did not outline the inner region, and the second not the outer one."""
    sites = {name: site for name, site in toy_sites().items() if name != "pooled"}
    for region, name in ((1, "s0"), (0, "s1")):
        sites[name].known = torch.ones_like(sites[name].masks)
        sites[name].known[:, region] = 0
        sites[name].masks[:, region] = 0
    return sites


def test_without_weight_or_with_everything_annotated_it_is_fedavg(tmp_path: Path) -> None:
    def run(name: str, sites: dict[str, ToySite], **knobs: Any) -> Any:
        return simulate(name, tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", 2, sites=sites, **knobs)

    partly, whole = partly_annotated(), {name: site for name, site in toy_sites().items() if name != "pooled"}
    assert_same_outcome(run("fedavg", partly), run("condistfl", partly, weight=0.0))
    assert_same_outcome(run("fedavg", whole), run("condistfl", whole))
    changed = run("condistfl", partly)
    with pytest.raises(AssertionError):
        assert_same_outcome(run("fedavg", partly), changed)


@pytest.mark.slow
def test_a_run_in_which_nothing_is_left_to_teach_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> list[str]:
        experiment = Experiment(read_settings([*TINY, "data=phantom", "data.n_sites=2", *words]))
        experiment.data.setup()
        return unused(experiment)

    left_out = "data.unannotated={site_01: [cup]}"
    assert told("algorithm=fedavg") == told("algorithm=condistfl", left_out) == []
    assert told("algorithm=condistfl", "data.per_site={site_01: {unannotated: [cup]}}") == []
    detail = "algorithm=condistfl, since every site annotated every region (data.unannotated)"
    assert told("algorithm=condistfl") == told("algorithm=condistfl", left_out, "data.unseen=[site_01]") == [detail]
    words = ["data.n_sites=2", "federation.rounds=1", "evaluation.metrics=[dice]", f"output={tmp_path / 'run'}"]
    execute(read_settings([*TINY, "data=phantom", "algorithm=condistfl", *words]))
    events = RunFolder(tmp_path / "run").events()
    assert events[["event", "detail"]].to_numpy().tolist() == [["no effect", detail]]
    assert f"no effect: {detail}" in capsys.readouterr().err


def test_the_weight_rises_linearly_over_the_rounds() -> None:
    method = build("condistfl", rounds=5, weight=2.0, first_weight=0.1)
    assert isinstance(method, ConDistFL)
    assert [method.weight_in(round) for round in range(1, 6)] == pytest.approx([0.2, 0.65, 1.1, 1.55, 2.0])
    assert method.weight_in(0) == 2.0  # in a stock Trainer
    alone = build("condistfl", rounds=1)
    assert isinstance(alone, ConDistFL)
    assert alone.weight_in(1) == 0.01


def test_the_teacher_is_the_received_model_in_every_step() -> None:
    method, site = build("condistfl"), partly_annotated()["s0"]
    method.receive(method.broadcast(method.init_server({}), "s0", TrainTask(1, 7)), State(), site)
    before = deepcopy(method.model.state_dict())
    CPU.fit(method, site.train_batches(1, 4))
    assert isinstance(method, ConDistFL)
    (teacher,) = method._teacher
    assert not teacher.training
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not torch.equal(method.model.state_dict()["encoder.0.weight"], before["encoder.0.weight"])
