"""Small imitations of the named public layouts: they load, and what does not fit is named."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import predict
import train
from fedseg.datamodules import DATASETS, DataError, MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.layouts.acdc import ACDCDataModule
from fedseg.datamodules.layouts.fets import FeTSDataModule
from fedseg.datamodules.layouts.fundus import FundusDataModule
from fedseg.datamodules.layouts.lgg import LGGDataModule
from fedseg.datamodules.layouts.mnms import MnMsDataModule
from fedseg.datamodules.layouts.polyp import PolypDataModule
from fedseg.datamodules.layouts.prostate import ProstateDataModule
from fedseg.datamodules.layouts.vessels import VesselsDataModule
from fedseg.datamodules.new import write_map
from fedseg.datamodules.readers import Reading, read_case

SIDE = 24


def disk(radius: float, side: int = SIDE) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    return np.hypot(rows, columns) < radius


def colour(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def save(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        Image.fromarray(array).convert("P").save(path)
    else:
        Image.fromarray(array).save(path)


def prepared(module: type[MultiCenterDataModule], root: Path, **kwargs: Any) -> MultiCenterDataModule:
    data = module(root=str(root), **{"size": SIDE, "batch_size": 2, **kwargs})  # type: ignore[call-arg]
    data.setup()
    return data


def counts(data: MultiCenterDataModule) -> Counter[tuple[str, str]]:
    return Counter((row["site"], row["split"]) for row in data.splits())


def fails(module: type[MultiCenterDataModule], root: Path, *words: str) -> None:
    with pytest.raises(DataError) as raised:
        prepared(module, root)
    for word in words:
        assert word in str(raised.value)


# --- fundus -----------------------------------------------------------------------------------------------------------


def fundus_mask() -> NDArray[np.uint8]:
    grey = np.where(disk(4), 0, np.where(disk(9), 128, 255)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.fixture
def fundus(tmp_path: Path) -> Path:
    root = tmp_path / "Fundus"
    for domain in (1, 2):
        for split, names in (("train", 5), ("test", 2)):
            for number in range(names):
                name = f"{split}_{number:03d}.png"
                save(root / f"Domain{domain}/{split}/ROIs/image/{name}", colour(number))
                save(root / f"Domain{domain}/{split}/ROIs/mask/{name}", fundus_mask())
    return root


def test_fundus_grey_levels_become_rim_and_cup(fundus: Path) -> None:
    data = prepared(FundusDataModule, fundus)
    site = data.site("Domain1")
    truth = site.truth(site.cases("test")[0])
    assert np.array_equal(truth[0], np.where(disk(4), 2, np.where(disk(9), 1, 0)))
    batch = next(iter(site.eval_batches("test")))
    assert batch["mask"].shape == (2, 2, SIDE, SIDE)
    assert batch["mask"].sum(dim=(0, 2, 3)).tolist() == [2 * disk(9).sum(), 2 * disk(4).sum()]


def test_fundus_keeps_the_official_split_and_carves_out_val(fundus: Path) -> None:
    data = prepared(FundusDataModule, fundus)
    assert data.sites == ("Domain1", "Domain2")
    found = counts(data)
    for site in data.sites:
        assert found[site, "test"] == 2
        assert found[site, "val"] >= 1
        assert found[site, "train"] + found[site, "val"] == 5
        assert {case.case for case in data.site(site).cases("test")} == {"test_000", "test_001"}


def test_fundus_names_the_unpaired_file(fundus: Path) -> None:
    (fundus / "Domain2/train/ROIs/mask/train_003.png").unlink()
    fails(FundusDataModule, fundus, "'Domain2'", "train/ROIs/image/train_003.png has no mask")


def test_fundus_names_a_mask_without_image(fundus: Path) -> None:
    save(fundus / "Domain1/test/ROIs/mask/extra.png", fundus_mask())
    fails(FundusDataModule, fundus, "'Domain1'", "extra.png has no image")


def test_fundus_refuses_other_grey_levels(fundus: Path) -> None:
    save(fundus / "Domain1/train/ROIs/mask/train_001.png", np.full((SIDE, SIDE), 77, np.uint8))
    fails(FundusDataModule, fundus, "train_001", "77", "data.label_values")


def test_fundus_one_folder_too_high(fundus: Path) -> None:
    fails(FundusDataModule, fundus.parent, "expected", "ROIs/{image,mask}", "found Fundus/")


def test_fundus_refuses_a_site_of_another_layout(fundus: Path) -> None:
    (fundus / "Domain3").mkdir()
    fails(FundusDataModule, fundus, "nothing of the kind in Domain3")


@pytest.mark.parametrize("top", [255.0, 1.0])
def test_fundus_arrays(tmp_path: Path, top: float) -> None:
    image = colour(0).astype(np.float32) / 255 * top
    array = np.concatenate([image, disk(9)[..., None], disk(4)[..., None]], axis=2)
    for client in ("client1", "client2"):
        (tmp_path / client / "data_npy").mkdir(parents=True)
        (tmp_path / client / "freq_amp_npy").mkdir()
        for number in range(4):
            np.save(tmp_path / client / "data_npy" / f"sample{number}.npy", array)
    data = prepared(FundusDataModule, tmp_path, split=[0.5, 0.25, 0.25])
    site = data.site("client2")
    case = site.cases("test")[0]
    assert np.array_equal(site.truth(case)[0], np.where(disk(4), 2, np.where(disk(9), 1, 0)))
    assert np.allclose(site.image(case)[0], colour(0) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((SIDE, SIDE, 4), np.float32), "(24, 24, 4)"),
        (np.full((SIDE, SIDE, 5), -1, np.float32), "run from -1 to -1"),
        (np.full((SIDE, SIDE, 5), np.nan, np.float32), "nan"),
    ],
    ids=["channels", "negative", "nan"],
)
def test_fundus_refuses_other_arrays(tmp_path: Path, array: NDArray[Any], words: str) -> None:
    (tmp_path / "client1" / "data_npy").mkdir(parents=True)
    for number in range(3):
        np.save(tmp_path / "client1" / "data_npy" / f"sample{number}.npy", array)
    fails(FundusDataModule, tmp_path, "sample", words)


def test_fundus_names_a_broken_array(tmp_path: Path) -> None:
    (tmp_path / "client1" / "data_npy").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "client1" / "data_npy" / f"sample{number}.npy").write_bytes(b"no array")
    fails(FundusDataModule, tmp_path, "sample", "cannot be read")


# --- prostate ---------------------------------------------------------------------------------------------------------


def save_volume(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.5, 0.5, 3.0, 1.0])), path)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "prostate"
    for site, ending in (
        ("BIDMC", "_segmentation.nii.gz"),
        ("UCL", "_Segmentation.nii.gz"),
        ("HK", "_segmentation.nii"),
    ):
        for number in range(4):
            labels = np.zeros((SIDE, SIDE, 5), np.uint8)
            labels[..., 2:4] = np.where(disk(4), 2, disk(8))[..., None]
            image_type = ".nii.gz" if ending.endswith("gz") else ".nii"
            save_volume(
                root / site / f"Case{number:02d}{image_type}", rng.integers(0, 900, (SIDE, SIDE, 5)).astype(np.int16)
            )
            save_volume(root / site / f"Case{number:02d}{ending}", labels)
    return root


def test_prostate_volumes_in_all_spellings(volumes: Path) -> None:
    data = prepared(ProstateDataModule, volumes)
    assert data.sites == ("BIDMC", "HK", "UCL")
    for name in data.sites:
        site = data.site(name)
        case = site.cases("test")[0]
        truth = site.truth(case)
        assert truth.shape == (5, SIDE, SIDE)
        assert set(np.unique(truth)) == {0, 1}  # labels above 1 are prostate too
        assert truth.sum(axis=(1, 2)).tolist() == [0, 0, disk(8).sum(), disk(8).sum(), 0]
        assert site.spacing(case) == pytest.approx((3.0, 0.5, 0.5))
    assert sum(counts(data).values()) == 12


def test_prostate_trains_on_slices_with_prostate_and_scores_whole_volumes(volumes: Path) -> None:
    data = prepared(ProstateDataModule, volumes, foreground_slices_only=True)
    site = data.site("UCL")
    assert site.examples == 2 * len(site.cases("train"))
    scored = [int(number) for batch in site.eval_batches("test") for number in batch["slice"]]
    assert scored[:5] == [0, 1, 2, 3, 4]


def test_prostate_names_the_unpaired_volume(volumes: Path) -> None:
    (volumes / "UCL" / "Case02_Segmentation.nii.gz").unlink()
    fails(ProstateDataModule, volumes, "'UCL'", "Case02.nii.gz has no mask")


def test_prostate_names_what_is_there_instead(tmp_path: Path) -> None:
    save(tmp_path / "BIDMC" / "a.png", colour(0))
    fails(ProstateDataModule, tmp_path, "expected <site>/CaseXX.nii.gz", "nothing of the kind in BIDMC", "found BIDMC/")


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    root = tmp_path / "ProstateSlice"
    for site in ("BIDMC", "HK"):
        for split, patients in (("train", ("Case00", "Case01", "Case02")), ("test", ("Case03",))):
            for patient in patients:
                for number in (2, 9, 10):
                    grey = np.full((SIDE, SIDE), number * 10, np.uint8)
                    save(root / site / split / "image" / f"{patient}_{number}.png", grey)
                    save(
                        root / site / split / "mask" / f"{patient}_{number}.png",
                        disk(number / 2).astype(np.uint8) * 255,
                    )
    return root


def test_prostate_slices_of_a_case_are_one_stack_in_order(slices: Path) -> None:
    data = prepared(ProstateDataModule, slices)
    site = data.site("HK")
    assert [case.case for case in site.cases("test")] == ["Case03"]
    assert site.truth("Case03").sum(axis=(1, 2)).tolist() == [disk(r / 2).sum() for r in (2, 9, 10)]
    assert site.image("Case03")[:, 0, 0, 0].tolist() == [20, 90, 100]
    assert site.spacing("Case03") is None
    assert counts(data)["HK", "train"] + counts(data)["HK", "val"] == 3


def test_prostate_names_the_unpaired_slice(slices: Path) -> None:
    (slices / "HK" / "train" / "image" / "Case01_9.png").unlink()
    fails(ProstateDataModule, slices, "'HK'", "mask/Case01_9.png has no image")


def test_prostate_refuses_a_case_in_both_splits(slices: Path) -> None:
    for kind in ("image", "mask"):
        shutil.copy(slices / f"HK/train/{kind}/Case00_2.png", slices / f"HK/test/{kind}/Case00_2.png")
    fails(ProstateDataModule, slices, "'HK'", "'Case00'")


# --- polyp ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def polyp(tmp_path: Path) -> Path:
    root = tmp_path / "PraNet"
    mask = np.where(disk(7), 254, 3).astype(np.uint8)
    for number in range(4):
        for name in (f"cju0qk{number}", str(number + 1)):
            save(root / "TrainDataset/image" / f"{name}.png", colour(number))
            save(root / "TrainDataset/mask" / f"{name}.png", mask)
    for source, names in (
        ("Kvasir", ["cju2zz", "cju3zz"]),
        ("CVC-ClinicDB", ["77", "78"]),
        ("CVC-ColonDB", list("1234")),
        ("ETIS-LaribPolypDB", list("1234")),
        ("CVC-300", list("5678")),
    ):
        for name in names:
            save(root / "TestDataset" / source / "images" / f"{name}.png", colour(int(name[-1], 36)))
            save(root / "TestDataset" / source / "masks" / f"{name}.png", mask)
    return root


def test_polyp_tells_the_sources_apart(polyp: Path) -> None:
    data = prepared(PolypDataModule, polyp)
    assert data.sites == ("clinicdb", "colondb", "etis", "kvasir")
    assert {case.case for case in data.site("kvasir").cases("test")} == {"cju2zz", "cju3zz"}
    assert {case.case for case in data.site("clinicdb").cases("test")} == {"77", "78"}
    found = counts(data)
    assert found["kvasir", "train"] + found["kvasir", "val"] == 4
    assert found["colondb", "train"] >= 2
    assert found["colondb", "test"] >= 1


def test_polyp_masks_are_thresholded(polyp: Path) -> None:
    site = prepared(PolypDataModule, polyp).site("etis")
    assert np.array_equal(site.truth(site.cases("test")[0])[0], disk(7))


def test_polyp_takes_cvc300_when_asked(polyp: Path) -> None:
    assert "cvc300" in prepared(PolypDataModule, polyp, cvc300=True).sites


def test_polyp_takes_either_folder_name(polyp: Path) -> None:
    for kind in ("image", "mask"):
        (polyp / "TrainDataset" / kind).rename(polyp / "TrainDataset" / f"{kind}s")
    assert len(prepared(PolypDataModule, polyp).sites) == 4


def test_polyp_names_an_image_of_unknown_source(polyp: Path) -> None:
    for kind in ("image", "mask"):
        shutil.copy(polyp / f"TrainDataset/{kind}/1.png", polyp / f"TrainDataset/{kind}/frame_7.png")
    fails(PolypDataModule, polyp, "frame_7.png", "no known source")


def test_polyp_names_the_unpaired_file(polyp: Path) -> None:
    (polyp / "TestDataset/ETIS-LaribPolypDB/masks/3.png").unlink()
    fails(PolypDataModule, polyp, "'etis'", "images/3.png has no mask")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: shutil.rmtree(root / "TrainDataset"), ("expected TrainDataset", "found TestDataset/")),
        (lambda root: shutil.rmtree(root / "TestDataset/Kvasir/masks"), ("mask (or masks)", "found images/")),
        (lambda root: (root / "TestDataset/Kvasir").rename(root / "TestDataset/kvasir"), ("Kvasir", "kvasir/")),
    ],
    ids=["no train", "no masks", "name"],
)
def test_polyp_says_what_it_expected(polyp: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(polyp)
    fails(PolypDataModule, polyp, *words)


# --- vessels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vessels(tmp_path: Path) -> Path:
    root = tmp_path / "retina"
    mask = disk(3).astype(np.uint8) * 255
    for part, first in (("training", 21), ("test", 1)):
        for number in range(first, first + 3):
            save(root / f"DRIVE/{part}/images/{number:02d}_{part}.tif", colour(number))
            save(root / f"DRIVE/{part}/1st_manual/{number:02d}_manual1.gif", mask)
            save(root / f"DRIVE/{part}/mask/{number:02d}_{part}_mask.gif", disk(11).astype(np.uint8) * 255)
    for child in (1, 2, 3, 4):
        for eye in "LR":
            name = f"Image_{child:02d}{eye}"
            save(root / f"CHASE_DB1/{name}.jpg", colour(child))
            save(root / f"CHASE_DB1/{name}_1stHO.png", mask)
            save(root / f"CHASE_DB1/{name}_2ndHO.png", 255 - mask)
    for number in range(1, 5):
        save(root / f"STARE/stare-images/im{number:04d}.ppm", colour(number))
        save(root / f"STARE/labels-ah/im{number:04d}.ah.ppm", mask)
        save(root / f"STARE/labels-vk/im{number:04d}.vk.ppm", 255 - mask)
        save(root / f"HRF/images/{number:02d}_dr.JPG", colour(number))
        save(root / f"HRF/manual1/{number:02d}_dr.tif", mask)
        save(root / f"HRF/mask/{number:02d}_dr_mask.tif", 255 - mask)
    return root


def test_vessels_of_four_sets(vessels: Path) -> None:
    data = prepared(VesselsDataModule, vessels)
    assert data.sites == ("chasedb1", "drive", "hrf", "stare")
    for name in data.sites:
        site = data.site(name)
        assert np.array_equal(site.truth(site.cases("test")[0])[0], disk(3)), name  # the first observer, GIF or not
    assert {case.case for case in data.site("drive").cases("test")} == {"01", "02", "03"}
    assert sum(counts(data).values()) == 6 + 8 + 4 + 4


def test_vessels_keep_both_eyes_of_a_child_together(vessels: Path) -> None:
    rows = [row for row in prepared(VesselsDataModule, vessels).splits() if row["site"] == "chasedb1"]
    assert {row["patient"] for row in rows} == {f"Image_{child:02d}" for child in (1, 2, 3, 4)}
    for patient in {row["patient"] for row in rows}:
        assert len({row["split"] for row in rows if row["patient"] == patient}) == 1


def test_vessels_take_the_sets_that_are_there(vessels: Path) -> None:
    shutil.rmtree(vessels / "STARE")
    (vessels / "CHASE_DB1").rename(vessels / "CHASEDB1")
    assert prepared(VesselsDataModule, vessels).sites == ("chasedb1", "drive", "hrf")


def test_vessels_drive_without_public_test_masks(vessels: Path) -> None:
    shutil.rmtree(vessels / "DRIVE/test/1st_manual")
    found = counts(prepared(VesselsDataModule, vessels))
    assert found["drive", "unused"] == 3
    assert found["drive", "test"] >= 1
    assert found["drive", "train"] >= 1


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda r: (r / "DRIVE/training/1st_manual/22_manual1.gif").unlink(),
            ("'drive'", "22_training.tif has no mask"),
        ),
        (lambda r: (r / "CHASE_DB1/Image_02L.jpg").unlink(), ("'chasedb1'", "Image_02L_1stHO.png has no image")),
        (lambda r: (r / "STARE/labels-ah/im0003.ah.ppm").unlink(), ("'stare'", "im0003.ppm has no mask")),
        (lambda r: (r / "HRF/manual1/02_dr.tif").unlink(), ("'hrf'", "02_dr.JPG has no mask")),
        (lambda r: (r / "STARE/stare-images/im0001.ppm").rename(r / "STARE/stare-images/im0001.ppm.gz"), ("gunzip",)),
        (lambda r: (r / "HRF").rename(r / "RITE"), ("expected folders named DRIVE", "RITE/")),
        (lambda r: remove_all(r / "CHASE_DB1"), ("Image_01L.jpg", "found an empty folder")),
        (
            lambda r: (r / "DRIVE/training/images/21_training.tif").rename(r / "DRIVE/training/images/21.tif"),
            ("'drive'", "ends in '_training'", "21.tif"),
        ),
    ],
    ids=["drive", "chase", "stare", "hrf", "packed", "unknown", "empty", "name"],
)
def test_vessels_say_what_does_not_fit(vessels: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(vessels)
    fails(VesselsDataModule, vessels, *words)


# --- LGG --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lgg(tmp_path: Path) -> Path:
    root = tmp_path / "kaggle_3m"
    for institution, patients in (("CS", 4), ("DU", 4), ("EZ", 1)):
        for patient in range(patients):
            folder = f"TCGA_{institution}_{4940 + patient}_19960909"
            for number in (1, 2, 10):
                image = np.stack([np.full((SIDE, SIDE), value, np.uint8) for value in (10, 100 + number, 200)], axis=-1)
                save(root / folder / f"{folder}_{number}.tif", image)
                save(
                    root / folder / f"{folder}_{number}_mask.tif", disk(5 if number == 2 else 0).astype(np.uint8) * 255
                )
    (root / "data.csv").write_text("Patient\n")
    return root


def test_lgg_sites_are_institutions_and_cases_are_stacks(lgg: Path) -> None:
    data = prepared(LGGDataModule, lgg)
    assert data.sites == ("TCGA_CS", "TCGA_DU")  # EZ has one patient and is left out
    site = data.site("TCGA_DU")
    case = site.cases("test")[0]
    assert case.case.startswith("TCGA_DU_494")
    assert site.truth(case).sum(axis=(1, 2)).tolist() == [0, disk(5).sum(), 0]
    assert site.image(case).shape == (3, SIDE, SIDE, 1)
    assert site.image(case)[:, 0, 0, 0].tolist() == [101, 102, 110]  # FLAIR, slices in the order of their numbers


@pytest.mark.parametrize(("sequence", "values"), [("pre", [10]), ("post", [200]), ("all", [10, 101, 200])])
def test_lgg_sequences(lgg: Path, sequence: str, values: list[int]) -> None:
    data = prepared(LGGDataModule, lgg, sequence=sequence)
    site = data.site("TCGA_CS")
    assert data.in_channels == len(values)
    assert site.image(site.cases("train")[0])[0, 0, 0].tolist() == values


def test_lgg_single_patient_site_can_be_held_out(lgg: Path) -> None:
    data = prepared(LGGDataModule, lgg, leave_out=[], unseen=["TCGA_EZ"])
    assert data.unseen_sites == ("TCGA_EZ",)
    with pytest.raises(DataError, match="TCGA_EZ"):
        prepared(LGGDataModule, lgg, leave_out=[])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda r: (r / "TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_2_mask.tif").unlink(),
            ("'TCGA_CS'", "TCGA_CS_4941_19960909_2.tif has no mask"),
        ),
        (lambda r: (r / "TCGA_CS_4941_19960909").rename(r / "patient7"), ("TCGA_<institution>", "patient7/")),
        (lambda r: remove_all(r / "TCGA_CS_4941_19960909"), ("<slice>.tif", "found an empty folder")),
        (
            lambda r: save(r / "TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_2.tif", disk(5).astype(np.uint8)),
            ("TCGA_CS_4941",),
        ),
    ],
    ids=["unpaired", "folder", "empty", "grey"],
)
def test_lgg_says_what_does_not_fit(lgg: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(lgg)
    fails(LGGDataModule, lgg, *words)


def test_lgg_refuses_an_unknown_sequence(lgg: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'flair'"):
        LGGDataModule(root=str(lgg), sequence="flairs")  # type: ignore[arg-type]


# --- FeTS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fets(tmp_path: Path) -> Path:
    root = tmp_path / "MICCAI_FeTS2022_TrainingData"
    rows = ["Partition_ID,Subject_ID"]
    for number in range(9):
        subject = f"FeTS2022_{number:05d}"
        rows.append(f"{1 if number < 4 else 2 if number < 8 else 17},{subject}")
        brain = np.broadcast_to(disk(12)[..., None], (SIDE, SIDE, 6))
        for value, name in enumerate(("flair", "t1", "t1ce", "t2"), start=1):
            save_volume(root / subject / f"{subject}_{name}.nii.gz", np.where(brain, 100 * value, 0).astype(np.int16))
        labels = np.zeros((SIDE, SIDE, 6), np.uint8)
        labels[..., 2:4] = np.select([disk(2), disk(4), disk(6)], [1, 4, 2], 0)[..., None]
        save_volume(root / subject / f"{subject}_seg.nii.gz", labels)
    (root / "partitioning_1.csv").write_text("\n".join(rows) + "\n")
    others = [f"{number % 3},{row.partition(',')[2]}" for number, row in enumerate(rows[1:])]
    (root / "partitioning_2.csv").write_text("\n".join([rows[0], *others]) + "\n")
    return root


@pytest.mark.slow
def test_fets_sites_are_institutions_and_channels_the_sequences(fets: Path) -> None:
    data = prepared(FeTSDataModule, fets, leave_out=["institution_17"])
    assert data.sites == ("institution_01", "institution_02")
    site = data.site("institution_02")
    case = site.cases("test")[0]
    truth = site.truth(case)
    assert truth.shape == (6, SIDE, SIDE)
    assert sorted(np.unique(truth)) == [0, 1, 2, 4]
    masks = data.regions.encode(torch.from_numpy(truth))  # slices first
    assert list(data.regions.names) == ["whole", "core", "enhancing"]
    whole, core = 2 * disk(6).sum(), 2 * disk(4).sum()
    assert masks.sum(dim=(0, 2, 3)).tolist() == [whole, core, core - 2 * disk(2).sum()]
    assert site.spacing(case) == pytest.approx((3.0, 0.5, 0.5))
    assert data.in_channels == 4
    two = prepared(FeTSDataModule, fets, modalities=["t2", "flair"], partitioning="partitioning_2.csv")
    assert two.sites == ("institution_00", "institution_01", "institution_02")
    assert two.in_channels == 2
    assert two.modalities_of("institution_00") == ("t2", "flair")


def test_fets_single_subject_site_can_be_held_out(fets: Path) -> None:
    assert prepared(FeTSDataModule, fets, unseen=["institution_17"]).unseen_sites == ("institution_17",)
    with pytest.raises(DataError, match="institution_17"):
        prepared(FeTSDataModule, fets)


def edited(change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda root: (root / "partitioning_1.csv").write_text(change((root / "partitioning_1.csv").read_text()))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda r: (r / "FeTS2022_00001/FeTS2022_00001_t1ce.nii.gz").unlink(),
            ("FeTS2022_00001_t1ce.nii.gz", "data.modalities"),
        ),
        (lambda r: (r / "FeTS2022_00001/FeTS2022_00001_seg.nii.gz").unlink(), ("FeTS2022_00001_seg.nii.gz; add it",)),
        (lambda r: (r / "partitioning_1.csv").unlink(), ("expected partitioning_1.csv", "data.partitioning")),
        (lambda r: (r / "extra").mkdir(), ("extra is no subject of partitioning_1.csv",)),
        (edited(lambda t: t + "3,FeTS2022_99999\n"), ("names FeTS2022_99999, which has no folder",)),
        (edited(lambda t: t + "3,FeTS2022_00001\n"), ("line 11: FeTS2022_00001 is there twice",)),
        (edited(lambda t: t.replace("17,", "A,")), ("line 10: write a number and a name",)),
        (
            edited(lambda t: t.replace("Partition_ID", "Site")),
            ("line 2: write a number and a name (Partition_ID,Subject_ID)",),
        ),
    ],
    ids=["image", "mask", "table", "folder", "row", "twice", "number", "header"],
)
def test_fets_says_what_does_not_fit(fets: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(fets)
    fails(FeTSDataModule, fets, *words)


def test_fets_refuses_settings_that_name_nothing(fets: Path) -> None:
    with pytest.raises(DataError, match="name each image once"):
        FeTSDataModule(root=str(fets), modalities=["t1", "t1"])
    with pytest.raises(DataError, match="has no institution_99; remove it"):
        prepared(FeTSDataModule, fets, leave_out=["institution_99"])


@pytest.mark.slow
def test_fets_trains_and_predicts_in_three_dimensions(fets: Path, tmp_path: Path) -> None:
    """The preset's own settings, on patches that fit the small volumes."""
    run = tmp_path / "run"
    settings = ["data=fets", f"data.root={fets}", "data.unseen=[institution_17]", "data.size=16", "model=unet3d"]
    settings += [
        "model.architecture=dynunet",
        "model.levels=3",
        "model.width=4",
        "data.batch_size=1",
        "algorithm=fedavg",
    ]
    settings += ["federation.rounds=1", "federation.local_steps=1", "trainer.threads=1", "evaluation.overlays=false"]
    assert train.main([*settings, f"output={run}"]) == 0
    new = tmp_path / "new"
    new.mkdir()
    for path in (fets / "FeTS2022_00000").glob("*_[ft]*.nii.gz"):
        shutil.copy(path, new)
    assert predict.main([str(run), "--images", str(new), "--out", str(tmp_path / "masks")]) == 0
    assert len(list((tmp_path / "masks").rglob("*.nii.gz"))) >= 1


