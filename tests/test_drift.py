"""Methods against the drift of local steps: whole rounds against reference arrays, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fednova import effective_steps
from fedseg.algorithms.recipe import Training
from fedseg.algorithms.tensornorm import LENGTHS, length, scaled
from fedseg.federation.client import Compute, turn
from fedseg.federation.contract import Cohort, TrainTask
from fedseg.federation.engine import POOL
from fedseg.federation.state import Mean, State, Update, subtract
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from tests.lines import LineSite, ScriptedSite, along, close, federate_lines, golden, lines
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites, training_of

SGD = Training(optimizer="sgd", lr=0.05)


def plain(lr: float, **knobs: Any) -> Training:
    return Training(optimizer="sgd", lr=lr, channels_last=False, **knobs)


# ------------------------------------------------------------------------------------------------------ SCAFFOLD


def test_scaffolds_rounds_are_the_reference(tmp_path: Path) -> None:
    data = golden("scaffold_s82")
    steps = int(data["local_steps"])
    sites = lines(data, [steps] * 3, [10] * 3)
    reference = [data[name][1:] for name in ("x", "c", "c_i")]  # the first entries are the start
    rounds = federate_lines("scaffold", tmp_path, sites, data["x"][0], plain(float(data["lr"])), len(reference[0]))
    for (server, kept), x, c, own in zip(rounds, *reference, strict=True):
        close(server["model"]["w"], x)
        close(server["control"]["w"], c)
        for site, expected in zip(sites, own, strict=True):
            close(kept[site]["own"]["control.w"], expected)


@pytest.mark.parametrize(("training", "cure"), [
    (Training(), "training.optimizer=sgd, not adam"),
    (Training(optimizer="sgd", momentum=0.9), "training.momentum=0, not 0.9"),
])  # fmt: skip
def test_scaffold_refuses_steps_that_are_no_plain_gradients(training: Training, cure: str) -> None:
    with pytest.raises(ValueError, match=f"algorithm=scaffold: a site's gradient is read off .* so take {cure}"):
        build("scaffold", training)
    build("scaffold", SGD)


@pytest.mark.parametrize(
    "training", [SGD, Training(optimizer="sgd", lr=0.05, weight_decay=0.1, optimizer_state="keep")]
)
def test_a_first_round_of_scaffold_is_fedavgs_bit_for_bit(training: Training, tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", 1, training=training)
    scaffold = simulate("scaffold", tmp_path / "b", 1, training=training)
    assert scaffold.server.tensors.pop("control")
    assert_same(State(scaffold.server.tensors, fedavg.server.scalars), fedavg.server)


@pytest.mark.slow
@pytest.mark.parametrize("compute", [CPU, Compute("cpu", gradient_clip=0.05), Compute("cpu", "bf16-mixed")])
def test_a_sites_control_variate_is_the_mean_of_its_gradients(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped or in mixed precision, in a second round, with a rate that moves."""
    training = training_of("scaffold", weight_decay=0.1, schedule="poly")
    worker, site = build("scaffold", training, rounds=3), toy_sites()["s1"]
    server, kept, seen = worker.init_server({}), State(), []
    correct = type(worker).__mro__[1].configure_gradient_clipping

    def noted(module: Any, *args: Any, **kwargs: Any) -> None:
        correct(module, *args, **kwargs)
        parameters = module.model.named_parameters()
        seen.append({name: p.grad + 0.1 * p.detach() for name, p in parameters if p.grad is not None})

    monkeypatch.setattr(type(worker).__mro__[1], "configure_gradient_clipping", noted)
    for round in (1, 2):
        seen.clear()
        message = worker.broadcast(server, "s1", TrainTask(round, 7))
        message.tensors["control"] = {name: torch.full_like(t, 0.01) for name, t in server["model"].items()}
        _, kept = turn(worker, site, TrainTask(round, 7, steps=4), message, kept, compute, evaluate)
        assert len(seen) == 4
        for name in server["model"]:
            mean = torch.stack([gradients[name] for gradients in seen]).mean(dim=0)
            torch.testing.assert_close(kept["own"][f"control.{name}"], mean, rtol=1e-3, atol=1e-4)


