"""Flower's simulation engine: the same tensors and the same table as in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import train
from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import QueryTask
from fedseg.federation.flower.kept import Kept
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.simulation import execute_in_simulation
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import TINY
from tests.world import assert_same

SETTINGS = [
    *TINY,
    "algorithm=ditto",
    "data.n_sites=2",
    "federation.rounds=2",
    "evaluation.metrics=[dice]",
]


@pytest.mark.waits(20)
@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'simulation'")
def test_the_simulation_ends_as_the_run_in_one_process(tmp_path: Path) -> None:
    before = dict(os.environ)
    runs = {engine: RunFolder(tmp_path / engine) for engine in ("in-process", "flower-simulation")}
    for engine, run in runs.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            assert train.main([*SETTINGS, f"engine={engine}", f"output={run.path}"]) == 0, err.getvalue()
    assert dict(os.environ) == before
    here, simulated = runs.values()
    assert (here.path / "summary.csv").read_bytes() == (simulated.path / "summary.csv").read_bytes()
    one, two = (Checkpoint(run.checkpoints).load() for run in (here, simulated))
    assert one is not None
    assert two is not None
    assert_same(one.server, two.server)
    name = (simulated.path / "run-id.txt").read_text().strip()
    for site, kept in one.kept.items():
        assert_same(kept, Kept(simulated.path / "sites" / site / name / "kept").before(QueryTask("publish", 2, 0)))
    pd.testing.assert_frame_equal(here.splits(), simulated.splits())
    order = list(here.scores().columns)
    tables = [run.scores().sort_values(order, ignore_index=True) for run in (here, simulated)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", ["launch.sites.simulation", "privacy.masks", "launch.flare"])
def test_flower_does_not_call_home(first: str) -> None:
    read = f"import sys, fedseg.{first}; sys.stdout.write(sys.modules[sys.argv[1]].FLWR_TELEMETRY_ENABLED)"
    unset = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    for environment, answer in ((unset, "0"), ({**unset, "FLWR_TELEMETRY_ENABLED": "1"}, "1")):
        line = [sys.executable, "-c", read, "flwr.supercore.telemetry"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, answer), done.stderr


@pytest.mark.parametrize("package", ["flwr", "ray"])
def test_without_the_extra_the_error_names_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == package else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError, match=rf"needs the package '{package}': pip install -e \"\.\[simulation\]\""):
        execute_in_simulation(compose([*SETTINGS, "engine=flower-simulation"], SCHEMA))
