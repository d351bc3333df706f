"""CFL: how groups part, rounds written down anew, and what it reduces to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.algorithms.functional.parting import parting, parts
from fedseg.algorithms.functional.rows import cosine
from fedseg.algorithms.recipe import Training
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.state import State
from fedseg.federation.transport import InProcess
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import read_settings, unused
from tests.lines import LineSite, close, federate_lines, trained
from tests.test_laws import Wire
from tests.tiny_run import TINY
from tests.world import CPU, Forgetful, assert_same, assert_same_outcome, build, evaluate, simulate, toy_sites

LR, STEPS = 0.1, 4
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)
ALWAYS: dict[str, Any] = {"cancel": 1.0, "cosine": 1.0, "first_parting": 1}


def two_kinds(signs: Sequence[int], examples: Sequence[int]) -> dict[str, LineSite]:
    """Sites whose lines are one of two, up to their rows."""
    generator = torch.Generator().manual_seed(3)
    sites = {}
    for index, (sign, count) in enumerate(zip(signs, examples, strict=True)):
        rows = torch.eye(3, dtype=torch.float64) + 0.1 * torch.rand(3, 3, generator=generator, dtype=torch.float64)
        goal = sign * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.tensor([0.2, 0.1, 0.0])
        sites[f"s{index}"] = LineSite(f"s{index}", index, rows, rows @ goal, count, STEPS)
    return sites


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_parts_are_the_best_of_all(count: int) -> None:
    for seed in range(20):
        rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cosines = {(i, j): cosine(rows[i], rows[j]) for i, j in combinations(range(count), 2)}

        def apart(part: set[int], cosines: dict[tuple[int, int], float] = cosines) -> float:
            return max(value for (i, j), value in cosines.items() if (i in part) != (j in part))

        larger, smaller = parts(cosines, count)
        assert larger | smaller == set(range(count))
        assert len(larger) >= len(smaller) > 0
        every = [set(c) for size in range(1, count) for c in combinations(range(count), size)]
        assert apart(smaller) == min(map(apart, every))


@pytest.mark.parametrize(
    ("rows", "cancel", "largest", "leave"),
    [
        ([[1, 0], [-1, 0.1], [1, 0.1]], 0.5, 0.0, [1]),
        ([[1, 0], [-1, 0.1], [1, 0.1]], 0.3, 0.0, []),  # the mean is 0.34 long
        ([[1, 0], [-1, 0.1], [1, 0.1]], 0.5, -0.995, []),  # a cosine between them is -0.990
        ([[1, 0], [-1, 0.1]], 1.0, 1.0, []),  # two stay together
        ([[0, 0], [0, 0], [0, 0]], 0.0, 1.0, [2]),
        ([], 1.0, 1.0, []),
    ],
)
def test_a_group_parts_when_its_updates_cancel_out_and_point_apart(
    rows: list[list[float]], cancel: float, largest: float, leave: list[int]
) -> None:
    assert parting([torch.tensor(row).double() for row in rows], [1.0] * len(rows), cancel, largest) == leave


def test_rounds_are_those_of_fedavg_in_each_group(tmp_path: Path) -> None:
    sites = two_kinds([1, -1, 1, -1, -1], [10, 20, 30, 10, 10])
    start = torch.zeros(3, dtype=torch.float64)
    groups = [list(sites)]
    models = [start]
    knobs: dict[str, Any] = {"cancel": 0.6, "first_parting": 2}
    for round, (server, _) in enumerate(federate_lines("cfl", tmp_path, sites, start, SGD, 4, **knobs), 1):
        if round == 2:
            groups, models = [["s1", "s3", "s4"], ["s0", "s2"]], models * 2
        ends = [{name: trained(sites[name], w, LR) for name in group} for group, w in zip(groups, models, strict=True)]
        models = [
            torch.stack([sites[n].examples * w for n, w in end.items()]).sum(dim=0)
            / sum(sites[n].examples for n in end)
            for end in ends
        ]
        for number, (group, model) in enumerate(zip(groups, models, strict=True)):
            assert {server.scalars[f"group/{name}"] for name in group} == {float(number)}
            close(server.get(f"group/{number}").get("w", server["model"]["w"]), model)
        shares = [sum(sites[name].examples for name in group) / 80 for group in groups]
        close(server["model"]["w"], torch.stack([s * w for s, w in zip(shares, models, strict=True)]).sum(dim=0))
        assert ("group/1" in server.tensors) == (round >= 2)


def test_a_run_that_ends_before_groups_may_part_says_so() -> None:
    words = [*TINY, "algorithm=cfl", "federation.rounds=3"]
    (detail,) = unused(Experiment(read_settings([*words, "algorithm.first_parting=4"])))
    assert detail.startswith(
        "algorithm=cfl, since groups part in round 4 at the earliest, and there are 3; take a smaller"
    )
    assert unused(Experiment(read_settings([*words, "algorithm.first_parting=3"]))) == []


@pytest.mark.parametrize("knobs", [{"cancel": 0.0, "first_parting": 1}, {**ALWAYS, "first_parting": 9}])
def test_one_group_is_fedavg_bit_for_bit(knobs: dict[str, Any], tmp_path: Path) -> None:
    schedule = {"dropout": 0.3, "work_spread": 0.5}
    ours = simulate("cfl", tmp_path / "a", 4, schedule=schedule, **knobs)
    theirs = simulate("fedavg", tmp_path / "b", 4, schedule=schedule)
    assert ours.server.tensors.keys() == theirs.server.tensors.keys()
    assert_same(State(ours.server.tensors), State(theirs.server.tensors))
    rows = [[{**row, "seconds": 0} for row in o.observer.rows("traffic")] for o in (ours, theirs)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("way", [InProcess, Forgetful, Wire])
def test_groups_resume_bit_for_bit(way: type[InProcess], tmp_path: Path) -> None:
    whole = simulate("cfl", tmp_path / "a", 3, **ALWAYS)
    assert {"group/0", "group/1"} <= whole.server.tensors.keys()
    simulate("cfl", tmp_path / "b", 1, transport=way, **ALWAYS)
    assert_same_outcome(whole, simulate("cfl", tmp_path / "b", 3, transport=way, **ALWAYS))


@pytest.mark.parametrize("personal", [None, "normalisation"])
def test_seen_sites_score_their_groups_model_and_others_the_mean(personal: str | None, tmp_path: Path) -> None:
    knobs = {**ALWAYS, "personal": personal}
    outcome = simulate("cfl", tmp_path, 2, **knobs)
    server, sites = outcome.server, toy_sites()
    method = outcome.federation.algorithm
    alone = next(name for name in ("s0", "s1", "s2") if server.scalars[f"group/{name}"] == 1)
    look = EvaluateTask(2, 7, splits=("val",))
    worker = build("cfl", **knobs)
    worker.receive(method.broadcast(server, alone, look), outcome.kept[alone], sites[alone])
    theirs = worker.predict(sites[alone].images, "personal")
    held = dict(worker.network("personal").state_dict())
    assert all(torch.equal(held[name], tensor) for name, tensor in server["group/1"].items())
    stays = outcome.kept[alone]["model"]
    assert all(torch.equal(held[name], tensor) for name, tensor in stays.items())
    worker.receive(method.broadcast(server, "elsewhere", look), State(), sites[alone])
    assert method.broadcast(server, "elsewhere", look).tensors.keys() == server.tensors.keys() - {"group/0", "group/1"}
    assert not torch.equal(worker.predict(sites[alone].images, worker.views[0]), theirs)
    assert worker.unseen_views == (() if personal else ("global",))
    train = TrainTask(3, 7)
    assert_same(State({"model": method.broadcast(server, "late", train)["model"]}),
                State({"model": {n: server["group/0"][n] for n in server["model"]}}))  # fmt: skip


def test_absent_sites_stay_with_the_larger_part(tmp_path: Path) -> None:
    method = build("cfl", **ALWAYS)
    groups = dict.fromkeys(("absent", "s0", "s1", "s2"), 0)
    update, _ = turn(build("cfl"), toy_sites()["s0"], TrainTask(1, 7, steps=1),
                     method.broadcast(method.init_server({}), "s0", TrainTask(1, 7)), State(),
                     CPU, evaluate)  # fmt: skip
    told = []
    for name, sign in (("s0", 1.0), ("s1", -1.0), ("s2", 1.0)):
        one = type(update)({"model": {n: sign * t for n, t in update["model"].items()}}, site=name, examples=2)
        told.append(one)
    found = method.parted(groups, told, dict.fromkeys(groups, 1.0))
    assert found == {"absent": 0, "s0": 0, "s1": 1, "s2": 0}
