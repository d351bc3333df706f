"""Batches that are computed in pieces: the step of the whole batch, in the memory of one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import turn
from fedseg.federation.contract import TrainTask
from fedseg.federation.state import State
from fedseg.reporting.folder import RunFolder
from tests.tiers import every
from tests.tiny_run import TINY
from tests.world import CPU, build, evaluate, toy_sites, training_of

ADDING_UP = [name for name, method in ALGORITHMS.items() if method.adds_up and method.labelled]


def after_a_turn(name: str, **knobs: Any) -> tuple[State, State]:
    """What a site sends and keeps after two turns of two steps, each of five images."""
    training = training_of(name, loss="bce", **knobs)
    worker = build(name, training, norm="group")
    site = toy_sites()["s1"]
    site.batch_size = 5
    server = worker.init_server({"s1": worker.introduce(site)})
    kept = State()
    for round in (1, 2):
        task = TrainTask(round, 7, steps=2)
        update, kept = turn(worker, site, task, worker.broadcast(server, "s1", task), kept, CPU, evaluate)
    return State(update.tensors, {k: v for k, v in update.scalars.items() if "seconds" not in k}), kept


@pytest.mark.parametrize("name", every(name for name in ADDING_UP if name != "silobn"))  # it needs batch statistics
def test_pieces_make_the_step_of_the_whole_batch(name: str) -> None:
    knobs = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01}
    whole, cut = after_a_turn(name, **knobs), after_a_turn(name, **knobs, pieces=2)
    for ours, expected in zip(cut, whole, strict=True):
        assert ours.tensors.keys() == expected.tensors.keys()
        for group, tensors in expected.tensors.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(ours[group][key], tensor, rtol=1e-4, atol=1e-6)
        assert ours.scalars.keys() == expected.scalars.keys()
        assert ours.scalars.get("steps") == expected.scalars.get("steps")
    moved = [t.abs().max() for tensors in whole[0].tensors.values() for t in tensors.values() if t.is_floating_point()]
    moved += [t.abs().max() for ts in whole[1].tensors.values() for t in ts.values() if t.is_floating_point()]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - set(ADDING_UP)))
def test_a_method_whose_step_is_no_sum_refuses_pieces(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no sum over pieces of its batch; take training\.pieces=1"):
        build(name, training_of(name, pieces=2))
    build(name, training_of(name, pieces=1))


def test_private_steps_refuse_pieces() -> None:
    private = PrivateStep(1.0, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"patient by patient.* take training\.pieces=1"):
        Recipe.build(Training(pieces=2), "sigmoid", 3, private)
    Recipe.build(Training(pieces=1), "sigmoid", 3, private)


@pytest.mark.slow
def test_a_run_in_pieces_counts_steps_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for pieces in (1, 3):
        told = [f"output={tmp_path / str(pieces)}", f"training.pieces={pieces}", "data.batch_size=4"]
        assert train.main([*TINY, "algorithm=fedavg", "data.n_sites=2", "federation.rounds=2", *told]) == 0
        tables.append(RunFolder(tmp_path / str(pieces)).rounds())
    assert list(tables[0]["steps"]) == list(tables[1]["steps"])
    assert tables[0]["loss"].notna().all()
    assert list(tables[0]["loss"]) != list(tables[1]["loss"])
    capsys.readouterr()
    assert train.main([*TINY, "trainer.accumulate_grad_batches=4"]) == 2
    assert "it is training.pieces" in capsys.readouterr().err
