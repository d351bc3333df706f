"""MONAI bundles: with MONAI alone they write the masks that predict.py writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow, verify_net_in_out
from PIL import Image

import export
import predict
import train
from fedseg.datamodules import DATASETS, Case, FolderDataModule, MultiCenterDataModule, Sample
from fedseg.launch.exports import bundle_steps
from fedseg.launch.exports.bundle import reads_plainly
from tests.data_files import picture, save, save_volume
from tests.test_export import SMALL
from tests.test_predict import OBLIQUE
from tests.test_three_dimensions import SMALL as VOLUME
from tests.tiers import every

NETWORK = tuple(word for word in SMALL if word.split("=")[0] not in {"data.n_sites", "data.unseen"})
TURNS = [[[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, 1]], [[1, 1], [2, 1], [0, -1]]]
FILES = tuple(word for word in NETWORK if not word.startswith(("data.cases", "data.amount", "data.resolution")))


def pictures(folder: Path, *, masks: bool) -> None:
    """Grey and colour, of 8 and of 16 bits, larger and smaller than the network's size."""
    kinds = {
        "colour.png": picture(1, 50, 70),
        "grey.png": picture(2, 20, 44, 1),
        "deep.png": picture(3, 33, 31, 1).astype(np.uint16) * 100,
        "clear.png": np.dstack([picture(4, 40, 24), np.full((40, 24), 9, np.uint8)]),
    }
    for number in range(6 if masks else 0):
        mask = np.zeros((40, 48), np.uint8)
        mask[5:30, 8:30], mask[10:20, 12:20] = 1, 2
        save(folder.parent / "masks" / f"c{number}.png", mask)
        save(folder / f"c{number}.png", np.repeat(mask[..., None] * 60 + 40, 3, axis=2).astype(np.uint8))
    for name, image in ({} if masks else kinds).items():
        save(folder / name, image)


def volumes(folder: Path, *, masks: bool, modalities: tuple[str, ...] = ()) -> None:
    """Oblique and differently oriented, 8-bit and not, of several thicknesses."""
    for number in range(6 if masks else 4):
        rng = np.random.default_rng(number)
        mask = np.zeros((24 + number, 22, 10 + number % 2), np.uint8)
        mask[5:17, 6:18, 2:8], mask[8:14, 9:15, 3:6] = 1, 2
        affine = OBLIQUE @ np.diag([1, 1, 0.2 if number == 3 else 1 + 0.3 * (number % 3), 1])
        for modality in modalities or ("",):
            values = rng.normal(100, 10, mask.shape) + (60 - 90 * (modality == "t1")) * mask.astype(float)
            kind = np.uint8 if number == 1 and not masks else np.int16
            values[:3] = values[-2:] = values[:, :4] = values[..., :1] = 0
            end = f"_{modality}" if modality else ""
            store(folder / f"v{number}{end}.nii.gz", values.clip(0, 255).astype(kind), affine, TURNS[number % 3])
        if masks:
            store(folder.parent / "masks" / f"v{number}.nii.gz", mask, affine, TURNS[number % 3])


def store(path: Path, array: np.ndarray, affine: np.ndarray, turn: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine).as_reoriented(np.array(turn)), path)


def two_modalities(folder: Path, *, masks: bool) -> None:
    """New cases lack one at times."""
    volumes(folder, masks=masks, modalities=("flair", "t1"))
    for name in () if masks else ("v0_t1", "v2_flair"):
        (folder / f"{name}.nii.gz").unlink()


KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "pictures": (pictures, ("data.size=32", *FILES, "data.regions={disc: [1, 2], cup: [2]}")),
    "luminance": (
        pictures,
        (*FILES, "data.channels=1", "data.scale_8bit=true", "data.exclusive=true", "training.harmonise=histogram",
         "data.regions={rim: [1], 'cup:it': [2]}"),
    ),
    "slices": (
        volumes,
        (*FILES, "data.neighbours=1", "data.exclusive=true", "data.regions={rim: [1], cup: [2]}",
         "training.normalize=zscore", "data.axis=1", "data.intensity=window", "data.window=[20, 220]"),
    ),
    "patches": (
        volumes,
        (*FILES, "data.fit=patches", "data.size=16", "data.resample=[1, 1.5]", "data.canonical=false", "data.axis=2",
         "data.regions={whole: [1, 2]}", "data.spacing=[2, 1.1, 0.9]"),
    ),
    "volumes": (
        two_modalities,
        (*VOLUME, "data.modalities=[flair, t1]", "data.missing_modalities=zeros", "data.crop_background=true",
         "data.scale_8bit=true", "data.resample=[3, 1, 1]", "data.exclusive=true",
         "data.regions={rim: [1], cup: [2]}", "training.normalize=zscore"),
    ),
    "own grid": (
        volumes,
        (*VOLUME, "data.regions={whole: [1, 2]}", "training.normalize=none", "data.intensity=zscore"),
    ),
}  # fmt: skip


def bundled(home: Path, kind: str) -> None:
    """A run of two sites, its bundles, images from elsewhere, and the masks that predict.py writes for them."""
    make, settings = KINDS[kind]
    for site in ("a", "b"):
        make(home / "data" / site / "images", masks=True)
    make(home / "new", masks=False)
    words = ["data=folder", f"data.root={home / 'data'}", "algorithm=fedavg", *settings, "federation.local_steps=12"]
    assert train.main([*words, f"output={home / 'run'}", "training.lr=0.02"]) == 0
    assert export.main([str(home / "run"), "--out", str(home / "out"), "--bundle"]) == 0
    given = ["--images", str(home / "new"), "--out", str(home / "masks"), "--no-overlay"]
    assert predict.main([str(home / "run"), *given]) == 0


def same_masks(written: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert names == sorted(path.name for path in written.iterdir())
    total = 0
    for name in names:
        if name.endswith(".png"):
            own, other = (np.asarray(Image.open(folder / name)) for folder in (written, expected))
        else:
            files = [nibabel.load(folder / name) for folder in (written, expected)]
            own, other = (np.asarray(file.dataobj) for file in files)
            assert np.array_equal(files[0].affine, files[1].affine)
            assert files[0].header.get_xyzt_units() == files[1].header.get_xyzt_units()
        assert own.dtype == other.dtype
        assert np.array_equal(own, other), name
        total += int((own > 0).sum())
    assert total > 0


def workflow(bundle: Path, home: Path, **overrides: Any) -> ConfigWorkflow:
    """The bundle in this process, where `scripts` is a package of this repository."""
    config = (bundle / "configs" / "inference.json").read_text()
    config = config.replace("scripts.steps.", "fedseg.launch.exports.bundle_steps.")
    (bundle / "configs" / "here.json").write_text(config)
    told = {"bundle_root": str(bundle), "dataset_dir": str(home / "new"), "output_dir": str(home / "written")}
    return ConfigWorkflow(
        str(bundle / "configs" / "here.json"), workflow_type="inference", logging_file=False, **told | overrides
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", every(KINDS, ["pictures"]))
def test_a_bundle_writes_the_masks_that_predict_writes(kind: str, tmp_path: Path) -> None:
    bundled(tmp_path, kind)
    bundle = tmp_path / "out" / "global"
    made = workflow(bundle, tmp_path)
    made.initialize()
    assert made.check_properties() == []
    made.run()
    same_masks(tmp_path / "written", tmp_path / "masks" / "masks")
    assert (bundle / "scripts" / "steps.py").read_text() == Path(bundle_steps.__file__).read_text()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    check_metadata(metadata)
    verify_net_in_out("network_def", str(bundle / "configs/metadata.json"), str(bundle / "configs/here.json"),
                      device="cpu", bundle_root=str(bundle))  # fmt: skip


def check_metadata(metadata: dict[str, Any]) -> None:
    """Keys that MONAI's specification of bundles demands."""
    words = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
             "copyright")  # fmt: skip
    assert all(isinstance(metadata[word], str) and metadata[word] for word in words)
    assert all(isinstance(metadata[key], dict) for key in ("changelog", "required_packages_version"))
    (image,), (pred,) = (metadata["network_data_format"][part].values() for part in ("inputs", "outputs"))
    for told in (image, pred):
        assert told["type"] == "image"
        assert isinstance(told["is_patch_data"], bool)
        assert told["num_channels"] == len(told["channel_def"])
        assert all(isinstance(side, int) for side in told["spatial_shape"])
        assert {"format", "modality", "dtype", "value_range"} <= told.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", every(["pictures", "volumes"], ["pictures"]))
def test_a_bundle_runs_where_the_suite_is_not_there(kind: str, tmp_path: Path) -> None:
    bundled(tmp_path, kind)
    names = "algorithms configs datamodules evaluation federation fedseg launch models privacy reporting"
    guard = f"import sys\nfor name in {names!r}.split(): sys.modules[name] = None\n"
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(guard)
    bundle = tmp_path / "out" / "global"
    command = (bundle / "docs" / "README.md").read_text().partition("```sh\n")[2].partition("\n```")[0]
    words = command.replace("IMAGES", str(tmp_path / "new")).replace("MASKS", str(tmp_path / "written")).split()
    assert words[:4] == ["python", "-m", "monai.bundle", "run"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=bundle, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "guard")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same_masks(tmp_path / "written", tmp_path / "masks" / "masks")


class Own(FolderDataModule):
    """Reads in its own way, new images too."""

    def read(self, case: Case) -> Sample:
        return super().read(case)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        *((kind, name != "lgg") for name, kind in DATASETS.items()),
        (Own, False),
        (type("New", (Own,), {"read_new": Own.read}), False),
    ],
)
def test_a_bundle_reads_as_the_suite_s_own_readers_do(kind: type[MultiCenterDataModule], plain: bool) -> None:
    assert reads_plainly(kind.__new__(kind)) == plain


