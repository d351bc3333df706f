"""The round loop: who is asked, what is averaged, what is written down, what is refused."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from fedseg.algorithms.recipe import Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.checkpoint import Checkpoint, CheckpointError
from fedseg.federation.client import Compute, turn
from fedseg.federation.contract import Batch, Cohort, EvaluateTask, Scored, Site, Task, TrainTask, Transform
from fedseg.federation.engine import POOL, Federation, RoundError, selection_scores
from fedseg.federation.schedule import Schedule, round_half_up
from fedseg.federation.state import Mean, State, Update
from fedseg.federation.transport import InProcess
from tests.world import CPU, Outcome, Quiet, ToySite, assert_same, build, evaluate, simulate, toy_sites

SEED = 7  # of the federations that `simulate` runs


class Echo:
    """A transport without training: sites answer with how many steps they were asked to do."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Task]] = []

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for site, task in tasks.items():
            self.asked.append((site, task))
            tensors = {g: {k: torch.ones_like(t) for k, t in ts.items()} for g, ts in messages[site].tensors.items()}
            trains = isinstance(task, TrainTask)
            scalars = {"seconds": 0.0, "steps": float(task.steps or 0) if trains else 0.0}
            yield Update(tensors if trains else {}, scalars, site=site, examples=1)

    def kept(self) -> Mapping[str, State]:
        return {}

    def restore(self, kept: Mapping[str, State]) -> None: ...


def federation(folder: Path, sites: int = 6, seed: int = SEED, name: str = "fedavg", **schedule: Any) -> Federation:
    names = [f"s{i}" for i in range(sites)]
    return Federation(
        build(name), Echo(), names, Schedule(**schedule), seed=seed, checkpoint=Checkpoint(folder), observer=Quiet()
    )


def rows(federation: Federation, table: str) -> list[dict[str, Any]]:
    observer: Any = federation.observer
    return observer.rows(table)


# ------------------------------------------------------------------------------------------------------ sampling


def test_a_fraction_of_the_sites_is_asked_in_their_order_and_anew_each_round(tmp_path: Path) -> None:
    one, same = federation(tmp_path, fraction=0.5), federation(tmp_path, fraction=0.5)
    drawn = [one.sample(round) for round in range(1, 21)]
    assert drawn == [same.sample(round) for round in range(1, 21)]
    assert all(len(present) == 3 and not absent for present, absent in drawn)
    assert all(present == sorted(present) for present, _ in drawn)
    assert len({tuple(present) for present, _ in drawn}) > 5
    assert {site for present, _ in drawn for site in present} == set(one.sites)
    other = federation(tmp_path, seed=8, fraction=0.5)
    assert drawn != [other.sample(round) for round in range(1, 21)]


@pytest.mark.parametrize(("fraction", "asked"), [(1.0, 6), (0.75, 5), (0.5, 3), (0.25, 2), (0.01, 1)])
def test_how_many_sites_a_fraction_is(tmp_path: Path, fraction: float, asked: int) -> None:
    assert len(federation(tmp_path, fraction=fraction).sample(1)[0]) == asked


def test_halves_go_up() -> None:
    assert [round_half_up(value) for value in (0.4, 0.5, 1.5, 2.5, 2.49)] == [0, 1, 2, 3, 2]


def test_absent_sites_were_asked_and_are_about_as_many_as_the_probability_says(tmp_path: Path) -> None:
    house = federation(tmp_path, sites=10, fraction=0.8, dropout=0.25)
    drawn = [house.sample(round) for round in range(1, 201)]
    assert all(len(present) + len(absent) == 8 and not set(present) & set(absent) for present, absent in drawn)
    share = sum(len(absent) for _, absent in drawn) / (8 * 200)
    assert 0.2 < share < 0.3


def test_absence_is_recorded_and_the_absent_do_not_train(tmp_path: Path) -> None:
    house = federation(tmp_path, rounds=8, dropout=0.4)
    house.run()
    events = rows(house, "events")
    assert {event["event"] for event in events} == {"absent"}
    for round in range(1, 9):
        present, absent = house.sample(round)
        assert [e["site"] for e in events if e["round"] == round] == absent
        assert [r["site"] for r in rows(house, "rounds") if r["round"] == round] == present
        trained = [s for s, task in house.transport.asked if task.kind == "train" and task.round == round]  # type: ignore[attr-defined]
        assert trained == present


