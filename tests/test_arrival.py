"""Sites that come later, leave and come back: who is asked, what is known of whom, and what a run without them is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.algorithms.recipe import Training
from fedseg.configs.compose import ConfigError, compose
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.phantom.data import PhantomDataModule
from fedseg.datamodules.site import SiteData
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import turn
from fedseg.federation.contract import Cohort, QueryTask
from fedseg.federation.engine import POOL, RoundError
from fedseg.federation.roster import Roster
from fedseg.federation.schedule import Schedule, check_newcomers, check_roster
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from tests.world import CPU, Outcome, ToySite, assert_same, assert_same_outcome, build, simulate, toy_sites

LATE = {"arrives": {"s2": 3}}
CHANCE = {"fraction": 0.7, "dropout": 0.2, "work_spread": 0.5}
"""Settings by which a round's random numbers hang on the sites that there are."""


slow = pytest.mark.slow


class StoppedError(Exception):
    """The process is killed."""


def without(*names: str) -> dict[str, ToySite]:
    return {name: site for name, site in toy_sites().items() if name not in names}


def killed_after(round: int) -> Any:
    """Tampers with a federation so that it ends once a round is saved."""

    def tamper(federation: Any) -> None:
        save = federation.checkpoint.save

        def saved(done: int, *args: Any, **kwargs: Any) -> None:
            save(done, *args, **kwargs)
            if done == round:
                raise StoppedError

        federation.checkpoint.save = saved

    return tamper


def asked(outcome: Outcome, task: str = "train") -> dict[int, list[str]]:
    rows = outcome.observer.rows("audit")
    found: dict[int, list[str]] = {}
    for row in rows:
        if row["task"] == task and row["site"] not in found.setdefault(row["round"], []):
            found[row["round"]].append(row["site"])
    return found


def test_a_roster_tells_who_is_there_who_comes_and_who_goes() -> None:
    roster = Roster(["a", "b", "c", "d"], {"b": 3, "d": 6}, {"c": 5, "d": 2})
    there = {round: "".join(roster.members(round)) for round in range(1, 7)}
    assert there == {1: "acd", 2: "ac", 3: "abc", 4: "abc", 5: "ab", 6: "abd"}
    assert [roster.arriving(round) for round in (1, 2, 3, 6)] == [[], [], ["b"], ["d"]]
    assert [roster.leaving(round) for round in (2, 3, 5)] == [["d"], [], ["c"]]
    assert [roster.since(round) for round in (1, 2, 4, 6)] == [1, 2, 3, 6]
    assert roster.later(5) == ["a", "b", "d"]
    assert Roster(["a"]).changes == []


@pytest.mark.parametrize(
    "name", ["scaffold", *(pytest.param(name, marks=slow) for name in ("feddg", "fedrdn", "ditto"))]
)
def test_before_it_arrives_a_site_has_no_part_in_anything(name: str, tmp_path: Path) -> None:
    """Its rounds before are those of a run that never had it, and so is all that follows if it does not come."""
    late = simulate(name, tmp_path / "late", 4, schedule={**CHANCE, **LATE})
    never = simulate(name, tmp_path / "never", 4, schedule=CHANCE, sites=without("s2"))
    assert late.federation.checkpoint.branches() == [2]
    late.federation.checkpoint.copied(2, tmp_path / "forgotten")
    forgotten = simulate(name, tmp_path / "forgotten", 4, schedule=CHANCE, sites=without("s2"))
    assert_same_outcome(forgotten, never)
    assert forgotten.federation.checkpoint.index["best"] == never.federation.checkpoint.index["best"]
    assert any(row["site"] == "s2" for row in late.observer.rows("rounds"))
    assert not any(row["site"] == "s2" and row["round"] < 3 for row in late.observer.rows("audit"))


