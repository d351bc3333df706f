"""Secure aggregation in whole runs: the sum is that of a plain run, and the server never gets a single update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedseg.federation.contract import Task, Transform
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.records import Answer, Question, unpack
from fedseg.federation.state import State, Update
from fedseg.federation.transport import InProcess
from fedseg.privacy.build import build_transforms
from fedseg.privacy.masked import GROUP, KEYS, ROW, SEALED, SHARES, Masked, threshold
from fedseg.privacy.masks import Party
from fedseg.privacy.payload import as_tensor
from fedseg.privacy.settings import Compression, Privacy
from tests.flower_world import LoopbackGrid, federate
from tests.world import Outcome, assert_same, build, simulate, toy_sites

FIVE = {"sites": toy_sites(5)}


def masked(**privacy: Any) -> tuple[Transform, ...]:
    return build_transforms(Privacy(aggregation="masked", **privacy), Compression(), 1.0)


def assert_close(one: Outcome, two: Outcome) -> None:
    for group, tensors in one.server.tensors.items():
        for name, t in tensors.items():
            torch.testing.assert_close(two.server[group][name], t, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedbn", "fedrep", "ditto", "apfl", "finetune"])
def test_a_masked_run_ends_where_the_plain_one_does(name: str, tmp_path: Path) -> None:
    """Sites weigh differently here; a round costs 2^-28 per number, which Adam blows up in the rounds after it."""
    plain = simulate(name, tmp_path / "a", rounds=1, **FIVE)
    hidden = simulate(name, tmp_path / "b", rounds=1, transforms=masked(), **FIVE)
    assert_close(plain, hidden)
    assert not hidden.observer.rows("events")


@pytest.mark.slow
def test_a_masked_run_repeats_bit_for_bit_although_its_masks_do_not(tmp_path: Path) -> None:
    once, twice = (simulate("fedavg", tmp_path / n, transforms=masked(), **FIVE) for n in "ab")
    assert_same(once.server, twice.server)


@pytest.mark.slow
def test_over_messages_the_server_gets_keys_noise_and_shares_only(tmp_path: Path) -> None:
    """Server and sites share no object; every answer that reached the server is opened and looked at."""
    answers: list[tuple[Task | None, State]] = []

    def watch(grid: LoopbackGrid, nodes: dict[str, int]) -> None:
        push = grid.push_messages

        def pushed(messages: Any) -> Any:
            messages = list(messages)
            numbers = push(messages)
            for number in numbers:
                question, _ = unpack(Envelope.from_records(messages[0].content), Question)
                _, state = unpack(Envelope.from_records(grid.replies[number].content), Answer)
                answers.append((question.task, state))
            return numbers

        grid.push_messages = pushed  # type: ignore[method-assign]

    settings: Any = {"rounds": 2, "sites": toy_sites(4), "transforms": masked()}
    here = simulate("fedavg", tmp_path / "here", **settings)
    there = federate("fedavg", tmp_path / "there", site_transforms=masked, before=watch, **settings)
    assert_same(here.server, there.server)
    groups = {(task.kind, group) for task, state in answers if task is not None for group in state.tensors}
    assert groups == {("consult", KEYS), ("consult", SEALED), ("consult", SHARES), ("train", GROUP)}
    rows = [state[GROUP][ROW].numpy() for task, state in answers if task is not None and task.kind == "train"]
    assert len(rows) == 8
    counts = np.bincount(np.concatenate(rows).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * (2 * 255) ** 0.5
    told = {name for task, state in answers if task is not None and task.kind == "train" for name in state.scalars}
    assert told == {"steps", "seconds"}
    audit = there.observer.rows("audit")
    assert {(row["task"], row["group"]) for row in audit if row["group"][0] != "("} == groups


@pytest.mark.slow
@pytest.mark.parametrize(
    ("privacy", "compression"),
    [
        ({}, {"cast": "float16"}),
        ({}, {"cast": "bfloat16", "top_k": 0.3}),
        ({"mechanism": "site", "noise": 0.5}, {}),
        ({"mechanism": "site", "noise": 0.5, "aggregation": "masked"}, {}),
        ({"mechanism": "sparse", "epsilon_round": 50.0}, {"cast": "float16"}),
    ],
)
def test_transforms_do_the_same_across_messages(
    privacy: dict[str, Any], compression: dict[str, Any], tmp_path: Path
) -> None:
    def chain() -> tuple[Transform, ...]:
        return build_transforms(Privacy(**privacy), Compression(**compression), 1.0)

    settings: Any = {"rounds": 3, "transforms": chain()}
    here = simulate("ditto", tmp_path / "a", **settings)
    there = federate("ditto", tmp_path / "b", site_transforms=chain, **settings)
    assert_same(here.server, there.server)
    for site, kept in there.kept.items():
        assert_same(here.kept[site], kept)
    for table in ("traffic", "privacy"):
        assert here.observer.rows(table) == there.observer.rows(table)


# ---------------------------------------------------------------- sites that fall silent, and sites that lie


Change = Callable[[str, Update], Update]


def changing(topic: str, sites: Mapping[str, Change], round: int = 1) -> type[InProcess]:
    """A way on which answers of some sites to one question are changed; the training task is the topic ``train``."""

    class Changed(InProcess):
        def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Any:
            for update in super().ask(tasks, messages):
                task = tasks[update.site]
                about = task.topic.partition("/")[2] if task.kind == "consult" else task.kind
                meant = about == topic and task.round == round and update.site in sites
                yield sites[update.site](update.site, update) if meant else update

    return Changed


def silent(site: str, update: Update) -> Update:
    return Update(site=site, examples=0, refusal="silence")


def without(group: str, name: str, value: torch.Tensor) -> Change:
    return lambda site, update: Update(tensors={group: {**update.get(group), name: value}}, site=site, examples=4)


@pytest.mark.parametrize("topic", ["keys", "shares", "train", "reveal"])
def test_a_site_that_falls_silent_is_missing_from_the_sum_or_has_its_part_in_it(topic: str, tmp_path: Path) -> None:
    outcome = simulate(
        "fedavg", tmp_path / "a", rounds=1, transforms=masked(), transport=changing(topic, {"s1": silent}), **FIVE
    )
    there = "train" if topic == "reveal" else "s1"  # after its row has arrived, it counts
    way = InProcess if there == "train" else changing("train", {"s1": silent})
    expected = simulate("fedavg", tmp_path / "b", rounds=1, transport=way, **FIVE)
    assert_close(expected, outcome)
    (event,) = (row for row in outcome.observer.rows("events") if row["event"] == "refused")
    assert (event["site"], event["detail"]) == ("s1", "silence")


@pytest.mark.slow
@pytest.mark.parametrize("topic", ["keys", "shares", "train", "reveal"])
def test_too_few_sites_open_nothing_and_the_run_goes_on_from_its_checkpoint(topic: str, tmp_path: Path) -> None:
    some = dict.fromkeys(("s1", "s2", "s3"), silent)
    with pytest.raises(RoundError, match=r"round 2: .*(3 needed by masked|unmask)"):
        simulate("fedavg", tmp_path, rounds=3, transforms=masked(), transport=changing(topic, some, round=2), **FIVE)
    again = simulate("fedavg", tmp_path, rounds=3, transforms=masked(), **FIVE)
    assert_same(again.server, simulate("fedavg", tmp_path / "whole", rounds=3, transforms=masked(), **FIVE).server)


@pytest.mark.parametrize(
    ("topic", "change", "reason"),
    [
        ("keys", without(KEYS, "pair", torch.zeros(8, dtype=torch.uint8)), "sent no public keys"),
        ("keys", without(KEYS, "pair", torch.zeros(8)), "no bytes"),
        ("shares", without(SEALED, "stranger", torch.zeros(8, dtype=torch.uint8)), "did not seal a share for every"),
        ("train", without(GROUP, ROW, torch.zeros(3, dtype=torch.int64)), "did not send one row of"),
        ("train", without("model", "w", torch.zeros(3)), "did not send one row of"),
        ("reveal", without(SHARES, "s0", torch.zeros(3)), "no bytes"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_and_the_others_go_on(
    topic: str, change: Change, reason: str, tmp_path: Path
) -> None:
    def lie(site: str, update: Update) -> Update:
        changed = change(site, update)
        changed.scalars = {"steps": 1.0, "seconds": 0.0}
        if topic == "keys":
            changed.tensors[KEYS] = {**update[KEYS], **changed[KEYS]}
        return changed

    outcome = simulate(
        "fedavg", tmp_path, rounds=1, transforms=masked(), transport=changing(topic, {"s1": lie}), **FIVE
    )
    (event,) = outcome.observer.rows("events")
    assert event["site"] == "s1"
    assert reason in event["detail"]


def test_a_peer_that_reveals_wrong_shares_ends_the_round_instead_of_spoiling_the_model(tmp_path: Path) -> None:
    def lie(site: str, update: Update) -> Update:
        wrong = {name: share.flip(0) for name, share in update[SHARES].items()}
        return Update(tensors={SHARES: wrong}, site=site, examples=0)

    with pytest.raises(RoundError, match="some peer sent a wrong one"):
        simulate("fedavg", tmp_path, rounds=1, transforms=masked(), transport=changing("reveal", {"s0": lie}), **FIVE)


# ---------------------------------------------------------------- a server that asks for more than its due


def hello(sites: int = 4) -> State:
    return State(scalars={"sites": float(sites)})


def book(keys: Mapping[str, State]) -> State:
    return State({field: {site: k[KEYS][field] for site, k in keys.items()} for field in ("pair", "seal", "own")})


def ready() -> tuple[Masked, dict[str, State]]:
    """Four sites that have passed their shares around, and the mail for each."""
    site_side = Masked()
    keys = {site: site_side.consulted(site, "keys", hello()) for site in "abcd"}
    sealed = {site: site_side.consulted(site, "shares", book(keys))[SEALED] for site in "abcd"}
    return site_side, {s: State({SEALED: {p: sealed[p][s] for p in "abcd" if p != s}}) for s in "abcd"}


def trained(site: str) -> Update:
    return Update({"model": {"w": torch.ones(4)}}, {"steps": 1.0, "seconds": 0.1}, site=site, examples=3)


def test_a_site_masks_one_row_and_reveals_once() -> None:
    side, mail = ready()
    side.consulted("a", "train", mail["a"])
    sent, _ = side.on_client(trained("a"), State(), 0)
    assert not sent.refusal
    side.consulted("a", "train", mail["a"])
    again, _ = side.on_client(trained("a"), State(), 0)
    assert "has masked a row already" in again.refusal
    fates = State(scalars={"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0})
    side.consulted("a", "reveal", fates)
    with pytest.raises(ValueError, match="already"):
        side.consulted("a", "reveal", fates)


def test_a_site_does_not_unmask_for_others_than_those_it_masked_with() -> None:
    side, mail = ready()
    side.consulted("a", "train", mail["a"])
    side.on_client(trained("a"), State(), 0)
    for fates in ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}):
        with pytest.raises(ValueError, match="unmasks no sum"):
            side.consulted("a", "reveal", State(scalars=fates))


def test_more_sites_than_were_announced_and_too_few_peers_are_refused() -> None:
    side = Masked()
    keys = {site: side.consulted(site, "keys", hello(3)) for site in "abcdef"}
    with pytest.raises(ValueError, match="more than were announced"):
        side.consulted("a", "shares", book(keys))
    side, mail = ready()
    side.consulted("a", "train", State({SEALED: {"b": mail["a"][SEALED]["b"]}}))
    assert "shares of 1 peers came" in side.on_client(trained("a"), State(), 0)[0].refusal


def test_what_comes_without_keys_of_this_round_is_refused() -> None:
    with pytest.raises(ValueError, match="no keys of this round"):
        Masked().consulted("a", "shares", State())
    assert "no shares of this round" in Masked().on_client(trained("a"), State(), 0)[0].refusal
    with pytest.raises(ValueError, match="no bytes"):
        ready()[0].consulted("a", "shares", State({"pair": {"a": as_tensor(b"x")}, "seal": {}, "own": {}}))


def test_more_than_half_of_the_sites_open_a_secret_and_one_may_always_drop_out() -> None:
    assert [threshold(sites) for sites in range(3, 11)] == [2, 3, 3, 4, 4, 5, 5, 6]
    assert Party("a", threshold(4)).threshold == 3


# ---------------------------------------------------------------- refused before anything runs


def test_what_masks_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take algorithm\.weighting=examples"):
        Masked().check(build("fedavg", weighting="uniform"))
    with pytest.raises(ValueError, match=r"before round 1 \(introduces\)"):
        Masked().check(build("feddg"))
    with pytest.raises(ValueError, match="masked adds up whole updates; it cannot go with compression"):
        build_transforms(Privacy(aggregation="masked"), Compression(cast="float16"), 1.0)
    with pytest.raises(ValueError, match="masked needs 3 sites in a round, 2 take part"):
        simulate("fedavg", tmp_path, transforms=masked(), sites=toy_sites(2))
