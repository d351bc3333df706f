"""The limit of time: no site trains longer than sites did on average in the round before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseg.algorithms.recipe import Training
from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.contract import Task
from fedseg.federation.pace import counted, left, mean_limit, validated
from fedseg.federation.schedule import Schedule
from fedseg.federation.selection import Past, Pruning
from fedseg.federation.state import State, Update
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from tests.test_engine import Echo, federation, rows
from tests.tiny_run import phantom_run
from tests.world import Outcome, assert_same, assert_same_outcome, simulate

FAST = {"selection": "fast", "step_seconds": {"s1": 10.0}, "local_steps": 3}
LIMIT = {"time_limit": "mean", "local_steps": 12}
SLOW = {**LIMIT, "step_seconds": {"s1": 4.0}}
seconds = st.floats(0.01, 100.0)


def steps(outcome: Outcome) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for row in outcome.observer.rows("rounds"):
        if row["task"] == "train":
            found.setdefault(row["round"], {})[row["site"]] = row["steps"]
    return found


def by_hand(rounds: int, speed: Mapping[str, float], full: int) -> dict[int, dict[str, int]]:
    """Every site counts its seconds and stops with the first step that ends later than the mean."""
    done = {1: dict.fromkeys(("s0", "s1", "s2"), full)}
    for round in range(2, rounds + 1):
        mean = sum(count * speed.get(site, 1.0) for site, count in done[round - 1].items()) / 3
        done[round] = {}
        for site in done[1]:
            spent, count = 0.0, 0
            while count < full and spent <= mean:
                spent, count = spent + speed.get(site, 1.0), count + 1
            done[round][site] = count
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fednova", "ditto"])
def test_a_slow_site_stops_with_the_step_that_ends_after_the_mean(name: str, tmp_path: Path) -> None:
    found = steps(simulate(name, tmp_path, 4, schedule=SLOW))
    models = 2 if name == "ditto" else 1
    expected = by_hand(4, {"s1": 4.0}, 12)
    assert found == {r: {site: models * count for site, count in done.items()} for r, done in expected.items()}
    assert found[2]["s1"] < found[1]["s1"]
    assert found[4]["s0"] == found[1]["s0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fednova"])
def test_where_all_are_equally_fast_it_changes_nothing_bit_for_bit(name: str, tmp_path: Path) -> None:
    limited = simulate(name, tmp_path / "a", 3, schedule={**LIMIT, "step_seconds": {"s0": 1.0}})
    usual = simulate(name, tmp_path / "b", 3, schedule={"local_steps": 12})
    limited.server.scalars = {k: v for k, v in limited.server.scalars.items() if not k.startswith("history/")}
    assert_same(limited.server, usual.server)


@pytest.mark.slow
def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    schedule = {**SLOW, "dropout": 0.3}
    whole = simulate("fedavg", tmp_path / "a", 5, schedule=schedule)
    simulate("fedavg", tmp_path / "b", 2, schedule=schedule)
    assert_same_outcome(whole, simulate("fedavg", tmp_path / "b", 5, schedule=schedule))


def test_less_work_and_a_limit_are_no_more_than_either(tmp_path: Path) -> None:
    both = steps(simulate("fedavg", tmp_path, 4, schedule={**SLOW, "work_decay": 0.5}))
    assert [done["s0"] for done in both.values()] == [12, 6, 3, 2]
    assert both[2]["s1"] == 6  # the mean is 24 seconds, and leaves it 7 steps


def test_work_is_halved_after_so_many_validations_without_a_better_score() -> None:
    server, found = State({}, {"rounds": 1.0}), []
    for score in (0.2, 0.5, 0.5, 0.4, 0.45, 0.5, 0.6, 0.1, 0.1):
        server = validated(server, counted({"global": score, "personal/a": 0.9}, True, "ab", "ab"), 2)
        found.append(left(server))
    assert found == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert validated(server, {}, 2) == server
    assert server.scalars["rounds"] == 1.0
    own = validated(State({}), {"personal/a": 0.2, "personal/b": 0.4}, 1)
    assert left(validated(own, {"personal/a": 0.1, "personal/b": 0.6}, 1)) == 1.0  # the mean has risen
    assert left(validated(own, {"personal/a": 0.3, "personal/b": 0.3}, 1)) == 0.5


class Told(Echo):
    """Sites answer validations with what is written; one of which nothing is written does not answer."""

    def __init__(self, scores: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
        super().__init__()
        self.scores = scores

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for update in super().ask(tasks, messages):
            task = tasks[update.site]
            if task.kind != "evaluate":
                yield update
            elif update.site in (now := self.scores[task.round - 1]):
                update.scalars |= {f"val/{view}/dice": score for view, score in now[update.site].items()}
                yield update


def both(a: float, b: float) -> dict[str, dict[str, float]]:
    return {"s0": {"personal": a}, "s1": {"personal": b}}


def shared(score: float) -> dict[str, dict[str, float]]:
    return {site: {"global": score, "personal": 0.8} for site in ("s0", "s1")}


RISING = [both(0.9, 0.4), both(0.9, 0.5), both(0.9, 0.6)]


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("ditto", [shared(0.5), {"s0": {"global": 0.9, "personal": 0.9}}, *map(shared, (0.6, 0.65, 0.7))]),
        ("local", [both(0.9, 0.3), {"s0": {"personal": 0.9}}, *RISING]),
        ("local", [{"s0": {"personal": 0.9}, "s1": {}}, both(0.9, 0.3), *RISING]),  # s1 trains from round 2 on
        ("local", [{"s0": {"personal": 0.1 * r}, "s1": {}} for r in range(5)]),  # s1 has no validation cases
    ],
)
def test_only_scores_of_the_same_models_are_compared(name: str, scores: list[Any], tmp_path: Path) -> None:
    def run(folder: str, written: list[Any]) -> float:
        house = federation(tmp_path / folder, sites=2, name=name, rounds=len(written), work_patience=3)
        house.transport = Told(written)
        return left(house.run())

    assert run("rising", scores) == 1.0
    assert run("still", [*scores, *scores[-1:] * 3]) == 0.5


def test_patience_without_any_validation_score_is_told(tmp_path: Path) -> None:
    house = federation(tmp_path, sites=2, rounds=6, work_patience=1, evaluate_every=2)
    house.transport = Told([{"s0": {}, "s1": {}}] * 6)
    assert left(house.run()) == 1.0
    assert [(row["round"], row["event"]) for row in rows(house, "events")] == [(2, "no effect")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fedbn"])
def test_a_run_whose_scores_rise_no_more_does_less_and_goes_on_after_a_stop(name: str, tmp_path: Path) -> None:
    still = {"local_steps": 8, "work_patience": 1, "evaluate_every": 2}
    recipe = Training(optimizer="sgd", lr=1e-30)  # nothing is learnt, so that no score rises
    whole = simulate(name, tmp_path / "a", 7, schedule=still, training=recipe, norm="group")
    done = {round: set(of.values()) for round, of in steps(whole).items()}
    assert done == {1: {8}, 2: {8}, 3: {8}, 4: {8}, 5: {4}, 6: {4}, 7: {2}}
    simulate(name, tmp_path / "b", 5, schedule=still, training=recipe, norm="group")
    assert_same_outcome(whole, simulate(name, tmp_path / "b", 7, schedule=still, training=recipe, norm="group"))


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(seconds, st.integers(1, 50)), min_size=1))
def test_nobody_ends_more_than_one_step_after_the_mean(sites: dict[str, tuple[float, int]]) -> None:
    history = {site: Past(3, count, None) for site, (_, count) in sites.items()}
    speed = {site: pace for site, (pace, _) in sites.items()}
    mean = sum(pace * count for pace, count in sites.values()) / len(sites)
    for site, most in mean_limit(
        {**history, "away": Past(2, 1000, None), "idle": Past(3, 0, None)}, speed, sites
    ).items():
        assert most >= 1
        assert most == floor(mean / speed[site]) + 1 or abs(mean / speed[site] - round(mean / speed[site])) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "ditto"])
def test_a_very_slow_site_is_left_out_after_a_round_and_comes_back_in_every_so_manieth(
    name: str, tmp_path: Path
) -> None:
    schedule = {**FAST, "fast_images": 0.5, "fast_every": 4}
    whole = simulate(name, tmp_path / "a", 5, schedule=schedule)
    assert {round: set(done) for round, done in steps(whole).items()} == {
        **{round: {"s0", "s1", "s2"} for round in (1, 4)},
        **{round: {"s0", "s2"} for round in (2, 3, 5)},
    }
    simulate(name, tmp_path / "b", 2, schedule=schedule)
    assert_same_outcome(whole, simulate(name, tmp_path / "b", 5, schedule=schedule))


@pytest.mark.slow
def test_where_all_are_equally_fast_nobody_is_left_out_bit_for_bit(tmp_path: Path) -> None:
    pruned = simulate("fedavg", tmp_path / "a", 3, schedule={**FAST, "step_seconds": {}, "fast_images": 0.1})
    usual = simulate("fedavg", tmp_path / "b", 3)
    pruned.server.scalars = {k: v for k, v in pruned.server.scalars.items() if not k.startswith("history/")}
    assert_same(pruned.server, usual.server)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(seconds, st.integers(1, 50)), min_size=1),
    st.floats(0.05, 1.0),
    st.floats(1.0, 5.0),
    st.integers(),
)
def test_those_who_stay_are_the_fastest_hold_the_share_and_their_order_plays_no_part(
    sites: dict[str, tuple[float, int]], share: float, factor: float, seed: int
) -> None:
    rng = Random(seed)
    history = {site: Past(1, 1.0, None, images) for site, (_, images) in sites.items()}
    pace = {site: own for site, (own, _) in sites.items()}
    stay = Pruning(list(sites), pace, share, factor, 5)(2, history, rng).keys()
    assert Pruning([*sites, "new"], pace, share, factor, 5)(2, history, rng).keys() == {*stay, "new"}
    shuffled = rng.sample(list(sites), len(sites))
    assert stay == Pruning(shuffled, pace, share, factor, 5)(2, history, rng).keys()
    assert stay
    slowest = max(pace[site] for site in stay)
    assert stay == {site for site in sites if pace[site] <= slowest}
    assert slowest <= factor * median(pace.values())
    total, held = sum(images for _, images in sites.values()), sum(sites[site][1] for site in stay)
    slower = [own for own in pace.values() if own > slowest]
    assert held >= share * total or min(slower) > factor * median(pace.values())
    assert sum(sites[site][1] for site in stay if pace[site] < slowest) < share * total  # the smallest such set


@pytest.mark.parametrize(
    ("schedule", "told", "cure"),
    [
        ({"step_seconds": {"s1": 2.0}}, "is for federation.time_limit=mean and", {"time_limit": "mean"}),
        ({"step_seconds": {"s1": 2.0}}, "selection=fast; take one", {"selection": "fast"}),
        ({"selection": "fast"}, "goes by federation.step_seconds; take", {"step_seconds": {"s1": 4.0}}),
        ({**FAST, "fraction": 0.5}, "asks some by chance; take federation.fraction=1", {"fraction": 1.0}),
        ({**FAST, "sampling": "poisson"}, "fast does not; take federation.sampling=fixed", {"sampling": "fixed"}),
        ({"fast_every": 3}, "selection=fast, or leave federation.fast_every at 5", {"fast_every": 5}),
        ({**LIMIT, "local_steps": None}, "take federation.local_steps=10", {"local_steps": 10}),
        ({**LIMIT, "order": "cyclic"}, "nobody waits; take federation.order=together", {"order": "together"}),
        ({"work_patience": 2, "evaluate_every": 100}, "take federation.rounds=301 or more", {"rounds": 301}),
        ({"work_patience": 3, "rounds": 4}, "take federation.rounds=5 or more", {"work_patience": 2}),
        ({**SLOW, "step_seconds": {"s1": 0.0}}, "federation.step_seconds={'s1': 0.0}", {"step_seconds": {"s1": 0.1}}),
    ],
)
def test_settings_without_meaning_are_refused_and_the_cure_helps(
    schedule: dict[str, Any], told: str, cure: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=told.replace("{", r"\{")):
        Schedule(**schedule)
    Schedule(**{**schedule, **cure})


@pytest.mark.slow
def test_seconds_of_a_site_that_there_is_not_and_no_number_are_refused(tmp_path: Path) -> None:
    def limited(site: str) -> None:
        execute(phantom_run(3, tmp_path / site, "federation.time_limit=mean", f"federation.step_seconds={{{site}: 3}}"))

    with pytest.raises(ConfigError, match="step_seconds names 'site_09'; there are site_01, site_02, site_03"):
        limited("site_09")
    limited("site_03")  # held out here, but not in every fold
    with pytest.raises(ConfigError, match=r"step_seconds=\{s1: -4\} should be dict\[str, .* > 0 .*\] or null"):
        compose(["federation.time_limit=mean", "federation.step_seconds={s1: -4}"], SCHEMA)


@pytest.mark.parametrize(
    ("setting", "method", "told", "other"),
    [
        ("work_patience=2", "contrastive", "no model that is scored; take federation.work_patience=null", "fedavg"),
        ("select_unbiased=true", "local", "averages nothing; take federation.select_unbiased=false", "fedavg"),
        ("select_unbiased=true", "fedce", "or takes no mean; take federation.select_unbiased=false", "fedbn"),
    ],
)
def test_settings_that_a_method_has_no_use_for_are_refused_before_images_are_read(
    setting: str, method: str, told: str, other: str, tmp_path: Path
) -> None:
    more = ["federation.rounds=20", f"federation.{setting}"]
    if "unbiased" in setting:
        more += ["federation.selection=heterogeneity", "federation.fraction=0.5"]
    with pytest.raises(ConfigError, match=told):
        Experiment(phantom_run(3, tmp_path, f"algorithm={method}", *more)).check()
    Experiment(phantom_run(3, tmp_path, f"algorithm={other}", *more)).check()
