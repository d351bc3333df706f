"""What goes together: server steps of other methods, personal parts, styles of images; and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.composed import composed, not_a_step, obstacle
from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.fedopt import FedAdam
from fedseg.algorithms.recipe import Training
from fedseg.common.parts import PartError
from fedseg.configs.compose import ConfigError, as_yaml, compose, load
from fedseg.configs.help import explained
from fedseg.federation.contract import Average, Cohort
from fedseg.federation.state import Mean, State, Update
from fedseg.launch.run import method_name
from fedseg.launch.settings import METHODS, SCHEMA
from fedseg.launch.sites.site import Local
from fedseg.launch.tuning.search import search_space
from tests.tiers import every
from tests.world import assert_same, assert_same_outcome, build, simulate

STEPS = ["fedavgm", "fedadagrad", "fedadam", "fedyogi"]
MOVED = [name for name, method in ALGORITHMS.items() if not obstacle(method, FedAdam)]


class Halved(FedAvg):
    """A step of one's own: half of the mean."""

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        model = {name: tensor / 2 for name, tensor in mean.get("model").items()}
        return super().advance(server, State({**mean.tensors, "model": model}, mean.scalars), cohort)


# ------------------------------------------------------------------------------------------------------ server steps


def test_fedce_says_the_mean_and_fedadam_what_becomes_of_it(tmp_path: Path) -> None:
    """Two rounds: the weights that FedCE gives to the same updates, then Adam's formula on their weighted mean."""
    rounds: list[tuple[State, list[Update]]] = []

    def listen(federation: Any) -> None:
        aggregate = federation.algorithm.aggregate

        def noted(server: State, updates: Sequence[Update], average: Average) -> State:
            rounds.append((server, list(updates)))
            after: State = aggregate(server, updates, average)
            return after

        federation.algorithm.aggregate = noted

    step, beta1, beta2, tau = 0.05, 0.8, 0.9, 1e-2
    knobs = {"server_step": step, "beta1": beta1, "beta2": beta2, "tau": tau, "join": "times"}
    outcome = simulate("fedce+fedadam", tmp_path, 2, before=listen, **knobs)
    alone = build("fedce", join="times")
    w = alone.init_server({})
    m = {name: torch.zeros_like(t) for name, t in w["model"].items()}
    v = dict(m)
    for server, updates in rounds:
        assert_same(State({group: server[group] for group in ("model", "buffers")}), State(w.tensors))
        mean = Mean()

        def average(
            weights: Sequence[float], updates: list[Update] = updates, mean: Mean = mean
        ) -> tuple[State, Cohort]:
            assert sum(weights) == pytest.approx(1)
            assert len(set(weights)) == 3
            for update, weight in zip(updates, weights, strict=True):
                mean.add(update, weight)
            return mean.result(), Cohort({}, 3, 3, 3)

        told = alone.aggregate(w, updates, average).scalars
        d = mean.result()
        m = {k: beta1 * t + (1 - beta1) * d["model"][k] for k, t in m.items()}
        v = {k: beta2 * t + (1 - beta2) * d["model"][k] ** 2 for k, t in v.items()}
        model = {k: t + step * m[k] / (v[k].sqrt() + tau) for k, t in w["model"].items()}
        w = State({"model": model, "buffers": {k: t + d["buffers"][k] for k, t in w["buffers"].items()}}, told)
        w = State({g: {k: t.clone() for k, t in ts.items()} for g, ts in w.tensors.items()}, told)
    close(outcome.server["model"], w["model"])
    close(outcome.server["buffers"], w["buffers"])
    close(outcome.server["moment/first"], m)
    close(outcome.server["moment/second"], v)
    assert {k: outcome.server.scalars[k] for k in w.scalars} == pytest.approx(w.scalars)


