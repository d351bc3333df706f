"""`evaluation.predictions=true`: the masks that scores are of, in the cases' own geometry, where the patients are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import train
from fedseg.reporting.folder import RunFolder
from tests.data_files import picture, save
from tests.test_across import SITES, across
from tests.test_own_grid import KINDS, SMALL, blob, read
from tests.tiers import every

KEEP = "evaluation.predictions=true"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("kind", every(KINDS, ["flat"]))
def test_the_best_models_masks_are_kept_as_predict_writes_them(kind: str, tmp_path: Path) -> None:
    ending = KINDS[kind](tmp_path / "data")
    run = RunFolder(tmp_path / "run")
    assert train.main([*SMALL, f"data.root={tmp_path / 'data'}", f"output={run.path}", KEEP]) == 0
    final = run.scores().query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
    wanted = {f"{row.site}/{row.view}/{row.case}_foreground.{ending}" for row in final.itertuples()}
    assert files(run.predictions) == sorted(wanted)
    words = ["--site", "b", "--view", "personal", "--no-overlay", "--out", str(tmp_path / "out")]
    predict.main([str(run.path), "--images", str(tmp_path / "data" / "b" / "images"), *words])
    for row in final[(final["site"] == "b") & (final["view"] == "personal")].itertuples():
        name = f"{row.case}_foreground.{ending}"
        mine, theirs = (folder / name for folder in (run.predictions / "b" / "personal", tmp_path / "out" / "masks"))
        prediction, truth = read(mine), read(tmp_path / "data" / "b" / "masks" / f"{row.case}.{ending}")
        assert (prediction == read(theirs)).all()
        both = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
        assert row.value == pytest.approx(both, abs=1e-12)


@pytest.mark.slow
def test_a_stack_has_a_file_for_every_image(tmp_path: Path) -> None:
    for patient in range(6):
        for number in range(3):
            name, mask = f"p{patient}_{number}.png", blob(44, 52, number)
            save(
                tmp_path / "data" / "a" / "images" / name,
                picture(3 * patient + number, 44, 52) // 2 + 90 * mask[..., None],
            )
            save(tmp_path / "data" / "a" / "masks" / name, mask)
    stacks = ["data.stack_slices=true", r"data.patient_pattern=^(.+)_\d+$"]
    run = RunFolder(tmp_path / "run")
    assert train.main([*SMALL, *stacks, f"data.root={tmp_path / 'data'}", f"output={run.path}", KEEP]) == 0
    cases = run.splits().query("split == 'test'")["case"]
    kept = {name for name in files(run.predictions) if name.startswith("a/global/")}
    assert kept == {f"a/global/{case}_{number}_foreground.png" for case in cases for number in range(3)}
    assert np.asarray(Image.open(run.predictions / min(kept))).shape == (44, 52)


@pytest.mark.slow
def test_across_machines_they_stay_at_their_site(tmp_path: Path) -> None:
    run = across(tmp_path, "algorithm=fedavg", KEEP)
    assert not run.predictions.exists()
    assert {path.parent for path in run.path.rglob("*.png")} == {run.plots}
    name = (run.path / "run-id.txt").read_text().strip()
    for site in SITES:
        own = RunFolder(tmp_path / "sites" / site / name)
        tested = own.splits().query("split == 'test'")["case"]
        found = files(own.predictions)
        assert found == sorted(f"{site}/global/{case}_{region}.png" for case in tested for region in ("disc", "cup"))
        assert all(file.startswith(f"{site}/") for file in found)


def test_masks_of_the_network_s_grid_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [KEEP, "evaluation.grid=network", f"output={tmp_path / 'run'}"]
    assert train.main(words) == 2
    assert "take evaluation.grid=own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
