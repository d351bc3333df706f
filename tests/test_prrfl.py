"""PRR-FL: aggregation, stages and divergence against the authors' arrays, rounds and what it reduces to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.algorithms.functional.deputy import Stage, divergence, next_stage, share_low_frequencies
from fedseg.federation.client import turn
from fedseg.federation.contract import TrainTask
from fedseg.federation.state import State, add
from fedseg.launch.tuning.search import axis, own_settings
from tests.lines import golden
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites


@pytest.mark.parametrize("archive", ["prrfl_pfa_conv_s41", "prrfl_pfa_linear_s42"])
def test_deputies_of_layers_are_the_programs(archive: str) -> None:
    data = golden(archive)
    for ratio in data["L"].tolist():
        made = share_low_frequencies(list(data["w"]), [0.25] * 4, ratio)
        torch.testing.assert_close(torch.stack(made), data[f"out_L{round(ratio * 1000):03d}"], rtol=1e-9, atol=1e-12)


def test_stages_are_the_programs() -> None:
    data = golden("prrfl_det_s43")
    thresholds = float(data["alpha1"]), float(data["alpha2"])
    rows = zip(*(data[name].tolist() for name in ("stage_in", "f_deputy", "f_personal")), strict=True)
    assert [next_stage(Stage(s), d, p, *thresholds) for s, d, p in rows] == data["stage_out"].tolist()


def test_the_divergence_and_its_gradient_are_the_programs() -> None:
    data = golden("prrfl_kl_s44")
    student, teacher = (data[f"{who}_logits"][..., None, None].requires_grad_() for who in ("student", "teacher"))
    value = divergence(student, teacher, "softmax")
    torch.testing.assert_close(value.detach(), data["kl_batchmean"], rtol=1e-9, atol=1e-12)
    value.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[..., 0, 0], data["grad_student"], rtol=1e-9, atol=1e-12)
    assert teacher.grad is None


def test_a_region_of_its_own_diverges_as_two_classes_do() -> None:
    student, teacher = (torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    both = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    torch.testing.assert_close(divergence(student, teacher, "sigmoid"), divergence(*both, "softmax"))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 2, 1, 1), (6, 4)])
def test_any_number_of_sites_keeps_its_phases_and_shares_amplitudes(count: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    shares = [1 / count] * count
    for ratio in (0.0, 1e-3):
        for own, made in zip(tensors, share_low_frequencies(tensors, shares, ratio), strict=True):
            torch.testing.assert_close(made, own)
    for made in share_low_frequencies([tensors[0]] * count, shares, 0.7):
        torch.testing.assert_close(made, tensors[0])
    alone = share_low_frequencies(tensors, [1.0] + [0.0] * (count - 1), 0.95)
    torch.testing.assert_close(alone[0], tensors[0])


def test_the_window_grows_as_the_programs_and_is_the_servers_memory() -> None:
    data = golden("prrfl_det_s43")
    worker = build("prrfl", window=float(data["l_rate"]), rounds=int(data["rounds_total"]))
    assert [worker.ratio(round) for round in data["round"].tolist()] == pytest.approx(data["pfa_rate"].tolist())
    assert worker.ratio(90) == worker.ratio(50) == 0.95


def test_a_round_is_the_rule_applied_to_what_sites_trained(tmp_path: Path) -> None:
    first, second = (simulate("prrfl", tmp_path / "a", rounds, weighting="uniform") for rounds in (1, 2))
    worker, sites, trained = build("prrfl", rounds=2), toy_sites(), []
    for site in ("s0", "s1", "s2"):
        message = worker.broadcast(first.server, site, TrainTask(2, 7))
        assert message["model"] is first.server[f"reply/{site}"]
        update = turn_of(site, 2, message, first.kept[site])
        trained.append(add(message["model"], update["model"]))
    for name, mean in second.server["model"].items():
        tensors = [one[name] for one in trained]
        ratio = 0.7 + 1 / 2 * 0.25
        expected = share_low_frequencies(tensors, [1 / 3] * 3, ratio) if mean.ndim > 1 else [sum(tensors) / 3] * 3
        for site, tensor in zip(sites, expected, strict=False):
            torch.testing.assert_close(second.server[f"reply/{site}"][name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, sum(tensors) / 3, rtol=1e-4, atol=1e-5)


def turn_of(site: str, round: int, message: State, kept: State) -> Any:
    task = TrainTask(round, 7, steps=3)
    return turn(build("prrfl", rounds=2, weighting="uniform"), toy_sites()[site], task, message, kept, CPU, evaluate)[0]


@pytest.mark.slow
def test_without_transfer_the_own_model_is_local_trainings_bit_for_bit(tmp_path: Path) -> None:
    schedule = {"local_steps": 8}
    prrfl = simulate("prrfl", tmp_path / "a", transfer=0.0, schedule=schedule)
    local = simulate("local", tmp_path / "b", schedule=schedule)
    for site in local.kept:
        own = {k.removeprefix("twin."): t for k, t in prrfl.kept[site]["own"].items() if k.startswith("twin.")}
        assert_same(State({"model": own}), State({"model": local.kept[site]["model"]}))


@pytest.mark.parametrize(("steps", "scores", "stages"), [
    (3, [], [Stage.EXCHANGE]),
    (8, [(0.1, 0.5), (0.1, 0.5)], [Stage.RECOVER, Stage.RECOVER]),
    (12, [(0.9, 0.5), (0.9, 0.5), (0.9, 0.5)], [Stage.RECOVER, Stage.EXCHANGE, Stage.SUBLIMATE]),
])  # fmt: skip
def test_who_teaches_is_asked_before_every_epoch(
    steps: int, scores: Sequence[tuple[float, float]], stages: Sequence[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site s2 has 8 images in batches of 2: an epoch is 4 steps; less than two of them always exchange."""
    worker, site, seen = build("prrfl"), toy_sites()["s2"], []
    told = iter([score for pair in scores for score in pair])
    monkeypatch.setattr(worker, "training_dice", lambda _: next(told))
    original = worker.loss
    monkeypatch.setattr(worker, "loss", lambda batch: seen.append(worker._stage) or original(batch))
    worker.receive(worker.broadcast(worker.init_server({}), "s2", TrainTask(1, 7)), State(), site)
    CPU.fit(worker, worker.batches(site, 0, steps))
    assert [stage for i, stage in enumerate(seen) if i % 4 == 0] == stages
    assert next(told, None) is None


