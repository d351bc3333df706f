"""Masks for new images: those that the run itself would give, in the images' own size and geometry."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import predict
import train
from datamodules.cases import Case
from datamodules.readers import Reading, put_back, read_case
from launch.gallery import predict_choices
from launch.reopen import Reopened
from reporting.folder import RunFolder
from tests.data_files import picture, save, save_volume, square

SMALL = (
    "data.size=32", "data.batch_size=4", "federation.rounds=2", "federation.local_steps=4", "trainer.threads=1",
    "trainer.accelerator=cpu", "evaluation.overlays=false", "evaluation.metrics=[dice]", "training.lr=0.01",
)  # fmt: skip
PHANTOM = ("data.n_sites=3", "data.cases_per_site=8", "data.amount=0", "data.resolution=32", "data.unseen=[site_03]")
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("zyx", [20, -15, 10], degrees=True).as_matrix() @ np.diag([-0.8, 1.2, 3.0])
OBLIQUE[:3, 3] = [30.0, -20.0, 7.0]


def trained(folder: Path, *settings: str) -> RunFolder:
    assert train.main([f"output={folder}", *SMALL, *settings]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module")
def ditto(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "ditto", *PHANTOM, "algorithm=ditto")


@pytest.fixture(scope="module")
def iopfl(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    small = ("algorithm=iopfl", "algorithm.adapt_passes=2", "federation.rounds=1", "data.cases_per_site=6")
    return trained(tmp_path_factory.mktemp("runs") / "iopfl", *PHANTOM, *small)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """FedPer on two sites of oblique volumes, whose data is gone after training."""
    home = tmp_path_factory.mktemp("volumes")
    for site, number in itertools.product("ab", range(6)):
        rng = np.random.default_rng(number)
        mask = np.zeros((20, 24, 4), np.uint8)
        mask[5:15, 6:16, 1:3] = 1
        image = (rng.normal(100, 10, mask.shape) + 60 * mask).astype(np.int16)
        save_volume(home / "data" / site / "images" / f"v{number}.nii.gz", image, OBLIQUE)
        save_volume(home / "data" / site / "masks" / f"v{number}.nii.gz", mask, OBLIQUE)
    settings = ("data=folder", f"data.root={home / 'data'}", "algorithm=fedper", "federation.local_steps=12")
    run = trained(home / "run", *settings)
    shutil.move(home / "data", home / "moved")
    return run


def moved(run: RunFolder) -> Path:
    return run.path.parent / "moved"


def cases_of(run: RunFolder, site: str) -> list[str]:
    splits = run.splits()
    return list(splits[(splits["site"] == site) & (splits["split"] == "test")]["case"])


def export_images(run: Reopened, site: str, folder: Path) -> list[str]:
    """The site's test cases as PNG files of the size of the network."""
    cases = cases_of(run.folder, site)
    for case in cases:
        save(folder / f"{case}.png", run.experiment.data.site(site).image(case)[0])
    return cases


def call(*arguments: Any) -> int:
    return predict.main([str(argument) for argument in arguments])


# -------------------------------------------------------------------------------------------- equal to the run's own


def reopened(run: RunFolder) -> Reopened:
    again = Reopened.read(run)
    again.prepare_data()
    return again


