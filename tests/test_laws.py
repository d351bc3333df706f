"""The laws of the house, over every entry of the table of methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.algorithms import ALGORITHMS
from fedseg.federation.client import Compute, Images, turn
from fedseg.federation.contract import EvaluateTask, QueryTask, Task, TrainTask
from fedseg.federation.state import State, Update, from_bytes, to_bytes
from fedseg.federation.transport import InProcess
from fedseg.models.select import statistics
from tests.formulas import expected, symbols
from tests.tiers import STANDING, every
from tests.world import (
    CPU,
    Forgetful,
    Outcome,
    ToySite,
    assert_same,
    assert_same_outcome,
    build,
    evaluate,
    simulate,
    toy_sites,
)

METHODS = [name if name in STANDING else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
"""Most laws of every method are part of the suite; those of few are quick."""
TO_ADAPT: Mapping[str, Mapping[str, Any]] = {"fedsm": {"gamma": 0.0}}
"""Settings with which two short rounds are enough for an adapted model to be another than the global one."""
every_method = pytest.mark.parametrize("name", METHODS)
standing_methods = pytest.mark.parametrize("name", every(ALGORITHMS))
Plain = Callable[[str], Outcome]


TOYS = {
    **{"sites": 3, "regions": 2, "images": 6, "others": 4 + 8, "shown": 3 * 2, "newer": 2},
    **{"public": 10 * 12 * 12, "window": 1},
}
"""What the formulas of bytes (`tests/formulas.py`) ask of two rounds of toy sites, of the second one."""


def moved(outcome: Outcome, site: str) -> dict[str, int]:
    """Bytes that a site sent in the first round, received in the second, keeps, and told before."""
    found = {"kept": sum(outcome.kept.get(site, State()).sizes().values())}
    for what, round, direction in (("up", 1, "up"), ("down", 2, "down"), ("told", 0, "up")):
        traffic = [row for record in outcome.observer.records if record.round == round for row in record.traffic]
        found[what] = sum(row["bytes"] for row in traffic if (row["site"], row["direction"]) == (site, direction))
    return found


class Recording(InProcess):
    """Remembers what travelled."""

    travelled: list[tuple[str, State, Update]]

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for update in super().ask(tasks, messages):
            site = update.site
            self.__dict__.setdefault("travelled", []).append((site, messages[site], update))
            yield update


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Two rounds of a method, recorded; made once, to be read only."""
    return functools.cache(lambda name: simulate(name, tmp_path_factory.mktemp(name), transport=Recording))


@pytest.mark.slow
@every_method
def test_contract_two_rounds_run_every_number_is_finite_and_every_byte_foreseen(name: str, plain: Plain) -> None:
    outcome = plain(name)
    assert moved(outcome, "s1") == expected(name, symbols(build("fedavg").model, **TOYS))
    assert not outcome.server.non_finite()
    assert not any(state.non_finite() for state in outcome.kept.values())
    losses = [row["loss"] for row in outcome.observer.rows("rounds") if row["task"] == "train"]
    assert len(losses) == 2 * (1 if outcome.federation.algorithm.trains_on == "pool" else len(outcome.federation.sites))
    assert all(0 < loss < 100 for loss in losses)


@pytest.mark.slow
@standing_methods
def test_amnesia_a_worker_rebuilt_for_every_turn_learns_the_same(name: str, plain: Plain, tmp_path: Path) -> None:
    assert_same_outcome(plain(name), simulate(name, tmp_path, transport=Forgetful))


class ForgetfulServer:
    """A server half that is built anew for every hook that is asked of it."""

    def __init__(self, name: str) -> None:
        self._method = name

    def __getattr__(self, hook: str) -> object:
        return getattr(build(self._method, rounds=2), hook)


@pytest.mark.slow
@standing_methods
def test_amnesia_what_a_server_hook_learns_is_in_the_state_it_returns(name: str, plain: Plain, tmp_path: Path) -> None:
    def forget(federation: Any) -> None:
        federation.algorithm = ForgetfulServer(name)

    assert_same_outcome(plain(name), simulate(name, tmp_path, before=forget))


@pytest.mark.slow
@every_method
def test_resume_equals_never_having_stopped(name: str, plain: Plain, tmp_path: Path) -> None:
    simulate(name, tmp_path, rounds=2, schedule={"rounds": 1})
    assert_same_outcome(plain(name), simulate(name, tmp_path, rounds=2))


