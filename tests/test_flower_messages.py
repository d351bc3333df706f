"""Every method through Flower's own messages, and what becomes of answers that are none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.algorithms import ALGORITHMS
from fedseg.datamodules.errors import DataError
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.contract import EvaluateTask, MessageError, QueryTask, TrainTask
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.held import Held, spared, without
from fedseg.federation.flower.kept import Kept
from fedseg.federation.flower.records import Answer, Question, pack, unpack
from fedseg.federation.ledger import digests
from fedseg.federation.state import State
from tests.flower_world import RUN, LoopbackGrid, app_of, federate, through_bytes
from tests.tiers import every
from tests.world import assert_same, assert_same_outcome, simulate

ACROSS = [name for name, method in ALGORITHMS.items() if method.trains_on == "sites"]


@pytest.mark.slow
@pytest.mark.parametrize("name", every(ACROSS, ["scaffold", "lcfed", "feddg", "iopfl", "contrastive"]))
def test_every_method_ends_with_the_same_tensors_as_in_process(name: str, tmp_path: Path) -> None:
    here, there = simulate(name, tmp_path / "a", rounds=3), federate(name, tmp_path / "b", rounds=3)
    here.kept = {site: here.kept.get(site, State()) for site in there.kept}
    assert_same_outcome(here, there)
    assert not there.observer.rows("events")
    for table in ("traffic", "rounds"):
        one, two = (outcome.observer.rows(table) for outcome in (here, there))
        assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ditto", "finetune", "lcfed", "feddg"])
def test_a_server_that_starts_again_goes_on_with_what_sites_kept_then(name: str, tmp_path: Path) -> None:
    """The server forgets rounds 3 and 4, which the sites have already trained."""
    schedule = {"checkpoint_every": 2, "evaluate_every": 2, "fraction": 0.7}
    whole = simulate(name, tmp_path / "whole", rounds=5, schedule=schedule)

    def stop_after_round_3(grid: LoopbackGrid, nodes: dict[str, int]) -> None:
        push = grid.push_messages

        def push_until(messages: Any) -> Any:
            if any(message.metadata.group_id == "4" for message in messages):
                raise KeyboardInterrupt
            return push(messages)

        grid.push_messages = push_until  # type: ignore[method-assign]

    with pytest.raises(KeyboardInterrupt):
        federate(name, tmp_path / "b", rounds=5, schedule=schedule, before=stop_after_round_3)
    again = federate(name, tmp_path / "b", rounds=5, schedule=schedule)
    assert_same(whole.server, again.server)
    for site in again.kept:
        assert_same(whole.kept.get(site, State()), again.kept[site])


# ---------------------------------------------------------------- answers that are none

Lie = Callable[[SiteClient, Envelope], Envelope]


def when_it_trains(site: str, lie: Lie) -> Callable[[LoopbackGrid, dict[str, int]], None]:
    """Before the first round, put something in the place of a site's honest answers to training tasks."""

    def before(grid: LoopbackGrid, nodes: dict[str, int]) -> None:
        client = grid.clients[nodes[site]]

        def answer(envelope: Envelope) -> Envelope:
            question, _ = unpack(envelope, Question)
            trains = question.task is not None and question.task.kind == "train"
            return lie(client, envelope) if trains else client.answer(envelope)

        grid.apps[nodes[site]] = app_of(answer)

    return before


def altered(change: Callable[[Answer, State], tuple[Answer, State]]) -> Lie:
    """What the site signs is the lie."""
    return lambda site, envelope: site.signed(
        envelope.text, *unpack(envelope, Question), *change(*unpack(site.answer(envelope), Answer))
    )