@pytest.mark.slow
def test_what_a_bundle_could_not_read_alike_is_refused_and_the_cure_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([f"output={tmp_path / 'run'}", "algorithm=fedavg", *SMALL, "federation.rounds=1"]) == 0
    monkeypatch.setattr("fedseg.launch.export.reads_plainly", lambda data: False)
    command = [str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert export.main([*command, "--bundle"]) == 2
    assert "PhantomDataModule reads files in a way of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export.main(command) == 0


@pytest.mark.parametrize(
    ("files", "modalities", "told"),
    [
        ((), (), "holds no image; set --dataset_dir"),
        (("a.tif",), (), "a.tif is none of .nii.gz"),
        (("a.png", "a.jpg"), (), "are the same case"),
        (("a_t1.nii.gz",), ("flair", "t1"), "a has no flair; add it"),
        (("a_t1.nii.gz", "b.nii.gz"), ("flair", "t1"), "ends on none of flair, t1; rename it"),
    ],
)
def test_folders_that_a_bundle_cannot_take_are_refused(
    files: tuple[str, ...], modalities: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=told):
        bundle_steps.cases(str(tmp_path), modalities)


@pytest.mark.parametrize(
    ("name", "image", "told"),
    [
        ("turned.jpg", "exif", "turned by its EXIF orientation"),
        ("slice.png", "deep", "scaled by patient; give the patient's volume"),
        ("six.nii.gz", "six", "has 6 channel"),
        ("nan.nii.gz", "nan", "not finite; replace them"),
    ],
)
def test_images_that_a_bundle_cannot_take_are_refused(name: str, image: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if image == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture(1)).save(path, exif=exif)
    elif image == "deep":
        save(path, picture(1, channels=1).astype(np.uint16) * 9)
    else:
        values = np.full((4, 5, 6, 6), 7.0 if image == "six" else np.nan, np.float32)
        save_volume(path, values if image == "six" else values[..., 0])
    steps = (
        bundle_steps.Read("auto", True, None),
        bundle_steps.Scale("percentile", (0.5, 99.5), None, False, stacked=True),
        bundle_steps.Fit((4, 4), None, False),
        bundle_steps.ToInput(3, 0, 2),
    )
    (item,) = bundle_steps.cases(str(tmp_path), ())
    with pytest.raises(ValueError, match=told):
        reduce(lambda read, step: step(read), steps, item)
