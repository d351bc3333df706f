"""Learning rates that move over rounds: their course, that every method follows it, and that resuming keeps it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import train
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.recipe import READ_BY, Recipe, Training
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.state import State
from tests.tiny_run import TINY
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites, training_of

ROUNDS = 12


def rates(training: Training, rounds: int = ROUNDS) -> list[float]:
    return [training.lr_in(round, rounds) for round in range(1, rounds + 1)]


@pytest.mark.parametrize(
    ("knobs", "scheduler"),
    [
        ({}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, ROUNDS)),
        ({"schedule": "poly"}, lambda o: lr_scheduler.PolynomialLR(o, ROUNDS, 0.9)),
        ({"schedule": "step", "decay": 0.3, "decay_every": 5}, lambda o: lr_scheduler.StepLR(o, 5, 0.3)),
    ],
    ids=["constant", "cosine", "poly", "step"],
)
def test_the_course_is_that_of_pytorchs_schedulers_with_an_epoch_for_a_round(knobs: Any, scheduler: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    following = scheduler(optimizer)
    expected = []
    for _ in range(ROUNDS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        following.step()
    assert rates(Training(lr=0.02, **knobs)) == pytest.approx(expected, rel=1e-9)


def test_warm_up_rises_in_equal_steps_before_the_schedule_begins() -> None:
    warm = rates(Training(lr=0.04, schedule="cosine", warmup=3))
    assert warm[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert warm[3:] == pytest.approx(rates(Training(lr=0.04, schedule="cosine"), ROUNDS - 3))
    assert rates(Training(lr=0.04, warmup=1), 3) == pytest.approx([0.02, 0.04, 0.04])


def test_rounds_beyond_the_schedule_keep_its_last_rate() -> None:
    course = rates(Training(schedule="poly", schedule_rounds=4), 8)
    assert course[:4] == pytest.approx(rates(Training(schedule="poly"), 4))
    assert course[4:] == [course[3]] * 4
    assert min(course) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_follows_it_in_training_tasks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {"lipschitz": 50.0} if name == "qffl" else {}  # which has no bound of its own where rates move
    worker: Any = build(name, training_of(name, optimizer="sgd", lr=0.02, schedule="cosine"), rounds=ROUNDS, **knobs)
    seen: list[set[float]] = []
    configure = worker.configure_optimizers

    def noted() -> torch.optim.Optimizer:
        optimizer = configure()
        seen.append({group["lr"] for group in optimizer.param_groups})
        return optimizer

    monkeypatch.setattr(worker, "configure_optimizers", noted)
    sites = {site: data for site, data in toy_sites().items() if site != "pool"}
    introduced = {site: worker.introduce(data) for site, data in sites.items()}
    server = worker.init_server(introduced)
    message = worker.broadcast(server, "s1", TrainTask(7, 7))
    kept = State()
    for round in (7, 12):
        _, kept = turn(worker, sites["s1"], TrainTask(round, 7, steps=1), message, kept, CPU, evaluate)
    expected = [worker.recipe.training.lr_in(round, ROUNDS) for round in (7, 12)]
    factors = {1.0, worker.discriminator_lr} if name == "flmrcm" else {1.0}
    assert seen == [{rate * factor for factor in factors} for rate in expected]
    assert expected[0] == pytest.approx(0.01)
    turn(worker, sites["s1"], EvaluateTask(12, 7, splits=("val",), personalise=True), message, kept, CPU, evaluate)
    own = 0.01 if name == "perfedavg" else 0.02  # its alpha
    assert all(rates == {own} for rates in seen[2:]), "what is fitted for an evaluation takes lr itself"
    assert bool(seen[2:]) == worker.personalises


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path, optimizer_state: Any) -> None:
    training = Training(lr=0.02, schedule="cosine", schedule_rounds=5, warmup=1, optimizer_state=optimizer_state)
    schedule = {"fraction": 0.7, "dropout": 0.3}
    whole = simulate("ditto", tmp_path / "whole", 4, training=training, schedule=schedule)
    simulate("ditto", tmp_path / "parts", 2, training=training, schedule=schedule)
    parts = simulate("ditto", tmp_path / "parts", 4, training=training, schedule=schedule)
    assert_same(parts.server, whole.server)
    for site, kept in whole.kept.items():
        assert_same(parts.kept[site], kept)
    other = simulate("ditto", tmp_path / "other", 4, training=Training(lr=0.02), schedule=schedule)
    assert any(not torch.equal(other.server["model"][name], t) for name, t in whole.server["model"].items())


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        (
            {"schedule": "poly", "warmup": 5, "schedule_rounds": 5},
            r"leaves no round of training.schedule_rounds=5",
        ),
        ({"decay": 0.0}, "training.decay=0.0"),
        ({"decay_every": 0}, "training.decay_every=0"),
        ({"warmup": -1}, "training.warmup=-1"),
    ],
)
def test_settings_out_of_range_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Training(**knobs)


OTHERS = {"harmonise_target": "least_complex", "mixstyle_after": ["encoder"], "schedule_rounds": 5, "decay_every": 5}


@pytest.mark.parametrize("name", READ_BY)
def test_a_setting_that_nobody_reads_is_refused(name: str) -> None:
    owner, readers = READ_BY[name]
    knobs = {name: OTHERS.get(name, 0.25)}
    usual = getattr(Training(), name)
    written = {None: "null", (): "[]"}.get(usual, usual)
    cure = f"take training.{owner}={readers[0]}, or leave training.{name} at {written}"
    with pytest.raises(ValueError, match=re.escape(f"training.{name} has no effect with training.{owner}=")) as refused:
        Training(**knobs)
    assert str(refused.value).endswith(cure)
    Training(**knobs, **{owner: readers[0]})
    Training(**{name: usual})


def test_a_schedule_of_ones_own_is_told_of_rounds_alone() -> None:
    Training(schedule="math:sqrt", schedule_rounds=5)
    with pytest.raises(ValueError, match=r"training.decay has no effect with training.schedule=math:sqrt"):
        Training(schedule="math:sqrt", decay=0.3)


def test_a_schedule_needs_a_round_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match=r"training.warmup=3 leaves no round of federation.rounds=3"):
        Recipe.build(Training(schedule="poly", warmup=3), "sigmoid", 3, rounds=3)
    Recipe.build(Training(warmup=3), "sigmoid", 3, rounds=3)


@pytest.mark.slow
def test_more_rounds_do_not_change_the_rates_of_those_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tiny = f"output={tmp_path / 'run'}", (*TINY, "data.n_sites=2", "algorithm=fedavg")
    assert train.main([run, *tiny, "federation.rounds=1", "training.schedule=cosine"]) == 0
    capsys.readouterr()
    assert train.main([run, "resume=true", "federation.rounds=2"]) == 2
    told = capsys.readouterr().err
    assert "training.schedule=cosine of this run falls over its 1 rounds" in told
    later, falls = f"output={tmp_path / 'later'}", ("training.schedule=cosine", "training.schedule_rounds=2")
    assert train.main([later, *tiny, "federation.rounds=1", *falls]) == 0
    assert train.main([later, "resume=true", "federation.rounds=2"]) == 0
