"""BrainTorrent: turns written down anew, and what they reduce to."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import export
from fedseg.algorithms.recipe import Training
from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import compose
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.state import State, Update
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.privacy.compression import Cast
from fedseg.reporting.folder import RunFolder
from tests.lines import LineSite, close, drawn_lines, federate_lines, trained
from tests.test_laws import Recording
from tests.tiny_run import phantom_run
from tests.world import Outcome, assert_same, assert_same_outcome, build, simulate, toy_sites

RANDOM = {"order": "random"}
STEPS, LR = 4, 0.05
SGD = Training(optimizer="sgd", lr=LR, channels_last=False)


def world(*examples: int) -> tuple[dict[str, LineSite], Tensor]:
    return drawn_lines(STEPS, examples)


def by_hand(
    sites: Mapping[str, LineSite], start: Tensor, rounds: int, dead: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Models and versions, as a peer's algorithm has them: nobody but whose turn it is computes anything."""
    models, versions = dict.fromkeys(sites, start), dict.fromkeys(sites, 0)
    merged: dict[str, dict[str, int]] = {name: dict.fromkeys(sites, 0) for name in sites}
    for round in range(1, rounds + 1):
        for mine in random.Random(derive_seed(7, "turns", round)).choices(list(sites), k=len(sites)):
            if mine in dead:
                continue
            newer = [peer for peer in sites if peer != mine and versions[peer] > merged[mine][peer]]
            images = {name: sites[name].examples for name in [mine, *newer]}
            w = sum(count * models[name] for name, count in images.items()) / sum(images.values())
            models[mine] = trained(sites[mine], w, LR)
            merged[mine] |= {peer: versions[peer] for peer in newer}
            versions[mine] += 1
    return models, versions


@pytest.mark.parametrize("dead", [(), ("s1",)])
def test_turns_are_the_papers_and_a_dead_peer_is_only_absent(dead: tuple[str, ...], tmp_path: Path) -> None:
    sites, start = world(10, 20, 40)
    broken = {name: replace(sites[name], rows=torch.full_like(sites[name].rows, torch.nan)) for name in dead}
    found = federate_lines("braintorrent", tmp_path, {**sites, **broken}, start, SGD, 4, RANDOM)
    for rounds, (server, kept) in enumerate(found, 1):
        models, versions = by_hand(sites, start, rounds, dead)
        for name in sites:
            if versions[name]:
                close(server[f"offer/{name}"]["w"], models[name])
                close(kept[name]["model"]["w"], models[name])
                assert int(server[f"versions/{name}"][name]) == versions[name]
            else:
                assert f"offer/{name}" not in server.tensors
                assert "model" not in kept.get(name, State()).tensors


def turns_of(outcome: Outcome) -> list[tuple[str, State, Update]]:
    way = outcome.federation.transport
    assert isinstance(way, Recording)
    return [turn for turn in way.travelled if "offer" in turn[2].tensors]


def test_who_has_its_turn_takes_all_newer_models_of_those_it_reaches_and_no_other(tmp_path: Path) -> None:
    """With peers that are away for rounds; what is taken is the traffic, byte by byte."""
    schedule = {**RANDOM, "dropout": 0.3}
    outcome = simulate("braintorrent", tmp_path, 6, schedule=schedule, sites=toy_sites(4), transport=Recording)
    rows = [row for row in outcome.observer.rows("rounds") if row["task"] == "train"]
    away = {(row["round"], row["site"]) for row in outcome.observer.rows("events") if row["event"] == "absent"}
    known = {name: dict.fromkeys(toy_sites(4), 0) for name in toy_sites(4)}  # own version under the own name
    carried = 0
    assert away
    for row, (site, message, update) in zip(rows, turns_of(outcome), strict=True):
        reached = {peer for peer in known if (row["round"], peer) not in away} - {site}
        newer = {peer: known[peer][peer] for peer in reached if known[peer][peer] > known[site][peer]}
        assert row["site"] == site
        assert (row["round"], site) not in away
        assert {group for group in message.tensors if group.startswith("offer/")} == {f"offer/{p}" for p in newer}
        known[site] |= {**newer, site: known[site][site] + 1}
        told = {peer: int(version) for peer, version in update["versions"].items()}
        assert told == {peer: version for peer, version in known[site].items() if version}
        carried += sum(message.sizes().values())
    traffic = outcome.observer.rows("traffic")
    assert {row["direction"] for row in traffic} == {"down"}
    assert sum(row["bytes"] for row in traffic) == carried


@pytest.mark.slow
def test_it_is_replayed_from_the_seed_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = simulate("braintorrent", tmp_path / "a", 4, schedule=RANDOM)
    assert_same_outcome(whole, simulate("braintorrent", tmp_path / "b", 4, schedule=RANDOM))
    simulate("braintorrent", tmp_path / "c", 2, schedule=RANDOM)
    assert_same_outcome(whole, simulate("braintorrent", tmp_path / "c", 4, schedule=RANDOM))


@pytest.mark.parametrize("order", ["together", "cyclic", "random"])
def test_a_site_alone_trains_as_locally_bit_for_bit(order: str, tmp_path: Path) -> None:
    schedule = {"order": order}
    alone = simulate("braintorrent", tmp_path / "a", 3, schedule=schedule, sites=toy_sites(1))
    local = simulate("local", tmp_path / "b", 3, sites=toy_sites(1))
    assert_same(State({"model": alone.kept["s0"]["model"]}), State({"model": local.kept["s0"]["model"]}))
    assert not alone.observer.rows("traffic")


