"""Volumes: along which axis they are cut, where their voxels lie, what a fourth axis is, and the order of slices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.cases import Case, Sample, slice_order, stack_slices
from fedseg.datamodules.check.command import check
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.readers import Intensity, Reading, put_back, read_case

SHAPE = (9, 10, 11)


def save(path: Path, array: np.ndarray, affine: np.ndarray, codes: str = "LPS") -> Path:
    """A volume given in the common orientation, stored in another one."""
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # NIfTI counts to the right and to the front
    stored = nibabel.apply_orientation(array, turn)
    nibabel.save(nibabel.Nifti1Image(stored, lps @ inv_ornt_aff(turn, array.shape[:3])), path)
    return path


def volume(shape: Sequence[int] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def read(image: Path, mask: Path | None = None, **settings: Any) -> Sample:
    case = Case("north", "p1", "p1", str(image), None if mask is None else str(mask))
    return read_case(case, Reading(intensity="minmax", ids=(1,), **settings))


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSL", "SAR"])
@pytest.mark.parametrize("thick", [0, 1, 2, None])
def test_slices_are_cut_along_the_thickest_voxels_and_put_back(tmp_path: Path, codes: str, thick: int | None) -> None:
    zooms = [5.0 if axis == thick else 1.0 for axis in range(3)]
    path = save(tmp_path / "a.nii.gz", volume(), np.diag([*zooms, 1.0]), codes)
    axis = 2 if thick is None else thick
    sample = read(path)
    chosen = read(path, axis=axis)
    assert np.array_equal(sample.image, chosen.image)
    assert sample.image.shape[0] == SHAPE[axis]
    assert sample.spacing == pytest.approx((5.0 if thick is not None else 1.0, 1.0, 1.0))
    assert [note.kind for note in sample.notes] == (["slice axis"] if axis != 2 else [])
    labels = np.random.default_rng(0).integers(0, 2, sample.image.shape[:3]).astype(np.uint8)
    back = put_back(labels, path, Reading(ids=(1,)))
    original = nibabel.load(path)
    assert back.shape == original.shape
    assert np.allclose(back.affine, original.affine)
    nibabel.save(back, tmp_path / "mask.nii.gz")
    assert np.array_equal(read(path, tmp_path / "mask.nii.gz").labels, labels)


@pytest.mark.parametrize(
    ("zooms", "axis"),
    [
        ((1, 1, 1.2), 2),
        ((1.2, 1, 1), 2),
        ((1.4, 1, 1), 2),
        ((1.5, 1, 1), 0),
        ((3, 3, 1), 2),
        ((1, 3, 2.1), 2),
        ((1, 9, 3), 1),
    ],
)
def test_only_a_clearly_coarser_axis_is_chosen(tmp_path: Path, zooms: tuple[float, ...], axis: int) -> None:
    path = save(tmp_path / "a.nii", volume(), np.diag([*zooms, 1.0]))
    assert len(read(path).image) == SHAPE[axis]


@pytest.mark.parametrize("shape", [(1, 20, 30), (20, 1, 30), (20, 30, 1)])
@pytest.mark.parametrize("canonical", [True, False])
def test_a_flat_volume_is_one_slice(tmp_path: Path, shape: tuple[int, ...], canonical: bool) -> None:
    path = save(tmp_path / "a.nii.gz", volume(shape), np.eye(4))
    image = read(path, canonical=canonical).image
    assert image.shape[0] == 1
    assert sorted(image.shape[1:3]) == [20, 30]


def test_a_mask_is_cut_as_its_image(tmp_path: Path) -> None:
    """Also where the mask's own voxels would choose another axis."""
    image = save(tmp_path / "image.nii", volume(), np.diag([5.0, 1, 1, 1]))
    labels = (volume() % 2).astype(np.uint8)
    lost = tmp_path / "mask.nii"
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), lost)
    with pytest.raises(DataError, match=r"lies up to .* set data.mask_geometry=image"):
        read(image, lost)
    found = read(image, lost, mask_geometry="image").labels
    right = tmp_path / "right.nii"
    nibabel.save(nibabel.Nifti1Image(labels, nibabel.load(image).affine), right)
    assert np.array_equal(found, read(image, right).labels)


