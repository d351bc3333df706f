"""SoftPull: rounds written down anew, and what they reduce to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.state import State
from tests.lines import LineSite, close, drawn_lines, federate_lines, trained
from tests.world import assert_same, build, simulate, toy_sites

LR, STEPS = 0.05, 4
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)


def world(*examples: int) -> tuple[dict[str, LineSite], Tensor]:
    return drawn_lines(STEPS, examples or (10, 10, 10))


def test_rounds_are_the_papers(tmp_path: Path) -> None:
    sites, start = world(10, 20, 40)
    own, lam = dict.fromkeys(sites, start), 0.6
    for server, _ in federate_lines("softpull", tmp_path, sites, start, SGD, 3, lam=lam):
        ends = {name: trained(site, own[name], LR) for name, site in sites.items()}
        for name in sites:
            others = [end for other, end in ends.items() if other != name]
            own[name] = lam * ends[name] + (1 - lam) / len(others) * torch.stack(others).sum(dim=0)
            close(server[f"reply/{name}"]["w"], own[name])
        close(server["model"]["w"], sum(site.examples / 70 * ends[name] for name, site in sites.items()))


@pytest.mark.slow
def test_sites_that_keep_their_model_train_alone(tmp_path: Path) -> None:
    training = Training(optimizer="sgd", lr=0.1)  # Adam makes steps of rounding, where a gradient is nothing else
    softpull = simulate("softpull", tmp_path / "a", 3, training=training, lam=1.0)
    local = simulate("local", tmp_path / "b", 3, training=training)
    for site, kept in local.kept.items():
        for name, tensor in softpull.server[f"reply/{site}"].items():
            torch.testing.assert_close(tensor, kept["model"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sites_that_keep_no_more_than_others_do_fedavg(tmp_path: Path) -> None:
    sites, start = world()
    ours = federate_lines("softpull", tmp_path / "a", sites, start, SGD, 3, lam=1 / len(sites))
    theirs = federate_lines("fedavg", tmp_path / "b", sites, start, SGD, 3)
    for (here, _), (there, _) in zip(ours, theirs, strict=True):
        for group in ("model", *(f"reply/{name}" for name in sites)):
            close(here[group]["w"], there["model"]["w"])


@pytest.mark.parametrize("personal", [None, "normalisation"])
def test_the_pulled_model_is_personal_and_the_mean_is_global(personal: str | None, tmp_path: Path) -> None:
    outcome = simulate("softpull", tmp_path, 2, personal=personal)
    server, method, sites = outcome.server, outcome.federation.algorithm, toy_sites()
    look, worker = EvaluateTask(2, 7), build("softpull", personal=personal)
    worker.receive(method.broadcast(server, "s1", look), outcome.kept["s1"], sites["s1"])
    held = worker.network("personal").state_dict()
    for name, tensor in {**server["reply/s1"], **outcome.kept["s1"]["model"]}.items():
        assert torch.equal(held[name], tensor)
    if personal is None:
        everybody = {**server["model"], **server["buffers"], **outcome.kept["s1"]["model"]}
        assert_same(State({"all": dict(worker.network("global").state_dict())}), State({"all": everybody}))
    for site, kind in (("elsewhere", EvaluateTask), ("late", TrainTask)):
        message = method.broadcast(server, site, kind(3, 7))
        assert_same(message, State({group: server[group] for group in message.tensors}))
        assert message.tensors.keys() == {"model", "buffers"} & server.tensors.keys()


def test_a_site_alone_keeps_its_model_and_one_that_is_absent_its_last(tmp_path: Path) -> None:
    models = {"s0": {"w": torch.tensor([1.0, 2.0])}}
    assert_same(State(build("softpull", lam=0.3).pulled(models)), State(models))
    before = simulate("softpull", tmp_path, 1, schedule={"fraction": 0.7})
    after = simulate("softpull", tmp_path, 2, schedule={"fraction": 0.7})
    asked = {row["site"] for row in after.observer.rows("rounds") if row["round"] == 2 and row["task"] == "train"}
    assert len(asked) == 2
    for group, tensors in before.server.tensors.items():
        if group.startswith("reply/"):
            same = all(torch.equal(tensor, after.server[group][name]) for name, tensor in tensors.items())
            assert same == (group.removeprefix("reply/") not in asked)
