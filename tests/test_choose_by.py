"""The validation score by which models are chosen is a setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedseg.configs.compose import ConfigError
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.engine import selection_scores
from fedseg.launch.run import execute
from fedseg.reporting.folder import DURING_TRAINING, RunFolder
from tests.tiers import every
from tests.tiny_run import phantom_run


def test_models_are_chosen_by_the_score_that_is_asked_for() -> None:
    found = {
        "a": {"val/global/dice": 0.2, "val/global/nsd": 0.9, "val/personal/nsd": 0.7},
        "b": {"val/global/dice": 0.4, "val/global/nsd": 0.5},
    }
    assert selection_scores(found, ["a", "b"], "dice") == {"global": pytest.approx(0.3)}
    assert selection_scores(found, ["a", "b"], "nsd") == {"global": pytest.approx(0.7), "personal/a": 0.7}
    assert selection_scores(found, ["a", "b", "c"], "nsd") == {"personal/a": 0.7}  # c could not be scored


@pytest.mark.slow
@pytest.mark.parametrize("metric", every(["iou", "nsd", "lesion_f1"], ["nsd"]))
def test_the_best_round_is_that_of_the_chosen_score(metric: str, tmp_path: Path) -> None:
    settings = ["algorithm=ditto", f"evaluation.choose_by={metric}", "federation.rounds=3", "training.lr=0.02"]
    execute(phantom_run(3, tmp_path, *settings))
    rows = RunFolder(tmp_path).scores()
    rows = rows[(rows["checkpoint"] == DURING_TRAINING) & (rows["metric"] == metric) & (rows["split"] == "val")]
    assert len(rows)
    whole = rows.groupby(["view", "round", "site", "case"])["value"].mean().groupby(["view", "round", "site"]).mean()
    shared = whole["global"].groupby("round").mean()
    best = Checkpoint(RunFolder(tmp_path).checkpoints).best()
    assert best["global"].score == pytest.approx(shared.max(), abs=1e-6)
    assert best["global"].round == shared.idxmax()
    for site, own in whole["personal"].groupby("site"):
        assert best[f"personal/{site}"].score == pytest.approx(own.max(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"evaluation\.choose_by: .*in the folder, 'dice' now"):
        execute(phantom_run(3, tmp_path, *settings, "evaluation.choose_by=dice", "resume=true"))
