"""Final scores are those of the masks that `predict.py` writes: on the stored image's own pixels, in its own unit."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt

import compare
import evaluate
import predict
import train
from fedseg.reporting.folder import COLUMNS, METRICS, YOUNGER, RunFolder
from tests.data_files import picture, save, save_volume
from tests.tiers import every

SMALL = (
    "data=folder", "data.size=32", "data.batch_size=4", "model=tiny", "federation.rounds=2", "federation.local_steps=6",
    "trainer.threads=1", "trainer.accelerator=cpu", "evaluation.overlays=false", "training.lr=0.01",
    "evaluation.metrics=[dice,hd95,nsd]", "algorithm=ditto",
)  # fmt: skip
SPACING = (1.5, 0.5, 4.0)  # of the stored axes


def blob(height: int, width: int, number: int) -> NDArray[np.uint8]:
    rows, columns = np.ogrid[:height, :width]
    centre = height / 2 + number % 3, width / 2 - number % 2
    return (((rows - centre[0]) / (height / 4)) ** 2 + ((columns - centre[1]) / (width / 5)) ** 2 < 1).astype(np.uint8)


def flat_sites(root: Path) -> str:
    """Pictures of several sizes, larger and smaller than the network's grid."""
    for site in ("a", "b"):
        for number in range(7):
            height, width = (50 + 3 * number, 70) if number % 2 else (24, 28)
            mask = blob(height, width, number)
            image = picture(number + (100 if site == "b" else 0), height, width) // 2 + 100 * mask[..., None]
            save(root / site / "images" / f"c{number}.png", image.astype(np.uint8))
            save(root / site / "masks" / f"c{number}.png", mask)
    return "png"


def volume_sites(root: Path) -> str:
    """Volumes whose voxels differ in length along every axis."""
    for site in ("a", "b"):
        for number in range(7):
            mask = np.stack([blob(44, 52, number) * (0 < k < 4) for k in range(5)], axis=-1).astype(np.uint8)
            noise = np.random.default_rng(number + (100 if site == "b" else 0)).normal(100, 10, mask.shape)
            affine = np.diag([*SPACING, 1.0])
            save_volume(root / site / "images" / f"c{number}.nii.gz", (noise + 60 * mask).astype(np.int16), affine)
            save_volume(root / site / "masks" / f"c{number}.nii.gz", mask, affine)
    return "nii.gz"


KINDS = {"flat": flat_sites, "volumes": volume_sites}


