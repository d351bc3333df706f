"""FedSoup: rounds written down anew, what it looks at, and what it reduces to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.recipe import Training
from fedseg.algorithms.stock import dice
from fedseg.federation.client import turn
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State
from fedseg.federation.transport import InProcess
from tests.world import (
    CPU,
    POOL,
    Forgetful,
    ToySite,
    assert_same,
    assert_same_outcome,
    build,
    evaluate,
    simulate,
    toy_sites,
)

SGD = Training(optimizer="sgd", lr=0.3)


def score(model: dict[str, Tensor], site: ToySite) -> float:
    worker = build("fedavg", SGD)
    worker.model.load_state_dict(model)
    return float(dice(worker.predict(site.images, "global") >= 0.5, site.masks).mean())


@pytest.mark.slow
def test_rounds_are_the_programs() -> None:
    """Both outcomes of the comparison occur, from an empty pool and from one of several models."""
    sites = {name: site for name, site in toy_sites().items() if name != POOL}
    server, kept = build("fedsoup", SGD).init_server({}), {name: State() for name in sites}
    pools = {name: (0, {n: torch.zeros_like(t) for n, t in server["model"].items()}) for name in sites}
    seen = set()
    for round in range(1, 6):
        ends = []
        for name, site in sites.items():
            task, message = TrainTask(round, 7, steps=3), State({g: server[g] for g in ("model", "buffers")})
            plain = State({"model": kept[name].get("model")})
            update, _ = turn(build("fedavg", SGD), site, task, message, plain, CPU, evaluate)
            w, v = server["model"], {n: server["model"][n] + t for n, t in update["model"].items()}
            rest = {n: server["buffers"][n] + t for n, t in update["buffers"].items()}
            worker = build("fedsoup", SGD, rounds=5, wait=0.0)
            answer, kept[name] = turn(worker, site, task, message, kept[name], CPU, evaluate)
            (n, pool), counters = pools[name], kept[name]["model"]
            without = {k: (v[k] + n * pool[k]) / (n + 1) for k in v}
            joined = {k: (v[k] + n * pool[k] + w[k]) / (n + 2) for k in v}
            better = score({**joined, **rest, **counters}, site) > score({**without, **rest, **counters}, site)
            seen.add((min(n, 2), better))
            if better:
                pools[name] = n + 1, {k: (n * pool[k] + w[k]) / (n + 1) for k in w}
            mixed = joined if better else without
            own = {k.removeprefix("own."): t for k, t in kept[name]["own"].items() if k.startswith("own.")}
            ends.append({})
            for k, t in mixed.items():
                torch.testing.assert_close(own[k], t, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(answer["model"][k], t - w[k], rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(kept[name]["own"][f"pool.{k}"], pools[name][1][k], rtol=1e-4, atol=1e-5)
                ends[-1][k] = own[k]
            ends[-1] |= {k: own[k] for k in rest}
            assert kept[name]["own"]["pooled"] == pools[name][0]
        mean = {k: torch.stack([end[k] for end in ends]).mean(dim=0) for k in ends[0]}
        server = State({g: {k: mean[k] for k in server[g]} for g in ("model", "buffers")})
    assert {(0, True), (0, False), (1, True)} <= seen
    assert seen & {(1, False), (2, False)}


@pytest.mark.slow
def test_without_mixing_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    fedsoup, fedavg = simulate("fedsoup", tmp_path / "a", 3, wait=1.0), simulate("fedavg", tmp_path / "b", 3)
    assert_same(fedsoup.server, fedavg.server)


@pytest.mark.parametrize(("wait", "mixed"), [(0.0, {1, 2, 3, 4}), (0.5, {3, 4}), (0.75, {4}), (1.0, set())])
def test_sites_mix_once_a_share_of_the_rounds_is_over(wait: float, mixed: set[int]) -> None:
    found = set()
    for round in range(1, 5):
        worker = build("fedsoup", SGD, rounds=4, wait=wait)
        worker._mix = lambda _, round=round: found.add(round)
        message = worker.broadcast(worker.init_server({}), "s1", TrainTask(round, 7))
        turn(worker, toy_sites()["s1"], TrainTask(round, 7, steps=1), message, State(), CPU, evaluate)
    assert found == mixed


@dataclass
class ValidationOnly(ToySite):
    """A site whose test images nobody may look at while training."""

    def eval_batches(self, split: str) -> Iterator[Batch]:
        assert split == "val"
        yield from super().eval_batches(split)


@dataclass
class Unvalidated(ToySite):
    """A site without validation images."""

    def eval_batches(self, split: str) -> Iterator[Batch]:
        yield from ()


def as_kind(kind: type[ToySite]) -> dict[str, ToySite]:
    return {name: kind(**vars(site)) for name, site in toy_sites().items()}


def test_it_looks_at_validation_images_alone() -> None:
    site = as_kind(ValidationOnly)["s2"]
    worker = build("fedsoup", SGD, wait=0.0)
    message = worker.broadcast(worker.init_server({}), "s2", TrainTask(1, 7))
    _, kept = turn(worker, site, TrainTask(1, 7, steps=3), message, State(), CPU, evaluate)
    assert kept["own"]["pooled"] in (0, 1)


def test_a_site_without_validation_images_takes_part_as_with_fedavg() -> None:
    site, task = as_kind(Unvalidated)["s1"], TrainTask(1, 7, steps=3)
    message = build("fedavg", SGD).init_server({})
    ours, kept = turn(build("fedsoup", SGD, wait=0.0), site, task, message, State(), CPU, evaluate)
    theirs, _ = turn(build("fedavg", SGD), site, task, message, State(), CPU, evaluate)
    assert_same(State(ours.tensors), State(theirs.tensors))
    assert not kept["own"]["pooled"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [InProcess, Forgetful])
def test_a_resumed_run_mixes_as_an_undisturbed_one(way: type[InProcess], tmp_path: Path) -> None:
    whole = simulate("fedsoup", tmp_path / "a", 4, wait=0.0)
    assert max(float(state["own"]["pooled"]) for state in whole.kept.values()) > 1
    simulate("fedsoup", tmp_path / "b", 2, transport=way, wait=0.0)
    assert_same_outcome(whole, simulate("fedsoup", tmp_path / "b", 4, transport=way, wait=0.0))


def test_personal_tensors_are_not_mixed(tmp_path: Path) -> None:
    outcome = simulate("fedsoup", tmp_path, 2, wait=0.0, personal="normalisation")
    worker = build("fedsoup", personal="normalisation")
    for state in outcome.kept.values():
        own = {k.removeprefix("own."): t for k, t in state["own"].items() if k.startswith("own.")}
        assert all(torch.equal(own[k], t) for k, t in state["model"].items())
        assert all(not state["own"][f"pool.{k}"].any() for k in worker.parts.stays)
