"""Stages and runs that are repeated with other settings: noticed before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.protocols.stages import _alone, execute_stages, plan
from fedseg.launch.run import read_settings
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sweep import Job
from fedseg.reporting.folder import RunFolder
from tests.world import build

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


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("fedsoup", {"wait": 0.0}),
        ("ga", {"step_rounds": 3}),
        ("ga", {"step": 0.0}),
        ("prrfl", {"window_rounds": 3}),
        ("condistfl", {"weight": 0.0}),
        ("ga+fedavgm", {"step_rounds": 3}),
    ],
)
def test_methods_say_what_goes_over_the_rounds(name: str, free: dict[str, Any]) -> None:
    assert build(name, rounds=4).over_rounds
    assert not build(name, rounds=4, **free).over_rounds


def test_a_run_that_goes_over_its_rounds_is_not_given_more_of_them(tmp_path: Path) -> None:
    began = ["model=tiny", "data.n_sites=2", "algorithm=ga", "federation.rounds=2", f"output={tmp_path}"]
    RunFolder(tmp_path).write_config(OmegaConf.to_yaml(compose(began, SCHEMA)))
    told = "federation.rounds=3: this run was begun with 2, and algorithm.step falls over them"
    with pytest.raises(ConfigError, match=rf"^{told}, as no algorithm.step_rounds .* keep the 2, or start another run"):
        read_settings([f"output={tmp_path}", "resume=true", "federation.rounds=3"])
    more = [*began, "federation.rounds=3"]
    with pytest.raises(ConfigError, match=rf"other settings \({told}"):
        Job("a", {}, tuple(more), compose(more, SCHEMA), tmp_path).finished()
    RunFolder(tmp_path).write_config(OmegaConf.to_yaml(compose([*began, "algorithm.step_rounds=5"], SCHEMA)))
    assert read_settings([f"output={tmp_path}", "resume=true", "federation.rounds=3"]).federation.rounds == 3
