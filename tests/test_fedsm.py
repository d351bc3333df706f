"""FedSM: what its parts reduce to, what the selector learns, and whose model answers for an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms.fedsm import MOMENTS, PERSONAL, SELECTOR, FedSM
from fedseg.algorithms.functional.selected import Selected, SiteClassifier
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.engine import POOL
from fedseg.federation.state import State
from fedseg.models.losses import build_loss
from tests.lines import close, drawn_lines, federate_lines, trained
from tests.test_softpull import LR, SGD
from tests.world import CPU, Outcome, ToySite, assert_same, build, evaluate, simulate, toy_sites

SITES = ("s0", "s1", "s2")


def worker_for(outcome: Outcome, name: str = "elsewhere", **knobs: Any) -> FedSM:
    """At a site that took no part, after training."""
    federation = outcome.federation
    rounds = federation.schedule.rounds
    message = federation.algorithm.broadcast(outcome.server, name, EvaluateTask(rounds, 7, adapt=True))
    message = State({**message.tensors, **federation.publish(rounds).tensors}, message.scalars)
    worker = build("fedsm", **knobs)
    assert isinstance(worker, FedSM)
    worker.receive(message, State(), replace(toy_sites()["s1"], name=name, seen=False))
    worker.adapt([])
    return worker


def selected(worker: FedSM) -> Selected:
    network = worker.network("adapted")
    assert isinstance(network, Selected)
    return network


# ------------------------------------------------------------------------------------------------- reductions


@pytest.mark.slow
@pytest.mark.parametrize("selector", [False, True])
def test_the_global_model_is_fedavg_s_and_the_personal_ones_softpull_s(selector: bool, tmp_path: Path) -> None:
    ours = simulate("fedsm", tmp_path / "a", selector=selector)
    fedavg, softpull = (simulate(name, tmp_path / name) for name in ("fedavg", "softpull"))
    assert_same(State({g: ours.server[g] for g in fedavg.server.tensors}), State(fedavg.server.tensors))
    replies = {group: ts for group, ts in softpull.server.tensors.items() if group.startswith("reply/")}
    assert_same(State({group: ours.server[group] for group in replies}), State(replies))
    everybody = {**softpull.server["model"], **softpull.server["buffers"]}
    assert_same(State({PERSONAL: ours.server[PERSONAL]}), State({PERSONAL: everybody}))
    beside = {SELECTOR, MOMENTS} if selector else set()
    assert set(ours.server.tensors) == {*fedavg.server.tensors, *replies, PERSONAL, *beside}


def test_rounds_are_the_papers(tmp_path: Path) -> None:
    sites, start = drawn_lines(4, (10, 20, 40))
    own, lam, shared = dict.fromkeys(sites, start), 0.6, start
    for server, _ in federate_lines("fedsm", tmp_path, sites, start, SGD, 3, lam=lam, selector=False):
        ends = {name: trained(site, own[name], LR) for name, site in sites.items()}
        shared = sum(
            (site.examples / 70 * trained(site, shared, LR) for site in sites.values()), torch.zeros_like(start)
        )
        close(server["model"]["w"], shared)
        for name in sites:
            others = [end for other, end in ends.items() if other != name]
            own[name] = lam * ends[name] + (1 - lam) / len(others) * torch.stack(others).sum(dim=0)
            close(server[f"reply/{name}"]["w"], own[name])


def test_without_a_selector_nothing_is_published_and_no_site_is_numbered(tmp_path: Path) -> None:
    method = build("fedsm", selector=False)
    assert (method.adapts, method.unseen_views, method.models_per_step) == (False, ("global",), 2)
    assert not method.exact_groups
    assert not method.init_server({name: State() for name in SITES}).scalars
    assert not build("fedsm", personal="normalisation").adapts


# ------------------------------------------------------------------------------------------------- the selector


def test_selectors_and_moments_are_averaged_as_by_hand(tmp_path: Path) -> None:
    """Two rounds of Adam, written down anew, each from the mean of all sites' moments."""
    rounds, steps, rate = 2, 2, 1e-3
    outcome = simulate("fedsm", tmp_path, rounds, schedule={"local_steps": steps}, selector_lr=rate)
    sites = {name: site for name, site in toy_sites().items() if name != POOL}
    weights = {name: site.examples / sum(one.examples for one in sites.values()) for name, site in sites.items()}
    worker = build("fedsm")
    assert isinstance(worker, FedSM)
    (selector,) = worker._selector
    selector.set_sites(len(sites))
    shared = [p.detach().clone() for p in selector.parameters()]
    m, v, done = [torch.zeros_like(p) for p in shared], [torch.zeros_like(p) for p in shared], 0
    for round in range(1, rounds + 1):
        ends = []
        for place, (name, site) in enumerate(sites.items()):
            w, own_m, own_v = list(shared), list(m), list(v)
            for step, batch in enumerate(site.train_batches(derive_seed(7, "batches", round, name), steps), done + 1):
                names = [key for key, _ in selector.named_parameters()]
                held = [p.detach().requires_grad_() for p in w]
                logits = torch.func.functional_call(
                    selector, dict(zip(names, held, strict=True)), worker.normalize(batch["image"])
                )
                loss = -logits.log_softmax(dim=1)[:, place].mean()
                grads = torch.autograd.grad(loss, held)
                own_m = [0.9 * a + 0.1 * g for a, g in zip(own_m, grads, strict=True)]
                own_v = [0.999 * a + 0.001 * g * g for a, g in zip(own_v, grads, strict=True)]
                w = [
                    p - rate * (a / (1 - 0.9**step)) / ((b / (1 - 0.999**step)).sqrt() + 1e-8)
                    for p, a, b in zip(w, own_m, own_v, strict=True)
                ]
            ends.append((w, own_m, own_v))
        done += steps
        shared, m, v = (
            [
                torch.stack([weights[n] * e[kind][i] for n, e in zip(sites, ends, strict=True)]).sum(dim=0)
                for i in range(len(shared))
            ]
            for kind in range(3)
        )
    server = outcome.server
    for i, (name, _) in enumerate(selector.named_parameters()):
        assert server[MOMENTS][f"{name}/step"] == rounds * steps
        torch.testing.assert_close(server[MOMENTS][f"{name}/exp_avg"], m[i], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(server[MOMENTS][f"{name}/exp_avg_sq"], v[i], rtol=1e-3, atol=1e-10)
        torch.testing.assert_close(server[SELECTOR][name], shared[i], rtol=0, atol=2e-5)


def looks(images: Tensor, place: int) -> Tensor:
    """Images as of one of three scanners: smooth, striped, inverted."""
    stripes = (torch.arange(images.shape[-1]) % 2) * 0.5
    return [images, (images + stripes).clamp(0, 1), 1 - images][place]


@pytest.fixture(scope="module")
def told_apart(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A federation of three scanners; to be read only."""
    sites = {name: replace(site, images=looks(site.images, i)) for i, (name, site) in enumerate(toy_sites().items())
             if name != POOL}  # fmt: skip
    folder = tmp_path_factory.mktemp("told_apart")
    return simulate("fedsm", folder, 10, sites=sites, schedule={"local_steps": 4}, selector_lr=1e-2, lam=0.9)


@pytest.mark.slow
def test_an_image_goes_to_the_model_of_the_site_that_it_looks_like(told_apart: Outcome) -> None:
    worker = worker_for(told_apart, gamma=0.5, lam=0.9)
    fresh = ToySite.make("fresh", 0, count=8).images
    for place, site in enumerate(SITES):
        images = looks(fresh, place)
        assert selected(worker).chosen(worker.normalize(images)) == [place] * len(images)
        held = selected(worker).own[str(place)].state_dict()
        for name, tensor in told_apart.server[f"reply/{site}"].items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-5, atol=1e-6)
    mixed = torch.stack([looks(fresh[:1], place)[0] for place in (2, 0, 1)])
    apart = [worker.answers(selected(worker).own[str(p)], mixed[i : i + 1]) for i, p in enumerate((2, 0, 1))]
    torch.testing.assert_close(worker.predict(mixed, "adapted"), torch.cat(apart))
    assert not torch.allclose(worker.predict(mixed, "adapted"), worker.predict(mixed, "global"))


@pytest.mark.slow
def test_gamma_one_takes_the_global_model_always(told_apart: Outcome) -> None:
    worker, images = worker_for(told_apart, gamma=1.0), ToySite.make("fresh", 0, count=4).images
    assert selected(worker).chosen(worker.normalize(images)) == [None] * 4
    assert torch.equal(worker.predict(images, "adapted"), worker.predict(images, "global"))


class Shares(nn.Module):
    """Tells sites by what stands in the first pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :2].log()


class Says(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        return torch.full_like(images[:, :1], self.number)


def test_each_image_of_a_batch_is_answered_by_itself_and_doubt_by_the_shared_model() -> None:
    images = torch.tensor([[0.95, 0.05], [0.1, 0.9], [0.04, 0.96], [0.5, 0.5]]).reshape(4, 1, 1, 2)
    network = Selected(Shares(), Says(9.0), {0: Says(0.0), 1: Says(1.0)}, gamma=0.9 + 1e-6)
    assert network(images)[:, 0, 0, 0].tolist() == [0.0, 9.0, 1.0, 9.0]
    unpublished = Selected(Shares(), Says(9.0), {0: Says(0.0)}, gamma=0.0)
    assert unpublished(images)[:, 0, 0, 0].tolist() == [0.0, 9.0, 9.0, 0.0]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_classifier_takes_images_and_volumes_of_any_size_one_by_one(dimensions: int) -> None:
    classifier = SiteClassifier(2, dimensions, 8)
    classifier.set_sites(5)
    images = torch.rand(3, 2, *(7, 18, 33)[:dimensions])
    assert torch.equal(classifier(images), torch.zeros(3, 5)), "no site is likelier before training"
    nn.init.normal_(classifier.weight)
    torch.testing.assert_close(classifier(images)[:1], classifier(images[:1]))


def test_networks_and_widths_that_no_selector_fits_are_refused() -> None:
    recipe = Recipe(Training(), "sigmoid", nn.Identity(), build_loss("dice_bce", "sigmoid"))
    with pytest.raises(ValueError, match=r"Linear has no convolution .* take algorithm\.selector=false"):
        FedSM(nn.Linear(2, 2), recipe)
    with pytest.raises(ValueError, match=r"algorithm\.selector_width=6 must be a multiple of 4"):
        build("fedsm", selector_width=6)


# ------------------------------------------------------------------------------------------------- who is there


def test_a_site_alone_and_one_that_joins_later(tmp_path: Path) -> None:
    outcome = simulate("fedsm", tmp_path, 1, sites={"s0": toy_sites()["s0"]})
    worker = worker_for(outcome)
    assert selected(worker).chosen(worker.normalize(toy_sites()["s1"].images)) == [0] * 6, "there is no other label"
    close(outcome.server["reply/s0"]["encoder.0.weight"], outcome.server[PERSONAL]["encoder.0.weight"])

    late, task = toy_sites()["s2"], TrainTask(2, 7, steps=2)
    message = outcome.federation.algorithm.broadcast(outcome.server, "s2", task)
    assert "site" not in message.scalars
    assert_same(State({"own": message["reply"]}), State({"own": outcome.server[PERSONAL]}))
    update, kept = turn(build("fedsm"), late, task, message, State(), CPU, evaluate)
    for group in (SELECTOR, MOMENTS):
        assert_same(State({group: update[group]}), State({group: outcome.server[group]}))
    assert update[PERSONAL]["encoder.0.weight"].any()
    assert kept["own"]["trained"] == 1


def test_a_site_that_never_trained_publishes_nothing(tmp_path: Path) -> None:
    sites = {name: site for name, site in toy_sites().items() if name != POOL}
    sites["s1"].labelled = False
    outcome = simulate("fedsm", tmp_path, 1, sites=sites)
    assert set(outcome.federation.publish(1).tensors) == {"personal/s0", "personal/s2"}
    assert "reply/s1" not in outcome.server.tensors
    assert set(selected(worker_for(outcome)).own) == {"0", "2"}
