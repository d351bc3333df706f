"""FedCE: weights of whole rounds against both programs' arrays, and the model without a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.algorithms.fedce import minus
from fedseg.federation.client import turn
from fedseg.federation.contract import Cohort, TrainTask
from fedseg.federation.state import Mean, State, Update
from tests.lines import golden
from tests.world import CPU, build, evaluate, simulate, toy_sites


def rounds_of(archive: str, **knobs: Any) -> tuple[list[list[float]], list[torch.Tensor], list[State]]:
    """Weights, what the model moved by, and the server's state after every round of an archive's updates."""
    data = golden(archive)
    deltas = data["deltas"]
    learns = data["is_param"].bool() if "is_param" in data else torch.ones(deltas.shape[-1], dtype=torch.bool)
    server = State({"model": {"w": torch.zeros_like(deltas[0, 0, learns])}})
    if not learns.all():
        server.tensors["buffers"] = {"s": torch.zeros_like(deltas[0, 0, ~learns])}
    method, weights, moves, servers = build("fedce", **knobs), [], [], []
    for sent, alone in zip(deltas, data["one_minus_mean_minus_metric"].tolist(), strict=True):
        updates = [
            Update(
                {"model": {"w": row[learns]}, **({} if learns.all() else {"buffers": {"s": row[~learns]}})},
                {"error_without": bad},
                site=f"s{i}",
                examples=5 + i,
            )
            for i, (row, bad) in enumerate(zip(sent, alone, strict=True))
        ]

        def average(given: Sequence[float], updates: list[Update] = updates) -> tuple[State, Cohort]:
            mean = Mean()
            weights.append(list(given))
            for update, weight in zip(updates, given, strict=True):
                mean.add(update, weight)
            return mean.result(), Cohort({u.site: w for u, w in zip(updates, given, strict=True)}, 4, 4, 4)

        before, server = server, method.aggregate(server, updates, average)
        move = torch.zeros_like(sent[0])
        move[learns] = server["model"]["w"] - before["model"]["w"]
        if not learns.all():
            move[~learns] = server["buffers"]["s"] - before["buffers"]["s"]
        moves.append(move)
        servers.append(server)
    return weights, moves, servers


@pytest.mark.parametrize(
    ("archive", "knobs"),
    [
        ("fedce_plus_s51", {"version": "2023", "join": "plus"}),
        ("fedce_times_s52", {"version": "2023", "join": "times"}),
        ("fedce_v2_plus_s54", {"version": "nvflare", "join": "plus"}),
    ],
)
def test_weights_and_steps_of_whole_rounds_are_the_programs(archive: str, knobs: dict[str, Any]) -> None:
    data = golden(archive)
    weights, moves, servers = rounds_of(archive, **knobs)
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), data["coef"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(moves), data["global_update"], rtol=1e-9, atol=1e-12)
    if "running_mean_cos" in data:
        last = servers[-1].scalars
        means = [last[f"cosines/s{i}"] / last[f"rounds/s{i}"] for i in range(4)]
        assert means == pytest.approx(data["running_mean_cos"][-1].tolist(), rel=1e-9)


def test_the_model_without_a_site_is_the_references() -> None:
    data = golden("fedce_minusmodel_s53")
    rest = minus(data["global_model"], data["last_local_model"], float(data["weight"]))
    torch.testing.assert_close(rest, data["minus_model"], rtol=1e-9, atol=1e-12)


def test_a_site_scores_the_model_without_itself_from_its_second_round_on() -> None:
    worker, site = build("fedce"), toy_sites()["s1"]
    server = worker.init_server({})
    server.scalars["share/s1"] = 0.4
    kept, told, found = State(), [], []
    for round in (1, 2, 3):
        message = worker.broadcast(server, "s1", TrainTask(round, 7))
        if kept.tensors:
            probe, last = build("fedce"), {k.removeprefix("last."): t for k, t in kept["own"].items()}
            rest = {
                name: (t - 0.4 * last[name]) / 0.6
                for group in ("model", "buffers")
                for name, t in message[group].items()
            }
            rest = {name: t.clamp(min=0) if name.endswith("running_var") else t for name, t in rest.items()}
            probe.model.load_state_dict({**probe.model.state_dict(), **rest})
            answer = probe.predict(site.images, "global") > 0.5
            overlap, size = (answer * site.masks).sum((2, 3)), (answer + site.masks).sum((2, 3))
            found.append(float((2 * overlap / size.clamp(min=1))[size > 0].mean()))
        update, kept = turn(worker, site, TrainTask(round, 7, steps=3), message, kept, CPU, evaluate)
        told.append(update.scalars["error_without"])
    assert told == pytest.approx([1.0, 1 - found[0] / 2, 1 - sum(found) / 3], abs=1e-5)
    assert 0 < found[0] < 1


@pytest.mark.slow
def test_after_a_round_without_it_the_model_without_a_site_is_the_one_it_receives(tmp_path: Path) -> None:
    method = build("fedce")
    server = State(method.init_server({}).tensors, {"share/s0": 0.5, "share/s1": 0.5})
    flat = {group: {key: tensor * 0 for key, tensor in server[group].items()} for group in ("model", "buffers")}
    told = Update(flat, {"error_without": 0.5}, site="s0", examples=9)

    def average(weights: Sequence[float]) -> tuple[State, Cohort]:
        return State(flat), Cohort({"s0": 1.0}, 2, 2, 2)

    after = method.aggregate(server, [told], average)
    message = method.broadcast(after, "s1", TrainTask(3, 7))
    assert message.scalars["share"] == 0
    worker, site = build("fedce"), toy_sites()["s1"]
    kept = turn(build("fedce"), site, TrainTask(1, 7, steps=2), message, State(), CPU, evaluate)[1]
    worker.receive(message, State(), site)
    received = worker.mean_dice(worker.model, site.eval_batches("val"))
    update, _ = turn(build("fedce"), site, TrainTask(3, 7, steps=2), message, kept, CPU, evaluate)
    assert received is not None
    assert update.scalars["error_without"] == pytest.approx(1 - received / 2, abs=1e-6)  # its first round counts as 0
    both = [Update(flat, {"error_without": 0.5}, site=name, examples=9) for name in ("s0", "s1")]
    again = method.aggregate(after, both, average)
    assert method.broadcast(again, "s1", TrainTask(4, 7)).scalars["share"] > 0


def test_absent_sites_keep_their_weight_and_unlabelled_ones_have_none(tmp_path: Path) -> None:
    sites = toy_sites(4)
    sites["s2"] = replace(sites["s2"], labelled=False)
    outcome = simulate("fedce", tmp_path, 3, sites=sites, schedule={"dropout": 0.4})
    shares = {name: value for name, value in outcome.server.scalars.items() if name.startswith("share/")}
    assert "share/s2" not in shares
    assert all(0 < value <= 1 for value in shares.values())
    counted = {name: value for name, value in outcome.server.scalars.items() if name.startswith("rounds/")}
    rows = [row["site"] for row in outcome.observer.rows("rounds") if row["task"] == "train" and row["examples"]]
    assert counted == {f"rounds/{site}": rows.count(site) for site in set(rows)}


def test_a_site_that_lies_about_its_score_gains_no_more_than_an_honest_one_could() -> None:
    method = build("fedce")
    server = method.init_server({})
    generator = torch.Generator().manual_seed(3)

    def weights(told: float) -> list[float]:
        given: list[float] = []
        generator.manual_seed(3)
        moves = [{k: torch.randn(t.shape, generator=generator) for k, t in server["model"].items()} for _ in range(3)]
        buffers = {k: t * 0 for k, t in server["buffers"].items()}
        numbers = [told, 0.5, 0.5]
        updates = [
            Update({"model": move, "buffers": buffers}, {"error_without": n}, site=f"s{i}", examples=4)
            for i, (move, n) in enumerate(zip(moves, numbers, strict=True))
        ]

        def average(found: Sequence[float]) -> tuple[State, Cohort]:
            given.extend(found)
            return State({"model": moves[0], "buffers": buffers}), Cohort({}, 3, 3, 3)

        method.aggregate(server, updates, average)
        return given

    assert weights(1e9) == weights(1.0)
    assert weights(1.0)[0] > weights(0.2)[0]


def test_a_site_without_validation_images_is_refused_with_a_cure() -> None:
    class Bare:
        name, examples = "bare", 3

        def eval_batches(self, split: str) -> list[Any]:
            return []

    bare: Any = Bare()
    with pytest.raises(ValueError, match="site 'bare' has no validation images, on which algorithm=fedce"):
        build("fedce").check_site(bare)
    build("fedce").check_site(toy_sites()["s0"])