def test_with_few_sites_the_control_variate_moves_by_their_share(tmp_path: Path) -> None:
    schedule = {"fraction": 0.67, "work_spread": 0.5}
    outcome = simulate("scaffold", tmp_path, 3, schedule=schedule, weighting="uniform")
    for name, c in outcome.server["control"].items():  # it stays the mean of all c_i, those at 0 included
        own = [kept.get("own")[f"control.{name}"] for kept in outcome.kept.values() if kept.get("own")]
        torch.testing.assert_close(c, torch.stack(own).sum(dim=0) / 3, rtol=1e-4, atol=1e-5)


def unequal() -> dict[str, LineSite]:
    """Sites of 100, 10 and 40 images whose best weights are 1, 4 and -2, each in a few steps."""
    row = torch.ones(1, 1, dtype=torch.float64)
    kinds = ((1.0, 100, 1.0), (4.0, 10, 0.5), (-2.0, 40, 0.8))
    return {
        f"s{i}": LineSite(f"s{i}", i, row * bend**0.5, row[0] * best * bend**0.5, images, 6)
        for i, (best, images, bend) in enumerate(kinds)
    }


def best_for(sites: Sequence[LineSite]) -> float:
    """Of the sum over images."""
    bends = [float(site.examples * site.rows.square().sum()) for site in sites]
    ends = [float(site.targets.sum() / site.rows.sum()) for site in sites]
    return sum(bend * end for bend, end in zip(bends, ends, strict=True)) / sum(bends)


OFTEN = 90
ADDING = [("scaffold", {}), ("feddyn", {"alpha": 0.3})]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "knobs"), ADDING)
def test_few_sites_of_unequal_size_end_at_the_optimum_of_all(name: str, knobs: Any, tmp_path: Path) -> None:
    sites, start = unequal(), torch.zeros(1, dtype=torch.float64)
    schedule, stops = {"fraction": 0.67}, [10, OFTEN]
    (early, kept), (late, _) = federate_lines(
        name, tmp_path, sites, start, plain(0.3), OFTEN, schedule, stops=stops, **knobs
    )
    assert float(late["model"]["w"]) == pytest.approx(best_for(list(sites.values())), abs=1e-3)
    if name == "scaffold":
        own = [site.examples * kept[name]["own"]["control.w"] for name, site in sites.items()]
        torch.testing.assert_close(early["control"]["w"], sum(own) / 150)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "knobs"), ADDING)
def test_a_site_that_leaves_draws_no_longer(name: str, knobs: Any, tmp_path: Path) -> None:
    sites, start = unequal(), torch.zeros(1, dtype=torch.float64)
    schedule = {"leaves": {"s1": 20}, "arrives": {"s2": 10}}
    ends = federate_lines(name, tmp_path, sites, start, plain(0.3), OFTEN, schedule, stops=[20, OFTEN], **knobs)
    there = best_for([sites["s0"], sites["s2"]])
    assert abs(float(ends[0][0]["model"]["w"]) - there) > 0.02
    assert float(ends[1][0]["model"]["w"]) == pytest.approx(there, abs=1e-3)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_site_whose_weight_changes_begins_again_as_all_do(name: str) -> None:
    method = build(name)
    server = method.init_server({})
    model = {key: torch.ones_like(tensor) for key, tensor in server["model"].items()}
    mean = State({"model": model, "control": model} if name == "scaffold" else {"model": model})
    once = method.advance(server, mean, Cohort({"a": 3.0, "b": 1.0}, 3, 3, 3))
    (key,) = {"control", "drift/mean"} & once.tensors.keys()
    part = 4.0 / 6.0  # the third site is taken to weigh as the others do
    assert all(torch.allclose(tensor, torch.tensor(part)) for tensor in once[key].values())
    again = method.advance(once, mean, Cohort({"a": 5.0}, 3, 3, 3))
    assert not any(tensor.any() for tensor in again[key].values())
    told = [method.broadcast(again, site, TrainTask(3, 7)).scalars.get("again") for site in ("a", "b")]
    assert told == [1.0, 1.0]
    on = method.advance(again, mean, Cohort({"a": 5.0}, 3, 3, 3))
    assert [method.broadcast(on, site, TrainTask(4, 7)).scalars.get("again") for site in ("a", "b")] == [None, 1.0]


