"""Sites that lack a modality, and models that learn to do without some."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedseg.configs.compose import ConfigError, compose
from fedseg.datamodules import DataError, FolderDataModule, PhantomDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.check.report import tables
from fedseg.datamodules.new import NewImages
from fedseg.datamodules.public import public_images
from fedseg.launch import prediction
from fedseg.launch.experiment import Experiment
from fedseg.launch.exports import bundle_steps
from fedseg.launch.settings import SCHEMA
from fedseg.models import build_normalizer
from tests.data_files import folder, picture, save, save_volume, square, write_manifest

COUNT = 6
BOTH = {"modalities": ["flair", "t1"]}
NAMES = {"a": ("flair", "t1"), "b": ("flair",)}


def grey(number: int, place: int) -> np.ndarray:
    return 1 + picture(10 * number + place, channels=1) // 2


def by_ending(root: Path) -> None:
    for site, names in NAMES.items():
        for number in range(COUNT):
            for place, name in enumerate(names):
                save(root / site / "images" / f"p{number}_{name}.png", grey(number, place))
            save(root / site / "masks" / f"p{number}.png", square())


def sub_folders(root: Path) -> None:
    by_ending(root)
    for path in [*root.glob("*/images/*.png")]:
        name, modality = path.stem.split("_")
        (path.parent / modality).mkdir(exist_ok=True)
        path.rename(path.parent / modality / f"{name}.png")


def columns(root: Path) -> None:
    by_ending(root)
    write_manifest(root / "sites.csv", [
        {"site": site, "mask": f"{site}/masks/p{k}.png", "image_flair": f"{site}/images/p{k}_flair.png",
         "image_t1": f"{site}/images/p{k}_t1.png" * (site == "a")}
        for site in NAMES for k in range(COUNT)
    ])  # fmt: skip


# --- a site that lacks one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [by_ending, sub_folders, columns])
def test_a_site_says_what_it_lacks(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    with pytest.raises(DataError, match=r"data.missing_modalities=zeros"):
        folder(tmp_path, **BOTH)
    data = folder(tmp_path, **BOTH, lacks={"b": ["t1"]}, augment="strong")
    assert not [finding for finding in data.findings if finding.kind == "missing modality"]
    image = data.site("b").image("p0")
    np.testing.assert_array_equal(image[0, ..., 0], grey(0, 0))
    assert not image[..., 1].any()
    assert data.site("a").image("p0")[..., 1].any()
    for batch in data.site("b").train_batches(0, 4):
        assert not batch["image"][:, 1].any()
        assert batch["image"][:, 0].flatten(1).any(dim=1).all()
    if layout is not columns:
        (tmp_path / "b/site.yaml").write_text("lacks: [t1]\n")
    else:
        table = (
            (tmp_path / "sites.csv")
            .read_text()
            .replace("b/images/p0_flair.png,", "b/images/p0_flair.png,a/images/p0_t1.png")
        )
        (tmp_path / "sites.csv").write_text(table)
        with pytest.raises(DataError, match=r"'image_t1' is filled, although the site lacks it \(data.lacks\)"):
            folder(tmp_path, **BOTH, lacks={"b": ["t1"]})
        return
    told = FolderDataModule(root=str(tmp_path), **BOTH)
    checked = check(told)
    assert not [finding for finding in checked.findings if finding.severity == "error"]
    shown = {table.title: table.rows for table in tables(checked, told.regions, "", told.modalities)}
    assert [row[:3] for row in shown["Intensities"] if row[0] == "b"][1] == ("b", "t1", "lacks")
    assert [row[:2] for row in shown["Sites in that mixture"]] == [("a", "flair"), ("a", "t1"), ("b", "flair")]
    assert shown["Distance between sites: brightness"][0] == ("a", "0.0", "0.0")  # of FLAIR, the same images
    own = next(path for path in (tmp_path / "a/images").rglob("*p1*") if "t1" in str(path.relative_to(tmp_path)))
    own.unlink()
    with pytest.raises(DataError, match=r"site 'a', case 'p1'.*has no t1"):  # of other sites nothing is forgiven
        folder(tmp_path, **BOTH)
    save(tmp_path / "b" / own.relative_to(tmp_path / "a"), grey(1, 1))
    with pytest.raises(DataError, match=r"site 'b', case 'p1'.*although the site lacks t1"):
        folder(tmp_path, **BOTH, left_out=["a"])


def test_a_site_may_call_what_it_has_otherwise(tmp_path: Path) -> None:
    by_ending(tmp_path)
    for path in [*(tmp_path / "b/images").iterdir()]:
        path.rename(path.with_name(path.name.replace("flair", "FLAIR")))
    (tmp_path / "b/site.yaml").write_text("modalities: [FLAIR, T1w]\nlacks: [t1]\n")
    data = folder(tmp_path, **BOTH)
    assert data.site("b").image("p0")[..., 0].any()
    assert data.lacking("b") == ("t1",)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({**BOTH, "lacks": {"b": ["t2"]}}, "^site 'b' lacks 't2', which is no modality; Known: flair, t1"),
        ({**BOTH, "lacks": {"b": ["t1", "flair"]}}, "lacks all of flair, t1; leave one"),
        ({**BOTH, "lacks": {"b": ["t1"], "c": ["t1"]}}, "data.lacks: no site 'c'"),
        ({**BOTH, "lacks": {"b": ["t1"]}, "modality_dropout": 1.0}, "data.modality_dropout=1.0: a probability"),
    ],
)
def test_what_nobody_can_lack_is_refused(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    by_ending(tmp_path)
    with pytest.raises(DataError, match=message):
        folder(tmp_path, **knobs)


def test_one_image_alone_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.modality_dropout=0.5: images have one modality each; name several"):
        PhantomDataModule(n_sites=1, cases_per_site=5, resolution=32, size=32, modality_dropout=0.5).setup()
    with pytest.raises(DataError, match=r"lacks 't2', but data.modalities names no two"):
        PhantomDataModule(n_sites=1, cases_per_site=5, lacks={"site_01": ["t2"]}).cases()
    for settings, message in (
        (["data.modalities=[t1]", "data.anatomy=organ"], "known: t2, dwi, of data.anatomy=organ"),
        (["data.modalities=[t2]"], "known: t2, dwi, of data.anatomy=organ"),
        (["data.modalities=[t2,t2]", "data.anatomy=organ"], "names one twice"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            Experiment(compose(["algorithm=fedavg", *settings], SCHEMA)).data.cases()


def test_a_channel_is_a_modality_where_some_are_left_out(tmp_path: Path) -> None:
    for number in range(COUNT):
        for name in ("flair", "t1"):
            save(tmp_path / f"a/images/p{number}_{name}.png", picture(number))  # in colour
        save(tmp_path / f"a/masks/p{number}.png", square())
    with pytest.raises(DataError, match="one channel for each modality: 2 are named, and images have 6; save them in"):
        folder(tmp_path, **BOTH, modality_dropout=0.5)
    table = [{"site": "a", "image": f"a/images/p{k}_t1.png", "mask": f"a/masks/p{k}.png"} for k in range(COUNT)]
    write_manifest(tmp_path / "sites.csv", table)
    with pytest.raises(DataError, match=r"lacks 't1', but data.modalities names no two"):
        folder(tmp_path, lacks={"a": ["t1"]})
    found = check(FolderDataModule(root=str(tmp_path), lacks={"a": ["t1"]})).findings
    assert ["lacks 't1'" in one.what for one in found if one.kind == "layout"] == [True]


def test_a_bundle_takes_what_its_site_has_and_nothing_less(tmp_path: Path) -> None:
    for name in ("flair", "t1"):
        save(tmp_path / f"x_{name}.png", grey(1, 1))
    (case,) = bundle_steps.cases(str(tmp_path), ["flair", "t1c", "t1"], lacks=["t1c"])
    assert case["absent"] == [1]
    with pytest.raises(ValueError, match=r"x_flair.png is there, although the site lacks flair"):
        bundle_steps.cases(str(tmp_path), ["flair", "t1c", "t1"], lacks=["flair"])
    (tmp_path / "x_flair.png").unlink()
    with pytest.raises(ValueError, match="x has no flair; add it"):
        bundle_steps.cases(str(tmp_path), ["flair", "t1c", "t1"], lacks=["t1c"])


@pytest.mark.parametrize(
    ("method", "harmonise", "message"),
    [
        ("fedavg", "histogram", "site 'site_02' lacks dwi.*training.harmonise=none"),
        ("feddg", "none", "site 'site_02' lacks dwi.*algorithm=feddg would give.*take another method"),
    ],
)
def test_one_style_for_images_and_for_what_they_lack_is_refused(method: str, harmonise: str, message: str) -> None:
    small = [
        "data.n_sites=2",
        "data.cases_per_site=5",
        "data.size=32",
        "data.resolution=32",
        "data.modalities=[t2,dwi]",
    ]
    settings = [f"algorithm={method}", "data.anatomy=organ", *small, f"training.harmonise={harmonise}"]
    experiment = Experiment(compose([*settings, "data.lacks={site_02: [dwi]}"], SCHEMA))
    experiment.data.setup()
    with pytest.raises(ConfigError, match=message):
        experiment.check_sites()


# --- dropout ---------------------------------------------------------------------------------------------------------


def phantom(**knobs: Any) -> PhantomDataModule:
    data = PhantomDataModule(
        anatomy="organ",
        modalities=["t2", "dwi"],
        n_sites=2,
        cases_per_site=5,
        resolution=32,
        size=32,
        amount=0,
        **knobs,
    )
    data.setup()
    return data


def gone(data: PhantomDataModule, site: str = "site_01", steps: int = 40) -> np.ndarray:
    """(N, 2): of training images, whether a modality is 0 everywhere."""
    batches = data.site(site).train_batches(3, steps)
    return np.concatenate([(batch["image"].flatten(2) == 0).all(dim=2).numpy() for batch in batches])


@pytest.mark.parametrize("augment", ["none", "flips"])
def test_modalities_are_left_out_in_training_alone_but_for_one(augment: str) -> None:
    data = phantom(modality_dropout=0.4, augment=augment)
    found = gone(data)
    assert not found.all(axis=1).any()
    assert abs(found.mean() - (0.4 - 0.4**2 / 2)) < 0.06  # where both are drawn, one stays
    assert (found == gone(data)).all()  # in every turn of the same seed the same
    for batch in data.site("site_01").eval_batches("test"):
        assert (batch["image"].flatten(2).amax(dim=2) > 0).all()
    assert data.site("site_01").image("case_0001").all(axis=(0, 1, 2)).any()  # what is kept was not written to


def test_what_is_not_left_out_is_as_without() -> None:
    batches = [
        next(iter(phantom(**knobs).site("site_01").train_batches(3, 1)))["image"]
        for knobs in ({}, {"modality_dropout": 0.5})
    ]
    there = (batches[1].flatten(2) > 0).any(dim=2)
    assert there.any()
    assert not there.all()
    assert torch.equal(batches[0][there], batches[1][there])


def test_public_images_of_the_phantom_have_its_modalities() -> None:
    data = phantom(public="phantom", public_images=2)
    images = public_images(data, data.in_channels)
    assert images.shape == (2, 2, 32, 32)
    assert not torch.equal(images[:, 0], images[:, 1])


def test_a_site_that_lacks_one_keeps_the_other() -> None:
    found = gone(phantom(modality_dropout=0.9, lacks={"site_01": ["t2"]}))
    assert (found == [True, False]).all()


def test_of_neighbouring_slices_the_same_modality_lacks(tmp_path: Path) -> None:
    for number in range(COUNT):
        volume = np.random.default_rng(number).integers(50, 900, (20, 24, 4), dtype=np.int16)
        for name in ("flair", "t1")[: 1 if number < 4 else 2]:
            save_volume(tmp_path / "a/images" / f"p{number}_{name}.nii.gz", volume)
        mask = np.repeat(square()[..., None], 4, axis=2)
        save_volume(tmp_path / "a/masks" / f"p{number}.nii.gz", mask)
    data = folder(tmp_path, **BOTH, missing_modalities="zeros", neighbours=1, augment="strong", size=[24, 20])
    for batch in data.site("a").train_batches(0, 6):
        for case, image in zip(batch["case"], batch["image"], strict=True):
            lacks = int(case[1:]) < 4
            assert image[0::2].flatten(1).any(dim=1).all()
            assert image[1::2].flatten(1).any(dim=1).tolist() == [not lacks] * 3


# --- the network's input, and new images -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet", "zscore", "none"])
def test_what_lacks_is_zero_after_normalisation(name: Any) -> None:
    images = torch.rand(2, 2, 6, 5)
    images[1, 0] = 0
    plain, ours = build_normalizer(name, 2), build_normalizer(name, 2, absent_as_zero=True)
    expected = plain(images)
    expected[1, 0] = 0
    assert torch.equal(ours(images), expected)
    assert torch.equal(torch.jit.trace(ours, torch.rand(2, 2, 6, 5))(images), expected)
    volumes = images[:, :, None]
    assert torch.equal(ours(volumes)[:, :, 0], expected)
    assert not ours.state_dict()


def test_new_images_may_lack_what_their_site_lacks_or_what_a_model_learnt_to_do_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_ending(tmp_path / "sites")
    save(tmp_path / "new/x_flair.png", grey(50, 0))

    def read(site: str, **knobs: Any) -> list[tuple[int, ...]]:
        data = FolderDataModule(root=str(tmp_path / "sites"), size=[20, 24], **BOTH, lacks={"b": ["t1"]}, **knobs)
        images = NewImages(data, tmp_path / "new", 2, site)
        prediction._warn_of_absent(images)
        return [image.case.absent for image in images.images]

    assert read("b") == [(1,)]
    assert "warning" not in capsys.readouterr().err
    assert read("elsewhere", modality_dropout=0.2) == [(1,)]
    assert "warning: x has no t1; the network sees 0 in its place" in capsys.readouterr().err
    for site in ("a", "elsewhere"):
        with pytest.raises(DataError, match=r"x.*has no t1 beside it; add it, leave the case out, or set data.missing"):
            read(site)
    save(tmp_path / "new/x_t1.png", grey(50, 1))
    with pytest.raises(DataError, match="although the site lacks t1"):
        read("b")
