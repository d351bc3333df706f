"""Segmentations in DICOM (SEG): masks of series, by segment number, on the slices of their image."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.readers.volumes import open_volume
from tests.data_files import folder, save_segmentation, save_series, save_volume
from tests.test_dicom import PLAIN, SHAPE, SHIPPED, errors_of, labels_of, oblique, read, refused, volume

CODES = ("LPS", "RAS", "PSL", "SAR", "IPR")


def masks_of(shape: tuple[int, ...] = SHAPE, segments: int = 2) -> np.ndarray:
    """(x, y, z, segments) that do not overlap, with nothing in the outer slices."""
    masks = np.zeros((*shape, segments), np.uint8)
    for number in range(segments):
        masks[number : 3 + number, 1 + 3 * number : 4 + 3 * number, 2 + number : 5, number] = 1
    return masks


def ids(masks: np.ndarray) -> np.ndarray:
    """Label ids of masks by number."""
    return (masks * np.arange(1, 1 + masks.shape[3], dtype=np.uint8)).max(-1)


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "all frames", "nothing"])
def test_segments_are_labels_on_the_slices_of_their_image(tmp_path: Path, codes: str, kind: str) -> None:
    """As the same labels in NIfTI: of a series, and of the same volume in NIfTI."""
    affine = oblique(codes, (0.7, 0.8, 2.5), (10, 5, -8), SHAPE)
    series, masks = save_series(tmp_path / "s", volume(), affine), masks_of() * (kind != "nothing")
    mask = tmp_path / "m.dcm"
    if kind == "LABELMAP":
        save_segmentation(mask, series, ids(masks), kind)
    else:
        save_segmentation(mask, series, masks, omit_empty_frames=kind != "all frames")
    expected = labels_of(read(series, save_volume(tmp_path / "m.nii", ids(masks), affine), ids=(1, 2)))
    assert np.array_equal(labels_of(read(series, mask, ids=(1, 2))), expected)
    image = save_volume(tmp_path / "i.nii", volume(), affine)
    assert np.array_equal(labels_of(read(image, mask, ids=(1, 2))), expected)
    assert open_volume(mask, series).segments[-1] == (2, "s2")


def test_a_folder_may_hold_the_segmentation(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    mask = save_segmentation(tmp_path / "m" / "export0001", series, masks_of())
    assert labels_of(read(series, mask.parent, ids=(1, 2))).sum() == ids(masks_of()).sum()


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    series, masks = save_series(tmp_path / "s", volume(), PLAIN), masks_of()
    masks[..., 1] |= masks[..., 0]
    refused(
        series, "segments that overlap", "a file of its own", mask=save_segmentation(tmp_path / "m.dcm", series, masks)
    )


@pytest.mark.slow
def test_overlapping_regions_have_files_of_their_own(tmp_path: Path) -> None:
    """The cure: a file for each region, nested as regions may be."""
    for number in range(6):
        series = save_series(tmp_path / "a" / "images" / f"v{number}", volume() + number, PLAIN)
        masks = masks_of()
        masks[..., 0] |= masks[..., 1]
        for region, name in enumerate(("disc", "cup")):
            save_segmentation(
                tmp_path / "a" / "masks" / f"v{number}_{name}.dcm", series, masks[..., region : region + 1]
            )
    data = folder(tmp_path, mask_suffix="_{region}", regions={"disc": [1, 2], "cup": [2]})
    assert set(np.unique(data.site("a").truth("v0"))) == {0, 1, 2}


def moved(path: Path, change: Any) -> Path:
    """A segmentation with other places of its frames."""
    head = pydicom.dcmread(path)
    for item in head.PerFrameFunctionalGroupsSequence:
        place = item.PlanePositionSequence[0]
        place.ImagePositionPatient = change([float(one) for one in place.ImagePositionPatient])
    head.save_as(path)
    return path


PLACES = {
    "beside": (lambda place: [place[0] + 5, *place[1:]], "lies up to 5 "),
    "between": (lambda place: [*place[:2], place[2] + 1], "lies up to 1 "),
    "beyond": (lambda place: [*place[:2], place[2] + 300], "reaches beyond its image"),
    "apart": (lambda place: [*place[:2], 1.3 * place[2]], "none of its image's slices"),
    "no numbers": (lambda place: place[:2], "does not say where its frames lie"),
}


@pytest.mark.parametrize("fault", PLACES)
def test_other_places_are_refused(tmp_path: Path, fault: str) -> None:
    change, told = PLACES[fault]
    series = save_series(tmp_path / "s", volume(), PLAIN)
    refused(series, told, mask=moved(save_segmentation(tmp_path / "m.dcm", series, masks_of()), change))


def test_another_series_is_refused_and_nifti_cures(tmp_path: Path) -> None:
    series, other = (save_series(tmp_path / name, volume(), PLAIN) for name in "so")
    mask = save_segmentation(tmp_path / "m.dcm", other, masks_of())
    refused(series, "another frame of reference", "write it as NIfTI", mask=mask)
    cured = save_volume(tmp_path / "m.nii", ids(masks_of()), PLAIN)
    assert labels_of(read(series, cured, ids=(1, 2))).any()


def test_another_grid_is_refused(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    fine = save_series(tmp_path / "f", volume((12, 14, 8)), np.diag([-0.5, -1, 3, 1]))
    for path in fine.iterdir():
        head = pydicom.dcmread(path)
        head.FrameOfReferenceUID = pydicom.dcmread(next(series.iterdir())).FrameOfReferenceUID
        head.save_as(path)
    refused(series, "but the image is", mask=save_segmentation(tmp_path / "m.dcm", fine, masks_of((12, 14, 8))))


def test_probabilities_are_refused(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    mask = save_segmentation(tmp_path / "m.dcm", series, masks_of().astype(np.float32), "FRACTIONAL")
    refused(series, "FRACTIONAL", "export it as BINARY", mask=mask)


def test_a_segmentation_is_no_image(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    refused(save_segmentation(tmp_path / "m.dcm", series, masks_of()), "is a segmentation", "move it to the masks")


@pytest.mark.parametrize("name", ["liver_1frame.dcm", "liver_expb_1frame.dcm"])
def test_a_shipped_segmentation_is_read(tmp_path: Path, name: str) -> None:
    """On an image made for it; as shipped it tells of three frames and holds one."""
    head = pydicom.dcmread(SHIPPED / name)
    frames, shared = head.PerFrameFunctionalGroupsSequence, head.SharedFunctionalGroupsSequence[0]
    place = [float(one) for one in frames[0].PlanePositionSequence[0].ImagePositionPatient]
    sizes = [float(one) for one in shared.PixelMeasuresSequence[0].PixelSpacing]
    affine = np.diag([sizes[1], sizes[0], 1, 1])
    affine[:3, 3] = place
    image = save_volume(tmp_path / "i.nii", volume((head.Columns, head.Rows, 4)), np.diag([-1, -1, 1, 1]) @ affine)
    mask = Path(shutil.copy(SHIPPED / name, tmp_path / "m.dcm"))
    refused(image, "other pixels than its header says", mask=mask)
    del frames[1:]
    head.save_as(mask)
    found = open_volume(mask, image).load()
    assert found.shape == (head.Columns, head.Rows, 4)
    assert np.array_equal(found[..., 0].T, head.pixel_array)
    assert not found[..., 1:].any()
    assert labels_of(read(image, mask)).sum() == head.pixel_array.sum()


@pytest.mark.slow
def test_sites_of_segmentations_are_checked_and_read(tmp_path: Path) -> None:
    for number in range(6):
        series = save_series(tmp_path / "a" / "images" / f"v{number}", volume() + number, PLAIN)
        save_segmentation(tmp_path / "a" / "masks" / f"v{number}.dcm", series, masks_of())
    knobs: dict[str, Any] = {"regions": {"one": [1], "two": [2]}}
    assert not errors_of(tmp_path, **knobs)
    assert set(np.unique(folder(tmp_path, **knobs).site("a").truth("v3"))) == {0, 1, 2}
    moved(tmp_path / "a" / "masks" / "v1.dcm", PLACES["beyond"][0])
    found = check(FolderDataModule(root=str(tmp_path), size=[20, 24], **knobs)).findings
    assert [(one.case, one.what) for one in found if one.severity == "error"] == [("v1", "reaches beyond its image")]


def test_another_program_reads_it_alike(tmp_path: Path) -> None:
    """What is expected of a file here is what highdicom says that it holds."""
    series = save_series(tmp_path / "s", volume(), PLAIN)
    mask = save_segmentation(tmp_path / "m.dcm", series, masks_of())
    stored = highdicom.seg.segread(mask).get_volume(combine_segments=True)
    own = open_volume(mask, series)
    assert stored.array.sum() == own.load().sum()