def test_a_mask_of_another_shape_stays_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii", volume(), np.eye(4))
    mask = save(tmp_path / "mask.nii", np.zeros((9, 10, 5), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"data.mask_geometry=image needs equal shapes"):
        read(image, mask, mask_geometry="image")


# --- headers ----------------------------------------------------------------------------------------------------------


def headed(path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> Path:
    image = nibabel.Nifti1Image(volume(), np.eye(4))
    image.set_sform(sform, 0 if sform is None else 1)
    image.set_qform(qform, 0 if qform is None else 1)
    nibabel.save(image, path)
    return path


SKEWED = np.array([[1.0, 1.0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize(
    ("sform", "told"),
    [
        (np.diag([1.0, 1, 0, 1]), "no voxel size along an axis"),
        (np.diag([1.0, np.nan, 1, 1]), "no voxel size along an axis"),
        (SKEWED, "two axes that run the same way"),
    ],
)
def test_headers_that_say_nothing_are_refused(tmp_path: Path, sform: np.ndarray, told: str, canonical: bool) -> None:
    path = headed(tmp_path / "a.nii", np.eye(4), None)
    content = bytearray(path.read_bytes())
    content[280:328] = sform[:3].astype("<f4").tobytes()  # no library writes such a header
    path.write_bytes(content)
    with pytest.raises(DataError, match=told) as refused:
        read(path, canonical=canonical)
    assert str(path) in str(refused.value)
    nibabel.save(nibabel.Nifti1Image(volume(), np.diag([1.0, 2.0, 3.0, 1])), path)  # the cure
    assert sorted(read(path, canonical=canonical).spacing or ()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("qform", [np.diag([1.0, 1, 4, 1]), np.diag([-1.0, 1, 1, 1])])
def test_forms_that_contradict_each_other_are_refused(tmp_path: Path, qform: np.ndarray) -> None:
    path = headed(tmp_path / "a.nii", np.eye(4), qform)
    with pytest.raises(DataError, match="a sform and a qform that contradict each other"):
        read(path)
    loaded = nibabel.load(path)
    loaded.set_qform(loaded.get_sform())  # the cure
    nibabel.save(loaded, tmp_path / "b.nii")
    assert read(tmp_path / "b.nii").spacing == (1.0, 1.0, 1.0)


def test_forms_that_differ_in_their_origin_only_are_read(tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[:3, 3] = 40
    assert read(headed(tmp_path / "a.nii", np.eye(4), moved)).spacing == (1.0, 1.0, 1.0)


# --- a fourth axis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "axis"), list(product(["LPS", "RAS"], [0, 1, 2])))
def test_a_fourth_axis_holds_channels(tmp_path: Path, codes: str, axis: int) -> None:
    parts = [volume() + 7 * k for k in range(4)]
    together = save(tmp_path / "all.nii.gz", np.stack(parts, axis=-1), np.eye(4), codes)
    sample = read(together, axis=axis)
    assert sample.image.shape[-1] == 4
    assert [note.kind for note in sample.notes] == ["fourth axis"]
    for k, part in enumerate(parts):
        alone = read(save(tmp_path / f"{k}.nii.gz", part, np.eye(4), codes), axis=axis)
        assert np.allclose(sample.image[..., k], alone.image[..., 0], atol=1e-6)


def test_time_series_and_too_many_channels_are_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume((4, 4, 4, 3)), np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 2.0
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(DataError, match="is a time series of 3 frames"):
        read(tmp_path / "a.nii")
    image.header.set_xyzt_units("mm")  # the cure
    nibabel.save(image, tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").image.shape[-1] == 3
    nibabel.save(nibabel.Nifti1Image(volume((4, 4, 4, 17)), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(DataError, match="at most 16; write one 3-D file"):
        read(tmp_path / "b.nii")
    nibabel.save(nibabel.Nifti1Image(volume((4, 4, 4, 2, 2)), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(DataError, match="has 5 dimensions"):
        read(tmp_path / "c.nii")


# --- volumes beside each other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("intensity", ["percentile", "minmax"])
def test_each_channel_of_a_volume_is_scaled_by_itself(intensity: Intensity, tmp_path: Path) -> None:
    one = volume()
    path = save(tmp_path / "v.nii.gz", np.stack([one, 1000 * one + 5], axis=-1), np.eye(4))
    alone = save(tmp_path / "one.nii.gz", one, np.eye(4))
    reading = Reading(intensity=intensity)
    both = read_case(Case("a", "v", "v", str(path)), reading).image
    expected = read_case(Case("a", "one", "one", str(alone)), reading).image
    assert both[..., 0] == pytest.approx(expected[..., 0])
    assert both[..., 1] == pytest.approx(expected[..., 0], abs=1e-5)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSL", "SAR"])
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("axis", range(3))
def test_the_plane_is_that_in_the_patient(axis: int, canonical: bool, codes: str, tmp_path: Path) -> None:
    zooms = [1.0, 1.0, 1.0]
    zooms[axis] = 4
    path = save(tmp_path / "v.nii.gz", volume(), np.diag([*zooms, 1]), codes)
    assert read(path, canonical=canonical).plane == ("sagittal", "coronal", "axial")[axis]


@pytest.mark.slow
def test_sites_cut_in_different_planes_are_told(tmp_path: Path) -> None:
    for site, zooms in (("a", (1, 1, 4)), ("b", (4, 1, 1))):
        for number, kind in product(range(6), ("images", "masks")):
            (tmp_path / site / kind).mkdir(parents=True, exist_ok=True)
            array = (volume((8, 8, 8)) % 2).astype(np.uint8)
            save(tmp_path / site / kind / f"p{number}.nii.gz", array, np.diag([*zooms, 1]))

    def made(axis: Literal["auto"] | int = "auto") -> FolderDataModule:
        return FolderDataModule(root=str(tmp_path), size=16, axis=axis)

    data = made()
    data.setup()
    (finding,) = [finding for finding in data.findings if finding.kind == "planes differ"]
    assert "axial at a (6), sagittal at b (6)" in finding.what
    assert finding in check(made()).findings
    cured = made(axis=2)
    cured.setup()
    assert "planes differ" not in [one.kind for one in (*cured.findings, *check(made(axis=2)).findings)]


# --- the order of slices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["scan_1", "scan_2", "scan_10"],
        ["p7_1_t1", "p7_2_t1", "p7_10_t1", "p7_11_t1"],
        ["1-flair", "2-flair", "12-flair"],
        ["s001a", "s002a", "s010a"],
    ],
)
def test_slices_are_ordered_by_the_number_that_differs(names: list[str]) -> None:
    assert slice_order(names[0]) < slice_order(names[1]) < slice_order(names[2])
    told: list[Finding] = []
    stack = stack_slices("p", [Case("a", name, "p", name, name) for name in reversed(names)], told.append)
    assert [part.case for part in stack.slices] == names
    assert not told


@pytest.mark.parametrize(
    "names", [["apex", "base", "mid"], ["p1_2", "p2_1"], ["slice_1", "slice_2", "slice_3_new"], ["1_2_3", "1_3_2"]]
)
def test_an_order_that_numbers_do_not_tell_is_warned_of(names: list[str]) -> None:
    told: list[Finding] = []
    stack_slices("p", [Case("a", name, "p", name, name) for name in names], told.append)
    assert [(finding.kind, finding.severity) for finding in told] == [("slice order", "warning")]
    assert "names differ in" in told[0].what