@pytest.fixture(scope="module", params=every(KINDS, ["flat"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    home = tmp_path_factory.mktemp(str(request.param))
    kind = KINDS[str(request.param)](home / "data")
    assert train.main([*SMALL, f"data.root={home / 'data'}", f"output={home / 'run'}"]) == 0
    return RunFolder(home / "run"), kind


def read(path: Path) -> NDArray[np.bool_]:
    """A stored mask; a volume's axes as they lie in the file."""
    if path.name.endswith(".png"):
        return np.asarray(Image.open(path)) > 0
    return np.asarray(nibabel.load(path).dataobj) > 0


def by_hand(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], steps: tuple[float, ...]) -> tuple[float, float]:
    """Dice and HD95 from two files, through distance maps."""
    dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    if not prediction.any():
        return dice, float(np.linalg.norm((np.array(truth.shape) - 1) * steps))
    contours = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    to = [distance_transform_edt(~contour, sampling=steps) for contour in contours]
    return dice, max(np.percentile(to[1][contours[0]], 95), np.percentile(to[0][contours[1]], 95))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_scores_are_those_of_the_masks_that_predict_writes(
    run: tuple[RunFolder, str], tmp_path: Path, checkpoint: str
) -> None:
    folder, kind = run
    data = folder.path.parent / "data"
    final = folder.scores().query(f"checkpoint == '{checkpoint}' and split == 'test' and site == 'a'")
    assert set(final["grid"]) == {"own"}
    lengths = final[final["metric"] != "dice"]
    assert set(lengths["unit"]) == {"px" if kind == "png" else "mm"}
    assert set(final.loc[final["metric"] == "dice", "unit"]) == {""}
    shown = 0
    for view in ("global", "personal"):
        out = tmp_path / view
        words = ["--site", "a", "--view", view, "--checkpoint", checkpoint, "--no-overlay"]
        predict.main([str(folder.path), "--images", str(data / "a" / "images"), "--out", str(out), *words])
        own = final[final["view"] == view].pivot(index="case", columns="metric", values="value")
        for case, row in own.iterrows():
            prediction = read(out / "masks" / f"{case}_foreground.{kind}")
            truth = read(data / "a" / "masks" / f"{case}.{kind}")
            dice, hd95 = by_hand(prediction, truth, (1.0, 1.0) if kind == "png" else SPACING)
            assert row["dice"] == pytest.approx(dice, abs=1e-12)
            assert row["hd95"] == pytest.approx(hd95, abs=1e-9)
            shown += 0 < dice < 1
    assert shown  # a network that outlines something


@pytest.mark.slow
def test_validation_during_training_is_on_the_network_s_grid(run: tuple[RunFolder, str]) -> None:
    scores = run[0].scores()
    assert set(scores.loc[scores["checkpoint"] == "round", "grid"]) == {"network"}


def test_unit_and_grid_stand_beside_the_numbers(run: tuple[RunFolder, str]) -> None:
    folder, kind = run
    text = (folder.path / "summary.md").read_text()
    assert "test dice, own grid" in text
    assert f"hd95, {'px' if kind == 'png' else 'mm'}" in text
    table = pd.read_csv(folder.path / "summary.csv")
    assert set(table["grid"]) == {"own"}


def older(folder: RunFolder, copy: Path) -> RunFolder:
    """The same run as an earlier version left it: scored on the network's grid, without a word of grid and unit."""
    shutil.copytree(folder.path, copy)
    assert evaluate.main([str(copy), "evaluation.grid=network"]) == 0
    old = RunFolder(copy)
    table = old.scores().drop(columns=list(YOUNGER[METRICS]))
    table.to_csv(copy / METRICS, index=False, lineterminator="\n")
    lines = old.config_path.read_text().splitlines(keepends=True)
    old.config_path.write_text("".join(line for line in lines if not line.startswith("  grid:")))
    (copy / "metrics-own-grid.csv").unlink()
    return old


@pytest.mark.slow
def test_runs_on_two_grids_are_not_compared_and_the_cure_works(
    run: tuple[RunFolder, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = run[0]
    old = older(new, tmp_path / "old")
    config = old.config_path.read_text().replace("seed: 0", "seed: 1", 1)
    old.config_path.write_text(config.replace("split_seed: null", "split_seed: 0"))
    new_copy = tmp_path / "new"
    shutil.copytree(new.path, new_copy)
    text = (new_copy / "config.yaml").read_text().replace("split_seed: null", "split_seed: 0")
    (new_copy / "config.yaml").write_text(text)
    words = [str(old.path), str(new_copy), f"output={tmp_path / 'report'}", "pictures=false"]
    capsys.readouterr()
    assert compare.main(words) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"the grid of the final scores is network in {old.path}, but own in {new_copy}" in told
    assert f"python evaluate.py {old.path} evaluation.grid=own" in told
    before = old.scores().query("checkpoint != 'round'")["value"].to_numpy()
    assert evaluate.main([str(old.path)]) == 0  # the settings of such a run say nothing of a grid
    assert "metrics-network-grid.csv" in capsys.readouterr().out
    kept = pd.read_csv(old.path / "metrics-network-grid.csv")["value"].to_numpy()
    np.testing.assert_array_equal(kept, before)
    mine, theirs = (one.scores().query("checkpoint != 'round'") for one in (old, new))
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), theirs.reset_index(drop=True))
    assert compare.main(words) == 0
    assert "own grid" in (tmp_path / "report" / "report.html").read_text()
    assert evaluate.main([str(old.path)]) == 0  # and again: the same numbers
    assert "the largest difference is 0" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_an_older_run_is_read_summarised_and_gone_on_with(
    run: tuple[RunFolder, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = older(run[0], tmp_path / "old")
    assert set(old.scores()["grid"]) == {"network"}
    assert evaluate.main([str(old.path), "evaluation.grid=network"]) == 0
    out = capsys.readouterr().out
    assert "the largest difference is 0" in out
    assert "network's grid" in out
    assert train.main([f"output={old.path}", "resume=true", "federation.rounds=3"]) == 0
    scores = old.scores()
    assert tuple(scores.columns) == COLUMNS[METRICS]
    assert set(scores.loc[scores["checkpoint"] == "round", "round"]) == {1, 2, 3}
    assert set(scores.loc[scores["checkpoint"] == "round", "grid"]) == {"network"}
    assert set(scores.loc[scores["checkpoint"] != "round", "grid"]) == {"own"}


@pytest.mark.slow
def test_a_run_may_keep_to_the_network_s_grid(tmp_path: Path) -> None:
    flat_sites(tmp_path / "data")
    words = [*SMALL, f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "evaluation.grid=network"]
    assert train.main(words) == 0
    scores = RunFolder(tmp_path / "run").scores()
    assert set(scores["grid"]) == {"network"}
    last = scores.query("checkpoint == 'last' and split == 'val' and metric == 'dice'")
    during = scores.query("checkpoint == 'round' and round == 2 and metric == 'dice'")
    keys = ["site", "view", "case"]
    pairs = last.merge(during, on=keys)
    assert len(pairs) == len(last)
    np.testing.assert_array_equal(pairs["value_x"], pairs["value_y"])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_folds_are_scored_again_each_by_its_own_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat_sites(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "a", tmp_path / "data" / "c")
    words = [*SMALL, "algorithm=fedavg", f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'run'}"]
    assert train.main([*words, "protocol=leave_one_site_out", "evaluation.grid=network"]) == 0
    folder = RunFolder(tmp_path / "run")
    assert evaluate.main([str(folder.path)]) == 0
    assert set(folder.scores()["grid"]) == {"network"}
    assert evaluate.main([str(folder.path), "evaluation.grid=own"]) == 0
    scores = folder.scores().query("checkpoint != 'round'")
    assert set(scores["grid"]) == {"own"}
    assert set(scores["site"]) == {"a", "b", "c"}
    assert set(pd.read_csv(folder.path / "summary.csv")["grid"]) == {"own"}
    folder.summary_path.unlink()  # as of a run whose last fold was stopped
    capsys.readouterr()
    assert evaluate.main([str(folder.path)]) == 0
    assert f"not all folds are done, and none are gathered; go on: python train.py output={folder.path}" in (
        capsys.readouterr().out
    )
    assert not folder.summary_path.exists()
    assert train.main([f"output={folder.path}", "resume=true"]) == 0
    assert folder.summary_path.is_file()