def each_tensor(state: State, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    changed = {group: {name: change(t) for name, t in tensors.items()} for group, tensors in state.tensors.items()}
    return State(changed, state.scalars)


LIES: dict[str, tuple[Lie, str]] = {
    "no text of ours": (lambda site, envelope: Envelope("{}", b""), "the answer cannot be read (site)"),
    "no state": (lambda site, envelope: Envelope(site.answer(envelope).text, b"garbage"), "not a serialised state"),
    "another site's name": (altered(lambda answer, state: (replace(answer, site="s0"), state)), "another site's name"),
    "other shapes": (altered(lambda a, s: (a, each_tensor(s, lambda t: t.flatten()[:1]))), "the one it was sent is"),
    "other types": (altered(lambda a, s: (a, each_tensor(s, lambda t: t.double()))), "the one it was sent is"),
    "tensors missing": (altered(lambda answer, state: (answer, State({}, state.scalars))), "left out the group"),
    "numbers missing": (altered(lambda answer, state: (answer, State(state.tensors))), "it lacks steps"),
    "a word as number": (altered(lambda a, s: (a, State(s.tensors, {**s.scalars, "loss": "low"}))), "are not numbers"),  # type: ignore[dict-item]
    "not finite": (altered(lambda a, s: (a, each_tensor(s, lambda t: t * torch.nan))), "tensors are not finite"),
    "no signature": (lambda site, e: pack(*unpack(site.answer(e), Answer)), "not signed by the key that its name"),
    "a refusal": (altered(lambda answer, state: (replace(answer, refusal="no"), State())), "no"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_cannot_be_used_leaves_the_round_to_the_others(lie: str, tmp_path: Path) -> None:
    change, told = LIES[lie]
    outcome = federate("fedavg", tmp_path, rounds=1, before=when_it_trains("s2", change))
    events = outcome.observer.rows("events")
    assert [(event["site"], event["event"]) for event in events] == [("s2", "refused")]
    assert told in events[0]["detail"]
    assert [row["site"] for row in outcome.observer.rows("rounds")] == ["s0", "s1"]


def test_a_site_that_never_answers_is_left_out_after_the_timeout(tmp_path: Path) -> None:
    def silence(grid: LoopbackGrid, nodes: dict[str, int]) -> None:
        grid.silent.add(nodes["s1"])

    with pytest.raises(RoundError, match=r"site 's1' cannot introduce itself: it did not answer within 0.05 s"):
        federate("fedavg", tmp_path, before=silence, timeout=0.05)


def test_fewer_than_min_sites_end_the_run_and_name_the_reasons(tmp_path: Path) -> None:
    refuse = LIES["a refusal"][0]
    with pytest.raises(RoundError, match=r"2 usable updates, federation.min_sites=3 needed \(s2: no\)\. See to it"):
        federate("fedavg", tmp_path, schedule={"min_sites": 3}, before=when_it_trains("s2", refuse))


# ---------------------------------------------------------------- what a site holds already

Change = Callable[[SiteClient, dict[str, Any], Envelope], Envelope]


def before_round_2(site: str, change: Change) -> Callable[[LoopbackGrid, dict[str, int]], None]:
    """Let something answer for a site from its training in round 2 on; it sees the server's memory, too."""

    def before(grid: LoopbackGrid, nodes: dict[str, int]) -> None:
        client, memory = grid.clients[nodes[site]], {"changed": False, "way": grid.way}

        def answer(envelope: Envelope) -> Envelope:
            task = unpack(envelope, Question)[0].task
            if task is not None and (task.kind, task.round) == ("train", 2):
                return change(client, memory, envelope)
            return client.answer(envelope)

        grid.apps[nodes[site]] = app_of(answer)

    return before


def restarted(site: SiteClient, memory: dict[str, Any], envelope: Envelope) -> Envelope:
    if not memory["changed"]:
        memory["changed"], site._held = True, Held()
    return site.answer(envelope)


def damaged(site: SiteClient, memory: dict[str, Any], envelope: Envelope) -> Envelope:
    if not memory["changed"]:
        memory["changed"] = True
        next(iter(next(iter(site._held._groups.values())).values())).view(-1)[0] += 1.0
    return site.answer(envelope)


def travelled(outcome: Any) -> dict[tuple[str, str], list[tuple[bool, bool]]]:
    """Site and task -> of each message, whether it had tensors with it, and whether some were left out."""
    found: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    model = sum(outcome.server.sizes().values())
    for row in outcome.federation.transport.take_sent():
        found.setdefault((row["site"], row["task"]), []).append((row["bytes"] > model, row["held"] == model))
    return found


WHOLE, SPARED = (True, False), (False, True)


def test_what_a_site_was_sent_to_be_scored_does_not_travel_again_to_be_trained(tmp_path: Path) -> None:
    there = federate("fedavg", tmp_path / "there", rounds=3)
    assert_same(simulate("fedavg", tmp_path / "here", rounds=3).server, there.server)
    told = travelled(there)
    for site in ("s0", "s1", "s2"):
        assert told[site, "train"] == [WHOLE, SPARED, SPARED]
        assert told[site, "evaluate"] == [WHOLE, WHOLE, WHOLE]


@pytest.mark.parametrize("change", [restarted, damaged])
def test_a_site_that_lost_what_it_held_is_sent_everything_in_the_same_round(change: Change, tmp_path: Path) -> None:
    there = federate("fedavg", tmp_path / "there", rounds=3, before=before_round_2("s1", change))
    assert_same(simulate("fedavg", tmp_path / "here", rounds=3).server, there.server)
    assert not there.observer.rows("events")
    told = travelled(there)
    assert told["s1", "train"] == [WHOLE, SPARED, WHOLE, SPARED]
    assert told["s0", "train"] == [WHOLE, SPARED, SPARED]
    asked_again = [row for row in there.observer.rows("audit") if row["group"] == "(lacks)"]
    assert [(row["site"], row["task"], row["round"]) for row in asked_again] == [("s1", "train", 2)]
    assert 0 < asked_again[0]["bytes"] < 200


def test_a_site_that_says_twice_that_it_lacks_something_is_left_out(tmp_path: Path) -> None:
    def lacks(site: SiteClient, memory: dict[str, Any], envelope: Envelope) -> Envelope:
        return pack(Answer("s1", lacks=("model",)))

    there = federate("fedavg", tmp_path, rounds=2, before=before_round_2("s1", lacks))
    (event,) = there.observer.rows("events")
    assert (event["site"], event["event"]) == ("s1", "refused")
    assert "it says that it lacks tensors that it was sent" in event["detail"]
    assert travelled(there)["s1", "train"] == [WHOLE, SPARED, WHOLE]


def test_a_site_that_claims_to_hold_what_it_was_never_shown_is_sent_it(tmp_path: Path) -> None:
    coming = tuple(digests(State(simulate("fedavg", tmp_path / "here", rounds=1).server.tensors)).values())
    claims = altered(lambda answer, state: (replace(answer, holds=(*answer.holds, *coming)), state))
    told = travelled(federate("fedavg", tmp_path / "there", rounds=1, before=when_it_trains("s1", claims)))
    assert told["s1", "evaluate"] == [WHOLE]


def test_a_server_that_starts_again_sends_everything_once(tmp_path: Path) -> None:
    def forgets(site: SiteClient, memory: dict[str, Any], envelope: Envelope) -> Envelope:
        memory["way"]._holds.clear()  # s2 is asked after s1
        return site.answer(envelope)

    there = federate("fedavg", tmp_path / "there", rounds=3, before=before_round_2("s1", forgets))
    told = travelled(there)
    assert told["s2", "train"] == [WHOLE, WHOLE, SPARED]
    assert_same(simulate("fedavg", tmp_path / "here", rounds=3).server, there.server)


def test_a_site_holds_one_message_of_one_run_and_hands_it_to_no_other() -> None:
    one, two = (
        State({"model": {"w": torch.full((3,), n)}, "buffers": {"b": torch.ones(2)}}, {"x": n}) for n in (1.0, 2.0)
    )
    held, task = Held(), TrainTask(1, 0)
    assert held.take(Question("turn", RUN, "", task=task), one) == (one, ())
    assert held.digests == tuple(sorted(digests(State(one.tensors)).values()))
    missing = spared(two, digests(two), held.digests)
    assert [*missing] == ["buffers"]
    question = Question("turn", RUN, "", task=task, held=missing)
    message, lacks = held.take(question, without(two, missing))
    assert not lacks
    assert_same(message, two)
    assert [*message.tensors] == [*two.tensors]  # in their order
    assert held.take(Question("turn", RUN, "", task=QueryTask("consult", 1, 0)), one) == (one, ())  # nothing to hold
    assert held.digests == tuple(sorted(digests(State(two.tensors)).values()))
    other = replace(question, run="f" * 32, held=spared(two, digests(two), held.digests))
    assert held.take(other, without(two, other.held)) == (State(), ("buffers", "model"))
    twins = State({"one": {"w": torch.ones(3)}, "two": {"w": torch.ones(3)}})  # what is held once is known once
    held.take(Question("turn", RUN, "", task=task), twins)
    assert len(held.digests) == len(held.known) == 1
    assert not Held(holds=False).take(Question("turn", RUN, "", task=task), one)[1]
    with pytest.raises(MessageError, match=r"1 groups came along, or have no place"):
        held.take(question, two)
    with pytest.raises(MessageError, match=r"1 groups came along, or have no place"):
        held.take(question, State())


# ---------------------------------------------------------------- envelopes and what sites keep


@pytest.mark.slow
def test_a_large_block_with_equal_parts_arrives_as_it_was_sent(tmp_path: Path) -> None:
    LoopbackGrid({})
    state = State({"model": {"zeros": torch.zeros(6_000_000), "noise": torch.randn(3_000_000)}})
    message = Message(pack(Answer("s0"), state).to_records(), 7, "train")
    contents = get_all_nested_objects(message)
    read = Envelope.from_records(through_bytes(message).content)
    assert_same(unpack(read, Answer)[1], state)
    assert sum(len(part.deflate()) for part in contents.values()) < 0.8 * len(read.data)  # equal parts once


def test_envelopes_of_others_are_not_read() -> None:
    for records in (
        RecordDict(),
        RecordDict({"text": ConfigRecord({"text": 1.0})}),
        RecordDict({"text": ConfigRecord({"text": "{}"}), "more": ConfigRecord({})}),
        RecordDict({"text": ConfigRecord({"text": "{}"}), "data": ArrayRecord({"data": Array(np.zeros(3))})}),
    ):
        with pytest.raises(ValueError, match="a message"):
            Envelope.from_records(records)


def test_a_turn_asked_again_starts_from_what_was_kept_before_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    first, second, third = (State({"own": {"x": torch.tensor([float(n)])}}) for n in (1, 2, 3))
    kept.keep(TrainTask(1, 0), first)
    kept.keep(EvaluateTask(1, 0), second)
    kept.keep(TrainTask(2, 0), third)
    assert not kept.before(TrainTask(1, 0)).tensors
    assert_same(kept.before(EvaluateTask(1, 0)), first)
    assert_same(kept.before(TrainTask(2, 0)), second)
    assert_same(kept.before(EvaluateTask(2, 0, checkpoint="last")), third)
    assert_same(kept.before(QueryTask("publish", 2, 0), base=1), second)
    kept.forget({2})
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("kept-00002-0-")


def test_what_a_site_kept_is_never_taken_for_something_else(tmp_path: Path) -> None:
    kept, task = Kept(tmp_path), TrainTask(1, 0)
    kept.keep(task, State({"own": {"x": torch.tensor([1.0, 2.0])}}))
    (tmp_path / ".kept-00001-0.safetensors.part").write_bytes(b"half")
    kept.keep(task, State({"own": {"x": torch.tensor([1.0, 3.0])}}))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged.*restore"):
            kept.before(TrainTask(2, 0))
    path.write_bytes(whole)
    old = path.rename(tmp_path / "kept-00001-0.safetensors")  # as earlier versions named it
    assert kept.before(TrainTask(2, 0))["own"]["x"].tolist() == [1.0, 3.0]
    kept.forget(set())
    assert old.exists()


def test_a_site_tells_the_server_no_file_and_no_patient(tmp_path: Path) -> None:
    def open_site(question: Question, folder: Path) -> Any:
        raise DataError("site 's0': image /data/s0/images/Miller_Anna.png has no mask")

    client = SiteClient("s0", tmp_path, open_site)
    answer, _ = unpack(client.answer(pack(Question("hello", RUN, ""))), Answer)
    assert answer.refusal == "an error (DataError); the site's log tells it"
    assert "Miller_Anna" in (tmp_path / "site.log").read_text()


@pytest.mark.parametrize("run", ["../../etc", "", "0" * 31, "x" * 32, "0" * 32 + "/.."])
def test_a_run_is_never_a_path(run: str, tmp_path: Path) -> None:
    client = SiteClient("s0", tmp_path / "state", lambda question, folder: pytest.fail("it was opened"))
    answer, _ = unpack(client.answer(pack(Question("hello", run, ""))), Answer)
    assert "the run's name is not one of ours" in answer.refusal


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"kind": "erase"}, "(task: no such kind)"),
        ({"kind": ["train"]}, "(task: no such kind)"),
        ({"splits": ["test"]}, "(task.train.splits: no such field)"),
        ({"kind": "evaluate"}, "(task.evaluate.steps: no such field, "),
        ({"kind": "publish"}, "(task.publish.steps: no such field, "),
        ({"a\nb" * 99: 1}, "(task.train." + r"a\nb" * 8 + ": no such field)"),
        ({"round": "1"}, "(task.train.round)"),
    ],
)
def test_a_task_that_is_none_of_ours_is_refused_and_the_server_is_told_why(
    said: dict[str, Any], told: str, tmp_path: Path
) -> None:
    text = json.loads(pack(Question("turn", RUN, "", task=TrainTask(1, 0))).text)
    client = SiteClient("s0", tmp_path / "state", lambda question, folder: pytest.fail("it was opened"))
    question = Envelope(json.dumps({**text, "task": {**text["task"], **said}}))
    answer, _ = unpack(client.answer(question), Answer)
    assert answer.refusal.startswith("the question cannot be read " + told)


@pytest.mark.parametrize(
    ("task", "own"),
    [
        (TrainTask(1, 7, steps=3, peers=("b",)), {"steps", "epochs", "work", "sites", "peers"}),
        (EvaluateTask(1, 7, ("val",)), {"splits", "checkpoint", "personalise", "adapt", "views", "topic"}),
        *((QueryTask(kind, 1, 7), {"checkpoint", "topic"}) for kind in ("introduce", "publish", "consult")),
    ],
)
def test_a_task_travels_with_its_own_fields_and_comes_back(task: Any, own: set[str]) -> None:
    question = Question("turn", RUN, "", task=task)
    assert json.loads(pack(question).text)["task"].keys() == {"kind", "round", "seed"} | own
    assert unpack(pack(question), Question)[0] == question


@pytest.mark.slow
@given(st.text(max_size=200) | st.from_type(dict[str, int | str | None]).map(json.dumps), st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_whatever_arrives_is_read_or_refused_by_a_value_error(text: str, data: bytes) -> None:
    for kind in (Question, Answer):
        with contextlib.suppress(ValueError):
            unpack(Envelope(text, data), kind)
