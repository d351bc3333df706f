"""Every method through Flower's own messages, and what becomes of answers that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from algorithms import ALGORITHMS
from federation.state import State
from tests.flower_world import LoopbackGrid, federate
from tests.world import assert_same, assert_same_outcome, simulate

ACROSS = [name for name, method in ALGORITHMS.items() if method.trains_on == "sites"]


@pytest.mark.parametrize("name", ACROSS)
def test_every_method_ends_with_the_same_tensors_as_in_process(name: str, tmp_path: Path) -> None:
    here, there = simulate(name, tmp_path / "a", rounds=3), federate(name, tmp_path / "b", rounds=3)
    here.kept = {site: here.kept.get(site, State()) for site in there.kept}
    assert_same_outcome(here, there)
    assert not there.observer.rows("events")
    for table in ("traffic", "rounds"):
        one, two = (outcome.observer.rows(table) for outcome in (here, there))
        assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]


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