@pytest.mark.parametrize("name", [name for name, method in ALGORITHMS.items() if method.exact_groups])
def test_what_the_server_computes_with_is_neither_noised_nor_thinned(name: str) -> None:
    method, why = build(name), r"computes with the group .+ \(exact_groups\)"
    noised = [build_transforms(Privacy(mechanism=kind), Compression(), 1.0)[0] for kind in ("site", "sparse")]
    thinned = build_transforms(Privacy(), Compression(top_k=0.1), 1.0)[0]
    for transform in noised:
        with pytest.raises(ValueError, match=r"\(reads_updates\)" if method.reads_updates else why):
            transform.check(method)
    with pytest.raises(ValueError, match=why):
        thinned.check(method)


# ------------------------------------------------------------------------------------------------------ servers' steps


def scripted(data: dict[str, Tensor]) -> dict[str, ScriptedSite]:
    """Sites whose updates are the archive's."""
    none, examples = torch.zeros(1, dtype=torch.float64), data["n_samples"].tolist()
    return {f"s{i}": ScriptedSite(f"s{i}", i, data["client_delta"][:, i], none, n) for i, n in enumerate(examples)}


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_servers_rounds_are_the_reference(name: str, tmp_path: Path) -> None:
    data = golden(f"{name}_s81")
    sites = scripted(data)
    knobs = {"beta1": float(data["beta1"]), "tau": float(data["tau"]), "server_step": float(data["server_lr"])}
    if name != "fedadagrad":
        knobs["beta2"] = float(data["beta2"])
    count = len(data["client_delta"])
    rounds = federate_lines(name, tmp_path, sites, data["w"][0], plain(1.0), count, loss=along, **knobs)
    for (server, _), w, m, v in zip(rounds, data["w"][1:], data["m"], data["v"], strict=True):
        close(server["model"]["w"], w)
        close(server["moment/first"]["w"], m)
        close(server["moment/second"]["w"], v)


def test_momentum_at_the_server_is_that_of_sgd_on_the_mean_updates(tmp_path: Path) -> None:
    data = golden("fedadam_s81")
    sites, count = scripted(data), len(data["client_delta"])
    plan = {"server_lr": 0.5}
    rounds = federate_lines("fedavgm", tmp_path, sites, data["w"][0], plain(1.0), count, plan, along, momentum=0.7)
    w = data["w"][0].clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.7)
    for (server, _), mean in zip(rounds, data["agg_delta"], strict=True):
        w.grad = -mean
        optimizer.step()
        close(server["model"]["w"], w.detach())


def test_without_momentum_at_the_server_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a")
    fedavgm = simulate("fedavgm", tmp_path / "b", momentum=0.0)
    assert fedavgm.server.tensors.pop("moment/first")
    assert_same(fedavgm.server, fedavg.server)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi", "fedavgm"])
def test_moments_stay_at_the_server_and_running_statistics_take_the_plain_mean(name: str, tmp_path: Path) -> None:
    outcome = simulate(name, tmp_path / "a", 1)
    assert {row["group"] for row in outcome.observer.rows("traffic")} == {"model", "buffers"}
    fedavg = simulate("fedavg", tmp_path / "b", 1)
    assert all(torch.equal(t, fedavg.server["buffers"][k]) for k, t in outcome.server["buffers"].items())


# ------------------------------------------------------------------------------------------------------ FedNova


@pytest.mark.parametrize("archive", ["fednova_s71", "fednova_s72", "fednova_s73"])
def test_fednovas_rounds_of_unequal_steps_are_the_reference(archive: str, tmp_path: Path) -> None:
    """Plain, with momentum and weight decay, and with a pull."""
    data = golden(archive)
    sites = lines(data, data["taus"].tolist(), [round(100 * float(share)) for share in data["ratio"]])
    training = plain(float(data["lr"]), momentum=float(data["momentum"]), weight_decay=float(data["weight_decay"]))
    start, reference = data["global_w"][0], data["global_w"][1:]
    rounds = federate_lines("fednova", tmp_path, sites, start, training, len(reference), mu=float(data["mu"]))
    for (server, _), w, steps in zip(rounds, reference, data["tau_eff"], strict=True):
        close(server["model"]["w"], w)
        close(server["pace"]["effective_steps"][0], steps)