@pytest.mark.parametrize(
    ("method", "site", "view", "options"),
    [
        ("ditto", "site_01", "personal", ()),
        ("ditto", "site_02", "global", ("--view", "global")),
        ("ditto", "site_03", "global", ()),
        ("iopfl", "site_03", "adapted", ()),
    ],
)
def test_masks_are_those_of_the_run(
    method: str, site: str, view: str, options: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = reopened(request.getfixturevalue(method))
    cases = export_images(run, site, tmp_path / "new")
    out = tmp_path / "out"
    assert call(run.folder.path, "--site", site, "--images", tmp_path / "new", "--out", out, *options) == 0
    pictures = predict_choices(run, {site: cases})
    table = pd.read_csv(out / "sizes.csv").set_index(["image", "region"])
    assert len(table) == 2 * len(cases)
    for case in cases:
        for region, mask in zip(("disc", "cup"), pictures[site, case].predictions[view], strict=True):
            written = np.asarray(Image.open(out / "masks" / f"{case}_{region}.png"))
            assert written.dtype == np.uint8
            assert set(np.unique(written)) <= {0, 255}
            assert np.array_equal(written == 255, mask[0]), (case, region)
            assert table.loc[(case, region), "pixels"] == mask.sum()
            assert np.isnan(table.loc[(case, region), "area_mm2"])
        assert min(Image.open(out / "overlays" / f"{case}.png").size) > 400


def test_without_a_site_the_global_model_answers(ditto: RunFolder, tmp_path: Path) -> None:
    export_images(reopened(ditto), "site_01", tmp_path / "new")
    for name, options in {"a": (), "b": ("--site", "site_01", "--view", "global")}.items():
        out = tmp_path / name
        assert call(ditto.path, "--images", tmp_path / "new", "--out", out, "--no-overlay", *options) == 0
        assert not (out / "overlays").exists()
    assert (tmp_path / "a/sizes.csv").read_text() == (tmp_path / "b/sizes.csv").read_text()


def test_best_and_last_are_different_models(ditto: RunFolder, tmp_path: Path) -> None:
    best = Reopened.read(ditto).checkpoint.best()["personal/site_01"]
    export_images(reopened(ditto), "site_01", tmp_path / "new")
    written = {}
    for chosen in ("best", "last"):
        out = tmp_path / chosen
        arguments = ("--site", "site_01", "--checkpoint", chosen, "--probabilities", "--no-overlay")
        assert call(ditto.path, "--images", tmp_path / "new", "--out", out, *arguments) == 0
        written[chosen] = [np.load(path) for path in sorted((out / "probabilities").glob("*.npy"))]
    assert all(w.shape == (32, 32) and w.dtype == np.float32 for w in written["best"])
    same = all(np.array_equal(a, b) for a, b in zip(written["best"], written["last"], strict=True))
    assert same == (best.round == 2)


# ---------------------------------------------------------------------------------------------------------- geometry


def test_flat_images_keep_their_size_whatever_their_type(ditto: RunFolder, tmp_path: Path) -> None:
    new = tmp_path / "new"
    save(new / "a.png", picture(1, 50, 70))
    save(new / "b.jpg", picture(2, 64, 31))
    save(new / "c.tif", picture(3, 20, 24))
    save(new / "d.npy", picture(4, 33, 32))
    save(new / "grey.png", picture(5, 40, 40, channels=1))  # is repeated for a network that takes colour
    assert call(ditto.path, "--images", new, "--out", tmp_path / "out", "--probabilities") == 0
    for name, size in {"a": (50, 70), "b": (64, 31), "c": (20, 24), "d": (33, 32), "grey": (40, 40)}.items():
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}_disc.png"))
        chance = np.load(tmp_path / "out" / "probabilities" / f"{name}_disc.npy")
        assert mask.shape == chance.shape == size
        assert np.array_equal(mask == 255, chance > 0.5)
    assert call(ditto.path, "--images", new / "a.png", "--out", tmp_path / "one") == 0
    assert len(list((tmp_path / "one" / "masks").iterdir())) == 2


def test_volumes_keep_their_geometry_and_are_measured_in_millimetres(volumes: RunFolder, tmp_path: Path) -> None:
    source = moved(volumes) / "a" / "images"
    out = tmp_path / "out"
    assert call(volumes.path, "--site", "a", "--images", source, "--out", out, "--probabilities") == 0
    table = pd.read_csv(out / "sizes.csv").set_index("image")
    for path in sorted(source.iterdir()):
        name = path.name.removesuffix(".nii.gz")
        before = nibabel.load(path)
        mask, chance = (nibabel.load(out / kind / f"{name}_foreground.nii.gz") for kind in ("masks", "probabilities"))
        truth = nibabel.load(moved(volumes) / "a" / "masks" / path.name).get_fdata() > 0
        for written in (mask, chance):
            assert written.shape == before.shape
            assert np.array_equal(written.affine, before.affine)
            assert written.header["sform_code"] == before.header["sform_code"]
            assert written.header["qform_code"] == before.header["qform_code"]
            assert written.header.get_xyzt_units() == before.header.get_xyzt_units()
        assert mask.get_data_dtype() == np.uint8
        assert np.array_equal(mask.get_fdata() > 0, chance.get_fdata() > 0.5)
        inside = chance.get_fdata()[truth].mean()
        assert inside > chance.get_fdata()[~truth].mean() + 0.1, "probabilities lie where the structure is"
        assert table.loc[name, "pixels"] == (mask.get_fdata() > 0).sum()
        assert table.loc[name, "volume_mm3"] == pytest.approx(table.loc[name, "pixels"] * 0.8 * 1.2 * 3.0, rel=1e-5)
        assert np.isnan(table.loc[name, "area_mm2"])


