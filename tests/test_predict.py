"""Masks for new images: those that the run itself would give, in the images' own size and geometry."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.spatial.transform import Rotation

import predict
import train
from fedseg.datamodules.cases import Case
from fedseg.datamodules.readers import Reading, put_back, read_case
from fedseg.launch import prediction
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.launch.scores.gallery import predict_choices
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.overlays import Picture, draw_prediction
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "site", "view", "options"),
    [
        ("ditto", "site_01", "personal", ()),
        ("ditto", "site_02", "global", ("--view", "global")),
        pytest.param("ditto", "site_03", "global", (), marks=pytest.mark.exhaustive),
        ("iopfl", "site_03", "adapted", ()),
    ],
)
@pytest.mark.usefixtures("rendered")
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


@pytest.mark.slow
def test_without_a_site_the_global_model_answers(ditto: RunFolder, tmp_path: Path) -> None:
    export_images(reopened(ditto), "site_01", tmp_path / "new")
    for name, options in {"a": (), "b": ("--site", "site_01", "--view", "global")}.items():
        out = tmp_path / name
        assert call(ditto.path, "--images", tmp_path / "new", "--out", out, "--no-overlay", *options) == 0
        assert not (out / "overlays").exists()
    assert (tmp_path / "a/sizes.csv").read_text() == (tmp_path / "b/sizes.csv").read_text()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "written"), [(".nrrd", ".nrrd"), (".nhdr", ".nrrd"), (".mha", ".mha"), (".mhd", ".mha")]
)
def test_volumes_of_other_formats_keep_theirs(volumes: RunFolder, tmp_path: Path, ending: str, written: str) -> None:
    """The same volume stored as NIfTI and in another format gets the same mask in the same place."""
    source = next(iter(sorted((moved(volumes) / "a" / "images").iterdir())))
    image = SimpleITK.ReadImage(str(source))
    (tmp_path / "new").mkdir()
    SimpleITK.WriteImage(image, str(tmp_path / "new" / f"v{ending}"))
    shutil.copy(source, tmp_path / "v.nii.gz")
    words = ("--site", "a", "--probabilities", "--no-overlay")
    assert call(volumes.path, "--images", tmp_path / "v.nii.gz", "--out", tmp_path / "one", *words) == 0
    assert call(volumes.path, "--images", tmp_path / "new", "--out", tmp_path / "two", *words) == 0
    image = SimpleITK.ReadImage(str(tmp_path / "new" / f"v{ending}"))
    for kind in ("masks", "probabilities"):
        expected = SimpleITK.ReadImage(str(tmp_path / "one" / kind / "v_foreground.nii.gz"))
        found = SimpleITK.ReadImage(str(tmp_path / "two" / kind / f"v_foreground{written}"))
        assert [path.name for path in (tmp_path / "two" / kind).iterdir()] == [f"v_foreground{written}"]
        assert found.GetSize() == image.GetSize()
        for place in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(found, place)() == pytest.approx(getattr(image, place)(), abs=1e-9)
            assert getattr(found, place)() == pytest.approx(getattr(expected, place)(), abs=1e-4)
        arrays = [SimpleITK.GetArrayFromImage(one) for one in (found, expected)]
        assert arrays[0].dtype == arrays[1].dtype
        assert np.array_equal(*arrays)
        assert len(np.unique(arrays[0])) > 1
    sizes = [pd.read_csv(tmp_path / name / "sizes.csv")["volume_mm3"][0] for name in ("one", "two")]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


@pytest.mark.slow
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


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """Off the centre in every direction."""
    places = np.indices(shape).T - centre
    return np.asarray(((places**2).sum(-1) <= radius**2).T)


@pytest.mark.slow
def test_masks_lie_where_the_structure_is_in_the_world(neighbours: RunFolder, tmp_path: Path) -> None:
    mask = ball((24, 20, 12), (7, 13, 3), 3)
    truth = nibabel.Nifti1Image(mask.astype(np.uint8), OBLIQUE)
    centres = {}
    for codes in ("LPS", "RAS", "IPR"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(OBLIQUE), nibabel.orientations.axcodes2ornt(codes)
        )
        turned = truth.as_reoriented(turn)
        there = np.asanyarray(turned.dataobj) > 0
        file = save_volume(tmp_path / f"{codes}.nii.gz", noisy(there, 1), turned.affine)
        out = tmp_path / codes
        assert call(neighbours.path, "--images", file, "--out", out, "--no-overlay") == 0
        written = nibabel.load(out / "masks" / f"{codes}_foreground.nii.gz")
        found = written.get_fdata() > 0
        assert 2 * (found & there).sum() / (found.sum() + there.sum()) > 0.7, codes
        centres[codes] = nibabel.affines.apply_affine(written.affine, np.argwhere(found)).mean(0)
    expected = nibabel.affines.apply_affine(OBLIQUE, np.argwhere(mask)).mean(0)
    for codes, centre in centres.items():
        assert np.abs(centre - expected).max() < 1.0, codes


def noisy(mask: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(100, 5, mask.shape) + 150 * mask).astype(np.int16)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """FedAvg on volumes with a bright ball somewhere, each slice with those beside it."""
    home = tmp_path_factory.mktemp("neighbours")
    for site, number in itertools.product("ab", range(5)):
        rng = np.random.default_rng(number)
        mask = ball((24, 20, 12), tuple(rng.uniform((5, 5, 3), (19, 15, 9))), 3)
        save_volume(home / "data" / site / "images" / f"v{number}.nii.gz", noisy(mask, number), OBLIQUE)
        save_volume(home / "data" / site / "masks" / f"v{number}.nii.gz", mask.astype(np.uint8), OBLIQUE)
    settings = ("data=folder", f"data.root={home / 'data'}", "data.neighbours=1", "algorithm=fedavg")
    return trained(home / "run", *settings, "federation.local_steps=30", "data.foreground_slices_only=true")


@pytest.fixture(scope="module")
def exclusive(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """FedAvg with regions that exclude each other, one of them named as the end of the other."""
    settings = ("algorithm=fedavg", "data.exclusive=true", "data.regions={rim_cup: [1], cup: [2]}")
    return trained(tmp_path_factory.mktemp("runs") / "exclusive", *PHANTOM, *settings)


@pytest.mark.slow
def test_exclusive_regions_share_no_pixel(exclusive: RunFolder, tmp_path: Path) -> None:
    cases = export_images(reopened(exclusive), "site_01", tmp_path / "new")
    out = tmp_path / "out"
    assert call(exclusive.path, "--images", tmp_path / "new", "--out", out, "--probabilities", "--no-overlay") == 0
    for case in cases:
        rim, cup = (np.load(out / "probabilities" / f"{case}_{name}.npy") for name in ("rim_cup", "cup"))
        winner = np.stack([1 - rim - cup, rim, cup]).argmax(0)
        for label, name in enumerate(("rim_cup", "cup"), 1):
            written = np.asarray(Image.open(out / "masks" / f"{case}_{name}.png")) == 255
            assert np.array_equal(written, winner == label)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """FedAvg on stacks of 16-bit files."""
    home = tmp_path_factory.mktemp("stacked")
    for site, patient in itertools.product("ab", range(5)):
        mask = ball((4, 20, 24), (2, 8, 15), 3)
        image = noisy(mask, patient).astype(np.uint16) * (1 + patient)
        for k in range(4):
            save(home / "data" / site / "images" / f"p{patient}_{k}.png", image[k])
            save(home / "data" / site / "masks" / f"p{patient}_{k}.png", mask[k].astype(np.uint8))
    settings = ("data=folder", f"data.root={home / 'data'}", "data.stack_slices=true", "algorithm=fedavg")
    return trained(home / "run", *settings, r"data.patient_pattern=^(.+)_\d+$")


@pytest.mark.slow
def test_slices_of_a_stack_are_predicted_as_a_volume(
    stacked: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = stacked.path.parent / "data" / "a" / "images"
    assert call(stacked.path, "--images", images, "--out", tmp_path / "flat") == 2
    told = capsys.readouterr().err
    assert "p0_0.png are scaled, which the run did over all slices" in told
    assert "give the patient's slices as one NIfTI volume" in told
    run = reopened(stacked)
    case = cases_of(stacked, "a")[0]
    slices = np.stack([np.asarray(Image.open(images / f"{case}_{k}.png")) for k in range(4)])
    file = save_volume(tmp_path / f"{case}.nii.gz", slices.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert call(stacked.path, "--images", file, "--out", tmp_path / "out", "--probabilities", "--no-overlay") == 0
    written = nibabel.load(tmp_path / "out" / "probabilities" / f"{case}_foreground.nii.gz").get_fdata()
    models = SavedModels(run)
    batches = list(run.experiment.data.site("a").eval_batches("test"))
    place = [k for k, name in enumerate(name for b in batches for name in b["case"]) if name == case]
    worker = models.load("global", None)
    small = torch.cat([worker.predict(b["image"], "global") for b in batches])[place].numpy()
    expected = np.stack([cv2.resize(plane[0], (24, 20), interpolation=cv2.INTER_AREA) for plane in small])
    np.testing.assert_allclose(written.transpose(2, 1, 0), expected, atol=1e-6)


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
    told = (
        "has no model for images of a new site, since weights in segmentation_head stay at the sites; name one of its"
    )
    assert f"{told} sites: a, b" in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_any_name_that_can_be_written_can_be_drawn(ditto: RunFolder, tmp_path: Path) -> None:
    save(tmp_path / "new" / "a$\\no$ b.png", picture(1))  # no formula
    assert call(ditto.path, "--images", tmp_path / "new", "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "overlays" / "a$\\no$ b.png") as drawn:
        drawn.verify()


def test_overlays_show_the_whole_image_in_its_proportions() -> None:
    mask = np.zeros((1, 3, 20, 90), bool)
    mask[0, 1, 2:18, 3:88] = True
    shown = Picture("s", "x", np.zeros((3, 20, 90, 1), np.uint8), None, {"global": mask}, aspect=2.5)
    drawn = draw_prediction(shown, ["r"])
    assert len(drawn.axes) == 2
    for axis in drawn.axes:
        assert (axis.get_xlim(), axis.get_ylim()) == ((-0.5, 89.5), (19.5, -0.5))
        assert axis.get_aspect() == 2.5
    assert drawn.get_suptitle() == "x, slice 2 of 3\nr"


def not_utf8(folder: Path) -> None:
    save(folder / "fine.png", picture(1)).rename(folder / os.fsdecode(b"r\xf6ntgen.png"))


def same_masks(folder: Path) -> None:
    save(folder / "x.png", picture(1))
    save(folder / "x_rim.png", picture(2))


@pytest.mark.slow
def test_names_are_looked_at_before_the_work(
    exclusive: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for make, message in {
        not_utf8: r"'r\udcf6ntgen' cannot name files and rows; names must be printable",
        same_masks: "x.png and {folder}/x_rim.png would both have a mask called x_rim_cup; rename one",
    }.items():
        folder = tmp_path / make.__name__
        make(folder)
        assert call(exclusive.path, "--images", folder, "--out", tmp_path / "out") == 2
        assert message.format(folder=folder) in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_is_whole_or_not_there(
    ditto: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "new" / "a.png", picture(1))
    save(tmp_path / "new" / f"{'b' * 200}.png", picture(2))
    arguments = (ditto.path, "--images", tmp_path / "new", "--no-overlay", "--out")
    (tmp_path / "empty").mkdir()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "write_atomic", interrupted)  # of the table, which comes last
        for out in ("out", "empty"):
            assert call(*arguments, tmp_path / out) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]
    assert not any((tmp_path / "empty").iterdir())
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert call(*arguments, tmp_path / "file" / "out") == 2
    assert "image(s)" not in capsys.readouterr().out, "known before the work"
    for out in ("out", "empty"):
        assert call(*arguments, tmp_path / out) == 0
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == ["masks", "sizes.csv"]


@pytest.mark.slow
def test_values_of_another_kind_than_in_training_are_told(
    volumes: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((volumes.path / "inputs.json").read_text())["values"] == ["float32"]
    for kind in (np.uint8, np.int16):
        volume = picture(0, 20, 24, 4).astype(kind)
        file = save_volume(tmp_path / f"{kind.__name__}.nii", volume, OBLIQUE)
        out = tmp_path / f"{kind.__name__}-out"
        assert call(volumes.path, "--site", "a", "--images", file, "--out", out, "--no-overlay") == 0
        told = "uint8.nii: is 8-bit, but the images of training were not 8-bit" in capsys.readouterr().err
        assert told == (kind is np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("inputs.json", "{}", "inputs.json does not say how many channels the network takes; train.py output="),
        ("inputs.json", "[3]", "inputs.json does not say how many channels the network takes; train.py output="),
        ("splits.csv", None, "splits.csv is missing or empty; restore it from a copy of the run"),
        (
            "config.yaml",
            {"privacy": {"max_epsilon": 3}},
            "config.yaml: settings of this run can no longer be used: priv",
        ),
    ],
)
def test_damaged_runs_are_told(
    name: str,
    content: str | dict[str, Any] | None,
    message: str,
    ditto: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(ditto.path, tmp_path / "run")
    file = tmp_path / "run" / name
    if isinstance(content, dict):  # settings beside those of the run
        content = OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(file), content))
    file.unlink() if content is None else file.write_text(content)
    save(tmp_path / "new" / "a.png", square())
    assert call(tmp_path / "run", "--images", tmp_path / "new", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


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
