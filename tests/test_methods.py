"""Methods by what they reduce to, by known answers, and by what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.base import SAID_BY, Algorithm
from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.client import turn
from fedseg.federation.contract import Batch, Task, TrainTask
from fedseg.federation.state import State, Update, squared_distance
from fedseg.federation.transport import InProcess
from fedseg.models import create_model
from tests.lines import Line, LineSite, squares
from tests.world import CPU, POOL, assert_same, build, evaluate, simulate, toy_sites

GOLDEN = Path(__file__).parent / "golden"
ADAM = Training(lr=1e-2)
MOMENTUM = Training(optimizer="sgd", lr=0.05, momentum=0.9)
optimizers = pytest.mark.parametrize("training", [ADAM, MOMENTUM], ids=["adam", "momentum"])


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def twin_of(kept: State, module: str = "twin") -> dict[str, Tensor]:
    return {k.removeprefix(f"{module}."): t for k, t in kept["own"].items() if k.startswith(f"{module}.")}


def one_turn(algorithm: Algorithm, steps: int = 3, kept: State | None = None, round: int = 1) -> tuple[Update, State]:
    message = build("fedavg").init_server({})
    parts = algorithm.parts
    shared = {"model": parts.parameters, "buffers": parts.buffers}
    sent = State({g: {n: message[g][n] for n in names} for g, names in shared.items() if names})
    task = TrainTask(round, 7, steps=steps)
    return turn(algorithm, toy_sites()["s1"], task, sent, kept or State(), CPU, evaluate)


# ------------------------------------------------------------------------------------------------------ reductions


@optimizers
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("fedprox", {"mu": 0.0}),
        ("ditto", {"lam": 0.7}),
        ("apfl", {}),
        ("apfl", {"mix": "weights", "adapt": "step"}),
        ("finetune", {"finetune_steps": 2}),
    ],
    ids=["fedprox-0", "ditto", "apfl-outputs", "apfl-weights", "finetune"],
)
def test_the_global_model_is_fedavgs_bit_for_bit(
    tmp_path: Path, name: str, knobs: Mapping[str, Any], training: Training
) -> None:
    fedavg = simulate("fedavg", tmp_path / "fedavg", training=training)
    assert_same(simulate(name, tmp_path / name, training=training, **knobs).server, fedavg.server)


@pytest.mark.parametrize(("hook", "flag"), SAID_BY.items())
def test_a_method_that_writes_a_hook_thereby_declares_it(hook: str, flag: str) -> None:
    hooks = type("Hooks", (), {hook: lambda *_: None})
    for method in (type("Own", (FedAvg,), {hook: lambda *_: None}), type("Mixed", (hooks, FedAvg), {})):
        heir = type("Heir", (method,), {})
        assert [name for name in SAID_BY.values() if getattr(heir, name)] == [flag]
    assert not getattr(FedAvg, flag)


@optimizers
def test_ditto_without_pull_is_local_training_beside_fedavg(tmp_path: Path, training: Training) -> None:
    local = simulate("local", tmp_path / "local", rounds=3, training=training)
    ditto = simulate("ditto", tmp_path / "ditto", rounds=3, training=training, lam=0.0)
    for site, kept in local.kept.items():
        assert same(twin_of(ditto.kept[site]), kept["model"]), site


def test_ditto_with_a_pull_stays_closer_to_the_received_model() -> None:
    received = build("fedavg").init_server({})["model"]

    def distance(lam: float) -> float:
        _, kept = one_turn(build("ditto", Training(optimizer="sgd", lr=0.02), lam=lam), steps=8)
        return float(squared_distance(twin_of(kept), received))

    assert distance(10.0) < distance(3.0) < distance(0.0)


@optimizers
def test_fedavg_with_one_site_is_that_sites_own_training(tmp_path: Path, training: Training) -> None:
    sites = {name: site for name, site in toy_sites(1).items() if name != POOL}
    fedavg = simulate("fedavg", tmp_path / "fedavg", rounds=3, sites=sites, training=training)
    local = simulate("local", tmp_path / "local", rounds=3, sites=sites, training=training)
    own = local.kept["s0"]["model"]
    shift_before_norm = {"encoder.0.bias", "decoder.0.bias", "encoder.1.running_mean", "decoder.1.running_mean"}
    for name, tensor in {**fedavg.server["model"], **fedavg.server["buffers"]}.items():
        if name not in shift_before_norm:  # their gradient is zero but for rounding, which Adam blows up
            torch.testing.assert_close(tensor, own[name], rtol=1e-3, atol=1e-4)
    losses = [[row["loss"] for row in run.observer.rows("rounds")] for run in (fedavg, local)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_personal_override_of_nothing_and_everything_reach_both_ends(tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a")
    local = simulate("local", tmp_path / "b")
    assert_same(simulate("fedper", tmp_path / "c", personal="nothing").server, fedavg.server)
    emptied = simulate("fedavg", tmp_path / "d", personal="everything")
    assert not emptied.server.tensors
    for site, kept in local.kept.items():
        assert_same(emptied.kept[site], kept)


# ------------------------------------------------------------------------------------------------------ proximal terms


def line_recipe(training: Training) -> Recipe:
    return Recipe(training, "sigmoid", nn.Identity(), squares)


@pytest.mark.parametrize("name", ["ditto", "fedprox"])
def test_the_proximal_steps_equal_the_golden_ones(name: str) -> None:
    golden = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "ditto_prox_s83.npz").items()}
    training = Training(optimizer="sgd", lr=float(golden["lr"]), channels_last=False)
    start = golden["personal_init"] if name == "ditto" else golden["global_w"]
    knobs = {"lam" if name == "ditto" else "mu": float(golden["mu"])}
    worker = ALGORITHMS[name](Line(start), line_recipe(training), **knobs)
    site: Any = LineSite("line", 0, golden["A"], golden["b"])
    message, reached = State({"model": {"w": golden["global_w"]}}), []
    for steps in range(1, 7):
        update, kept = turn(worker, site, TrainTask(1, 0, steps=steps), message, State(), CPU, evaluate)
        reached.append(kept["own"]["twin.w"] if name == "ditto" else golden["global_w"] + update["model"]["w"])
    if name == "ditto":
        torch.testing.assert_close(torch.stack(reached), golden["personal"], rtol=1e-9, atol=1e-9)
        return
    w, expected = golden["global_w"].clone(), []  # FedProx takes the same step from another start
    for _ in range(6):
        gradient = golden["A"].T @ (golden["A"] @ w - golden["b"]) / len(golden["b"])
        w = w - golden["lr"] * (gradient + golden["mu"] * (w - golden["global_w"]))
        expected.append(w)
    torch.testing.assert_close(torch.stack(reached), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_fedprox_pulls_and_its_first_step_is_fedavgs() -> None:
    plain, _ = one_turn(build("fedavg", MOMENTUM), steps=1)
    pulled, _ = one_turn(build("fedprox", MOMENTUM, mu=5.0), steps=1)
    assert_same(State(plain.tensors), State(pulled.tensors))
    plain, _ = one_turn(build("fedavg", MOMENTUM), steps=5)
    pulled, _ = one_turn(build("fedprox", MOMENTUM, mu=5.0), steps=5)
    assert sum(float(t.pow(2).sum()) for t in pulled["model"].values()) < sum(
        float(t.pow(2).sum()) for t in plain["model"].values()
    )


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("fedprox", {"mu": -0.1}, "algorithm.mu=-0.1"),
        ("ditto", {"lam": math.nan}, "algorithm.lam=nan"),
        ("apfl", {"alpha": 1.5}, "algorithm.alpha=1.5"),
        ("fedrep", {"head_share": -1.0}, "algorithm.head_share=-1.0"),
        ("finetune", {"finetune_steps": 0}, "algorithm.finetune_steps=0"),
        ("fedavg", {"personal": "part:head"}, "no part 'head'"),
        ("fedavg", {"personal": "normalization"}, "did you mean 'normalisation'"),
    ],
)
def test_knobs_out_of_range_are_refused_by_name(name: str, knobs: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **knobs)


@pytest.mark.parametrize(("knob", "value"), [("lr", 0.0), ("lr", math.nan), ("momentum", 1.0), ("weight_decay", -1.0)])
def test_training_out_of_range_is_refused_by_name(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"training.{knob}={value}"):
        Training(**{knob: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ APFL


def alphas(**knobs: Any) -> tuple[list[float], Algorithm]:
    """Alpha after every step of one turn of APFL."""
    worker = build("apfl", MOMENTUM, **knobs)
    seen: list[float] = []
    step = worker.training_step

    def training_step(batch: Batch, batch_idx: int) -> Tensor:
        seen.append(float(worker.alpha))  # type: ignore[arg-type]
        return step(batch, batch_idx)

    worker.training_step = training_step  # type: ignore[method-assign]
    _, kept = one_turn(worker, steps=4)
    return [*seen, float(kept["own"]["alpha"])], worker


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_alpha_moves_when_it_should(mix: str) -> None:
    never, _ = alphas(mix=mix, adapt="never")
    assert never == [0.5] * 5
    once, _ = alphas(mix=mix, adapt="round")
    assert once[0] == 0.5
    assert once[1] != 0.5
    assert len(set(once[1:])) == 1
    always, _ = alphas(mix=mix, adapt="step")
    assert len(set(always)) == 5
    assert always[1] == once[1]


def test_alpha_zero_personal_is_the_shared_model_and_one_the_own(tmp_path: Path) -> None:
    images = toy_sites()["s1"].images
    for alpha, module in ((0.0, "model"), (1.0, "twin")):
        worker = build("apfl", alpha=alpha, adapt="never")
        one_turn(worker)
        personal = worker.predict(images, "personal")
        network = getattr(worker, module)
        network.eval()
        expected = torch.sigmoid(network(worker.normalize(images)))
        network.train()
        torch.testing.assert_close(personal, expected, rtol=1e-6, atol=1e-6)


def test_the_weight_mixture_is_the_network_of_mixed_weights() -> None:
    worker = build("apfl", alpha=0.25, mix="weights", adapt="never")
    one_turn(worker, steps=4)
    mixed = worker.network("personal")
    shared = dict(worker.model.named_parameters())
    for name, v in worker.twin.named_parameters():
        torch.testing.assert_close(dict(mixed.named_parameters())[name], 0.25 * v + 0.75 * shared[name])
    assert same(dict(mixed.named_buffers()), dict(worker.twin.named_buffers()))
    assert mixed is not worker.twin


def test_alpha_and_the_own_model_stay_at_the_site(tmp_path: Path) -> None:
    outcome = simulate("apfl", tmp_path, adapt="step")
    assert len({float(kept["own"]["alpha"]) for kept in outcome.kept.values()}) == 3
    assert set(outcome.server.tensors) == {"model", "buffers"}


# ------------------------------------------------------------------------------------------------------ split networks


def moves(worker: Algorithm, steps: int) -> list[set[str]]:
    """Parameters that changed, step by step."""
    history: list[dict[str, Tensor]] = []

    def snapshot(*_: Any) -> None:
        history.append({name: p.detach().clone() for name, p in worker.model.named_parameters()})

    worker.on_train_batch_start = snapshot  # type: ignore[method-assign, assignment]
    end = worker.on_train_end
    worker.on_train_end = lambda: (snapshot(), end())[0]  # type: ignore[method-assign, func-returns-value]
    one_turn(worker, steps=steps)
    return [
        {name for name in after if not torch.equal(before[name], after[name])} for before, after in pairwise(history)
    ]


HEAD = {"segmentation_head.0.weight", "segmentation_head.0.bias"}


@optimizers
@pytest.mark.parametrize(("share", "head_steps"), [(0.5, 2), (0.25, 1), (0.0, 0), (1.0, 4)])
def test_fedrep_moves_the_head_first_and_then_the_body(training: Training, share: float, head_steps: int) -> None:
    decayed = Training(**{**vars(training), "weight_decay": 0.1})
    worker = build("fedrep", decayed, head_share=share)
    body = {name for name, _ in worker.model.named_parameters()} - HEAD
    found = moves(worker, steps=4)
    assert found == [HEAD] * head_steps + [body] * (4 - head_steps)


@optimizers
def test_fedrep_starts_every_turn_with_the_head_also_with_kept_optimiser_state(training: Training) -> None:
    keeping = Training(**{**vars(training), "optimizer_state": "keep", "weight_decay": 0.1})
    worker = build("fedrep", keeping)
    _, kept = one_turn(worker, steps=4)
    again = build("fedrep", keeping)
    receive = again.receive
    again.receive = lambda message, _, site: receive(message, kept, site)  # type: ignore[method-assign]
    body = {name for name, _ in again.model.named_parameters()} - HEAD
    assert moves(again, steps=4) == [HEAD, HEAD, body, body]


@optimizers
def test_fedbabu_never_moves_the_head_but_fine_tunes_it(tmp_path: Path, training: Training) -> None:
    assert not any(HEAD & moved for moved in moves(build("fedbabu", training), steps=3))
    start = build("fedbabu").init_server({})
    outcome = simulate("fedbabu", tmp_path, training=training, finetune_steps=2)
    for name in HEAD:
        assert torch.equal(outcome.server["model"][name], start["model"][name])
        assert all(
            not torch.equal(twin_of(kept, "tuned")[name], start["model"][name]) for kept in outcome.kept.values()
        )
    assert not torch.equal(outcome.server["model"]["encoder.0.weight"], start["model"]["encoder.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "fedbabu"])
def test_fine_tuning_leaves_the_federation_alone(tmp_path: Path, name: str) -> None:
    often = simulate(name, tmp_path / "often", rounds=3, finetune_steps=3)
    seldom = simulate(name, tmp_path / "seldom", rounds=3, finetune_steps=3, schedule={"evaluate_every": 3})
    assert_same(often.server, seldom.server)
    for site in often.kept:
        assert_same(often.kept[site], seldom.kept[site])
    for outcome, times in ((often, 3), (seldom, 1)):
        fitted = [row for row in outcome.observer.rows("rounds") if row["task"] == "personalise"]
        assert [row["steps"] for row in fitted] == [3] * times * len(outcome.kept), "what fine-tuning costs is counted"


def test_fine_tuning_is_so_many_plain_steps_from_the_global_model(tmp_path: Path) -> None:
    outcome = simulate("finetune", tmp_path, rounds=1, finetune_steps=4)
    worker = build("fedavg")
    site = toy_sites()["s1"]
    worker.receive(build("fedavg").broadcast(outcome.server, "s1", TrainTask(1, 7)), State(), site)
    CPU.fit(worker, site.train_batches(derive_seed(7, "personalise", 1, "s1"), 4))
    tuned = twin_of(outcome.kept["s1"], "tuned")
    trained = {k: t for k, t in worker.model.state_dict().items() if t.is_floating_point()}
    assert same({k: tuned[k] for k in trained}, trained)


def expected_personal(name: str, keys: Sequence[str], norms: set[str]) -> set[str]:
    rules = {
        "fedbn": lambda k: k.rpartition(".")[0] in norms,
        "silobn": lambda k: k.rpartition(".")[0] in norms and k.rpartition(".")[2].startswith(("running", "num_")),
        "fedper": lambda k: k.startswith("segmentation_head."),
        "fedrep": lambda k: k.startswith("segmentation_head."),
        "lgfedavg": lambda k: k.startswith("encoder."),
        "local": lambda k: True,
    }
    return {key for key in keys if rules[name](key)}


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return create_model(3, 2, encoder=request.param)


@pytest.mark.parametrize("name", ["fedbn", "silobn", "fedper", "fedrep", "lgfedavg", "local"])
def test_real_networks_are_split_at_exactly_the_right_tensors(unet: nn.Module, name: str) -> None:
    state = unet.state_dict()
    norms = {path for path, module in unet.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    worker = ALGORITHMS[name](unet, Recipe.build(Training(), "sigmoid", 3))
    personal = expected_personal(name, list(state), norms)
    assert personal
    counters = {key for key, tensor in state.items() if not tensor.is_floating_point()}
    assert set(worker.parts.stays) == personal | counters
    server = worker.init_server({})
    assert {*server.get("model"), *server.get("buffers")} == set(state) - personal - counters
    assert set(server.get("model")) == {name for name, _ in unet.named_parameters()} - personal
    assert all(key.rpartition(".")[2].startswith("running_") for key in server.get("buffers"))
    assert set(worker.keep()["model"]) == personal | counters


@pytest.mark.parametrize(
    ("name", "knobs", "views", "unseen"),
    [
        ("fedprox", {}, ("global",), ("global",)),
        ("fedprox", {"personal": "normalisation"}, ("personal",), ()),
        ("fedprox", {"personal": "part:decoder,segmentation_head"}, ("personal",), ()),
        ("ditto", {"personal": "statistics"}, ("personal",), ("own-statistics",)),
        ("fedprox", {"personal": "statistics+part:segmentation_head"}, ("personal",), ()),
        ("fedbn", {"personal": "nothing"}, ("global",), ("global",)),
        ("finetune", {"personal": "normalisation"}, ("personal",), ()),
    ],
)
def test_the_config_may_choose_what_is_personal(
    name: str, knobs: Mapping[str, str], views: tuple[str, ...], unseen: tuple[str, ...]
) -> None:
    worker = build(name, **knobs)
    assert (worker.views, worker.unseen_views) == (views, unseen)


def test_fedprox_with_personal_norms_shares_the_rest_and_pulls_only_that(tmp_path: Path) -> None:
    strong = {"mu": 50.0, "personal": "normalisation"}
    training = Training(optimizer="sgd", lr=1e-2)
    outcome = simulate("fedprox", tmp_path / "a", rounds=1, training=training, **strong)
    assert not any(key.startswith(("encoder.1", "decoder.1")) for key in outcome.server["model"])
    free, _ = one_turn(build("fedbn", training), steps=3)
    worker = build("fedprox", training, **strong)
    pulled, kept = one_turn(worker, steps=3)
    norm = lambda update: sum(float(t.pow(2).sum()) for t in update["model"].values())  # noqa: E731
    assert norm(pulled) < norm(free)
    assert {"encoder.1.weight", "decoder.1.running_mean"} <= set(kept["model"])


def test_personal_tensors_differ_between_sites_and_shared_ones_do_not(tmp_path: Path) -> None:
    outcome = simulate("fedbn", tmp_path)
    weights = [kept["model"]["encoder.1.weight"] for kept in outcome.kept.values()]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


# ------------------------------------------------------------------------------------------------------ optimiser state


class OneStream(InProcess):
    """Every round goes on in one long list of batches instead of drawing its own."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for name, task in tasks.items():
            site: Any = self.sites[name]
            if task.kind == "train":
                whole = site.train_batches(99, 9)
                part = whole[3 * (task.round - 1) : 3 * task.round]
                self.worker.batches = lambda site, seed, steps, part=part: part[:steps]  # type: ignore[method-assign, misc]
            yield from super().ask({name: task}, messages)