@pytest.mark.parametrize("stage", [Stage.RECOVER, Stage.EXCHANGE, Stage.SUBLIMATE])
def test_only_those_who_are_taught_feel_the_other(stage: Stage) -> None:
    worker, gradients = build("prrfl"), {}
    with torch.no_grad():
        for parameter in worker.twin.parameters():
            parameter.add_(0.1)
    for transfer in (0.0, 1.0):
        worker.transfer, worker._stage = transfer, stage
        worker.zero_grad()
        worker.loss(next(iter(toy_sites()["s1"].eval_batches("train")))).backward()
        gradients[transfer] = [
            torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
            for network in (worker.model, worker.twin)
        ]
    felt = [not torch.equal(a, b) for a, b in zip(gradients[0.0], gradients[1.0], strict=True)]
    assert felt == [stage != Stage.SUBLIMATE, stage != Stage.RECOVER]


def test_thresholds_that_leave_the_stages_no_order_are_refused_and_never_drawn() -> None:
    build("prrfl", recover=0.9, sublimate=0.9)
    with pytest.raises(ValueError, match=r"recover=0\.95 is above .*sublimate=0\.9: .*take algorithm\.recover=0\.9 or"):
        build("prrfl", recover=0.95)
    searched = {key: axis(key, knob, knob.default) for key, knob in own_settings("prrfl").items()}
    assert searched["transfer"] is not None
    assert searched["recover"] is searched["sublimate"] is None


def test_measuring_changes_neither_model() -> None:
    worker, site = build("prrfl"), toy_sites()["s1"]
    worker._site = site
    before = {name: tensor.clone() for name, tensor in worker.state_dict().items()}
    assert 0 <= worker.training_dice(worker.model) <= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in worker.state_dict().items())
    assert worker.model.training


def test_a_site_that_joins_later_begins_with_the_mean(tmp_path: Path) -> None:
    outcome = simulate("prrfl", tmp_path, 1, schedule={"fraction": 0.67})
    absent = next(site for site in ("s0", "s1", "s2") if f"reply/{site}" not in outcome.server.tensors)
    message = build("prrfl").broadcast(outcome.server, absent, TrainTask(2, 7))
    assert_same(State({"m": message["model"]}), State({"m": outcome.server["model"]}))


@pytest.mark.parametrize("schedule", [{"combine": "median"}, {"server_lr": 0.5}, {"order": "cyclic"}])
def test_settings_of_a_mean_that_no_site_receives_are_refused(schedule: dict[str, Any], tmp_path: Path) -> None:
    ((name, value),) = schedule.items()
    with pytest.raises(ValueError, match=rf"federation\.{name}={value} has no effect .*take federation\.{name}="):
        simulate("prrfl", tmp_path, schedule=schedule)