def normalised_rounds(
    data: dict[str, Tensor], rates: Sequence[float], mu: float, momentum: float, server_lr: float
) -> list[Tensor]:
    """FedNova on lines by its formula, one rate a round: a step is tau_eff sum_i p_i cum_i / a_i, cum_i a site's way.

    The server is a heavy ball on the step over the rate.
    """
    w, taus, ball, reached = data["global_w"][0], data["taus"].tolist(), torch.zeros(()), []
    for lr in rates:
        way = torch.zeros_like(w)
        for a, b, p, tau in zip(data["A"], data["b"], data["ratio"], taus, strict=True):
            local = w
            for _ in range(tau):
                local = local - lr * (a.T @ (a @ local - b) / len(b) + mu * (local - w))
            way = way + p * (w - local) / sum((1 - lr * mu) ** k for k in range(tau))
        step = way * sum(p * tau for p, tau in zip(data["ratio"], taus, strict=True))
        ball = momentum * ball + server_lr * step / lr
        w = w - lr * ball
        reached.append(w)
    return reached


@pytest.mark.parametrize(("mu", "momentum", "server_lr"), [(0.6, 0.0, 1.0), (0.0, 0.7, 0.5)])
def test_fednova_takes_the_rate_of_each_round_for_its_pull_and_its_momentum(
    mu: float, momentum: float, server_lr: float, tmp_path: Path
) -> None:
    data, knobs = golden("fednova_s71"), {"mu": mu, "momentum": momentum}
    sites = lines(data, data["taus"].tolist(), [round(100 * float(share)) for share in data["ratio"]])
    training, plan = plain(0.2, schedule="step", decay=0.5, decay_every=1), {"server_lr": server_lr}
    rounds = federate_lines("fednova", tmp_path, sites, data["global_w"][0], training, 3, plan, **knobs)
    for (server, _), w in zip(rounds, normalised_rounds(data, [0.2, 0.1, 0.05], mu, momentum, server_lr), strict=True):
        close(server["model"]["w"], w)


