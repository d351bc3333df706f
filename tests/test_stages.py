"""Stages that are repeated with other settings: noticed before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.protocols.stages import _alone, execute_stages, plan
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sweep import Job
from fedseg.reporting.folder import RunFolder

STAGES = 'stages=["algorithm=contrastive federation.rounds=2", "algorithm=local data.labelled_patients=2"]'


def arguments(output: Path, *more: str, stages: str = STAGES) -> list[str]:
    return ["model=tiny", "data.n_sites=2", "federation.local_steps=1", *more, stages, f"output={output}"]


class Executed(list[tuple[str, int, bool]]):
    """Instead of running: which folder, how many rounds, and whether it goes on."""

    def __call__(self, config: DictConfig, job_type: str = "") -> Any:
        self.append((Path(config.output).name, config.federation.rounds, config.resume))


@pytest.fixture
def executed() -> Executed:
    return Executed()


def leave_behind(output: Path, given: list[str], *numbers: int) -> None:
    """The folders of stages that were started."""
    for stage in plan(given, compose(given, SCHEMA), output):
        if stage.number in numbers:
            stage.folder.path.mkdir(parents=True)
            RunFolder(stage.folder.path).write_config(OmegaConf.to_yaml(_alone(stage)))


@pytest.mark.slow
def test_the_same_settings_go_on(tmp_path: Path, executed: Executed) -> None:
    given = arguments(tmp_path)
    leave_behind(tmp_path, given, 1, 2)
    execute_stages(given, compose(given, SCHEMA), executed)
    assert executed == [("1", 2, True), ("2", 20, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "stages", "message"),
    [
        (["training.lr=0.5"], STAGES, "stage 1: .*training.lr: 0.001 in the folder, 0.5 now"),
        ([], STAGES.replace("labelled_patients=2", "labelled_patients=1"), "stage 2: .*labelled_patients: 2 in the"),
        (
            [],
            STAGES.replace(" data.labelled_patients=2", ""),
            "stage 2: .*labelled_patients: 2 in the folder, None now",
        ),
        ([], STAGES.replace("rounds=2", "rounds=9"), "stage 1: .*federation.rounds: 2 in the folder, 9 now"),
    ],
)
def test_other_settings_are_named_and_refused(
    tmp_path: Path, executed: Executed, more: list[str], stages: str, message: str
) -> None:
    leave_behind(tmp_path, arguments(tmp_path), 1, 2)
    given = arguments(tmp_path, *more, stages=stages)
    with pytest.raises(ConfigError, match=message):
        execute_stages(given, compose(given, SCHEMA), executed)
    assert executed == []


@pytest.mark.slow
def test_a_sweep_notices_stages_with_other_settings(tmp_path: Path) -> None:
    leave_behind(tmp_path, arguments(tmp_path), 1, 2)
    job = Job("a", {}, tuple(arguments(tmp_path)), compose(arguments(tmp_path), SCHEMA), tmp_path)
    assert not job.finished()  # no summary yet
    other = arguments(tmp_path, "training.lr=0.5")
    with pytest.raises(ConfigError, match=r"other settings \(stage 1: training.lr: 0.001 in the folder, 0.5 now"):
        Job("a", {}, tuple(other), compose(other, SCHEMA), tmp_path).finished()


@pytest.mark.slow
def test_a_first_stage_that_no_other_started_from_may_have_more_rounds(tmp_path: Path, executed: Executed) -> None:
    leave_behind(tmp_path, arguments(tmp_path), 1)
    given = arguments(tmp_path, stages=STAGES.replace("rounds=2", "rounds=9"))
    execute_stages(given, compose(given, SCHEMA), executed)
    assert executed == [("1", 9, True), ("2", 20, False)]
