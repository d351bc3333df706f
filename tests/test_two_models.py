"""Methods whose local step trains two models or three: each loss by itself, and the steps of all counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedseg.algorithms import ALGORITHMS
from fedseg.reporting.curves import draw_curves, loss_curves
from fedseg.reporting.folder import COLUMNS, ROUNDS, RunFolder
from fedseg.reporting.progress import Progress
from fedseg.reporting.reporter import Reporter
from fedseg.reporting.wandb import WandbRun
from tests.world import simulate

TWO = ("ditto", "apfl", "fedsm")
"""Whose shared model is FedAvg's."""
COUNTED = {"ditto": 2, "apfl": 2, "moe": 2, "prrfl": 2, "fedsm": 3}


def rows(name: str, folder: Path, **knobs: Any) -> pd.DataFrame:
    return pd.DataFrame(simulate(name, folder / name, **knobs).observer.rows("rounds"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_the_shared_model_s_loss_is_fedavg_s_and_the_other_stands_beside_it(name: str, tmp_path: Path) -> None:
    alone, two = rows("fedavg", tmp_path), rows(name, tmp_path)
    assert two["loss"].tolist() == alone["loss"].tolist()  # its shared model is FedAvg's, bit for bit
    assert alone["loss_personal"].isna().all()
    assert two["loss_personal"].notna().all()
    later = two[two["round"] > 1]  # FedSM's two start from the same
    assert (later["loss_personal"] != later["loss"]).all()


@pytest.mark.slow
def test_ditto_s_pull_is_in_no_loss_that_is_told(tmp_path: Path) -> None:
    pulled = rows("ditto", tmp_path, lam=1e6)
    assert pulled["loss_personal"].max() < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_steps_of_all_models_count(name: str, tmp_path: Path) -> None:
    assert (rows("fedavg", tmp_path)["steps"] == 3).all()
    assert (rows(name, tmp_path)["steps"] == 3 * COUNTED[name]).all()


def test_every_method_that_keeps_a_second_trained_model_counts_it() -> None:
    for name, method in ALGORITHMS.items():
        assert method.models_per_step == COUNTED.get(name, 1)


def test_an_earlier_run_s_rounds_are_read_and_gone_on_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    old = [name for name in COLUMNS[ROUNDS] if name != "loss_personal"]
    (tmp_path / ROUNDS).write_text(",".join(old) + "\n1,a,train,0.5,3,4,0.1\n")
    assert folder.rounds()["loss_personal"].isna().all()
    row = {"round": 2, "site": "a", "task": "train", "loss": 0.25, "steps": 6, "examples": 4, "seconds": 0.1}
    folder.append_rounds([{**row, "loss_personal": 0.75}])
    table = folder.rounds()
    assert table["loss"].tolist() == [0.5, 0.25]
    assert table["loss_personal"].isna().tolist() == [True, False]
    assert tuple(table.columns) == COLUMNS[ROUNDS]
    assert loss_curves(table, "loss_personal").to_dict() == {"a": {2: 0.75}}
    figure = draw_curves(pd.DataFrame(columns=[*folder.scores().columns]), table)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["training", "training, personal model"]


class Record:
    """A round without anything but its training."""

    scores = updates = traffic = events = privacy = audit = ()

    def __init__(self, round: int) -> None:
        self.round = round
        row = {"round": round, "site": "a", "task": "train", "steps": 1, "examples": 1, "seconds": 0.0}
        self.rounds = [{**row, "loss": 1.0, "loss_personal": 0.5}]


def test_a_round_that_was_not_validated_shows_no_score(tmp_path: Path) -> None:
    stream = io.StringIO()
    folder = RunFolder(tmp_path)
    reporter = Reporter(folder, WandbRun("disabled", folder, {}), progress=Progress(stream))
    told = {"round": 1, "checkpoint": "round", "site": "a", "seen": True, "split": "val", "view": "global"}
    told |= {"region": "r", "case": "c", "metric": "dice", "value": 0.75, "unit": "", "grid": "network"}
    for round in (1, 2):
        reporter.round_started(round, 2, ["a"])
        if round == 1:
            reporter.scores([told])
        reporter.round_done(Record(round))
    first, second = stream.getvalue().splitlines()
    assert "val global dice 0.7500" in first
    assert "dice" not in second
    assert "loss 1.0000" in second
    assert "loss personal 0.5000" in second