def test_what_a_round_of_steps_weighs_is_the_references() -> None:
    for archive in ("fednova_s71", "fednova_s72", "fednova_s73"):
        data = golden(archive)
        pull = float(data["lr"] * data["mu"])
        weights = [effective_steps(steps, float(data["momentum"]), pull) for steps in data["taus"].tolist()]
        assert weights == pytest.approx(data["a_i"][0].tolist(), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_of_equal_steps_is_fedavg(momentum: float, tmp_path: Path) -> None:
    training, schedule = Training(optimizer="sgd", lr=0.05, momentum=momentum), {"local_steps": 4}
    fedavg = simulate("fedavg", tmp_path / "a", training=training, schedule=schedule)
    fednova = simulate("fednova", tmp_path / "b", training=training, schedule=schedule)
    assert fednova.server.tensors.pop("pace").keys() == {"effective_steps"}
    if not momentum:  # a division by 4 is exact
        assert_same(fednova.server, fedavg.server)
    for name, tensor in fedavg.server["model"].items():
        torch.testing.assert_close(fednova.server["model"][name], tensor, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- normalised tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each site's update is in the first round: a federation of that site alone takes it as it is."""
    found, start = {}, build("fedavg").init_server({})["model"]
    for name, site in toy_sites().items():
        if name != POOL:
            outcome = simulate("fedavg", tmp_path_factory.mktemp(name), 1, sites={name: site})
            found[name] = subtract(outcome.server["model"], start)
    return found


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_mean_of_normalised_tensors_is_the_formula(
    weighting: str, alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    outcome = simulate("tensornorm", tmp_path / "own", 1, weighting=weighting)
    start, images = build("fedavg").init_server({})["model"], {"s0": 4, "s1": 6, "s2": 8}
    p = {s: n / 18 if weighting == "examples" else 1 / 3 for s, n in images.items()}
    for name, tensor in outcome.server["model"].items():
        norms = {site: float(d[name].norm()) for site, d in alone.items()}
        far = sum(p[site] * norms[site] for site in p)
        ahead = torch.stack([p[site] * d[name] / max(norms[site], 1e-12) for site, d in alone.items()]).sum(dim=0)
        torch.testing.assert_close(tensor, start[name] + far * ahead, rtol=1e-4, atol=1e-6)
    fedavg = simulate("fedavg", tmp_path / "fedavg", 1, weighting=weighting)
    assert all(torch.equal(t, fedavg.server["buffers"][k]) for k, t in outcome.server["buffers"].items())
    assert max((t - fedavg.server["model"][k]).abs().max() for k, t in outcome.server["model"].items()) > 1e-3


def test_one_site_or_sites_that_moved_equally_far_are_fedavgs_mean(
    alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    only = simulate("tensornorm", tmp_path, 1, sites={"s1": toy_sites()["s1"]})
    start = build("fedavg").init_server({})["model"]
    for name, tensor in only.server["model"].items():
        torch.testing.assert_close(tensor - start[name], alone["s1"][name], rtol=1e-3, atol=1e-6)
    signs = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([-4.0, 3.0])}
    torch.testing.assert_close(server_mean(signs), torch.stack(list(signs.values())).mean(dim=0))
    longer = server_mean({**signs, "a": 7 * signs["a"]})  # points the same way, and goes as far as sites do in the mean
    torch.testing.assert_close(longer, 4 * server_mean(signs))
    torch.testing.assert_close(server_mean(dict(reversed(signs.items()))), server_mean(signs))
    assert not server_mean({"a": torch.zeros(2), "b": torch.zeros(2)}).any()


def server_mean(differences: Mapping[str, Tensor]) -> Tensor:
    """What a server that holds zeros makes of sites' differences of one tensor."""
    mean = Mean()
    for site, difference in differences.items():
        far = length(difference)
        groups = {"model": scaled({"w": difference}, {"w": 1 / far}), LENGTHS: {LENGTHS: far.unsqueeze(0)}}
        mean.add(Update(tensors=groups, site=site, examples=1), 1.0)
    before = State({"model": {"w": torch.zeros(2)}, LENGTHS: {LENGTHS: torch.zeros(1)}})
    return build("tensornorm").advance(before, mean.result(), Cohort({}, 2.0, 2, 2))["model"]["w"]


def test_by_steps_it_is_fednova_with_plain_sgd(tmp_path: Path) -> None:
    data = golden("fednova_s71")
    sites = lines(data, data["taus"].tolist(), [round(100 * float(share)) for share in data["ratio"]])
    training = plain(float(data["lr"]), weight_decay=float(data["weight_decay"]))
    start, reference = data["global_w"][0], data["global_w"][1:]
    rounds = federate_lines("tensornorm", tmp_path, sites, start, training, len(reference), by="steps")
    for (server, _), w in zip(rounds, reference, strict=True):
        close(server["model"]["w"], w)


@pytest.mark.slow
def test_by_equal_steps_it_is_fedavg_whatever_the_optimiser(tmp_path: Path) -> None:
    schedule = {"local_steps": 4}  # a division by 4 is exact
    fedavg = simulate("fedavg", tmp_path / "a", schedule=schedule)
    own = simulate("tensornorm", tmp_path / "b", schedule=schedule, by="steps")
    assert own.server.tensors.pop(LENGTHS)
    assert_same(own.server, fedavg.server)


def test_fednovas_pull_is_fedproxs_and_is_not_clipped() -> None:
    def ways(clip: float | None) -> list[Tensor]:
        found = []
        for name in ("fedprox", "fednova"):
            worker = build(name, SGD, mu=2.0)
            message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
            task, compute = TrainTask(1, 7, steps=5), Compute("cpu", gradient_clip=clip)
            update, _ = turn(worker, toy_sites()["s1"], task, message, State(), compute, evaluate)
            scale = effective_steps(5, pull=SGD.lr * 2.0) if name == "fednova" else 1.0
            found.append(torch.cat([scale * t.reshape(-1) for t in update["model"].values()]))
        return found

    torch.testing.assert_close(*ways(None), rtol=1e-4, atol=1e-6)
    prox, nova = ways(0.1)
    assert (prox - nova).abs().max() > 1e-5


@pytest.mark.parametrize(("training", "mu", "cure"), [
    (Training(), 0.0, "training.optimizer=sgd, not adam"),
    (Training(optimizer="sgd", momentum=0.9), 0.1, "training.momentum=0, not 0.9"),
    (Training(optimizer="sgd", momentum=0.9, optimizer_state="keep"), 0.0, "training.optimizer_state=reset"),
])  # fmt: skip
def test_fednova_refuses_steps_of_unknown_weight(training: Training, mu: float, cure: str) -> None:
    with pytest.raises(ValueError, match=f"algorithm=fednova: .* so take {cure}"):
        build("fednova", training, mu=mu)
    build("fednova", Training(optimizer="sgd", momentum=0.9))
    build("fednova", SGD, mu=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Privacy(aggregation="masked"), Privacy(aggregation="encrypted")])
@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_the_server_needs_no_more_than_sums(name: str, settings: Privacy, tmp_path: Path) -> None:
    schedule = {"work_spread": 0.7}
    open_sums = simulate(name, tmp_path / "a", schedule=schedule)
    chain = build_transforms(settings, Compression(), 1.0)
    hidden = simulate(name, tmp_path / "b", schedule=schedule, transforms=chain)
    for group, tensors in open_sums.server.tensors.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(hidden.server[group][key], tensor, rtol=1e-3, atol=1e-4, check_dtype=False)


# ------------------------------------------------------------------------------------------------------ FedDyn


def dynamic_rounds(data: dict[str, Tensor], steps: list[int], lr: float, alpha: float, rounds: int) -> list[Tensor]:
    """The paper's algorithm 1 on lines, written down anew: h, theta and the gradients that sites remember."""
    theta = torch.zeros_like(data["A"][0, 0])
    h, count = torch.zeros_like(theta), len(data["A"])
    remembered, reached = [torch.zeros_like(theta) for _ in range(count)], []
    for _ in range(rounds):
        ends = []
        for i, (a, b) in enumerate(zip(data["A"], data["b"], strict=True)):
            w = theta.clone()
            for _ in range(steps[i]):
                w = w - lr * (a.T @ (a @ w - b) / len(b) - remembered[i] + alpha * (w - theta))
            remembered[i] = remembered[i] - alpha * (w - theta)
            ends.append(w)
        h = h - alpha / count * torch.stack([end - theta for end in ends]).sum(dim=0)
        theta = torch.stack(ends).mean(dim=0) - h / alpha
        reached.append(theta)
    return reached


@pytest.mark.slow
def test_feddyns_rounds_are_the_papers_and_end_at_the_federations_optimum(tmp_path: Path) -> None:
    data, steps, alpha = golden("scaffold_s82"), [5, 9, 20], 0.3
    expected = dynamic_rounds(data, steps, 0.1, alpha, 60)
    start = torch.zeros_like(expected[0])
    rounds = federate_lines("feddyn", tmp_path, lines(data, steps, [10] * 3), start, plain(0.1), 6, alpha=alpha)
    for (server, _), theta in zip(rounds, expected, strict=False):
        close(server["model"]["w"], theta)
    rows, targets = data["A"].flatten(0, 1), data["b"].flatten()
    optimum = torch.linalg.lstsq(rows, targets[:, None]).solution[:, 0]
    torch.testing.assert_close(expected[-1], optimum, rtol=1e-2, atol=1e-2)


def test_feddyns_sum_takes_a_round_by_its_sites_share_of_all() -> None:
    """The paper's -h / alpha, by weights: the fourth site is taken to weigh as the other three do."""
    w, past, mean = (torch.tensor(values) for values in ([1.0, 2.0], [0.5, -0.5], [0.2, 0.4]))
    server = State({"model": {"w": w}, "drift/mean": {"w": past}})
    cohort = Cohort({"a": 3.0, "b": 1.0, "c": 0.5}, 3.0, 3, 4)
    after = build("feddyn").advance(server, State({"model": {"w": mean}}), cohort)
    torch.testing.assert_close(after["drift/mean"]["w"], past + 3 / 4 * mean)
    torch.testing.assert_close(after["model"]["w"], w + mean + past + 3 / 4 * mean)


def test_a_site_that_feddyn_meets_first_takes_fedproxs_steps() -> None:
    answers = []
    for name, knobs in (("fedprox", {"mu": 0.4}), ("feddyn", {"alpha": 0.4})):
        worker = build(name, SGD, **knobs)
        message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
        answers.append(turn(worker, toy_sites()["s1"], TrainTask(1, 7, steps=4), message, State(), CPU, evaluate)[0])
    assert_same(State(answers[0].tensors), State(answers[1].tensors))


def test_feddyn_lets_nothing_travel_beside_the_model(tmp_path: Path) -> None:
    outcome = simulate("feddyn", tmp_path)
    assert {row["group"] for row in outcome.observer.rows("traffic")} == {"model", "buffers"}
