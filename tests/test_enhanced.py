"""Enhanced images in DICOM, many frames in one file: the same volume as a series of single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

import predict
import train
from fedseg.datamodules.readers import Reading, put_back
from fedseg.datamodules.readers.dicom import open_series
from fedseg.datamodules.readers.volumes import open_volume
from tests.data_files import PATIENT, save_enhanced, save_segmentation, save_series, save_volume
from tests.readings import SHAPE, labels_of, read, volume
from tests.test_dicom import PLAIN, heads, oblique, refused
from tests.test_segmentation_out import MAKER, random_masks, texts, written

CODES = ("LPS", "PSL", "SAR")


def turned(codes: str) -> np.ndarray:
    return oblique(codes, (0.7, 0.8, 2.5), (10, 5, -8), SHAPE)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16])
def test_an_enhanced_image_is_the_volume_of_its_series(tmp_path: Path, codes: str, kind: Any) -> None:
    array = volume(kind=kind)
    series = open_volume(save_series(tmp_path / "s", array, turned(codes)))
    for path in (tmp_path / "p1.dcm", tmp_path / "p2" / "any.dcm"):
        save_enhanced(path, array, turned(codes))
        found = open_volume(path if path.parent == tmp_path else path.parent)
        assert np.array_equal(found.load(), series.load() * 2.0 - 10)
        assert np.allclose(found.affine, series.affine, atol=1e-5)
        assert found.frame


@pytest.mark.parametrize("codes", CODES)
def test_every_pixel_has_the_value_and_the_place_that_its_frame_tells(tmp_path: Path, codes: str) -> None:
    """From pydicom's arrays and headers alone."""

    def pet(number: int, item: Any) -> None:
        item.PixelValueTransformationSequence[0].RescaleSlope = f"{0.5 + number}"
        item.PixelValueTransformationSequence[0].RescaleIntercept = f"{number}"

    path = save_enhanced(tmp_path / "p1.dcm", volume(), turned(codes), pet)
    head, found = pydicom.dcmread(path), open_volume(path)
    values, back = found.load(), np.linalg.inv(found.affine)
    row, column = np.split(
        np.array(head.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0][0x00200037].value, float), 2
    )
    seen = np.zeros(values.shape, int)
    for item, pixels in zip(head.PerFrameFunctionalGroupsSequence, head.pixel_array, strict=True):
        scale, place = (
            item.PixelValueTransformationSequence[0],
            np.array(item.PlanePositionSequence[0][0x00200032].value, float),
        )
        down, across = map(float, item.PixelMeasuresSequence[0].PixelSpacing)
        for r, c in np.ndindex(pixels.shape):
            patient = [-1, -1, 1] * (place + row * across * c + column * down * r)
            voxel = tuple(np.rint(back[:3] @ [*patient, 1]).astype(int))
            assert values[voxel] == pixels[r, c] * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
            seen[voxel] += 1
    assert (seen == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_what_another_program_converts_reads_as_its_series(tmp_path: Path, modality: str) -> None:
    def scaled(_: int, head: Any) -> None:
        head.SOPClassUID, head.Modality = (
            pydicom.uid.UID(f"1.2.840.10008.5.1.4.1.1.{2 if modality == 'CT' else 4}"),
            modality,
        )
        head.RescaleSlope, head.RescaleIntercept, head.ImageType = "2", "-1024", ["ORIGINAL", "PRIMARY", "AXIAL"]

    series = save_series(tmp_path / "s", volume(), turned("SAR"), scaled)
    kind = getattr(highdicom.legacy, f"LegacyConvertedEnhanced{modality}Image")
    made = kind([head for _, head in heads(series)], highdicom.UID(), 1, highdicom.UID(), 1)
    made.save_as(tmp_path / "p1.dcm")
    one, other = open_volume(tmp_path / "p1.dcm"), open_volume(series)
    assert np.array_equal(one.load(), other.load())
    assert np.allclose(one.affine, other.affine, atol=1e-5)
    assert one.load().dtype == np.int32
    theirs = highdicom.imread(tmp_path / "p1.dcm").get_volume()
    assert sorted(theirs.spacing) == pytest.approx(sorted(np.linalg.norm(one.affine[:3, :3], axis=0)))


def test_compressed_frames_are_read(tmp_path: Path) -> None:
    plain = open_volume(save_enhanced(tmp_path / "p1.dcm", volume(), PLAIN)).load()

    def packed(head: Any) -> None:
        head.compress(pydicom.uid.RLELossless)

    assert np.array_equal(open_volume(save_enhanced(tmp_path / "p2.dcm", volume(), PLAIN, spoil=packed)).load(), plain)


def test_masks_of_other_formats_and_in_dicom_lie_on_it(tmp_path: Path) -> None:
    affine = turned("LPS")
    series = save_series(tmp_path / "s", volume(), affine)
    space = heads(series)[0][1].FrameOfReferenceUID
    path = save_enhanced(tmp_path / "p1.dcm", volume(), affine, spoil=spoilt(FrameOfReferenceUID=space))
    labels = (np.random.default_rng(1).random(SHAPE) > 0.6).astype(np.uint8)
    nifti = save_volume(tmp_path / "m.nii.gz", labels, affine)
    seg = save_segmentation(tmp_path / "seg.dcm", series, labels[..., None])
    expected = labels_of(read(series, nifti))
    for mask in (nifti, seg):
        assert np.array_equal(labels_of(read(path, mask)), expected)
    assert np.array_equal(
        np.asanyarray(put_back(expected, path, Reading()).dataobj),
        np.asanyarray(put_back(expected, series, Reading()).dataobj),
    )


@pytest.mark.parametrize("codes", CODES)
def test_a_segmentation_of_it_refers_to_its_frames(tmp_path: Path, codes: str) -> None:
    path = save_enhanced(tmp_path / "p1.dcm", volume(), turned(codes))
    masks = random_masks(read(path).image.shape[:3], 2)
    file = written(tmp_path, path, masks, "disc", "cup")
    for place in range(2):
        alone = written(tmp_path, path, masks[:, [place]], "only")
        assert np.array_equal(labels_of(read(path, alone)), masks[:, place])
    source, made = pydicom.dcmread(path), pydicom.dcmread(written(tmp_path, path, masks, "disc", "cup"))
    expected = [np.asanyarray(put_back(masks[:, k].astype(np.uint8), path, Reading()).dataobj) for k in range(2)]
    back = np.linalg.inv(open_volume(path).affine)
    for frame, pixels in zip(made.PerFrameFunctionalGroupsSequence, made.pixel_array, strict=True):
        told = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert told.ReferencedSOPInstanceUID == source.SOPInstanceUID
        item = source.PerFrameFunctionalGroupsSequence[int(told.ReferencedFrameNumber) - 1]
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(np.array(place, float), np.array(item.PlanePositionSequence[0].ImagePositionPatient, float))
        level = round(float((back @ [*([-1, -1, 1] * np.array(place, float)), 1])[2]))
        number = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        assert np.array_equal(pixels, expected[number - 1][..., level].T)
    assert made.PatientName == PATIENT
    del made.PatientName
    assert "Planted" not in texts(made).replace("Planted^Physician", "")
    assert file.is_file()
    assert MAKER.name in texts(made)


def test_nothing_personal_is_kept(tmp_path: Path) -> None:
    path = save_enhanced(tmp_path / "p1.dcm", volume(), PLAIN)
    assert path.read_bytes().count(PATIENT.encode()) > SHAPE[2]  # in the header, and in what frames say of themselves
    told = "".join(str(one.head) for one in open_series(path).slices)
    assert "Planted" not in told
    assert "ID-4711" not in told


def test_text_where_a_number_belongs_is_not_quoted(tmp_path: Path) -> None:
    path = save_enhanced(
        tmp_path / "p1.dcm", volume(), PLAIN, every("PixelMeasuresSequence", SliceThickness=["3.25", "3"])
    )
    path.write_bytes(path.read_bytes().replace(b"3.25", b"Plan"))
    assert "Plan" not in refused(
        path, "p1.dcm", "whose frames do not say what they are (ValueError)", "export the series anew"
    )


def every(group: str, **elements: Any) -> Callable[[int, Any], None]:
    """Every other frame says something else."""

    def change(number: int, item: Any) -> None:
        for tag, value in elements.items():
            setattr(item[group][0], tag, value[number % 2])

    return change


FAULTS: dict[str, tuple[Callable[[int, Any], None], str]] = {
    "stacks": (every("FrameContentSequence", StackID=["1", "Planted"]), "2 stacks;"),
    "times": (every("FrameContentSequence", TemporalPositionIndex=[1, 2]), "2 points in time (1, 2)"),
    "echoes": (every("MREchoSequence", EffectiveEchoTime=[2.4, 4.8]), "2 echoes (2.4, 4.8)"),
    "types": (
        every("MRImageFrameTypeSequence", FrameType=[["PRIMARY", "IN_PHASE"], ["PRIMARY", "OUT_OF_PHASE"]]),
        "2 kinds of image (PRIMARY/IN_PHASE,",
    ),
    "complex": (every("MRImageFrameTypeSequence", ComplexImageComponent=["PHASE", "PLANTED"]), "2 kinds of image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_several_volumes_in_one_file_are_told_apart(tmp_path: Path, fault: str) -> None:
    change, told = FAULTS[fault]
    refused(save_enhanced(tmp_path / "p1.dcm", volume(), PLAIN, change), "p1.dcm", told, "export each as a file")


def placed(**elements: Any) -> Callable[[int, Any], None]:
    """The fourth frame lies elsewhere."""

    def change(number: int, item: Any) -> None:
        for group in (item.PlanePositionSequence[0], item.PixelMeasuresSequence[0], item.PlaneOrientationSequence[0]):
            for tag, value in elements.items():
                if number == 3 and tag in group:
                    setattr(group, tag, value)

    return change


@pytest.mark.parametrize(
    ("change", "told", "cure"),
    [
        (
            placed(ImagePositionPatient=[0, 0, 12]),
            "two slices at one place (frame",
            "several times, echoes or directions",
        ),
        (placed(ImagePositionPatient=[0, 0, 10]), "uneven gaps", "add the missing slices"),
        (placed(ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), "another orientation", "a folder of its own"),
        (placed(PixelSpacing=[1, 1]), "another size of pixels", "a folder of its own"),
        (placed(ImagePositionPatient=None), "frame", "does not say where its pixels lie"),
        (
            lambda _, item: item.PlanePositionSequence.clear(),
            "whose frames do not say what they are",
            "export the series",
        ),
    ],
)
def test_frames_that_are_no_even_stack_are_refused(tmp_path: Path, change: Any, told: str, cure: str) -> None:
    refused(save_enhanced(tmp_path / "p1.dcm", volume(), PLAIN, change), "p1.dcm", told, cure)


def spoilt(**elements: Any) -> Callable[[Any], None]:
    def spoil(head: Any) -> None:
        for tag, value in elements.items():
            setattr(head, tag, value)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told", "cure"),
    [
        (spoilt(NumberOfFrames=7), "has 7 frames and says of 8 where they lie", "export the series anew"),
        (spoilt(PerFrameFunctionalGroupsSequence=None), "says of 0 where they lie", "export the series anew"),
        (spoilt(ConcatenationUID="1.2.3", InConcatenationTotalNumber=2), "a part of an image", "have it joined"),
        (spoilt(PhotometricInterpretation="MONOCHROME1"), "white as zero", "MONOCHROME2"),
        (spoilt(SOPClassUID="1.2.840.10008.5.1.4.1.1.7.2"), "is a single DICOM file", "a folder of its own"),
        (lambda head: setattr(head, "PixelData", head.PixelData[:-100]), "pixels are broken", "replace the file"),
    ],
)
def test_files_that_are_no_whole_image_are_refused(tmp_path: Path, spoil: Any, told: str, cure: str) -> None:
    refused(save_enhanced(tmp_path / "p1.dcm", volume(), PLAIN, spoil=spoil), told, cure)


def test_a_file_of_many_frames_among_others_is_named(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    save_enhanced(series / "all.dcm", volume(), PLAIN)
    refused(series, "holds 9 files, of which all.dcm holds a whole image", "beside the folders of series")
    (series / "all.dcm").rename(tmp_path / "all.dcm")  # the cure
    assert np.array_equal(read(tmp_path / "all.dcm").image, read(series).image)


@pytest.mark.slow
def test_a_run_trains_on_enhanced_images_and_predicts_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for site in ("north", "south"):
        for number in range(5):
            labels = np.zeros((16, 16, 4), np.uint8)
            labels[4:12, 4:12, 1:3] = 1
            array = (volume((16, 16, 4)) + 100 * labels).astype(np.int16)
            image = save_enhanced(data / site / "images" / f"p{number}.dcm", array + number, PLAIN)
            save_volume(data / site / "masks" / f"p{number}.nii.gz", labels, PLAIN)
    settings = ["data=folder", f"data.root={data}", "data.size=16", "model=tiny", "federation.rounds=1"]
    settings += [
        "federation.local_steps=1",
        "trainer.threads=1",
        "evaluation.overlays=false",
        f"output={tmp_path / 'run'}",
    ]
    assert train.main(settings) == 0
    assert predict.main([str(tmp_path / "run"), "--images", str(image), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").rglob("p4.dcm")
    assert highdicom.seg.segread(file).NumberOfFrames >= 1
    assert list((tmp_path / "out").rglob("p4*.nii.gz"))
