"""Pictures of chosen cases, predicted anew from the folders of several runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import train
from fedseg.evaluation import score
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.scores.gallery import draw_cases, predict_choices
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.overlays import draw_case
from tests.data_files import make_sites
from tests.test_own_grid import flat_sites, volume_sites

SMALL = (
    "data.size=32", "data.batch_size=2", "federation.rounds=2", "federation.local_steps=2", "trainer.threads=1",
    "trainer.accelerator=cpu", "evaluation.overlays=false", "evaluation.metrics=[dice]",
)  # fmt: skip
PHANTOM = ("data.n_sites=3", "data.cases_per_site=8", "data.amount=0", "data.resolution=32", "data.unseen=[site_03]")


def trained(folder: Path, *settings: str) -> RunFolder:
    assert train.main([f"output={folder}", *SMALL, *settings]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    home = tmp_path_factory.mktemp("runs")
    return {name: trained(home / name, *PHANTOM, f"algorithm={name}") for name in ("ditto", "fedbn")}


def case_of(run: RunFolder, site: str) -> str:
    splits = run.splits()
    return str(splits[(splits["site"] == site) & (splits["split"] == "test")]["case"].iloc[-1])


@pytest.mark.slow
def test_every_chosen_case_has_a_picture(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    choices = {site: [case_of(runs["ditto"], site)] for site in ("site_01", "site_03")}
    drawn = draw_cases(runs, choices, tmp_path)
    assert set(drawn) == {(site, cases[0]) for site, cases in choices.items()}
    for (site, case), path in drawn.items():
        assert path == tmp_path / site / f"{case}.png"
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_masks_are_those_that_the_run_scored(runs: dict[str, RunFolder], checkpoint: str) -> None:
    run = Reopened.read(runs["ditto"])
    run.prepare_data()
    case = case_of(runs["ditto"], "site_02")
    picture = predict_choices(run, {"site_02": [case]}, checkpoint)["site_02", case]
    assert set(picture.predictions) == {"global", "personal"}
    scores = run.folder.scores().query("checkpoint == @checkpoint and split == 'test' and site == 'site_02'")
    for view, masks in picture.predictions.items():
        for region, mask, truth in zip(("disc", "cup"), masks, picture.truth, strict=True):
            row = scores.query("view == @view and region == @region and case == @case and metric == 'dice'")
            assert score(mask, truth, None, ("dice",), 1.0)["dice"] == pytest.approx(row["value"].item(), abs=1e-9)
            assert picture.scores[view][region] == row["value"].item()


@pytest.mark.slow
def test_a_run_without_a_model_for_a_site_says_so(runs: dict[str, RunFolder]) -> None:
    case = case_of(runs["fedbn"], "site_03")
    pictures = {}
    for name, folder in runs.items():
        run = Reopened.read(folder)
        run.prepare_data()
        pictures[name] = predict_choices(run, {"site_03": [case]})["site_03", case]
    figure = draw_case(pictures, ("disc", "cup"))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == ""
    assert titles[1].splitlines()[:2] == ["ditto", "Dice    global"]
    assert titles[2] == "fedbn\nno model for this site"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"site_01": ["case_9999"]}, "'case_9999' is no test case of site 'site_01'"),
        ({"site_9": ["case_0001"]}, "sites: site_01, site_02, site_03; test cases there: none"),
    ],
)
def test_unknown_places_are_named(
    runs: dict[str, RunFolder], choices: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReportingError, match=message):
        draw_cases(runs, choices, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "alike"), [("data.size=64", True), ("data.regions={disc: [1], cup: [2]}", False)])
def test_runs_are_shown_side_by_side_whose_truth_is_the_same(
    runs: dict[str, RunFolder], setting: str, alike: bool, tmp_path: Path
) -> None:
    """Whatever grid their networks have: pictures are on the cases' own."""
    other = trained(tmp_path / "other", *PHANTOM, "algorithm=fedavg", setting, "federation.rounds=1")
    choice = {"site_01": [case_of(other, "site_01")]}
    if alike:
        assert len(draw_cases(runs | {"other": other}, choice, tmp_path / "out")) == 1
        return
    with pytest.raises(ReportingError, match=r"truth of other is another one than that of ditto"):
        draw_cases(runs | {"other": other}, choice, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("make", [flat_sites, volume_sites])
def test_pictures_are_on_the_case_s_own_grid(make: Callable[[Path], str], tmp_path: Path) -> None:
    """Of the stored size and proportions, with the masks that the run kept."""
    ending = make(tmp_path / "data")
    words = ["data=folder", f"data.root={tmp_path / 'data'}", "algorithm=fedavg", "evaluation.predictions=true"]
    run = Reopened.read(trained(tmp_path / "run", *words, "model=tiny", "federation.rounds=1"))
    run.prepare_data()
    case = case_of(run.folder, "a")
    drawn = predict_choices(run, {"a": [case]})["a", case]
    flat = ending == "png"
    stored = run.experiment.data.site("a").at_own_size(run.experiment.data.site("a").cases("test")[-1])
    assert drawn.image.shape == (1, *stored.image.shape[1:])
    assert drawn.depth == len(stored.image)
    assert drawn.aspect == (1.0 if flat else stored.spacing[1] / stored.spacing[2])
    assert drawn.truth.shape == drawn.predictions["global"].shape == (1, *drawn.image.shape[:3])
    areas = (stored.labels == 1).sum(axis=(1, 2))
    assert drawn.truth.sum() == areas.max() == areas[drawn.number]
    (kept,) = (run.folder.predictions / "a" / "global").glob(f"{case}_*")
    if flat:
        assert np.array_equal(np.asarray(Image.open(kept)) > 0, drawn.predictions["global"][0, 0])
    else:  # whichever axis was cut, and however it was turned
        whole = np.asarray(nibabel.load(kept).dataobj) > 0
        (axis,) = (axis for axis in range(3) if whole.shape[axis] == drawn.depth)
        assert int(drawn.predictions["global"].sum()) in whole.sum(axis=tuple({0, 1, 2} - {axis})).tolist()


@pytest.mark.slow
def test_data_that_is_gone_or_changed_is_told(tmp_path: Path) -> None:
    data = make_sites(tmp_path / "data", "a", "b", count=8)
    run = trained(tmp_path / "run", "data=folder", f"data.root={data}", "algorithm=fedavg", "federation.rounds=1")
    choice = {"a": [case_of(run, "a")]}
    assert len(draw_cases({"one": run}, choice, tmp_path / "out")) == 1
    shutil.copy(data / "a/images/case_00.png", data / "a/images/case_77.png")
    shutil.copy(data / "a/masks/case_00.png", data / "a/masks/case_77.png")
    with pytest.raises(ReportingError, match="the data changed since this run began"):
        draw_cases({"one": run}, choice, tmp_path / "out")
    shutil.rmtree(data)
    with pytest.raises(ReportingError, match=r"run: the data of this run can no longer be read \(.*is no folder"):
        draw_cases({"one": run}, choice, tmp_path / "out")


def test_a_folder_without_checkpoint_is_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    shutil.copy(runs["ditto"].config_path, tmp_path / "config.yaml")
    with pytest.raises(ReportingError, match="holds no checkpoint yet"):
        draw_cases({"stopped": RunFolder(tmp_path)}, {"site_01": ["case_0001"]}, tmp_path / "out")
    with pytest.raises(ReportingError, match="no run is named"):
        draw_cases({}, {}, tmp_path / "out")
