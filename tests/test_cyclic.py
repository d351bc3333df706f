"""One model that travels from site to site: the engine's other orders of turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from fedseg.common.seeds import derive_seed
from fedseg.federation.client import turn
from fedseg.federation.contract import Cohort, TrainTask, Transform
from fedseg.federation.engine import POOL, RoundError
from fedseg.federation.schedule import Schedule, check_method, without_effect
from fedseg.federation.state import Mean, State
from tests.tiers import every
from tests.world import CPU, ToySite, assert_same, assert_same_outcome, build, evaluate, simulate, toy_sites

CYCLIC = {"order": "cyclic"}
either_order = pytest.mark.parametrize("order", ["cyclic", "random"])


def turns(order: str, round: int, sites: Sequence[str]) -> list[str]:
    rng = random.Random(derive_seed(7, "turns", round))
    return rng.choices(sites, k=len(sites)) if order == "random" else list(sites)


def by_hand(rounds: int, order: str) -> State:
    """Every site goes on where the one before it stopped; whose turn it is once more sees other images."""
    method, sites = build("fedavg", rounds=rounds), toy_sites()
    server, kept = method.init_server({}), dict.fromkeys(sites, State())
    for round in range(1, rounds + 1):
        had: list[str] = []
        for name in turns(order, round, [site for site in sites if site != POOL]):
            again = had.count(name)
            task = TrainTask(round, derive_seed(7, "turn", again) if again else 7, steps=3)
            had.append(name)
            message = method.broadcast(server, name, task)
            worker = build("fedavg", rounds=rounds)
            update, kept[name] = turn(worker, sites[name], task, message, kept[name], CPU, evaluate)
            one = Mean()
            one.add(update, float(update.examples))
            server = method.advance(server, one.result(), Cohort({name: 1.0}, 1.0, 1, 3))
    return server


@either_order
def test_each_site_goes_on_where_the_one_before_it_stopped(order: str, tmp_path: Path) -> None:
    assert_same(simulate("fedavg", tmp_path, 3, schedule={"order": order}).server, by_hand(3, order))


def test_turns_that_are_drawn_come_twice_in_a_round_or_not_at_all() -> None:
    rounds = [turns("random", round, ["s0", "s1", "s2"]) for round in range(1, 4)]
    assert any(len(set(drawn)) < 3 for drawn in rounds)
    assert len({tuple(drawn) for drawn in rounds}) > 1


@either_order
def test_with_one_site_all_orders_are_the_same(order: str, tmp_path: Path) -> None:
    one = {"sites": toy_sites(1)}
    assert_same_outcome(
        simulate("ditto", tmp_path / "a", **one), simulate("ditto", tmp_path / "b", schedule={"order": order}, **one)
    )


def test_turns_mean_nothing_to_a_method_that_averages_nothing(tmp_path: Path) -> None:
    together, cyclic = (
        simulate("local", tmp_path / order, 1, schedule={"order": order}) for order in ("together", "cyclic")
    )
    assert_same_outcome(together, cyclic)
    assert without_effect(Schedule(order="cyclic"), build("local"))
    assert not without_effect(Schedule(order="random"), build("local"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", every(["fedavg", "fedbn", "ditto", "lcfed", "feddg", "local", "pooled"], ["fedavg", "ditto", "lcfed"])
)
@either_order
def test_methods_of_every_kind_travel_and_resume(order: str, name: str, tmp_path: Path) -> None:
    schedule = {"order": order}
    whole = simulate(name, tmp_path / "whole", rounds=2, schedule=schedule)
    simulate(name, tmp_path / "parts", rounds=1, schedule=schedule)
    assert_same(whole.server, simulate(name, tmp_path / "parts", rounds=2, schedule=schedule).server)


def broken(site: ToySite) -> ToySite:
    return replace(site, images=torch.full_like(site.images, torch.nan))


def test_a_site_that_diverges_is_passed_over_and_named(tmp_path: Path) -> None:
    sites = toy_sites()
    sites["s1"] = broken(sites["s1"])
    outcome = simulate("fedavg", tmp_path, rounds=1, schedule=CYCLIC, sites=sites)
    refused = [event["site"] for event in outcome.observer.rows("events") if event["event"] == "refused"]
    assert refused[0] == "s1"
    trained = [row["site"] for row in outcome.observer.rows("rounds") if row["task"] == "train"]
    assert trained == ["s0", "s2"]
    assert not outcome.server.non_finite()


def test_where_every_site_diverges_the_run_ends_with_their_reasons(tmp_path: Path) -> None:
    sites = {name: broken(site) for name, site in toy_sites().items()}
    with pytest.raises(RoundError, match=r"s0: .* not finite.*s2: .* not finite"):
        simulate("fedavg", tmp_path, rounds=1, schedule=CYCLIC, sites=sites)


class Guarded(Transform):
    name = "guarded"
    least = 3


@either_order
def test_what_protects_a_mean_is_refused(order: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"order={order} shows every site's model to the next; guarded protects means"):
        simulate("fedavg", tmp_path, schedule={"order": order}, transforms=[Guarded()])
    with pytest.raises(ValueError, match=rf"order={order} combines nothing, so that federation\.combine=median"):
        simulate("fedavg", tmp_path, schedule={"order": order, "combine": "median"})


@either_order
@pytest.mark.parametrize(
    ("name", "knobs"),
    [("fedce", {}), ("ga", {}), ("fedcost", {}), ("fedawa", {}), ("qffl", {}), ("feddg", {"weighting": "rounded"})],
)
def test_methods_that_weigh_updates_against_each_other_are_refused(
    name: str, knobs: dict[str, str], order: Literal["cyclic", "random"]
) -> None:
    schedule, method = Schedule(order=order), build(name, **knobs)
    with pytest.raises(ValueError, match=rf"order={order} takes in one update at a time.*; take federation\.order=tog"):
        check_method(schedule, method)
    check_method(Schedule(), method)
    check_method(schedule, build("feddg"))