@pytest.mark.parametrize(("name", "last"), [("fedbn", 2), pytest.param("feddg", 3, marks=slow)])
def test_a_run_whose_sites_come_and_go_resumes_bit_for_bit(name: str, last: int, tmp_path: Path) -> None:
    changes = {**CHANCE, "arrives": {"s2": 3}, "leaves": {"s0": 4}, "checkpoint_every": 3}
    whole = simulate(name, tmp_path / "whole", 5, schedule=changes)
    with pytest.raises(StoppedError):
        simulate(name, tmp_path / "parts", 5, schedule=changes, before=killed_after(last))
    resumed = simulate(name, tmp_path / "parts", 5, schedule=changes)
    assert_same_outcome(resumed, whole)
    ends = [outcome.federation.checkpoint.index for outcome in (resumed, whole)]
    assert len({repr({key: value for key, value in end.items() if key != "checksums"}) for end in ends}) == 1


def test_who_is_asked_scored_and_told_of(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, 4, schedule={"arrives": {"s2": 3}, "leaves": {"s0": 4}})
    assert asked(outcome) == {1: ["s0", "s1"], 2: ["s0", "s1"], 3: ["s0", "s1", "s2"], 4: ["s1", "s2"]}
    assert asked(outcome, "evaluate") == asked(outcome)
    told = [(row["round"], row["site"], row["event"]) for row in outcome.observer.rows("events")]
    assert told == [(3, "s2", "arrived"), (4, "s0", "left")]
    assert list(outcome.federation.members(4)) == ["s1", "s2"]


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_shares_of_all_sites_are_shares_of_those_that_are_there(fraction: float, tmp_path: Path) -> None:
    """SCAFFOLD's |S| / N, and the updates that a round is to have."""
    cohorts: list[Cohort] = []

    def listen(federation: Any) -> None:
        advance = federation.algorithm.advance

        def heard(server: State, mean: State, cohort: Cohort) -> State:
            cohorts.append(cohort)
            return advance(server, mean, cohort)

        federation.algorithm.advance = heard

    changes = {"arrives": {"s2": 2}, "leaves": {"s0": 3}, "fraction": fraction}
    simulate("scaffold", tmp_path, 3, schedule=changes, before=listen)
    assert [cohort.population for cohort in cohorts] == [2, 3, 2]
    assert [cohort.expected for cohort in cohorts] == ([2, 3, 2] if fraction == 1.0 else [1, 2, 1])


def test_the_best_global_model_is_one_of_rounds_with_the_same_sites(tmp_path: Path) -> None:
    checkpoint, state = Checkpoint(tmp_path), State({"model": {"w": torch.zeros(1)}})
    checkpoint.save(1, state, {}, {"global": 0.9, "personal/a": 0.9})
    checkpoint.save(2, state, {}, {"global": 0.5, "personal/a": 0.5}, since=2)
    checkpoint.save(3, state, {}, {"global": 0.4}, since=2)
    assert {name: best.round for name, best in Checkpoint(tmp_path).best().items()} == {"global": 2, "personal/a": 1}


def test_what_lies_at_the_server_in_the_name_of_a_site_that_left_is_dropped(tmp_path: Path) -> None:
    schedule = {"leaves": {"s0": 2}, "arrives": {"s0": 3}, "local_steps": 1}
    outcome = simulate("feddg", tmp_path, 2, schedule={**schedule, "arrives": None})
    assert not [name for name in (*outcome.server.tensors, *outcome.server.scalars) if name.endswith("/s0")]
    assert {group for group in outcome.kept["s1"].tensors if group.startswith("bank/")} == {"bank/s2"}
    back = simulate("feddg", tmp_path / "back", 3, schedule=schedule)
    assert {"bank/s0", "bank/s2"} <= back.kept["s1"].tensors.keys()
    assert asked(back)[3] == ["s0", "s1", "s2"]


def test_groups_of_sites_have_numbers_and_not_names() -> None:
    method = build("cfl")
    server = method.init_server({"1": State(), "s1": State()})
    server.tensors["group/1"] = {"w": torch.zeros(1)}
    after = method.regrouped(server, {"s2": State()}, ["1"])
    assert "group/1" in after.tensors
    assert {name for name in after.scalars if name.startswith("group/")} == {"group/s1", "group/s2"}


