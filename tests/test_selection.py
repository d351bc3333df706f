"""Which sites a round asks, and how much each does, from what happened before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fedseg.federation.schedule import Schedule, check_cohort
from fedseg.federation.selection import History, Past, PowerOfChoice, history_of, remembering
from fedseg.federation.state import State
from tests.flower_world import federate
from tests.test_privacy import transforms
from tests.world import Outcome, assert_same, assert_same_outcome, simulate

BY_LOSS = {"selection": "loss", "fraction": 0.3}
BY_LABELS = {"selection": "heterogeneity", "fraction": 0.6}
LOSSES = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}


def trained(outcome: Outcome) -> list[tuple[int, str]]:
    return [(row["round"], row["site"]) for row in outcome.observer.rows("rounds") if row["task"] == "train"]


@pytest.mark.parametrize(
    ("told", "asked"),
    [(LOSSES, {"b", "d"}), ({**LOSSES, "b": None}, {"b", "d"}), ({"b": 0.4, "d": 0.3}, {"a", "c"}), ({"a": 9.0}, None)],
)
def test_the_highest_losses_are_asked_and_first_those_that_told_none(
    told: Mapping[str, float | None], asked: set[str] | None
) -> None:
    history = {site: Past(1, 3.0, loss) for site, loss in told.items()}
    found = [set(PowerOfChoice(list("abcd"), 2, 4)(2, history, Random(seed))) for seed in range(20)]
    if asked is None:  # among those that told nothing chance decides, and the one that did comes last
        assert all("a" not in one for one in found)
        assert len({tuple(sorted(one)) for one in found}) == 3
    else:
        assert all(one == asked for one in found)


def test_few_candidates_leave_more_to_chance() -> None:
    history = {site: Past(1, 3.0, loss) for site, loss in LOSSES.items()}
    choice = PowerOfChoice(list("abcd"), 1, 2)
    drawn = [next(iter(choice(2, history, Random(seed)))) for seed in range(600)]
    # the best of two drawn of four: the highest in 3 of 6 pairs, the second in 2, the third in 1, the lowest in none
    assert [round(drawn.count(site) / 100) for site in "bdca"] == [3, 2, 1, 0]


@pytest.mark.slow
def test_as_many_candidates_as_are_asked_are_uniform_sampling_bit_for_bit(tmp_path: Path) -> None:
    schedule = {"fraction": 0.6, "dropout": 0.3}
    plain = simulate("fedavg", tmp_path / "plain", rounds=4, schedule=schedule)
    own = {**schedule, "selection": "loss", "candidates": 0.6}
    found = simulate("fedavg", tmp_path / "loss", rounds=4, schedule=own)
    assert trained(found) == trained(plain)
    assert_same(State(found.server.tensors), plain.server)
    assert not plain.server.scalars  # nothing is remembered unless somebody asks for it


def test_sites_take_turns_until_all_have_told_then_the_highest_loss_is_asked(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=6, schedule=BY_LOSS)
    rows = [row for row in outcome.observer.rows("rounds") if row["task"] == "train"]
    told: dict[str, float] = {}
    for row in rows:
        assert (len(told) < 3 and row["site"] not in told) or row["site"] == max(told, key=lambda site: told[site])
        told[row["site"]] = row["loss"]
    assert len(rows) == 6
    assert {site: past.loss for site, past in history_of(outcome.server).items()} == told


UNBIASED = {**BY_LABELS, "select_unbiased": True}
OF_METHODS = [(name, BY_LOSS) for name in ("fedavg", "ditto", "scaffold", "feddyn", "fedamp")]
OF_METHODS += [("fedavg", UNBIASED), ("scaffold", BY_LABELS), ("fedamp", BY_LABELS), ("qffl", BY_LABELS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "schedule"), OF_METHODS)
def test_what_was_told_survives_a_stop(name: str, schedule: dict[str, Any], tmp_path: Path) -> None:
    whole = simulate(name, tmp_path / "whole", rounds=5, schedule=schedule)
    simulate(name, tmp_path / "parts", rounds=3, schedule=schedule)
    rest = simulate(name, tmp_path / "parts", rounds=5, schedule=schedule)
    assert [turn for turn in trained(whole) if turn[0] > 3] == trained(rest)
    assert_same_outcome(whole, rest)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [BY_LOSS, UNBIASED])
def test_across_machines_the_same_is_told_and_the_same_sites_are_asked(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    here = simulate("fedavg", tmp_path / "here", rounds=4, schedule=schedule)
    there = federate("fedavg", tmp_path / "there", rounds=4, schedule=schedule)
    assert trained(here) == trained(there)
    assert_same(here.server, there.server)


def with_selection(select: Any) -> Any:
    def change(federation: Any) -> None:
        federation.select = select

    return change


def test_a_selection_of_ones_own_says_how_much_each_site_does(tmp_path: Path) -> None:
    def shrinking(round: int, history: History, random: Random) -> dict[str, float]:
        return {site: 1.0 if site not in history else 0.5 for site in ("s0", "s2")}

    outcome = simulate("fedavg", tmp_path, schedule={"local_steps": 4}, before=with_selection(shrinking))
    rows = [(r["site"], r["steps"]) for r in outcome.observer.rows("rounds") if r["task"] == "train"]
    assert rows == [("s0", 4), ("s2", 4), ("s0", 2), ("s2", 2)]


@pytest.mark.parametrize(("chosen", "told"), [({"s9": 1.0}, "site 's9'; there are s0"), ({"s0": 0.0}, "'s0' 0 of")])
def test_a_selection_that_makes_no_sense_is_refused(chosen: dict[str, float], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        simulate("fedavg", tmp_path, before=with_selection(lambda *_: chosen))


@pytest.mark.parametrize(
    ("schedule", "told", "cure"),
    [
        ({**BY_LOSS, "sampling": "poisson"}, "does not; take federation.sampling=fixed", {"sampling": "fixed"}),
        ({"candidates": 0.5}, "or leave federation.candidates at 1.0", {"candidates": 1.0}),
        ({"selection": "loss"}, "all 3 sites", {"fraction": 0.3}),
        ({"selection": "loss"}, "or federation.selection=uniform", {"selection": "uniform"}),
        ({**BY_LOSS, "fraction": 0.6, "candidates": 0.3}, "take federation.candidates=0.6", {"candidates": 0.6}),
        ({"selection": "heterogeneity"}, "heterogeneity has no choice where a round asks all 3", {"fraction": 0.3}),
        ({"select_labels": 0.2}, "or leave federation.select_labels at 0.5", {"select_labels": 0.5}),
        ({"select_unbiased": True}, "or leave federation.select_unbiased at false", {"select_unbiased": False}),
        ({"local_epochs": 5.0}, "take federation.local_steps=null", {"local_steps": None}),
        ({"local_epochs": 5.0}, "or leave federation.local_epochs at 1.0", {"local_epochs": 1.0}),
        ({**BY_LABELS, "sampling": "poisson"}, "take federation.sampling=fixed", {"sampling": "fixed"}),
        (
            {**BY_LABELS, "select_unbiased": True, "combine": "median"},
            "take federation.combine=mean",
            {"combine": "mean"},
        ),
        (
            {**BY_LABELS, "select_unbiased": True, "order": "cyclic"},
            "take federation.order=together",
            {"order": "together"},
        ),
    ],
)
def test_settings_without_meaning_are_refused_and_the_cure_helps(
    schedule: dict[str, Any], told: str, cure: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=told):
        check_cohort(Schedule(**schedule), (), 3)
    check_cohort(Schedule(**{**schedule, **cure}), (), 3)


def test_what_single_sites_told_is_not_read_where_they_are_hidden(tmp_path: Path) -> None:
    chain = transforms(mechanism="sparse", epsilon_round=1.0, max_epsilon=9.0, clip=0.01)
    with pytest.raises(ValueError, match=r"sparse does not allow; take federation\.selection=uniform"):
        simulate("fedavg", tmp_path, schedule=BY_LOSS, transforms=chain)
    with pytest.raises(ValueError, match=r"sparse does not allow; take federation\.combine=mean"):
        check_cohort(Schedule(combine="median"), chain, 4)  # before anything runs, as for the selection
    own = r"of your own \(Federation\.select\) asks sites by what single ones told, which sparse .*; leave it out"
    with pytest.raises(ValueError, match=own):
        simulate("fedavg", tmp_path, transforms=chain, before=with_selection(lambda *_: {"s0": 1.0}))
    simulate("fedavg", tmp_path / "cure", schedule={**BY_LOSS, "selection": "uniform"}, transforms=chain)


def test_history_is_part_of_the_state_and_site_names_may_hold_anything() -> None:
    history = {"a/b": Past(3, 4.0, 0.5), "c": Past(1, 2.0, None)}
    state = remembering(State({}, {"rounds": 2.0, "history/loss/c": 7.0}), history)
    assert history_of(state) == history
    assert state.scalars["rounds"] == 2.0
