"""max_epsilon of a site's terms holds over all of its runs: its own ledger counts what it released."""

from __future__ import annotations

import json
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.federation.contract import Guarantee
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.kept import Kept
from fedseg.federation.flower.records import Answer, Question, unpack
from fedseg.federation.state import State
from fedseg.launch.sites.spending import MOST_NAMED, Spending, Spent, released
from fedseg.privacy.accounting import Account, gaussian_event, pure_event
from fedseg.privacy.compression import TopK
from fedseg.reporting.folder import RunFolder
from tests.test_across import SITES, across, grid_of
from tests.test_terms import written

PRIVATE = (
    *("algorithm=fedavg", "model.norm=group", "privacy.mechanism=patient", "privacy.randomness=secret"),
    *("privacy.noise=8", "federation.local_steps=1"),
)
ONE = ("federation.rounds=1",)
MOST = 2.0


@dataclass
class World:
    """Sites of which the first has terms, and a first run of one round."""

    folder: Path
    grid: Any
    first: RunFolder

    @property
    def site(self) -> Path:
        return self.folder / "sites" / SITES[0]

    @property
    def ledger(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads((self.site / "spent.json").read_text())
        return found

    def terms(self, **terms: Any) -> None:
        written(self.folder / "terms.yaml", terms)

    def ask_again(self) -> tuple[Answer, State]:
        """The site's answer to the last training message, sent once more."""
        sent = [message for message in self.grid.sent if message.metadata.dst_node_id == 1]
        tasks = [unpack(Envelope.from_records(message.content), Question)[0].task for message in sent]
        trained = [message for message, task in zip(sent, tasks, strict=True) if task and task.kind == "train"]
        (number,) = self.grid.push_messages([Message(trained[-1].content, 1, "query")])
        (reply,) = self.grid.pull_messages([number])
        return unpack(Envelope.from_records(reply.content), Answer)

    def run(self, name: str, *more: str) -> RunFolder:
        return across(self.folder / name, *PRIVATE, *ONE, *more, grid=self.grid)


def run_id(run: RunFolder) -> str:
    return (run.path / "run-id.txt").read_text().strip()


def sites_in(folder: Path) -> Any:
    path = written(folder / "terms.yaml", {"max_epsilon": MOST})
    grid = grid_of(folder / "sites")
    grid.apps[1] = grid_of(folder / "sites", SITES[:1], terms_file=path).apps[1]
    return grid


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("beginning")
    grid = sites_in(folder)
    return World(folder, grid, across(folder / "first", *PRIVATE, *ONE, f"privacy.max_epsilon={MOST:g}", grid=grid))


@pytest.fixture
def world(beginning: World, tmp_path: Path) -> World:
    """The same, in a folder of the test's own."""
    shutil.copytree(beginning.folder, tmp_path, dirs_exist_ok=True)
    grid = sites_in(tmp_path)
    grid.sent = [*beginning.grid.sent]
    return World(tmp_path, grid, RunFolder(tmp_path / "first" / "across"))


# ----------------------------------------------------------------------------------------------------- the sum

EVENTS = st.dictionaries(
    st.sampled_from([gaussian_event(1.0, 0.1), gaussian_event(4.0, 1.0), pure_event(0.1), pure_event(1.0)]),
    st.integers(1, 30).map(float),
    min_size=1,
)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=3))
def test_runs_together_cost_as_much_as_one_run_of_all_their_events_and_never_more_than_their_sum(
    runs: list[Any],
) -> None:
    named = {f"run {number}": events for number, events in enumerate(runs)}
    found, account = Spent(named), Account(Guarantee("patient", 1e-5, None))
    joint = {event: sum(events.get(event, 0.0) for events in runs) for events in runs for event in events}
    assert found.epsilon == account.epsilon(joint)
    alone = [account.epsilon(events) for events in runs]
    assert max(alone) - 1e-9 <= found.epsilon <= sum(alone) + 1e-9


def test_the_costliest_runs_are_named() -> None:
    told = Spent({f"r{n}": {pure_event(0.1): float(n)} for n in range(1, MOST_NAMED + 3)}).told
    assert re.findall(r"run (r\d+)", told) == [f"r{n}" for n in range(MOST_NAMED + 2, 2, -1)]
    assert "and 2 more" in told


