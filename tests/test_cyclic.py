"""One model that travels from site to site: the engine's other order of turns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedseg.federation.client import turn
from fedseg.federation.contract import Cohort, TrainTask, Transform
from fedseg.federation.engine import POOL, RoundError
from fedseg.federation.state import Mean, State
from tests.world import CPU, ToySite, assert_same, assert_same_outcome, build, evaluate, simulate, toy_sites

CYCLIC = {"order": "cyclic"}


def by_hand(rounds: int) -> State:
    """Every site goes on where the one before it stopped."""
    method, sites = build("fedavg", rounds=rounds), toy_sites()
    server, kept = method.init_server({}), dict.fromkeys(sites, State())
    for round in range(1, rounds + 1):
        for name in (site for site in sites if site != POOL):
            task = TrainTask(round, 7, steps=3)
            message = method.broadcast(server, name, task)
            worker = build("fedavg", rounds=rounds)
            update, kept[name] = turn(worker, sites[name], task, message, kept[name], CPU, evaluate)
            one = Mean()
            one.add(update, float(update.examples))
            server = method.advance(server, one.result(), Cohort({name: 1.0}, 1.0, 1, 3))
    return server


def test_each_site_goes_on_where_the_one_before_it_stopped(tmp_path: Path) -> None:
    found, expected = simulate("fedavg", tmp_path, schedule=CYCLIC).server, by_hand(2)
    assert_same(found, expected)


def test_with_one_site_both_orders_are_the_same(tmp_path: Path) -> None:
    one = {"sites": toy_sites(1)}
    assert_same_outcome(
        simulate("ditto", tmp_path / "a", **one), simulate("ditto", tmp_path / "b", schedule=CYCLIC, **one)
    )


@pytest.mark.parametrize("name", ["fedavg", "fedbn", "ditto", "lcfed", "feddg", "local", "pooled"])
def test_methods_of_every_kind_travel_and_resume(name: str, tmp_path: Path) -> None:
    whole = simulate(name, tmp_path / "whole", rounds=2, schedule=CYCLIC)
    simulate(name, tmp_path / "parts", rounds=1, schedule=CYCLIC)
    assert_same(whole.server, simulate(name, tmp_path / "parts", rounds=2, schedule=CYCLIC).server)


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


def test_what_protects_a_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every site's model to the next; guarded protects means"):
        simulate("fedavg", tmp_path, schedule=CYCLIC, transforms=[Guarded()])
    with pytest.raises(ValueError, match=r"order=cyclic combines nothing, so that federation\.combine=median"):
        simulate("fedavg", tmp_path, schedule={**CYCLIC, "combine": "median"})