@pytest.mark.parametrize("examples", [(10, 10, 10), (10, 20, 40)])
def test_where_all_have_their_turn_at_once_a_merge_is_fedavgs(examples: tuple[int, ...], tmp_path: Path) -> None:
    """All start from one model and take all of the others': what each trains from is FedAvg's global model."""
    sites, start = world(*examples)
    ours = federate_lines("braintorrent", tmp_path / "a", sites, start, SGD, 4)
    theirs = federate_lines("fedavg", tmp_path / "b", sites, start, SGD, 4)
    starts = [start, *(server["model"]["w"] for server, _ in theirs)]
    for before, (server, _) in zip(starts, ours, strict=False):
        for name, site in sites.items():
            close(server[f"offer/{name}"]["w"], trained(site, before, LR))


def test_tensors_that_are_held_back_are_not_taken(tmp_path: Path) -> None:
    outcome = simulate("braintorrent", tmp_path, 2, schedule=RANDOM, personal="normalisation", transport=Recording)
    norms = {f"{part}.1.{name}" for part in ("encoder", "decoder") for name in ("weight", "bias", "running_mean")}
    (_, _, update), *_ = turns_of(outcome)
    assert update["offer"]
    assert not norms & update["offer"].keys()
    method = build("braintorrent", personal="normalisation")
    policies = {str(row["tensor"]): row["policy"] for row in method.parts.rows(method.model)}
    assert {name for name, policy in policies.items() if policy == "taken by peers"} == update["offer"].keys()
    assert {policies[name] for name in norms} == {"stays at the site"}


def test_a_site_without_labels_takes_the_others_mean_and_hands_nothing_on(tmp_path: Path) -> None:
    sites = toy_sites()
    sites["s1"] = replace(sites["s1"], labelled=False)
    outcome = simulate("braintorrent", tmp_path, 1, schedule={"order": "cyclic"}, sites=sites)  # after s0
    assert "offer/s1" not in outcome.server.tensors
    own, first = outcome.kept["s1"]["model"], outcome.server["offer/s0"]
    assert_same(State({"model": {name: own[name] for name in first}}), State({"model": first}))


def lie(found: State, how: str) -> None:
    own = found["versions"]["s1"]
    if how == "shape":
        found["offer"]["encoder.0.bias"] = torch.zeros(1)
    elif how == "replay":
        found["versions"]["s1"] = own - 1
    elif how == "fraction":
        found["versions"]["s1"] = own + 0.5
    else:
        found.tensors["versions"] = {}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shape", "its model is none of this run: names, shapes or types of its tensors are others"),
        ("replay", "its version of 's1' goes back behind 2"),
        ("fraction", "its versions are not whole numbers"),
        ("none", "its version of 's1' goes back behind 2"),
    ],
)
def test_a_model_that_is_none_or_not_newer_is_not_handed_on(how: str, reason: str, tmp_path: Path) -> None:
    outcome = simulate("braintorrent", tmp_path, 1, schedule={"order": "cyclic"}, transport=Recording)
    method, server = build("braintorrent"), outcome.server
    update = next(update for site, _, update in turns_of(outcome) if site == "s1")
    honest = Update({group: dict(ts) for group, ts in update.tensors.items()}, {}, site="s1", examples=6)
    honest["versions"]["s1"] = torch.tensor(2)
    assert method.weigh(server, [honest]) == [6.0]
    lie(honest, how)
    with pytest.raises(ValueError, match=reason):
        method.weigh(server, [honest])


def test_a_look_at_a_site_shows_its_own_model_and_takes_nothing(tmp_path: Path) -> None:
    outcome = simulate("braintorrent", tmp_path, 2, schedule=RANDOM)
    message = outcome.federation.algorithm.broadcast(outcome.server, "s1", EvaluateTask(2, 7))
    assert not message.tensors
    worker = build("braintorrent")
    worker.receive(message, outcome.kept["s1"], toy_sites()["s1"])
    held = State({"model": dict(worker.network("personal").state_dict())})
    assert_same(held, State({"model": outcome.kept["s1"]["model"]}))
    assert worker.views == ("personal",)


def test_its_settings_draw_turns_and_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    assert compose(["algorithm=braintorrent"], SCHEMA).federation.order == "random"
    for schedule in ({"combine": "median"}, {"server_lr": 0.5}):
        with pytest.raises(ValueError, match=r"has (no effect|no meaning)|combines nothing"):
            simulate("braintorrent", tmp_path, schedule={**RANDOM, **schedule})
    with pytest.raises(ValueError, match=r"peers hand on whole models; take compression\.cast=none"):
        Cast("float16").check(build("braintorrent"))
    Cast("float16").check(build("fedavg"))
    with pytest.raises(ValueError, match="leaves nothing to take from a peer; take algorithm=local"):
        build("braintorrent", personal="part:encoder+part:decoder+part:segmentation_head")


@pytest.mark.slow
def test_a_run_says_whose_models_it_has_what_travelled_and_what_is_taken(tmp_path: Path) -> None:
    config = phantom_run(3, tmp_path / "run", "algorithm=braintorrent", "federation.rounds=3")
    execute(config)
    folder = RunFolder(tmp_path / "run")
    scores, trained, traffic = folder.scores(), folder.rounds(), folder.traffic()
    assert set(scores["view"]) == {"personal"}
    assert set(scores["site"]) == {"site_01", "site_02"}
    assert len(trained) == 3 * 2
    assert trained.duplicated(["round", "site"]).any()  # one had both turns of a round
    assert set(traffic["direction"]) == {"down"}
    assert set(traffic["group"]) <= {"offer/site_01", "offer/site_02", "versions"}
    assert {"averaged", "taken by peers"} & set(pd.read_csv(folder.path / "tensors.csv")["policy"]) == {
        "taken by peers"
    }
    assert export.main([str(folder.path), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "personal-site_02.md").read_text()
    assert "nothing was shared" not in card
    assert "| site_01 |" in card.partition("Scores")[0]