def test_a_round_with_too_few_sites_is_skipped_and_said_so(tmp_path: Path) -> None:
    house = federation(tmp_path, rounds=12, dropout=0.5, min_sites=4)
    start = house.algorithm.init_server({})
    server = house.run()
    skipped = [event["round"] for event in rows(house, "events") if event["event"] == "skipped"]
    assert skipped == [round for round in range(1, 13) if len(house.sample(round)[0]) < 4]
    assert 0 < len(skipped) < 12
    assert not {row["round"] for row in rows(house, "rounds")} & set(skipped)
    details = [event["detail"] for event in rows(house, "events") if event["event"] == "skipped"]
    assert all("of 6 sites present, 4 needed" in detail for detail in details)
    moved = {k: torch.full_like(t, 12.0 - len(skipped)) for k, t in start["model"].items()}  # one a round
    for name, tensor in server["model"].items():
        torch.testing.assert_close(tensor - start["model"][name], moved[name])
    assert house.checkpoint.round == 12


def test_more_sites_needed_than_asked_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_sites=4, but a round asks 3 of 6 sites .*fraction=0\.5"):
        federation(tmp_path, fraction=0.5, min_sites=4)
    federation(tmp_path, fraction=0.5, min_sites=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0),
        ("local_steps", 0),
        ("local_epochs", 0.0),
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("min_sites", 0),
        ("work_spread", 1.0),
        ("work_decay", 0.0),
        ("work_decay", 1.1),
        ("work_decay_rounds", 0),
        ("server_lr", 0.0),
        ("server_lr", math.nan),
        ("evaluate_every", 0),
        ("checkpoint_every", 0),
    ],
)
def test_a_schedule_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"federation.{name}={value}"):
        Schedule(**{name: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ amount of work


def test_unequal_work_is_a_share_of_the_steps_drawn_anew_for_every_site_and_round(tmp_path: Path) -> None:
    house = federation(tmp_path, rounds=5, work_spread=0.6, local_steps=100)
    house.run()
    shares = {(site, t.round): t.work for site, t in house.transport.asked if t.kind == "train"}  # type: ignore[attr-defined]
    assert len(set(shares.values())) == len(shares) == 30
    assert all(0.4 <= share <= 1 for share in shares.values())
    assert min(shares.values()) < 0.55
    assert max(shares.values()) > 0.85
    again = federation(tmp_path / "again", work_spread=0.6, local_steps=100)
    assert all(again._task(round, site).work == share for (site, round), share in shares.items())


def test_steps_done_are_the_share_of_the_steps(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, schedule={"local_steps": 6, "work_spread": 0.9})
    for row in outcome.observer.rows("rounds"):
        share = outcome.federation._task(row["round"], row["site"]).work
        assert row["steps"] == max(1, round(6 * share))


@pytest.mark.slow
def test_local_work_falls_over_rounds_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    falling = {"local_steps": 8, "work_decay": 0.5, "work_decay_rounds": 2}
    whole = simulate("fedavg", tmp_path / "whole", rounds=5, schedule=falling)
    steps = {(row["round"], row["site"]): row["steps"] for row in whole.observer.rows("rounds")}
    assert [{steps[round, site] for site in ("s0", "s1", "s2")} for round in range(1, 6)] == [{8}, {4}, {2}, {2}, {2}]
    simulate("fedavg", tmp_path / "stopped", rounds=2, schedule=falling)
    assert_same(whole.server, simulate("fedavg", tmp_path / "stopped", rounds=5, schedule=falling).server)
    constant = simulate("fedavg", tmp_path / "constant", rounds=2, schedule={"local_steps": 8})
    usual = simulate("fedavg", tmp_path / "usual", rounds=2, schedule={"local_steps": 8, "work_decay": 1.0})
    assert_same(constant.server, usual.server)


@pytest.mark.parametrize(
    ("knobs", "shares"),
    [
        ({}, [1, 0.5, 0.25, 0.125, 0.125, 0.125]),
        ({"work_every": 2}, [1, 1, 0.5, 0.5, 0.5, 0.5]),
        ({"work_every": 3}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ({"work_every": 2, "work_decay_rounds": 4}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_local_work_falls_every_so_many_rounds(knobs: dict[str, Any], shares: list[float]) -> None:
    schedule = Schedule(**{"work_decay": 0.5, "work_decay_rounds": 3, **knobs})
    assert [schedule.work_in(round) for round in range(1, 7)] == shares


@pytest.mark.parametrize(
    ("knobs", "told", "cure"),
    [
        ({"work_every": 5}, "it never does; take federation.work_decay=0.5", {"work_decay": 0.5}),
        ({"work_decay_rounds": 3}, "it never does; take federation.work_decay=0.5", {"work_decay": 0.5}),
        ({"work_decay_rounds": 3}, r"or federation\.work_decay_rounds=10", {"work_decay_rounds": 10}),
        ({"work_every": 12, "work_decay": 0.5}, "take federation.work_decay_rounds=12", {"work_decay_rounds": 12}),
    ],
)
def test_work_that_would_never_fall_is_refused_and_the_cure_helps(
    knobs: dict[str, Any], told: str, cure: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=told):
        Schedule(**knobs)
    Schedule(**{**knobs, **cure})


def test_epochs_count_batches_of_each_site(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=1, schedule={"local_steps": None, "local_epochs": 1.5})
    steps = {row["site"]: row["steps"] for row in outcome.observer.rows("rounds")}
    assert steps == {"s0": 3, "s1": 5, "s2": 6}  # 4, 6 and 8 images by two, one and a half times
    examples = {row["site"]: row["examples"] for row in outcome.observer.rows("rounds")}
    assert examples == {"s0": 4, "s1": 6, "s2": 8}


def test_pooled_training_does_the_steps_of_all_sites_on_all_images(tmp_path: Path) -> None:
    outcome = simulate("pooled", tmp_path, rounds=1, schedule={"local_steps": 2, "min_sites": 3})
    (row,) = outcome.observer.rows("rounds")
    assert (row["site"], row["steps"], row["examples"]) == (POOL, 6, 18)
    sites = toy_sites()
    message = build("pooled").init_server({})
    task = TrainTask(1, SEED, steps=6)
    update, _ = turn(build("pooled"), sites[POOL], task, message, State(), CPU, evaluate)
    for name, tensor in outcome.server["model"].items():
        torch.testing.assert_close(tensor, message["model"][name] + update["model"][name])


# ------------------------------------------------------------------------------------------------------ aggregation


class Recording(InProcess):
    """Remembers what came back from training."""

    updates: list[Update]

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        self.updates = []
        for update in super().ask(tasks, messages):
            if tasks[update.site].kind == "train":
                self.updates.append(replace(update, scalars=dict(update.scalars)))
                self.trained = self.updates
            yield update


@pytest.mark.parametrize(("weighting", "weights"), [("examples", [4, 6, 8]), ("uniform", [1, 1, 1])])
def test_the_server_moves_by_the_weighted_mean(tmp_path: Path, weighting: str, weights: list[int]) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=1, transport=Recording, weighting=weighting)
    updates = outcome.federation.transport.trained  # type: ignore[attr-defined]
    start = build("fedavg").init_server({})
    for group in ("model", "buffers"):
        for name, tensor in outcome.server[group].items():
            step = sum(w * u[group][name].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
            torch.testing.assert_close(tensor.double(), start[group][name] + step, rtol=1e-5, atol=1e-6)


def test_server_step_scales_parameters_and_leaves_statistics_alone(tmp_path: Path) -> None:
    start = build("fedavg").init_server({})
    full = simulate("fedavg", tmp_path / "full", rounds=1).server
    half = simulate("fedavg", tmp_path / "half", rounds=1, schedule={"server_lr": 0.5}).server
    for name, tensor in half["model"].items():
        torch.testing.assert_close(tensor, start["model"][name] + 0.5 * (full["model"][name] - start["model"][name]))
    assert not torch.equal(half["model"]["segmentation_head.0.weight"], full["model"]["segmentation_head.0.weight"])
    assert_same(State({"buffers": half["buffers"]}), State({"buffers": full["buffers"]}))


PARAMETERS, NORM, HEAD, STATISTICS = 286, 16, 10, 16  # numbers of TinyNet's floats


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("fedavg", {"model": PARAMETERS, "buffers": STATISTICS}),
        ("ditto", {"model": PARAMETERS, "buffers": STATISTICS}),
        ("fedbn", {"model": PARAMETERS - NORM}),
        ("silobn", {"model": PARAMETERS}),
        ("fedper", {"model": PARAMETERS - HEAD, "buffers": STATISTICS}),
        ("local", {}),
    ],
)
def test_traffic_is_four_bytes_a_shared_number_down_and_up(
    tmp_path: Path, name: str, groups: Mapping[str, int]
) -> None:
    outcome = simulate(name, tmp_path, schedule={"local_steps": 1})
    found = {
        (row["round"], row["site"], row["direction"], row["group"]): row["bytes"]
        for row in outcome.observer.rows("traffic")
    }
    assert found == {
        (round, site, direction, group): 4 * count
        for round in (1, 2)
        for site in ("s0", "s1", "s2")
        for direction in ("down", "up")
        for group, count in groups.items()
    }


def test_one_site_alone_can_run(tmp_path: Path) -> None:
    sites = {name: site for name, site in toy_sites(1).items() if name != POOL}
    outcome = simulate("fedavg", tmp_path, sites=sites)
    assert [row["site"] for row in outcome.observer.rows("rounds")] == ["s0", "s0"]


def unlabelled(name: str, index: int) -> ToySite:
    site = ToySite.make(name, index)
    return replace(site, images=site.images[:0], masks=site.masks[:0])


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_site_without_labelled_images_has_no_say(tmp_path: Path, weighting: str) -> None:
    sites = {name: site for name, site in toy_sites().items() if name != POOL}
    alone = simulate("fedavg", tmp_path / "alone", sites=sites, weighting=weighting)
    joined = simulate("fedavg", tmp_path / "joined", sites={"a": unlabelled("a", 0), **sites}, weighting=weighting)
    assert_same(joined.server, alone.server)
    row = joined.observer.rows("rounds")[0]
    assert (row["site"], row["steps"], row["examples"], row["loss"]) == ("a", 0, 0, None)


@pytest.mark.parametrize("name", ["fedavg", "local", "pooled", "fedbn", "finetune", "apfl"])
def test_a_round_in_which_nobody_has_labels_changes_nothing(tmp_path: Path, name: str) -> None:
    empty = {site: unlabelled(site, i) for i, site in enumerate(("a", "b", POOL))}
    outcome = simulate(name, tmp_path, rounds=1, sites=empty)
    assert_same(outcome.server, build(name).init_server({}))
    (event,) = (row for row in outcome.observer.rows("events") if row["event"] == "skipped")
    assert "labelled" in event["detail"]


# ------------------------------------------------------------------------------------------------------ broken updates


@dataclass
class BrokenInRound(ToySite):
    """A site whose images turn into NaN in one round."""

    broken: int = 0

    def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
        batches = super().train_batches(seed, steps)
        if seed == derive_seed(SEED, "batches", self.broken, self.name):
            batches[-1]["image"] = torch.full_like(batches[-1]["image"], torch.nan)
        return batches


def broken_in(round: int, *names: str) -> dict[str, Site]:
    return {
        name: BrokenInRound(**vars(site), broken=round) if name in names else site for name, site in toy_sites().items()
    }


class Deaf(InProcess):
    """In round 2 the answer of s1 gets lost."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        heard = {site: t for site, t in tasks.items() if (site, t.kind, t.round) != ("s1", "train", 2)}
        yield from super().ask(heard, messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fedbn", "ditto", "apfl"])
def test_a_broken_update_is_refused_named_and_the_round_goes_on_without_it(tmp_path: Path, name: str) -> None:
    broken = simulate(name, tmp_path / "broken", rounds=2, sites=broken_in(2, "s1"))
    (event,) = broken.observer.rows("events")
    assert (event["round"], event["site"], event["event"]) == (2, "s1", "refused")
    assert "not finite" in event["detail"]
    assert [row["site"] for row in broken.observer.rows("rounds") if row["round"] == 2] == ["s0", "s2"]
    sent = {row["site"] for row in broken.observer.rows("traffic") if (row["round"], row["direction"]) == (2, "up")}
    assert sent == {"s0", "s2"}
    deaf = simulate(name, tmp_path / "deaf", rounds=2, transport=Deaf)
    assert_same(broken.server, deaf.server)
    before = simulate(name, tmp_path / "before", rounds=1)
    for site in broken.kept:
        assert_same(broken.kept[site], deaf.kept[site])
    assert_same(broken.kept["s1"], before.kept["s1"])


def test_a_site_broken_from_the_start_keeps_nothing_and_may_recover(tmp_path: Path) -> None:
    outcome = simulate("fedbn", tmp_path, rounds=2, sites=broken_in(1, "s1"))
    assert [event["round"] for event in outcome.observer.rows("events")] == [1]
    assert not outcome.kept["s1"].non_finite()
    assert [row["site"] for row in outcome.observer.rows("rounds") if row["round"] == 2] == ["s0", "s1", "s2"]


def test_too_few_usable_updates_end_the_run_and_name_the_sites(tmp_path: Path) -> None:
    with pytest.raises(RoundError, match=r"(?s)round 2: 1 usable updates.*min_sites=2 needed.*s0: .*; s1: ") as caught:
        simulate("fedavg", tmp_path, sites=broken_in(2, "s0", "s1"), schedule={"min_sites": 2})
    assert "s2" not in str(caught.value)
    assert "not finite" in str(caught.value)
    assert Checkpoint(tmp_path).round == 1


def test_when_every_site_breaks_the_record_still_says_who(tmp_path: Path) -> None:
    observer: list[Quiet] = []
    with pytest.raises(RoundError, match="round 1: 0 usable updates"):
        simulate(
            "fedavg",
            tmp_path,
            sites=broken_in(1, "s0", "s1", "s2"),
            before=lambda federation: observer.append(federation.observer),
        )
    assert [event["site"] for event in observer[0].rows("events")] == ["s0", "s1", "s2"]


def test_an_exploding_fine_tuning_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    @dataclass
    class Fragile(ToySite):
        def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
            batches = super().train_batches(seed, steps)
            if seed == derive_seed(SEED, "personalise", 1, self.name):
                batches[0]["image"] = torch.full_like(batches[0]["image"], torch.nan)
            return batches

    def strict(algorithm: Any, site: ToySite, task: EvaluateTask) -> Scored:
        scores = evaluate(algorithm, site, task)
        if any(math.isnan(score) for score in scores.means.values()):
            raise ValueError("probabilities are not finite")
        return scores

    def be_strict(federation: Any) -> None:
        federation.transport = federation.transport.scored_by(strict)

    sites = {**toy_sites(), "s1": Fragile(**vars(ToySite.make("s1", 1, count=6)))}
    outcome = simulate("finetune", tmp_path, rounds=2, sites=sites, finetune_steps=2, before=be_strict)
    (event,) = outcome.observer.rows("events")
    assert (event["round"], event["site"], event["event"]) == (1, "s1", "refused")
    assert not outcome.kept["s1"].non_finite()


def test_an_error_at_a_site_says_where_and_when(tmp_path: Path) -> None:
    class Unreadable(ToySite):
        def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
            raise OSError("disk on fire")

    sites = {**toy_sites(), "s1": Unreadable(**vars(ToySite.make("s1", 1)))}
    with pytest.raises(OSError, match=r"site 's1', task train, round 1.*disk on fire"):
        simulate("fedavg", tmp_path, sites=sites)


def test_an_interrupt_during_training_reaches_the_caller(tmp_path: Path) -> None:
    class Impatient(ToySite):
        def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
            class Interrupted(list[Batch]):
                def __iter__(self) -> Iterator[Batch]:
                    raise KeyboardInterrupt

            return Interrupted(super().train_batches(seed, steps))

    handler = signal.getsignal(signal.SIGINT)
    sites = {**toy_sites(), "s1": Impatient(**vars(ToySite.make("s1", 1)))}
    with pytest.raises(KeyboardInterrupt):
        simulate("fedavg", tmp_path, sites=sites)
    assert signal.getsignal(signal.SIGINT) is handler


# ------------------------------------------------------------------------------------------------------ transforms


@dataclass
class Step(Transform):
    """Computes something on the way out and undoes it on the way back."""

    name: str
    log: list[str]
    out: Any
    back: Any
    seeds: list[int] = field(default_factory=list)
    hides_updates: bool = False

    def check(self, algorithm: Any) -> None:
        self.log.append(f"{self.name} checks")

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        self.log.append(f"{self.name} {update.site}")
        self.seeds.append(seed)
        tensors = {k: self.out(t) for k, t in update["model"].items()}
        return replace(update, tensors={**update.tensors, "model": tensors}), memory

    def on_server(self, mean: State, cohort: Cohort, memory: State, seed: int) -> tuple[State, State]:
        self.log.append(f"{self.name} back {cohort.usable}")
        self.seeds.append(seed)
        model = {k: self.back(t) for k, t in mean["model"].items()}
        return State({**mean.tensors, "model": model}, mean.scalars), memory


def test_transforms_run_in_order_on_the_way_out_and_in_reverse_on_the_way_back(tmp_path: Path) -> None:
    log: list[str] = []
    double = Step("double", log, lambda t: t * 2, lambda t: t / 2)
    shift = Step("shift", log, lambda t: t + 1, lambda t: t - 1)
    outcome = simulate("fedavg", tmp_path / "a", rounds=1, transforms=(double, shift))
    assert log[:2] == ["double checks", "shift checks"]
    assert log[2:] == [f"{name} {s}" for s in ("s0", "s1", "s2") for name in ("double", "shift")] + [
        "shift back 3",
        "double back 3",
    ]
    plain = simulate("fedavg", tmp_path / "b", rounds=1)
    for name, tensor in plain.server["model"].items():
        torch.testing.assert_close(outcome.server["model"][name], tensor, rtol=1e-5, atol=1e-5)
    seeds = double.seeds + shift.seeds
    assert len(set(seeds)) == len(seeds) == 8


def test_what_is_counted_is_what_travels(tmp_path: Path) -> None:
    class Halve(Step):
        def on_arrival(self, update: Update) -> Update:
            model = {k: t.float() for k, t in update["model"].items()}
            return replace(update, tensors={**update.tensors, "model": model})

    halve = Halve("halve", [], lambda t: t.half(), lambda t: t)
    outcome = simulate("fedavg", tmp_path, rounds=1, transforms=(halve,))
    sizes = {(r["direction"], r["group"]): r["bytes"] for r in outcome.observer.rows("traffic")}
    assert sizes["up", "model"] == 2 * PARAMETERS
    assert sizes["down", "model"] == 4 * PARAMETERS


def test_a_transform_refuses_a_method_before_anything_runs(tmp_path: Path) -> None:
    class NoPersonal(Step):
        def check(self, algorithm: Any) -> None:
            raise ValueError("this method cannot be masked")

    untouched = Echo()
    with pytest.raises(ValueError, match="cannot be masked"):
        Federation(
            build("fedavg"),
            untouched,
            ["s0"],
            Schedule(),
            0,
            Checkpoint(tmp_path),
            Quiet(),
            [NoPersonal("x", [], None, None)],
        )
    assert not untouched.asked


# ------------------------------------------------------------------------------------------------------ checkpoints


def state(value: float) -> State:
    return State({"model": {"w": torch.tensor([value])}})


def value(state: State) -> float:
    return float(state["model"]["w"])


def test_best_is_the_highest_score_and_keeps_its_state(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for round, (shared, own) in enumerate([(0.2, 0.9), (0.8, 0.1), (0.8, math.nan), (0.5, 0.3)], 1):
        checkpoint.save(round, state(round), {"a": state(10 * round)}, {"global": shared, "personal/a": own})
    again = Checkpoint(tmp_path)
    best = again.best()
    assert (best["global"].round, best["global"].score) == (2, 0.8)  # the first of equals
    assert (best["personal/a"].round, best["personal/a"].score) == (1, 0.9)
    assert value(again.read(best["global"].server)) == 2
    assert (value(again.read(best["personal/a"].server)), value(again.read(best["personal/a"].kept))) == (1, 10)
    assert best["global"].kept == ""
    last = again.load()
    assert last is not None
    assert (last.round, value(last.server), value(last.kept["a"])) == (4, 4, 40)


def test_nan_never_wins_and_always_yields(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for round, score in enumerate([math.nan, 0.1, math.nan], 1):
        checkpoint.save(round, state(round), {}, {"global": score})
    assert (Checkpoint(tmp_path).best()["global"].round, Checkpoint(tmp_path).best()["global"].score) == (2, 0.1)


def test_only_named_state_files_stay_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "my-copy.safetensors").write_bytes(b"mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".server-00001.safetensors.part").write_bytes(b"half a file")
    for round, score in enumerate([0.5, 0.1, 0.2], 1):
        checkpoint.save(round, state(round), {"a": state(round), "b": state(0)}, {"global": score})
    files = {path.name for path in tmp_path.iterdir()}
    index = json.loads((tmp_path / "index.json").read_text())
    assert files == {
        "index.json",
        "my-copy.safetensors",
        "notes",
        "server-00001.safetensors",
        "server-00003.safetensors",
        *index["kept"].values(),
    }
    assert set(index["kept"]) == {"a", "b"}


def test_an_unchanged_site_is_not_written_again_even_after_loading(tmp_path: Path) -> None:
    checkpoint, unchanged = Checkpoint(tmp_path), state(1)
    checkpoint.save(1, state(1), {"a": unchanged, "b": state(1)}, {})
    checkpoint.save(2, state(2), {"a": unchanged, "b": state(2)}, {})
    assert "00001" in checkpoint.index["kept"]["a"]
    assert "00002" in checkpoint.index["kept"]["b"]
    again = Checkpoint(tmp_path)
    snapshot = again.load()
    assert snapshot is not None
    again.save(3, state(3), snapshot.kept, {})
    assert "00001" in again.index["kept"]["a"]


def test_sites_with_awkward_names_have_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a b", "..", "ä", "x" * 300, "", "server-00001"]
    Checkpoint(tmp_path).save(1, state(0), {name: state(i) for i, name in enumerate(names)}, {})
    snapshot = Checkpoint(tmp_path).load()
    assert snapshot is not None
    assert {name: value(kept) for name, kept in snapshot.kept.items()} == {n: float(i) for i, n in enumerate(names)}
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"round": 1}', '{"round": "1", "server": "", "kept": {}}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint(tmp_path)


def test_a_damaged_or_missing_state_file_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(1, state(1), {}, {})
    file = tmp_path / "server-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match=r"server-00001\.safetensors is damaged"):
        Checkpoint(tmp_path).load()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"server-00001\.safetensors is missing, although .*index\.json names it"):
        Checkpoint(tmp_path).load()


def test_a_kill_between_state_files_and_index_leaves_the_round_before(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(1, state(1), {"a": state(1)}, {"global": 0.5})
    write = Checkpoint._write
    for stop_at in range(3):
        written: list[str] = []

        def killed(self: Checkpoint, name: str, data: bytes, limit: int = stop_at, seen: list[str] = written) -> None:
            if len(seen) == limit:
                (self.folder / f".{name}.part").write_bytes(data[: len(data) // 2])
                raise KeyboardInterrupt
            seen.append(name)
            write(self, name, data)

        monkeypatch.setattr(Checkpoint, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(tmp_path).save(2, state(2), {"a": state(2)}, {"global": 0.9})
        snapshot = Checkpoint(tmp_path).load()
        assert snapshot is not None
        assert (snapshot.round, value(snapshot.server), value(snapshot.kept["a"])) == (1, 1, 1)
        assert Checkpoint(tmp_path).best()["global"].round == 1
    monkeypatch.setattr(Checkpoint, "_write", write)
    Checkpoint(tmp_path).save(2, state(2), {"a": state(2)}, {"global": 0.9})
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert len(list(tmp_path.iterdir())) == 3


def test_selection_is_the_mean_over_sites_and_each_sites_own() -> None:
    found = {
        "a": {"val/global/dice": 0.2, "val/personal/dice": 0.9, "test/global/dice": 1.0},
        "b": {"val/global/dice": 0.6, "val/global/iou": 0.0},
        "c": {"seconds": 1.0},
    }
    assert selection_scores(found, "abc", "dice") == {"global": 0.4, "personal/a": 0.9}
    assert selection_scores({"a": {"seconds": 1.0}}, "a", "dice") == {}


def test_a_round_in_which_a_site_could_not_be_scored_has_no_global_score() -> None:
    found = {"a": {"val/global/dice": 0.9, "val/personal/dice": 0.7}}
    assert selection_scores(found, "ab", "dice") == {"personal/a": 0.7}


def best_rounds(outcome: Outcome) -> dict[str, int]:
    return {name: best.round for name, best in outcome.federation.checkpoint.best().items()}


def test_the_engine_notes_the_best_round_of_every_model(tmp_path: Path) -> None:
    history: list[tuple[int, str, float]] = []

    def note(federation: Any) -> None:
        inner = federation.observer.site_done

        def site_done(task: str, round: int, site: str, scalars: Mapping[str, float], seconds: float) -> None:
            if task == "evaluate":
                history.extend((round, f"{site}:{k}", v) for k, v in scalars.items())
            inner(task, round, site, scalars, seconds)

        federation.observer.site_done = site_done

    outcome = simulate("ditto", tmp_path, rounds=4, before=note)
    mean = {r: [v for q, k, v in history if q == r and k.endswith("val/global/dice")] for r in range(1, 5)}
    own = {r: next(v for q, k, v in history if q == r and k == "s1:val/personal/dice") for r in range(1, 5)}
    found = best_rounds(outcome)
    assert set(found) == {"global", "personal/s0", "personal/s1", "personal/s2"}
    assert found["global"] == max(mean, key=lambda r: sum(mean[r]))
    assert found["personal/s1"] == max(own, key=lambda r: own[r])


@pytest.mark.slow
def test_seldom_evaluated_and_seldom_saved_runs_end_evaluated_and_saved(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=5, schedule={"evaluate_every": 3, "checkpoint_every": 2})
    assert outcome.federation.checkpoint.round == 5
    assert set(best_rounds(outcome).values()) == {5}  # the one round that was both scored and saved
    simple = simulate("fedavg", tmp_path / "simple", rounds=5)
    assert_same(outcome.server, simple.server)


def test_gpu_without_a_gpu_and_senseless_compute_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu"):
        Compute(accelerator="gpu")
    assert Compute().device.type == "cpu"
    with pytest.raises(ValueError, match=r"trainer\.threads=0"):
        Compute(threads=0)
    with pytest.raises(ValueError, match=r"trainer\.gradient_clip=-1"):
        Compute(gradient_clip=-1)


def test_a_clipped_gradient_is_clipped(tmp_path: Path) -> None:
    sites, message = toy_sites(), build("fedavg").init_server({})
    task = TrainTask(1, SEED, steps=1)
    worker = build("fedavg", Training(optimizer="sgd", lr=1.0))
    update, _ = turn(worker, sites["s0"], task, message, State(), Compute("cpu", gradient_clip=1e-3), evaluate)
    norm = math.sqrt(sum(float(t.double().pow(2).sum()) for t in update["model"].values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_mean_of_the_federation_is_streamed_in_the_order_of_sites(tmp_path: Path, monkeypatch: Any) -> None:
    order: list[str] = []
    add = Mean.add
    monkeypatch.setattr(
        Mean, "add", lambda self, update, weight: (order.append(update.site), add(self, update, weight))
    )
    simulate("fedavg", tmp_path, rounds=1)
    assert order == ["s0", "s1", "s2"]


def test_what_a_site_keeps_no_more_does_not_stay_in_memory(tmp_path: Path) -> None:
    checkpoint, kept = Checkpoint(tmp_path), {"a": State({"w": {"w": torch.ones(3)}})}
    checkpoint.save(1, State(), kept, {})
    old = ref(kept.pop("a"))
    assert old() is None
    again = {"a": State({"w": {"w": torch.zeros(3)}})}
    checkpoint.save(2, State(), again, {})
    before = {path.name for path in tmp_path.iterdir()}
    checkpoint.save(3, State(), again, {})  # the same object: not written again
    assert {name for name in before if name.startswith("site-a")} <= {path.name for path in tmp_path.iterdir()}
