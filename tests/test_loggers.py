"""Lightning's loggers, beside the run's folder and W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import train
from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import loggers
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import TINY

RUN = (*TINY, "algorithm=fedavg", "data.n_sites=2", "federation.rounds=2")
PARTS = """
from pytorch_lightning.loggers import CSVLogger

class Breaking(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise OSError("the disk is full")

def nothing(save_dir):
    return save_dir
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_loggers.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def losses(folder: str) -> list[float]:
    rounds = RunFolder(folder).rounds()
    return list(rounds[rounds["task"] == "train"].groupby("round")["loss"].mean())


@pytest.mark.slow
def test_csv_holds_what_every_round_told_and_a_resumed_run_adds_a_file() -> None:
    assert train.main([*RUN, "output=run", "loggers=[csv]"]) == 0
    assert train.main(["output=run", "resume=true", "federation.rounds=3"]) == 0
    tables = [pd.read_csv(f"run/csv/version_{part}/metrics.csv") for part in (0, 1)]
    told = [table.groupby("step")["train/loss"].mean().dropna() for table in tables]
    assert [list(part.index) for part in told] == [[1, 2], [3]]
    assert [loss for part in told for loss in part] == pytest.approx(losses("run"))
    assert any(column.startswith("best/test/global/") for column in tables[0])
    assert "training.lr" in Path("run/csv/version_0/hparams.yaml").read_text()


@pytest.mark.slow
def test_tensorboard_reads_its_files_back() -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train.main([*RUN, "output=run", "loggers=[tensorboard]"]) == 0
    found = reader.EventAccumulator("run/tensorboard")
    found.Reload()
    events = found.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2]
    assert [event.value for event in events] == pytest.approx(losses("run"))


def test_mlflow_finds_the_run_again() -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    assert train.main([*RUN, "output=run", "loggers=[mlflow]"]) == 0
    client = tracking.MlflowClient("sqlite:///run/mlflow.db")
    experiment = client.get_experiment_by_name("federated-segmentation")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.value for point in history] == pytest.approx(losses("run"))
    assert found.data.params["training.lr"] == "0.001"


@pytest.mark.slow
def test_a_logger_that_fails_is_given_up_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*RUN, "output=run", "loggers=[outside_loggers:Breaking]"]) == 0
    told = capsys.readouterr().err
    assert told.count("warning: the logger outside_loggers:Breaking took no numbers of round") == 1
    assert "OSError: the disk is full" in told
    assert len(losses("run")) == 2


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("[tensorbord]", r"write loggers=\[tensorboard\]"),
        ("tensorbord", r"should be list\[csv\|tensorboard\|mlflow or package.module:Name\]"),
        ("[outside_loggers:Nothing]", "has no Nothing"),
        ("[tensorboard]", r"needs a library that is not installed: pip install tensorboard"),
    ],
)
def test_loggers_that_cannot_be_had_are_refused_before_the_run(
    chosen: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere: Any = {"tensorboard": ("no_such_library",)}
    monkeypatch.setattr(loggers, "NEEDS", {**loggers.NEEDS, **nowhere})
    with pytest.raises(ConfigError, match=told):
        Experiment(compose([*RUN, f"loggers={chosen}"], SCHEMA)).check()


@pytest.mark.slow
def test_what_makes_no_logger_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*RUN, "output=run", "loggers=[outside_loggers:nothing]"]) == 2
    assert "which is no pytorch_lightning.loggers.Logger" in capsys.readouterr().err
