"""The simulated clock of comparisons: what rounds would have taken, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from fedseg.configs.compose import ConfigError
from fedseg.launch import compare as command
from fedseg.launch.compare import Destination, compare, requested
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.clock import Clock
from fedseg.reporting.compare.report import PAGE
from fedseg.reporting.compare.runs import find_runs, read_run
from tests.run_folders import write_run

SLOW = ("step_seconds=0.1", "megabits=8", "slower={site_02: 3}")
FAST, SLOWEST, LINE = 1.0, 3.0, 2.0  # seconds of ten steps, of those at site_02, of two megabytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("fedavg", "local", "pooled"):
        write_run(folder / name, name)
    write_run(folder / "cyclic", "fedprox", 0, "federation.order=cyclic")
    return folder


def analysed(runs: Path, *options: str) -> Analysis:
    _, told, _, _ = requested([str(runs), *options])
    return command.analysed([read_run(path, "dice") for path in find_runs([str(runs)])], told)


@pytest.mark.parametrize(
    ("options", "fedavg", "local", "cyclic"),
    [
        (SLOW, SLOWEST + LINE, SLOWEST, 2 * FAST + SLOWEST + 3 * LINE),
        (SLOW[:1], FAST, FAST, 3 * FAST),
        (("step_seconds=0", "megabits=8"), LINE, 0.0, 3 * LINE),
    ],
)
def test_sites_of_a_round_wait_for_the_slowest_and_turns_add_up(
    options: Sequence[str], fedavg: float, local: float, cyclic: float, runs: Path
) -> None:
    curves = analysed(runs, *options).curves.set_index(["method", "round"])["seconds"]
    for method, once in {"fedavg": fedavg, "local": local, "fedprox": cyclic}.items():
        assert curves[method].to_list() == pytest.approx([round * once for round in range(1, 5)])
    assert curves["pooled"].isna().all()


@pytest.mark.slow
def test_the_time_to_the_target_stands_in_the_table_and_the_picture_only_where_a_clock_is_told(
    runs: Path, tmp_path: Path
) -> None:
    cost = analysed(runs, *SLOW).cost.set_index("method")
    assert cost.loc["fedavg", "seconds_to_target"] == 5 * cost.loc["fedavg", "rounds_to_target"]
    for told, options in ((True, SLOW), (False, ())):
        place = Destination(str(tmp_path / str(told)), pictures=False)
        _, read, _, _ = requested([str(runs), *options])
        compare([str(runs)], read, place)
        page = (tmp_path / str(told) / PAGE).read_text()
        assert ("simulated s to target" in page) == told
        assert ("line has 8 Mbit/s; site_02 is 3 times slower" in page) == told


def test_a_round_with_an_absent_site_and_one_with_two_turns() -> None:
    work = pd.DataFrame({"round": [1, 1, 2, 2], "site": ["a", "b", "a", "a"], "steps": [10, 10, 10, 10]})
    traffic = pd.DataFrame({"round": [0, 2], "site": ["b", "a"], "bytes": [1e6, 1e6]})
    clock = Clock(1.0, 1.0, {"b": 2.0})
    assert clock.after(work, traffic, "random").to_dict() == {0: 8, 1: 8 + 30, 2: 8 + 30 + 20 + 8}
    assert clock.after(work, traffic, "together").to_dict() == {0: 8, 1: 8 + 20, 2: 8 + 20 + 20 + 8}


@pytest.mark.parametrize(
    ("wrong", "told", "right"),
    [
        (["megabits=8"], "take step_seconds=0.1", ["megabits=8", "step_seconds=0.1"]),
        (["slower={site_02: 3}"], "take step_seconds=0.1", ["slower={site_02: 3}", "step_seconds=0.1"]),
        (["step_seconds=-1"], "step_seconds=-1", ["step_seconds=1"]),
        (["step_seconds=1", "megabits=0"], "megabits=0", ["step_seconds=1"]),
        (["step_seconds=1", "slower={site_02: 0}"], "slower=", ["step_seconds=1"]),
    ],
)
def test_a_clock_that_makes_no_sense_is_refused(wrong: list[str], told: str, right: list[str]) -> None:
    with pytest.raises(ConfigError, match=told):
        requested(["runs", *wrong])
    requested(["runs", *right])


def test_a_slow_site_that_there_is_not_is_refused(runs: Path) -> None:
    with pytest.raises(ReportingError, match=r"slower names 'site_09'; the sites that train are .*site_01, site_02"):
        analysed(runs, "step_seconds=1", "slower={site_09: 2}")