def close(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(a), dict(b), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", every(MOVED, {"fedprox", "fedbn", "ditto", "lcfed", "fedrdn", "qffl"}))
def test_whatever_a_method_makes_of_a_round_the_step_moves_its_model(name: str, tmp_path: Path) -> None:
    start: list[State] = []

    def listen(federation: Any) -> None:
        init = federation.algorithm.init_server
        federation.algorithm.init_server = lambda told: start.append(init(told)) or start[0]

    server = simulate(f"{name}+fedadam", tmp_path, 1, before=listen, server_step=0.5).server
    assert any(bool(tensor.any()) for tensor in server["moment/first"].values())
    for key, first in server["moment/first"].items():
        step = 0.5 * first / (server["moment/second"][key].sqrt() + 1e-3)
        assert torch.equal(server["model"][key], start[0]["model"][key] + step)
    assert start[0].tensors.keys() >= {"moment/first", "moment/second"}


@pytest.mark.slow
def test_a_composed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    simulate("fedce+fedadam", tmp_path / "parts", 1)
    resumed = simulate("fedce+fedadam", tmp_path / "parts", 2)
    assert_same_outcome(resumed, simulate("fedce+fedadam", tmp_path / "whole", 2))


def test_what_steps_there_are_follows_from_what_they_write() -> None:
    assert [name for name, method in ALGORITHMS.items() if not not_a_step(method)] == STEPS
    assert not obstacle(ALGORITHMS["fedce"], Halved)
    halved = composed(ALGORITHMS["fedprox"], Halved)
    assert (halved.loss, halved.advance) == (ALGORITHMS["fedprox"].loss, Halved.advance)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("scaffold+fedadam", "FedAdam cannot be the server's step of Scaffold: both write advance"),
        ("fednova+fedavgm", "both write advance"),
        ("feddyn+fedyogi", "both write advance"),
        ("feddg+fedadam", "both write advance"),
        ("harmofl+fedavgm", "both have a setting momentum"),
        ("fedce+fedadam+fedyogi", "both write advance"),
        ("fedavg+fedadam", "one of the two is the other already"),
        ("fedyogi+fedadam", "one of the two is the other already"),
        ("local+fedadam", "the method shares nothing"),
        ("pooled+fedadam", "the method trains in one place"),
        ("fedamp+fedadam", "the method answers every site with a model of its own"),
        ("medisecfed+fedadam", "the method exchanges answers"),
        ("fedadam+fedprox", "a server's step writes advance and init_server alone, and it writes loss"),
        ("fedadam+pooled", "and it does not write advance"),
        ("feddg+fedbn", r"it writes personal; what stays at a site is said by algorithm\.personal"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm={name.replace('+', '.')}.*: .*{told}"):
        compose([f"algorithm={name}"], SCHEMA)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fedce+fedadm", "unknown algorithm 'fedadm'; did you mean 'fedadam'"),
        ("fedc+fedadam", "unknown algorithm 'fedc'; did you mean 'fedce'"),
        ("fedce+fedprox_bn", "unknown algorithm 'fedprox_bn'; did you mean 'fedprox'"),
        ("fedce+", "unknown algorithm ''"),
    ],
)
def test_a_part_that_nobody_knows_is_named(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose([f"algorithm={name}"], SCHEMA)
    with pytest.raises(ConfigError, match=r"unknown data"):
        compose(["data=phantom+phantom"], SCHEMA)


# ------------------------------------------------------------------------------------------------------ settings


def test_a_composed_method_has_the_settings_of_both_and_a_name_of_its_own() -> None:
    told = ["algorithm=fedprox_bn+fedadam", "algorithm.mu=0.3", "algorithm.tau=0.02"]
    config = compose(told, SCHEMA)
    assert (config.algorithm.name, config.algorithm.preset) == ("fedprox+fedadam", "fedprox_bn+fedadam")
    assert (config.algorithm.mu, config.algorithm.tau, config.algorithm.personal) == (0.3, 0.02, "normalisation")
    saved = load(as_yaml(config), SCHEMA)
    again = compose(["algorithm.beta2=0.5"], SCHEMA, base=saved).algorithm
    assert again == {**config.algorithm, "beta2": 0.5}
    keys = {axis.key for axis in search_space(config)}
    assert keys == {"training.lr", "algorithm.mu", "algorithm.server_step", "algorithm.tau"}
    assert "algorithm.server_step = 0.01" in explained(SCHEMA, "algorithm=fedprox+fedadam")
    assert compose(["algorithm=fedrdn+fedadam"], SCHEMA).training == compose(["algorithm=fedrdn"], SCHEMA).training


def test_a_step_of_ones_own_is_imported_where_a_site_agreed(tmp_path: Path) -> None:
    name = f"fedprox+{__name__}:Halved"
    assert METHODS[name] is composed(ALGORITHMS["fedprox"], imported_step())
    config = compose([f"algorithm={name}"], SCHEMA)
    assert method_name(config) == "fedprox+Halved"
    with pytest.raises(ConfigError, match=rf"uses algorithm={__name__}:Halved.* parts='{__name__}:Halved'"):
        Local("a", tmp_path).applied(config)
    with pytest.raises(PartError, match="there is no module no_such"):
        METHODS["fedprox+no_such:Step"]
    assert Local("a", tmp_path, parts=(f"{__name__}:Halved",)).applied(config).algorithm == config.algorithm


def imported_step() -> Any:
    return METHODS[f"{__name__}:Halved"]


# ------------------------------------------------------------------------------------------------------ other pairs

OFF = {"fedprox": {"mu": 0.0}, "feddg": {"meta_weight": 0.0, "contrast_weight": 0.0}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFF)
def test_with_personal_normalisation_a_method_of_no_strength_is_fedbn(name: str, tmp_path: Path) -> None:
    fedbn = simulate("fedbn", tmp_path / "a", 2)
    off = simulate(name, tmp_path / "b", 2, personal="normalisation", **OFF[name])
    assert_same(State({"model": off.server["model"]}), State({"model": fedbn.server["model"]}))
    assert "buffers" not in off.server.tensors
    for site, kept in fedbn.kept.items():
        assert_same(State({"model": off.kept[site]["model"]}), State({"model": kept["model"]}))
    on = simulate(name, tmp_path / "c", 1, personal="normalisation")
    assert on.server["model"].keys() == fedbn.server["model"].keys()


@pytest.mark.parametrize(
    ("kind", "name", "knobs"),
    [
        ("histogram", "scaffold", {}),
        ("histogram", "ditto", {}),
        ("combat", "fedprox+fedyogi", {"personal": "normalisation"}),
        ("mixstyle", "iopfl", {}),
    ],
)
def test_any_kind_of_method_is_harmonised(
    kind: Literal["histogram", "combat", "mixstyle"], name: str, knobs: dict[str, str], tmp_path: Path
) -> None:
    training = Training(lr=1e-2, harmonise=kind, optimizer="sgd")
    server = simulate(name, tmp_path, 1, training=training, **knobs).server
    plain = simulate(name, tmp_path / "plain", 1, training=Training(lr=1e-2, optimizer="sgd"), **knobs).server
    assert server["model"].keys() == plain["model"].keys()
    assert any(not torch.equal(tensor, plain["model"][key]) for key, tensor in server["model"].items())