class Wire(InProcess):
    """Sends everything through bytes, what is kept included."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        read = {site: from_bytes(to_bytes(message)) for site, message in messages.items()}
        self._kept = {site: from_bytes(to_bytes(state)) for site, state in self._kept.items()}
        for update in super().ask(tasks, read):
            back = from_bytes(to_bytes(update))
            yield Update(back.tensors, back.scalars, site=update.site, examples=update.examples, refusal=update.refusal)


class Silent(InProcess):
    """One site tells none of the numbers of its method."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for update in super().ask(tasks, messages):
            if update.site == "s1" and tasks[update.site].kind == "train":
                update.scalars = {"steps": update.scalars["steps"]}
            yield update


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "knobs"),
    every([*((name, {}) for name in ALGORITHMS), ("contrastive", {"weighting": "similarity"})], at=0),
)
def test_a_site_that_tells_no_number_is_refused_or_does_without(
    name: str, knobs: Mapping[str, Any], tmp_path: Path
) -> None:
    outcome = simulate(name, tmp_path, transport=Silent, **knobs)
    assert not outcome.server.non_finite()
    needed = build(name, rounds=2, **knobs).needed_numbers
    refused = [row["detail"] for row in outcome.observer.rows("events") if row["event"] == "refused"]
    assert len(refused) == (2 if needed else 0)
    assert all("left out its number" in reason for reason in refused)


@pytest.mark.slow
@standing_methods
def test_wire_through_bytes_equals_in_process(name: str, plain: Plain, tmp_path: Path) -> None:
    assert_same_outcome(plain(name), simulate(name, tmp_path, transport=Wire))


@pytest.mark.slow
@every_method
def test_secrecy_nothing_that_is_kept_travels(name: str, plain: Plain) -> None:
    """Personal tensors travel only in groups that the method declares `per_site`; what hangs on it never does."""
    outcome = plain(name)
    parts, shown = build(name).parts, build(name).per_site
    kept = {
        group: [t for state in outcome.kept.values() for t in state.get(group).values()] for group in ("model", "own")
    }
    for group, tensors in kept.items():
        # a gradient of a bias before batch normalisation is rounding, and two of them may be the same by chance
        kept[group] = [t for t in tensors if t.is_floating_point() and t.numel() > 1 and t.std() > 1e-6]
    way = outcome.federation.transport
    assert isinstance(way, Recording)
    # what a site keeps as it came from the server is no secret: a step may leave a tensor of a second model as it was
    came = [t for _, message, _ in way.travelled for t in message.get("model").values()]
    kept["own"] = [s for s in kept["own"] if not any(s.shape == t.shape and torch.equal(s, t) for t in came)]
    for _, message, update in way.travelled:
        for state in (message, update):
            assert not set(state.get("model")) & set(parts.stays)
            assert not set(state.get("buffers")) & set(parts.stays)
            for group, tensors in state.tensors.items():
                secrets = kept["own"] if group.partition("/")[0] in shown else kept["own"] + kept["model"]
                assert not any(t.shape == s.shape and torch.equal(t, s) for t in tensors.values() for s in secrets)


@every_method
def test_completeness_what_is_not_personal_travels_statistics_included(name: str) -> None:
    algorithm = build(name)
    floats = {k for k, t in algorithm.model.state_dict().items() if t.is_floating_point()}
    sites = toy_sites()
    introduce = QueryTask("introduce", 0, 0)
    introductions = {k: turn(build(name), s, introduce, State(), State(), CPU, evaluate)[0] for k, s in sites.items()}
    server = algorithm.init_server(introductions)
    travels = {*server.get("model"), *server.get("buffers")}
    assert travels == floats - algorithm.personal(algorithm.model)
    message = algorithm.broadcast(server, "s0", TrainTask(1, 0, steps=2))
    update, _ = turn(build(name), sites["s0"], TrainTask(1, 0, steps=2), message, State(), CPU, evaluate)
    assert {*update.get("model"), *update.get("buffers")} == travels


@pytest.mark.slow
@standing_methods
def test_poison_the_server_never_reads_its_modules_weights(name: str, plain: Plain, tmp_path: Path) -> None:
    def poison(federation: object) -> None:
        server = federation.algorithm  # type: ignore[attr-defined]
        original = server.init_server

        def init_then_poison(introductions: Mapping[str, State]) -> State:
            state = original(introductions)
            with torch.no_grad():
                for tensor in server.state_dict().values():
                    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
            return state

        server.init_server = init_then_poison

    assert_same_outcome(plain(name), simulate(name, tmp_path, before=poison))


@every_method
def test_purity_predicting_changes_nothing(name: str, plain: Plain) -> None:
    outcome = plain(name)
    federation, sites = outcome.federation, toy_sites()
    worker = build(name)
    message = federation.algorithm.broadcast(outcome.server, "s1", EvaluateTask(2, 7))
    worker.receive(message, outcome.kept.get("s1", State()), sites["s1"])
    before = {key: tensor.clone() for key, tensor in worker.state_dict().items()}
    for view in worker.views:
        first = worker.predict(sites["s1"].images, view)
        alone = torch.cat([worker.predict(image[None], view) for image in sites["s1"].images])
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
        assert ((first >= 0) & (first <= 1)).all()
    worker.probe(sites["s1"], "val")
    assert all(torch.equal(tensor, before[key]) for key, tensor in worker.state_dict().items())
    assert all(module.training for module in worker.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in ALGORITHMS.items() if method.adapts])