def test_a_single_slice_has_an_area(volumes: RunFolder, tmp_path: Path) -> None:
    save_volume(tmp_path / "new" / "s.nii", picture(0, 20, 24, 1)[..., None].astype(np.int16), OBLIQUE)
    assert call(volumes.path, "--site", "b", "--images", tmp_path / "new", "--out", tmp_path / "out") == 0
    row = pd.read_csv(tmp_path / "out" / "sizes.csv").iloc[0]
    assert row["area_mm2"] == pytest.approx(row["pixels"] * 0.8 * 1.2, rel=1e-5)
    assert np.isnan(row["volume_mm3"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("turn", list(itertools.permutations(range(3)))[:4])
def test_slices_go_back_to_where_they_were_cut(
    axis: int, canonical: bool, turn: tuple[int, ...], tmp_path: Path
) -> None:
    affine = OBLIQUE.copy()
    affine[:3, :3] = OBLIQUE[:3, list(turn)] * [1, -1, 1]
    volume = np.random.default_rng(axis).integers(1, 255, (5, 6, 7), dtype=np.uint8)
    path = save_volume(tmp_path / "v.nii.gz", volume, affine)
    reading = Reading(axis=axis, canonical=canonical)
    sample = read_case(Case("s", "v", "v", str(path)), reading)
    back = put_back(sample.image[..., 0], path, reading)
    assert np.array_equal(np.asanyarray(back.dataobj), volume)
    assert np.array_equal(back.affine, nibabel.load(path).affine)


def test_scaling_of_the_stored_values_is_not_inherited(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 4, 2), np.int16), OBLIQUE)
    image.header.set_slope_inter(0.5, -10)
    image.header["cal_max"] = 300
    nibabel.save(image, tmp_path / "v.nii")
    back = put_back(np.ones((2, 4, 4), np.uint8), tmp_path / "v.nii", Reading())
    nibabel.save(back, tmp_path / "mask.nii")
    again = nibabel.load(tmp_path / "mask.nii")
    assert set(np.unique(again.get_fdata())) == {1.0}
    assert again.header["cal_max"] == 0


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--site", "site_9"), "no site 'site_9'; did you mean"),
        (("--view", "personal"), "no personal model for a site that took no part (name one of the run's with --site)"),
        (("--view", "adapted"), "no adapted model for a site that took no part"),
        (("--site", "site_03", "--view", "personal"), "no personal model for site 'site_03'; there is: global"),
        (("--site", "site_01", "--view", "adapted"), "there is: global, personal"),
    ],
)
def test_models_that_do_not_exist_are_refused(
    options: tuple[str, ...], message: str, ditto: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "new" / "a.png", picture(1))
    assert call(ditto.path, "--images", tmp_path / "new", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_method_without_a_global_model_wants_a_site(
    volumes: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(volumes.path, "--images", moved(volumes) / "a" / "images", "--out", tmp_path / "out") == 2
    assert "has no model for images of a new site; name one of its sites: a, b" in capsys.readouterr().err


def broken(folder: Path) -> None:
    save(folder / "fine.png", picture(1))
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")


def four_channels(folder: Path) -> None:
    save(folder / "four.npy", np.zeros((8, 8, 4), np.uint8))


def twins(folder: Path) -> None:
    save(folder / "x.png", picture(1))
    save(folder / "x.jpg", picture(1))


def stranger(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken, "torn.png cannot be read"),
        (four_channels, "four.npy has 4 channel(s), the network takes 3"),
        (twins, "x.png is the same case as x.jpg"),
        (stranger, "notes.txt is none of"),
        (lambda folder: folder.mkdir(), "holds no image"),
        (lambda folder: None, "does not exist; give a folder of images"),
    ],
)
def test_images_that_cannot_be_used_are_named_before_anything_is_written(
    make: Any, message: str, ditto: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "new")
    assert call(ditto.path, "--images", tmp_path / "new", "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_runs_must_be_runs(
    ditto: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "new" / "a.png", square())
    assert call(ditto.path, "--images", tmp_path / "new", "--out", tmp_path / "new") == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err
    assert call(tmp_path, "--images", tmp_path / "new", "--out", tmp_path / "out") == 2
    assert "holds no run" in capsys.readouterr().err
    shutil.copytree(ditto.path, tmp_path / "old")
    (tmp_path / "old" / "inputs.json").unlink()
    assert call(tmp_path / "old", "--images", tmp_path / "new", "--out", tmp_path / "out") == 2
    assert "resume=true writes it again" in capsys.readouterr().err
