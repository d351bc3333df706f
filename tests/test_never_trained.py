"""A site that took part in no round has no personal model: none is scored, averaged, exported or predicted with."""

from __future__ import annotations

from pathlib import Path

import pytest

import evaluate
import export
import predict
import train
from fedseg.algorithms import ALGORITHMS
from fedseg.reporting.folder import RunFolder
from tests.data_files import make_sites
from tests.tiers import every
from tests.tiny_run import TINY

KEPT = sorted(
    name
    for name, method in ALGORITHMS.items()
    if "personal" in method.views and not method.personalises and name != "contrastive"
)
FITTED = sorted(name for name, method in ALGORITHMS.items() if method.personalises)
FEW = ("data.n_sites=3", "federation.rounds=1", "federation.fraction=0.34", "evaluation.metrics=[dice]")


def run(folder: Path, *settings: str) -> RunFolder:
    assert train.main([*TINY, *FEW, f"output={folder}", *settings]) == 0
    return RunFolder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", every(KEPT))
def test_only_sites_that_trained_have_a_personal_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    folder = run(tmp_path / "run", f"algorithm={method}")
    scores, rounds, events = folder.scores(), folder.rounds(), folder.events()
    trained = set(rounds.loc[rounds["task"] == "train", "site"])
    assert len(trained) == 1
    assert set(scores.loc[scores["view"] == "personal", "site"]) == trained
    assert set(events.loc[events["event"] == "never trained", "site"]) == {"site_01", "site_02", "site_03"} - trained
    if "global" in ALGORITHMS[method].views:
        assert "Personal models are those of 1 of 3 sites" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", every(FITTED, ["finetune"]))
def test_a_model_that_is_fitted_from_the_global_one_exists_everywhere(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path / "run", f"algorithm={method}", "algorithm.finetune_steps=1")
    scores = folder.scores()
    assert set(scores.loc[scores["view"] == "personal", "site"]) == {"site_01", "site_02", "site_03"}
    assert folder.events().empty


@pytest.mark.slow
def test_other_commands_know_who_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_sites(tmp_path / "data", "north", "south", "west")
    images = ("data=folder", f"data.root={root}", "data.size=[20, 24]", "data.batch_size=2", "data.augment=none")
    few = [setting for setting in (*TINY, *FEW) if not setting.startswith("data.")]
    folder = tmp_path / "run"
    assert train.main([*few, *images, "algorithm=ditto", f"output={folder}"]) == 0
    rounds = RunFolder(folder).rounds()
    (trained,) = set(rounds.loc[rounds["task"] == "train", "site"])
    other = next(site for site in ("north", "south", "west") if site != trained)
    assert evaluate.main([str(folder)]) == 0  # the same scores again
    capsys.readouterr()
    asked = ["--site", other, "--images", str(root / other / "images"), "--out"]
    assert predict.main([str(folder), *asked, str(tmp_path / "a"), "--view", "personal"]) == 2
    assert f"no personal model for site '{other}'" in capsys.readouterr().err
    assert predict.main([str(folder), *asked, str(tmp_path / "b"), "--no-overlay"]) == 0  # with the global one
    assert export.main([str(folder), "--out", str(tmp_path / "c")]) == 0
    assert {path.stem for path in (tmp_path / "c").glob("*.safetensors")} == {"global", f"personal-{trained}"}


@pytest.mark.slow
def test_sites_that_stay_away_until_a_run_is_resumed_train_then(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "algorithm=fedbn")
    first = set(folder.rounds().query("task == 'train'")["site"])
    assert train.main([f"output={folder.path}", "resume=true", "federation.rounds=6"]) == 0
    trained = set(folder.rounds().query("task == 'train'")["site"])
    assert first < trained
    final = folder.scores().query("checkpoint == 'last'")
    assert set(final["site"]) == trained