def test_purity_adapting_changes_neither_the_site_nor_what_was_published(name: str, tmp_path: Path) -> None:
    outcome = simulate(name, tmp_path)
    federation, site = outcome.federation, replace(toy_sites()["s1"], seen=False)
    message = federation.algorithm.broadcast(outcome.server, "out", EvaluateTask(2, 7, adapt=True))
    message = State({**message.tensors, **federation.publish(2).tensors}, message.scalars)
    before = message.clone()
    worker = build(name, **TO_ADAPT.get(name, {}))
    worker.receive(message, State(), site)
    state = {key: tensor.clone() for key, tensor in worker.state_dict().items()}
    learning = [parameter.requires_grad for parameter in worker.parameters()]
    shared = worker.predict(site.images, "global")
    worker.adapt(Images(site, "test"))
    assert not torch.equal(worker.predict(site.images, "adapted"), shared)
    assert torch.equal(worker.predict(site.images, "global"), shared)
    assert all(torch.equal(tensor, state[key]) for key, tensor in worker.state_dict().items())
    assert [parameter.requires_grad for parameter in worker.parameters()] == learning
    assert all(parameter.grad is None for parameter in worker.parameters())
    assert all(module.training for module in worker.modules())
    assert_same(message, before)


def half_annotated(seed: int, told: bool = True) -> dict[str, ToySite]:
    """Sites of which some pixels and one region at one site count nowhere; labels there are drawn from the seed."""
    sites = toy_sites()
    for name, site in sites.items():
        generator = torch.Generator().manual_seed(5)
        known = (torch.rand(site.masks.shape, generator=generator) < 0.7).float()
        known[0], known[1, :, 6:] = 0, 0
        if name == "s1":
            known[:, 1] = 0
        noise = torch.rand(site.masks.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        masks = torch.where(known > 0, site.masks, noise.float())
        sites[name] = replace(site, masks=masks, known=known if told else None)
    return sites


@pytest.mark.slow
@standing_methods
def test_ignorance_labels_of_ignored_pixels_change_nothing(name: str, tmp_path: Path) -> None:
    assert build(name).leaves_out_unknown
    once, again = (simulate(name, tmp_path / str(seed), 1, sites=half_annotated(seed)) for seed in (1, 2))
    assert not once.server.non_finite()
    assert_same_outcome(once, again)


@pytest.mark.slow
@standing_methods
def test_ignorance_the_same_labels_matter_where_they_are_not_ignored(name: str, tmp_path: Path) -> None:
    once, again = (simulate(name, tmp_path / str(seed), 1, sites=half_annotated(seed, told=False)) for seed in (1, 2))
    states = [
        [t for group in o.kept.values() for ts in group.tensors.values() for t in ts.values()] for o in (once, again)
    ]
    servers = [[t for ts in o.server.tensors.values() for t in ts.values()] for o in (once, again)]
    same = all(torch.equal(a, b) for pair in (states, servers) for a, b in zip(*pair, strict=True))
    assert same == (not build(name).labelled)


def with_compute(**choices: Any) -> Callable[[Any], None]:
    def change(federation: Any) -> None:
        federation.transport.compute = Compute("cpu", **choices)

    return change


@pytest.mark.slow
@standing_methods
def test_clipping_bounds_gradients_and_nothing_else(name: str, plain: Plain, tmp_path: Path) -> None:
    """A bound that no gradient meets changes no bit; one that all meet is felt, and nothing breaks."""
    loose = simulate(name, tmp_path / "loose", before=with_compute(gradient_clip=1e9))
    assert_same_outcome(plain(name), loose)
    tight = simulate(name, tmp_path / "tight", before=with_compute(gradient_clip=1e-3))
    assert not tight.server.non_finite()
    assert numbers(tight) != numbers(loose)


@pytest.mark.slow
@standing_methods
def test_mixed_precision_is_felt_and_breaks_nothing(name: str, plain: Plain, tmp_path: Path) -> None:
    mixed = simulate(name, tmp_path, before=with_compute(precision="bf16-mixed"))
    assert not mixed.server.non_finite()
    assert not any(state.non_finite() for state in mixed.kept.values())
    assert numbers(mixed) != numbers(plain(name))


def numbers(outcome: Outcome) -> list[float]:
    """What was learnt, at the server and at the sites, in sums."""
    states = [outcome.server, *outcome.kept.values()]
    return [float(t.double().sum()) for state in states for ts in state.tensors.values() for t in ts.values()]


@every_method
def test_views_are_declared_truthfully(name: str) -> None:
    algorithm = build(name)
    assert set(algorithm.views) <= {"global", "personal"}
    assert bool(algorithm.views) == algorithm.labelled
    has_personal_part = bool(algorithm.personal(algorithm.model))
    assert ("global" in algorithm.views) != has_personal_part
    assert ("global" in algorithm.unseen_views) != has_personal_part
    assert ("adapted" in algorithm.unseen_views) == algorithm.adapts
    all_but_statistics = algorithm.personal(algorithm.model) == statistics(algorithm.model)
    assert ("own-statistics" in algorithm.unseen_views) == all_but_statistics
    assert set(algorithm.unseen_views) <= {"global", "adapted", "own-statistics"}
    assert bool(algorithm.none_elsewhere) == (not algorithm.unseen_views and algorithm.labelled)