# --- the heart --------------------------------------------------------------------------------------------------------

HEART = {"canonical": False, "axis": 2}  # as the presets say
TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
OBLIQUE = np.array([[-0.8, 0.5, 6.0, 0.0], [0.6, 0.8, 3.0, 0.0], [0.1, 0.3, -7.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def save_heart(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def heart(radius: int) -> NDArray[np.uint8]:
    """Left cavity 1, muscle 2, right cavity 3 in three of five slices."""
    labels = np.zeros((SIDE, SIDE, 5), np.uint8)
    labels[..., 1:4] = np.select([disk(radius), disk(radius + 3)], [1, 2], 0)[..., None]
    labels[:3, 8:14, 1:4] = 3
    return labels


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Centres 1 and 2 train, 4 has no labelled subject in Training, as in the release."""
    root = tmp_path_factory.mktemp("heart")
    rows = [",External code,VendorName,Vendor,Centre,ED,ES,Age"]
    subjects = [("Training/Labeled", "A", 1)] * 4 + [("Training/Labeled", "B", 2)] * 4 + [("Validation", "A", 1)]
    subjects += [("Testing", "A", 1), ("Testing", "B", 2), ("Training/Unlabeled", "C", 4)]
    subjects += [("Validation", "C", 4), ("Testing", "C", 4), ("Testing", "C", 4)]
    for number, (part, vendor, centre) in enumerate(subjects):
        code = f"{vendor}{number:02}S9V9"
        rows.append(f"{number},{code},Vendor of {vendor},{vendor},{centre},0,2,50")
        cine = np.random.default_rng(number).integers(0, 900, (SIDE, SIDE, 5, 4)).astype(np.int16)
        truth = np.zeros(cine.shape, np.uint8)
        if part != "Training/Unlabeled":
            truth[..., 0], truth[..., 2] = heart(6), heart(4)
        save_heart(root / part / code / f"{code}_sa.nii.gz", cine)
        save_heart(root / part / code / f"{code}_sa_gt.nii.gz", truth)
    (root / TABLE).write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def dijon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("database")
    for number in range(6):
        folder = root / ("testing" if number == 5 else "training") / f"patient{number:03}"
        for frame, radius in ((1, 6), (12, 4)):
            image = np.random.default_rng(number + frame).integers(0, 300, (SIDE, SIDE, 5)).astype(np.int16)
            labels = heart(radius)
            save_volume(folder / f"{folder.name}_frame{frame:02}.nii.gz", image)
            save_volume(
                folder / f"{folder.name}_frame{frame:02}_gt.nii.gz", np.where(labels, 4 - labels, 0).astype("u1")
            )
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nNbFrame: 30\n")
    (root / "MANDATORY_CITATION.md").write_text("cite")
    return root


@pytest.fixture
def mnms(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "OpenDataset"))


@pytest.fixture
def acdc(dijon: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dijon, tmp_path / "database"))


def test_mnms_reads_the_two_annotated_frames(released: Path) -> None:
    data = prepared(MnMsDataModule, released, **HEART)
    assert data.sites == ("centre_1", "centre_2", "centre_4")
    site = data.site("centre_1")
    assert {(case.case, case.patient) for case in site.cases("val")} == {
        ("A08S9V9_ED", "A08S9V9"),
        ("A08S9V9_ES", "A08S9V9"),
    }
    volume: Any = nibabel.load(released / "Validation/A08S9V9/A08S9V9_sa.nii.gz")
    cine = np.asanyarray(volume.dataobj)
    for phase, frame, radius in (("ED", 0, 6), ("ES", 2, 4)):
        assert np.array_equal(site.truth(f"A08S9V9_{phase}"), heart(radius).transpose(2, 0, 1))
        image, own = site.image(f"A08S9V9_{phase}")[..., 0], cine[..., frame].transpose(2, 0, 1).astype(np.float32)
        low, high = np.percentile(own, [0.5, 99.5])
        assert np.allclose(image, np.clip((own - low) / (high - low), 0, 1), atol=1e-6)
    assert site.spacing("A08S9V9_ED") == pytest.approx(tuple(np.linalg.norm(OBLIQUE[:3, [2, 0, 1]], axis=0)))
    found = counts(data)
    assert (found["centre_1", "train"], found["centre_1", "val"], found["centre_1", "test"]) == (8, 2, 2)
    assert [finding for finding in data.findings if finding.severity != "note"] == []
    assert data.columns()["centre_2", "B04S9V9_ES"] == {"phase": "ES", "vendor": "B", "centre": "2"}


def test_mnms_splits_anew_where_nothing_was_to_be_trained_on(released: Path) -> None:
    found = counts(prepared(MnMsDataModule, released, sites="vendor", **HEART))
    assert [found["vendor_C", split] for split in ("train", "val", "test")] == [2, 2, 2]
    held = prepared(MnMsDataModule, released, unseen=["centre_4"], **HEART)
    assert counts(held)["centre_4", "test"] == 6
    more = prepared(MnMsDataModule, released, unlabeled=True, leave_out=["A00S9V9"], **HEART)
    assert [row["labelled"] for row in more.splits() if row["patient"] == "C11S9V9"] == [False, False]
    assert not [row for row in more.splits() if row["patient"] == "A00S9V9"]


def test_acdc_joins_mnms_as_one_more_site_with_the_same_labels(released: Path, dijon: Path) -> None:
    alone = prepared(ACDCDataModule, dijon, **HEART)
    assert alone.sites == ("ACDC",)
    assert {case.case for case in alone.site("ACDC").cases("test")} == {"patient005_ED", "patient005_ES"}
    assert np.array_equal(alone.site("ACDC").truth("patient005_ES"), heart(4).transpose(2, 0, 1))
    both = prepared(MnMsDataModule, released, acdc=str(dijon), leave_out=["patient004"], **HEART)
    assert both.sites == ("ACDC", "centre_1", "centre_2", "centre_4")
    for site, case in (("ACDC", "patient005_ED"), ("centre_1", "A09S9V9_ED")):
        assert np.array_equal(both.site(site).truth(case), heart(6).transpose(2, 0, 1))


def test_hearts_in_three_dimensions(released: Path, dijon: Path) -> None:
    settings = {"dimensions": 3, "size": [4, 16, 16], "resample": [10, 1, 1], "acdc": str(dijon)}
    data = prepared(MnMsDataModule, released, **settings, **HEART)
    batch = next(iter(data.site("centre_1").train_batches(0, 1)))
    assert batch["image"].shape == (2, 1, 4, 16, 16)
    assert batch["mask"].shape == (2, 3, 4, 16, 16)


def test_frames_are_read_of_nifti_only(tmp_path: Path) -> None:
    save(tmp_path / "a.png", colour(0))
    with pytest.raises(DataError, match=r"a.png has no frames that are read; write frame 3 as a NIfTI volume"):
        read_case(Case("a", "p", "p", str(tmp_path / "a.png"), frame=3), Reading())


def test_a_frame_is_part_of_the_cache(mnms: Path, tmp_path: Path) -> None:
    settings = {"cache": "disk", "cache_dir": str(tmp_path / "cache"), "unseen": ["centre_4"], **HEART}
    before = prepared(MnMsDataModule, mnms, **settings).site("centre_1").image("A08S9V9_ED").copy()
    retabled(lambda text: text.replace("A08S9V9,Vendor of A,A,1,0", "A08S9V9,Vendor of A,A,1,1"))(mnms)
    assert not np.array_equal(prepared(MnMsDataModule, mnms, **settings).site("centre_1").image("A08S9V9_ED"), before)


def test_masks_of_a_frame_are_written_in_its_geometry(released: Path, tmp_path: Path) -> None:
    for canonical in (False, True):
        data = prepared(MnMsDataModule, released, canonical=canonical)
        case = data.site("centre_1").cases("test")[1]
        mask, reading = data.read(case).labels == 1, data.reading_of(case.site).at(case.frame)
        written: Any = nibabel.load(write_map(mask, case.image, reading, tmp_path, "mask"))
        assert np.allclose(written.affine, OBLIQUE)
        assert np.array_equal(np.asanyarray(written.dataobj), heart(4) == 1)


def retabled(change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda root: (root / TABLE).write_text(change((root / TABLE).read_text()))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / TABLE).unlink(), ("expected one table (*.csv)", "found Testing/")),
        (lambda r: shutil.copy(r / TABLE, r / "b.csv"), ("several tables", "data.table='b.csv'")),
        (retabled(lambda t: t.replace("ES,", "End,")), (TABLE, "no column 'es'", "(External code, Vendor, Centre")),
        (retabled(lambda _: ""), (TABLE, "is empty")),
        (retabled(lambda t: t.replace("B,2,0,2", "B,2,,2", 1)), ("line 6: ED of B04S9V9 is nothing", "counted from 0")),
        (retabled(lambda t: t.replace("B,2,0,2", "B,2,2,2", 1)), ("line 6: ED and ES of B04S9V9 are both frame 2",)),
        (retabled(lambda t: t.replace("B,2,0,2", "B,,0,2", 1)), ("line 6: write External code, Vendor and Centre",)),
        (
            retabled(lambda t: t.replace("B,2,0,2", "B,2,0,4", 1)),
            ("'B04S9V9_ES'", "B04S9V9_sa.nii.gz", "has 4 frames, numbered from 0, and none of number 4; correct"),
        ),
        (retabled(lambda t: t + "x,Z99S9V9,V,A,1,0,2,5\n"), ("line 17: Z99S9V9 has no folder",)),
        (retabled(lambda t: t + t.splitlines()[1] + "\n"), ("line 17: A00S9V9 is in line 2",)),
        (lambda r: (r / "Testing/new").mkdir(), ("Testing/new is no subject of",)),
        (
            lambda r: (r / "Testing/A09S9V9/A09S9V9_sa_gt.nii.gz").unlink(),
            ("'centre_1'", "no A09S9V9_sa_gt.nii.gz", "data.leave_out=[A09S9V9]"),
        ),
        (
            lambda r: save_heart(r / "Testing/A09S9V9/A09S9V9_sa_gt.nii.gz", heart(6)),
            ("A09S9V9_sa_gt.nii.gz: has 3 dimensions and no frames",),
        ),
    ],
)  # fmt: skip
def test_mnms_says_what_does_not_fit(mnms: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(mnms)
    fails(MnMsDataModule, mnms, *words)


def test_settings_that_name_no_subject_are_refused(released: Path, dijon: Path) -> None:
    with pytest.raises(DataError, match="has no subject X; remove it"):
        prepared(MnMsDataModule, released, leave_out=["X"])
    with pytest.raises(DataError, match="has no patient X; remove it"):
        prepared(ACDCDataModule, dijon, leave_out=["X"])
    with pytest.raises(DataError, match=r"expected the table b.csv \(data.table\)"):
        prepared(MnMsDataModule, released, table="b.csv")


def informed(text: str) -> Callable[[Path], Any]:
    return lambda root: (root / "training/patient002/Info.cfg").write_text(text)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / "training/patient002/Info.cfg").unlink(), ("patient002/Info.cfg cannot be read", "'ED: 1'")),
        (informed("ED: 1\nGroup: DCM\n"), ("does not say which frame is ES ('no such line')",)),
        (informed("ED: one\nES: 12\n"), ("does not say which frame is ED ('one')",)),
        (informed("ED: 1\nES: 1\n"), ("names frame 1 as ED and ES",)),
        (
            informed("ED: 1\nES: 31\n"),
            ("patient002/Info.cfg names frame 31 as ES", "no patient002_frame31.nii.gz", "data.leave_out=[patient002]"),
        ),
        (
            lambda r: (r / "training/patient002/patient002_frame12_gt.nii.gz").unlink(),
            ("no patient002_frame12_gt.nii.gz", "correct the number"),
        ),
        (lambda r: [path.unlink() for path in r.rglob("Info.cfg")], ("expected training/ and testing/", "Info.cfg")),
    ],
    ids=["info", "line", "number", "equal", "frame", "mask", "layout"],
)
def test_acdc_says_what_does_not_fit(acdc: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    harm(acdc)
    fails(ACDCDataModule, acdc, *words)


# --- all --------------------------------------------------------------------------------------------------------------

LAYOUTS = (
    FundusDataModule, ProstateDataModule, PolypDataModule, VesselsDataModule, LGGDataModule, FeTSDataModule,
    MnMsDataModule, ACDCDataModule,
)  # fmt: skip


@pytest.mark.parametrize("module", LAYOUTS)
def test_a_root_that_does_not_exist_is_named(module: type[MultiCenterDataModule], tmp_path: Path) -> None:
    fails(module, tmp_path / "nowhere", "nowhere is no folder", "data.root")


@pytest.mark.parametrize("module", LAYOUTS)
def test_an_empty_root_says_what_was_expected(module: type[MultiCenterDataModule], tmp_path: Path) -> None:
    fails(module, tmp_path, "expected", "found an empty folder")


@pytest.mark.parametrize("module", LAYOUTS)
def test_every_layout_is_in_the_table_and_documented(module: type[MultiCenterDataModule]) -> None:
    names = [name for name, entry in DATASETS.items() if entry is module]
    assert len(names) == 1
    root = Path(__file__).parent.parent
    assert (root / "configs" / "data" / f"{names[0]}.yaml").is_file()
    assert f"data={names[0]} " in (root / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert {"How to obtain", "Terms"} <= {word for word in ("How to obtain", "Terms") if word in (module.__doc__ or "")}