def test_a_newcomer_that_does_not_introduce_itself_ends_the_run(tmp_path: Path) -> None:
    def deaf(federation: Any) -> None:
        ask = federation.transport.ask

        def unheard(tasks: Mapping[str, Any], messages: Mapping[str, State]) -> Any:
            return (update for update in ask(tasks, messages) if tasks[update.site].round != 2 or update.site != "s2")

        federation.transport.ask = unheard

    with pytest.raises(RoundError, match=r"round 3: site 's2' arrives .*does not introduce itself"):
        simulate("fedavg", tmp_path, 4, schedule=LATE, before=deaf)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arrives": {"s1": 1}}, "arrives"),
        ({"arrives": {"s1": 21}}, r"\{s1: 21\}, and there are federation.rounds=20"),
        ({"arrives": {"s1": 4}, "leaves": {"s1": 4}}, "one round for 's1'"),
        ({"arrives": {"s1": 4}, "work_patience": 2}, "work_patience=2 compares .* take federation.work_patience=null"),
        ({"leaves": {"s1": 4}, "selection": "heterogeneity", "fraction": 0.5}, "take federation.selection=uniform"),
    ],
)
def test_arrivals_that_cannot_be_meant_are_refused(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arrives": {"s7": 4}}, "arrives names 's7', which is no site that trains; Known: s0, s1, s2"),
        ({"leaves": {"s0": 4, "s1": 4, "s2": 5}}, "no site take part in round 5"),
        ({"leaves": {"s0": 4}, "min_sites": 3}, "from round 4 on .*min_sites=3, but a round asks 2 of 2"),
        ({"arrives": {"s2": 4}}, "'s2' arrives later .*3 channels, .*have 1: .*take data.channels=1 or 3"),
    ],
)
def test_sites_that_cannot_come_or_leave_so_are_named(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_roster(Schedule(**settings), (), {"s0": 1, "s1": 1, "s2": 3}, "auto")


@pytest.mark.parametrize(("task", "first"), [(QueryTask("introduce", 3, 0), 4), (QueryTask("publish", 3, 0), 3)])
def test_a_newcomer_tells_of_the_images_that_are_there_in_its_first_round(task: QueryTask, first: int) -> None:
    asked: list[int] = []

    class Growing(ToySite):
        def at(self, round: int) -> Growing:
            asked.append(round)
            return self

    turn(build("fedavg"), Growing.make("s0", 0), task, State(), State(), CPU, lambda *_: None)
    assert asked == [first]


def test_a_method_whose_sites_learn_from_others_leaves_none_alone() -> None:
    fewest = build("feddg").fewest_sites
    check_roster(Schedule(leaves={"s0": 4}), (), dict.fromkeys(("s0", "s1", "s2"), 1), "auto", fewest)
    with pytest.raises(ValueError, match="in round 4 there would be 1 of 2 sites, and the method needs 2"):
        check_roster(Schedule(leaves={"s0": 4}), (), {"s0": 1, "s1": 1}, "auto", fewest)


@pytest.mark.parametrize(
    ("name", "training", "words"),
    [
        ("lcfed", Training(), "the codes cannot grow"),
        ("fedsm", Training(), "its selector tells the sites apart"),
        ("fedavg", Training(harmonise="combat"), "combat adjusts the images"),
        ("pooled", Training(), "in one place that holds all data"),
        ("local", None, ""),
        ("fedavg", Training(harmonise="histogram"), ""),
        ("feddg", None, ""),
    ],
)
def test_a_method_that_has_no_place_for_newcomers_says_so(name: str, training: Training | None, words: str) -> None:
    method = build(name, training)
    if not words:
        check_newcomers(Schedule(**LATE), method)
        return
    with pytest.raises(ValueError, match=words):
        check_newcomers(Schedule(**LATE), method)


def test_a_method_of_ones_own_that_asks_sites_before_round_1_must_say_what_becomes_of_newcomers() -> None:
    from fedseg.algorithms.fedavg import FedAvg

    class Asking(FedAvg):
        def introduce(self, site: Any) -> State:
            return State({"told": {"size": torch.tensor(float(site.examples))}})

    class Open(Asking):
        @property
        def founders_only(self) -> str:
            return super().founders_only

        def introduce(self, site: Any) -> State:
            return super().introduce(site)

    template = build("fedavg")
    assert "agreed on then" in Asking(template.model, template.recipe).founders_only
    assert "agreed on then" in Open(template.model, template.recipe).founders_only  # what it asks with does not say


def test_the_style_that_was_agreed_on_stays_and_newcomers_take_it(tmp_path: Path) -> None:
    training = Training(lr=1e-2, harmonise="zscore", normalize="none")
    late = simulate("fedavg", tmp_path / "late", 3, schedule=LATE, training=training)
    never = simulate("fedavg", tmp_path / "never", 1, training=training, sites=without("s2"))
    assert_same(State({"style": late.server["style/target"]}), State({"style": never.server["style/target"]}))
    assert POOL not in late.kept


def phantom(**settings: Any) -> PhantomDataModule:
    small = {"n_sites": 2, "cases_per_site": 12, "amount": 0, "size": 32, "resolution": 32, "batch_size": 2}
    made = PhantomDataModule(**{**small, **settings})
    made.setup()
    return made


@pytest.fixture(scope="module")
def whole() -> PhantomDataModule:
    return phantom()


def taught(site: SiteData) -> set[str]:
    return {case for batch in site.plain_batches() for case in batch["case"]}


def test_training_patients_come_with_their_rounds_and_never_cut(whole: PhantomDataModule) -> None:
    data = phantom(anatomy="organ", slices=3, arrives={"site_01": {3: 0.4, 5: 0.3}})
    site = data.site("site_01")
    grown = [site.at(round) for round in (0, 1, 2, 3, 4, 5, 9)]
    assert [one.patients for one in grown] == [2, 2, 2, 5, 5, 7, 7]
    assert [one.examples for one in grown] == [6, 6, 6, 15, 15, 21, 21]  # all slices of a patient together
    assert taught(grown[0]) < taught(grown[3]) < taught(grown[5])
    assert site.at(5) is site
    assert data.site("site_02").at(1) is data.site("site_02")
    assert data.pooled().at(3).examples == 15 + data.site("site_02").examples
    assert [len(one.cases("val")) for one in grown] == [len(site.cases("val"))] * 7


def test_who_comes_later_depends_on_nothing_but_the_site(whole: PhantomDataModule) -> None:
    later = {"site_01": {2: 0.5}}
    one, other = phantom(arrives=later), phantom(n_sites=1, arrives=later)
    assert taught(one.site("site_01").at(1)) == taught(other.site("site_01").at(1))
    assert one.splits() == whole.splits()
    batches = [next(iter(data.site("site_01").at(2).train_batches(3, 1)))["image"] for data in (one, whole)]
    assert torch.equal(*batches)


def test_a_site_that_is_left_out_is_as_if_it_were_not_there(whole: PhantomDataModule) -> None:
    left = phantom(n_sites=3, left_out=["site_03"])
    assert left.splits() == whole.splits()
    assert left.fingerprints() == whole.fingerprints()
    assert (left.sites, left.unseen_sites) == (whole.sites, ())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"left_out": ["site_9"]}, "left_out: no site 'site_9'.*where its data are gone, take it out"),
        ({"left_out": ["site_01", "site_02"]}, "leaves out every site; take one out of it"),
        ({"arrives": {"site_01": {1: 0.5}}}, "name rounds from 2 on, not 1"),
        ({"arrives": {"site_01": {2: 0.5, 3: 0.5}}}, "sum to less than 1"),
        ({"arrives": {"site_01": {2: 0.01}}}, r"0.01 of \d training patients .*is nobody; take a larger share"),
        ({"arrives": {"site_01": {2: 0.99}}}, "no labelled one is there from the start; take smaller shares"),
        ({"arrives": {"site_9": {2: 0.5}}}, "arrives: no site 'site_9'"),
        ({"arrives": {"site_01": {2: 0.5}}, "unseen": ["site_01"]}, "an unseen site never trains"),
    ],
)
def test_data_that_cannot_come_so_are_refused(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        phantom(**settings)


def test_data_after_the_last_round_are_refused_before_any_is_read() -> None:
    settings = ["data=phantom", "federation.rounds=3", "data.arrives={site_01: {4: 0.5}}"]
    with pytest.raises(ConfigError, match=r"arrives=.*4: 0.5.* there are federation.rounds=3"):
        Experiment(compose(settings, SCHEMA)).check()