# ------------------------------------------------------------------------------------------------------ the runs


@pytest.mark.slow
def test_a_second_run_gets_what_the_first_left_and_the_cures_work(world: World) -> None:
    (first,) = world.ledger
    assert first == run_id(world.first)
    assert stat.S_IMODE((world.site / "spent.json").stat().st_mode) == 0o600
    with pytest.raises(RoundError, match=f"max_epsilon {MOST:g}, of which .* is spent") as error:
        world.run("second", f"privacy.max_epsilon={MOST:g}")
    assert f"run {first}: " in str(error.value)
    cure = re.search(r"privacy\.max_epsilon=\S+(?=, or less)", str(error.value))
    assert cure is not None
    world.run("second", cure[0])
    assert len(world.ledger) == 2
    world.terms(max_epsilon=3 * MOST)
    world.run("third", f"privacy.max_epsilon={MOST:g}")
    world.terms(max_epsilon=0.01)
    with pytest.raises(RoundError, match="nothing is left for any run; the site's people may raise max_epsilon"):
        world.run("fourth", "privacy.max_epsilon=0.01")


@pytest.mark.slow
def test_a_run_that_is_resumed_counts_once_and_a_turn_that_is_asked_again_as_often_as_it_is_answered(
    world: World,
) -> None:
    (before,) = world.ledger.values()
    across(world.folder / "first", "resume=true", "federation.rounds=2", grid=world.grid)
    (after,) = world.ledger.values()
    assert after == {event: 2 * count for event, count in before.items()}
    answer, _ = world.ask_again()
    assert not answer.refusal
    (again,) = world.ledger.values()
    assert again == {event: 3 * count for event, count in before.items()}


@pytest.mark.slow
def test_what_would_be_too_much_does_not_leave_and_does_not_count(world: World) -> None:
    """However often a server asks for one turn, and whatever it said of the budget."""
    for _ in range(40):
        counted = world.ledger
        answer, state = world.ask_again()
        if answer.refusal:
            break
    assert f"its terms (max_epsilon: {MOST:g}) let no more of it leave" in answer.refusal
    assert not state.tensors
    assert world.ledger == counted
    assert Spent(counted).epsilon <= MOST
    world.terms()  # none: the run's own limit holds all the same, although the account that the server picks is empty
    answer, state = world.ask_again()
    assert re.match(rf"epsilon 2\S* of {MOST} at delta 1e-05 .patient. is spent: .* by its own ledger", answer.refusal)
    assert not state.tensors
    assert world.ledger == counted


@pytest.mark.slow
def test_a_site_that_is_killed_after_its_ledger_was_written_has_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round something could leave that nobody counted."""
    (before,) = world.ledger.values()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            world.ask_again()
    (after,) = world.ledger.values()
    assert after == {event: 2 * count for event, count in before.items()}


@pytest.mark.exhaustive
def test_a_ledger_that_was_lost_is_made_again_from_what_the_site_kept(world: World) -> None:
    before = world.ledger
    (world.site / "spent.json").unlink()
    with pytest.raises(RoundError, match=f"of which .* is spent .run {run_id(world.first)}: "):
        world.run("second", f"privacy.max_epsilon={MOST:g}")
    world.run("second", "privacy.max_epsilon=1")
    assert {run: world.ledger[run] for run in before} == before
    assert len(world.ledger) == 2


@pytest.mark.slow
def test_a_ledger_that_is_damaged_stops_the_site_and_not_its_accounts(world: World) -> None:
    (world.site / "spent.json").write_text("{")
    with pytest.raises(RoundError, match="a file that it kept is damaged; the site's log names it"):
        world.run("second", "privacy.max_epsilon=1")
    assert "spent.json is damaged, so that nobody knows what was spent" in (world.site / "site.log").read_text()


def test_what_needs_no_account_has_none(tmp_path: Path) -> None:
    state = State({"own": {"w": torch.zeros(1)}}, {"transform/top_k/kept": 1.0})
    assert released(State(), state, [TopK(0.1)]) == {}
    assert Spending(tmp_path).elsewhere("", 1e-5).epsilon == 0.0