@pytest.mark.parametrize(
    "kind",
    [
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9},
        {"optimizer": "adam", "lr": 1e-2},
        {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        {"optimizer": "amsgrad", "lr": 1e-2},
    ],
    ids=["momentum", "adam", "adamw", "amsgrad"],
)
def test_kept_optimiser_state_makes_rounds_of_one_site_one_long_training(
    tmp_path: Path, kind: Mapping[str, Any]
) -> None:
    sites = {name: site for name, site in toy_sites(1).items() if name != POOL}
    long = build("local", Training(**kind))
    CPU.fit(long, sites["s0"].train_batches(99, 9))
    expected = long.model.state_dict()

    def rounds(state: str) -> dict[str, Tensor]:
        training = Training(**kind, optimizer_state=state)  # type: ignore[arg-type]
        run = simulate("local", tmp_path / state, rounds=3, sites=sites, training=training, transport=OneStream)
        return run.kept["s0"]["model"]

    assert same(rounds("keep"), expected)
    reset = rounds("reset")
    assert not torch.allclose(reset["segmentation_head.0.weight"], expected["segmentation_head.0.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "training"), [("fedavg", ADAM), ("fedavg", MOMENTUM), ("ditto", ADAM), ("fedrep", MOMENTUM)]
)
def test_optimiser_state_stays_at_its_site(tmp_path: Path, name: str, training: Training) -> None:
    keeping = Training(**{**vars(training), "optimizer_state": "keep"})
    outcome = simulate(name, tmp_path / "keep", training=keeping)
    assert set(outcome.server.tensors) <= {"model", "buffers"}
    states = [kept["optimizer"] for kept in outcome.kept.values()]
    assert all(states)
    key = next(key for key in states[0] if "encoder.0.weight" in key and not key.endswith("step"))
    assert not torch.equal(states[0][key], states[1][key])
    reset = simulate(name, tmp_path / "reset", training=training)
    assert all("optimizer" not in kept.tensors for kept in reset.kept.values())
    assert not same(outcome.server["model"], reset.server["model"])
    resumed = tmp_path / "resumed"
    simulate(name, resumed, rounds=1, training=keeping)
    assert_same(simulate(name, resumed, training=keeping).server, outcome.server)


# ------------------------------------------------------------------------------------------------------ the template


def test_the_loss_that_is_reported_is_the_mean_over_the_steps() -> None:
    worker, seen = build("fedavg"), []
    loss = worker.loss

    def recorded(batch: Batch) -> Tensor:
        seen.append(loss(batch))
        return seen[-1]

    worker.loss = recorded  # type: ignore[method-assign]
    update, _ = one_turn(worker, steps=4)
    assert update.scalars["loss"] == pytest.approx(float(torch.stack(seen).detach().mean()), rel=1e-6)
    assert update.scalars["steps"] == 4


def test_an_update_is_trained_minus_received() -> None:
    worker = build("fedavg")
    start = build("fedavg").init_server({})
    update, _ = one_turn(worker)
    state = worker.model.state_dict()
    for group in ("model", "buffers"):
        assert same(update[group], {k: state[k] - t for k, t in start[group].items()})


def test_what_was_frozen_before_is_frozen_still() -> None:
    plain = build("fedavg", MOMENTUM)
    plain.model.encoder.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
    update, _ = one_turn(ALGORITHMS["fedavg"](plain.model, plain.recipe))
    assert torch.equal(plain.model.get_parameter("encoder.0.weight"), before["encoder.0.weight"])
    assert "encoder.0.weight" not in update["model"]
    assert update["model"]["decoder.0.weight"].any()


@pytest.mark.parametrize("name", ["local", "pooled"])
def test_a_split_has_no_meaning_where_nothing_or_everything_is_shared(name: str) -> None:
    with pytest.raises(ValueError, match="has no meaning"):
        build(name, personal="normalisation")


@pytest.mark.parametrize("name", ["fedprox", "ditto"])
def test_with_nothing_shared_there_is_nothing_to_be_pulled_to(name: str, tmp_path: Path) -> None:
    outcome = simulate(name, tmp_path, personal="everything")
    assert not outcome.server.tensors
    assert len(outcome.observer.rows("rounds")) == 6
