"""Masks of DICOM series leave as a segmentation in DICOM (SEG): every pixel, codes, and of the patient what it must."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest

import predict
import train
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers import Maker, Reading, Segment, put_back, read_codes, segments_back
from fedseg.datamodules.readers.coded import FORM, OF_PATIENT, OF_STUDY, TISSUE, Code
from fedseg.datamodules.readers.kinds import install
from fedseg.launch import check
from fedseg.reporting.environment import SUITE, suite_version
from tests.data_files import PATIENT, save_segmentation, save_series, save_volume
from tests.test_dicom import PLAIN, SHAPE, heads, labels_of, oblique, read, volume
from tests.tiers import every

MAKER = Maker("suite", "1.2", "fedper, personal model")


def random_masks(shape: tuple[int, ...], regions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((shape[0], regions, *shape[1:])) > 0.6


def written(tmp_path: Path, series: Path, masks: np.ndarray, *names: str, **knobs: Any) -> Path:
    segments = [Segment(name) for name in names]
    return segments_back(masks, series, Reading(**knobs), tmp_path / "out.dcm", segments, MAKER)


@pytest.mark.slow
@pytest.mark.parametrize("codes", every(["LPS", "RAS", "PSL", "SAR", "IPR"], ["LPS", "SAR"]))
@pytest.mark.parametrize("kind", ["apart", "overlapping", "one", "nothing"])
@pytest.mark.parametrize("canonical", [True, False])
def test_every_pixel_comes_back(tmp_path: Path, codes: str, kind: str, canonical: bool) -> None:
    series = save_series(tmp_path / "s", volume(), oblique(codes, (0.7, 0.8, 2.5), (10, 5, -8), SHAPE))
    regions = 1 if kind == "one" else 2
    knobs = {"canonical": canonical}
    masks = random_masks(read(series, **knobs).image.shape[:3], regions) & (kind != "nothing")
    if kind == "apart":
        masks[:, 1] &= ~masks[:, 0]
    file = written(tmp_path, series, masks, *("disc", "cup")[:regions], **knobs)
    stored = highdicom.seg.segread(file)
    frames = stored.get_volume(combine_segments=False, allow_missing_positions=True).array
    assert frames.sum() == masks.sum()
    if kind != "overlapping":
        labels = (masks * np.arange(1, 1 + regions)[:, None, None]).max(1)
        assert np.array_equal(labels_of(read(series, file, ids=(1, 2), **knobs)), labels)
    for place in range(regions):
        alone = written(tmp_path, series, masks[:, [place]], "only", **knobs)
        assert np.array_equal(labels_of(read(series, alone, **knobs)), masks[:, place])


def test_frames_are_those_of_their_source_slices(tmp_path: Path) -> None:
    """Told apart by the files alone, without this suite's reader."""
    series = save_series(tmp_path / "s", volume(), PLAIN)
    masks = random_masks(read(series).image.shape[:3], 2)
    assert (masks[:, 0] & masks[:, 1]).any()
    head = pydicom.dcmread(written(tmp_path, series, masks, "disc", "cup"))
    expected = [np.asanyarray(put_back(masks[:, k].astype(np.uint8), series, Reading()).dataobj) for k in range(2)]
    by_uid = {str(source.SOPInstanceUID): source for _, source in heads(series)}
    for frame, pixels in zip(head.PerFrameFunctionalGroupsSequence, head.pixel_array, strict=True):
        source = by_uid[str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
        number = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        assert np.array_equal(pixels, expected[number - 1][..., int(source.InstanceNumber) - 1].T)
    assert len(head.pixel_array) == 2 * len(by_uid)
    assert head.FrameOfReferenceUID == source.FrameOfReferenceUID


# --- what it says of the patient, and of itself -----------------------------------------------------------------------


def texts(head: Any) -> str:
    return "\n".join(str(element) for element in head.iterall())


def test_of_the_patient_it_has_what_every_file_of_a_study_must_have(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    source, made = heads(series)[0][1], pydicom.dcmread(written(tmp_path, series, random_masks((8, 7, 6), 1), "disc"))
    carried = (*OF_PATIENT, *OF_STUDY, "StudyInstanceUID")
    for tag in carried:
        assert made[tag].value == source[tag].value
    groups = {element.keyword for element in made if element.tag.group == 0x0010}
    assert groups == {*OF_PATIENT}
    rest = pydicom.Dataset({element.tag: element for element in made if element.keyword not in carried})
    assert "Planted" not in texts(rest)
    assert "ID-4711" not in texts(rest)
    planted = {element.keyword for element in source if "Planted" in str(element.value)}
    assert planted - {*carried} >= {"PatientAddress", "PatientComments", "StudyDescription", "OperatorsName"}


def test_empty_and_odd_names_are_kept_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Libraries of DICOM warn of such values, and quote them."""

    def odd(_: int, head: Any) -> None:
        head.SpecificCharacterSet = "ISO_IR 100"
        head.PatientName, head.PatientBirthDate = "Pl\xe4nted Planted", "Planted"
        head.PatientSex = ""
        del head.PatientID

    with pydicom.config.disable_value_validation():
        series = save_series(tmp_path / "s", volume(), PLAIN, odd)
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        file = written(tmp_path, series, random_masks((8, 7, 6), 1), "L\xe4sion")
    assert not told
    said = capfd.readouterr()
    assert "Planted" not in said.out + said.err + caplog.text
    with pydicom.config.disable_value_validation():
        made = pydicom.dcmread(file)
        assert (made.PatientName, made.PatientBirthDate) == ("Pl\xe4nted Planted", "Planted")
        assert (made.PatientSex, made.PatientID) == ("", "")
        assert made.SegmentSequence[0].SegmentLabel == "L\xe4sion"


def test_it_names_its_maker_and_some_tissue(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    made = pydicom.dcmread(written(tmp_path, series, random_masks((8, 7, 6), 1), "disc"))
    (segment,) = made.SegmentSequence
    told = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (told.AlgorithmName, told.AlgorithmVersion) == ("suite", "1.2")
    assert (segment.SegmentAlgorithmType, segment.SegmentLabel) == ("AUTOMATIC", "disc")
    for concept in (segment.SegmentedPropertyCategoryCodeSequence, segment.SegmentedPropertyTypeCodeSequence):
        assert (concept[0].CodingSchemeDesignator, concept[0].CodeValue) == ("SCT", "85756007")
    assert (made.Manufacturer, made.ManufacturerModelName) == ("suite", "fedper, personal model")
    assert highdicom.sr.CodedConcept("85756007", "SCT", "Tissue") == pydicom.sr.codedict.codes.SCT.Tissue


# --- codes ------------------------------------------------------------------------------------------------------------


def test_codes_are_taken_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "codes.yaml"
    table.write_text(f"{FORM}\ncup:\n  type: [99LOCAL, 007, Cup]\n")
    lesion, cup, other = read_codes(table, ["lesion", "cup", "other"])
    assert lesion.category == Code("SCT", "49755003", "Morphologically Abnormal Structure")
    assert lesion.type == Code("SCT", "52988006", "Lesion")
    assert (cup.category, cup.type) == (TISSUE, Code("99LOCAL", "007", "Cup"))
    assert other == Segment("other")
    assert read_codes(None, ["other"]) == [other]
    known = pydicom.sr.codedict.codes.SCT
    assert (known.Lesion.value, known.MorphologicallyAbnormalStructure.value) == ("52988006", "49755003")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lesoin: {type: [SCT, 1, x]}", "there is no region 'lesoin'; did you mean 'lesion'"),
        ("lesion: {kind: [SCT, 1, x]}", "expected category and type"),
        ("lesion: Lesion", "expected category and type"),
        ("lesion: {type: [SCT, 1]}", "type is no [scheme, code, meaning]"),
        ("lesion: {type: [SCT, '', x]}", "type is no [scheme, code, meaning]"),
        ("lesion: {type: [SCT, 12345678901234567, x]}", "type is no [scheme, code, meaning]"),
        ("- lesion", "expected lines such as"),
        ("lesion: {", "cannot be read"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "codes.yaml").write_text(content)
    with pytest.raises(DataError, match=re.escape(told)):
        read_codes(tmp_path / "codes.yaml", ["lesion"])
    (tmp_path / "codes.yaml").write_text(FORM)  # the cure
    read_codes(tmp_path / "codes.yaml", ["lesion"])


def test_names_that_no_segment_can_have_are_refused() -> None:
    with pytest.raises(DataError, match="at most 64 characters"):
        read_codes(None, ["x" * 65])


# --- predict.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HOME/data of two sites of series, with masks in DICOM at one, and HOME/run, a run on them that keeps masks."""
    home = tmp_path_factory.mktemp("dicom")
    affine = oblique("PSL", (1.2, 0.8, 3), (10, -8, 5), (20, 24, 4))
    for site, number in itertools.product("ab", range(6)):
        rng, mask = np.random.default_rng(number), np.zeros((20, 24, 4), np.uint8)
        mask[5:15, 6:16, 1:3] = 1
        image = (rng.normal(100, 10, mask.shape) + 60 * mask).astype(np.int16)
        series = save_series(home / "data" / site / "images" / f"v{number}", image, affine)
        if site == "a":
            save_segmentation(home / "data" / site / "masks" / f"v{number}.dcm", series, mask[..., None])
        else:
            save_volume(home / "data" / site / "masks" / f"v{number}.nii.gz", mask, affine)
    settings = (
        *("data=folder", f"data.root={home / 'data'}", f"output={home / 'run'}", "algorithm=fedper", "data.size=32"),
        *("data.batch_size=4", "federation.rounds=2", "federation.local_steps=12", "trainer.threads=1"),
        *("trainer.accelerator=cpu", "evaluation.metrics=[dice]", "training.lr=0.01", "evaluation.predictions=true"),
    )
    assert train.main(settings) == 0
    return home


def call(*arguments: Any) -> int:
    return predict.main([str(argument) for argument in arguments])


def bytes_of(folder: Path, but: str = "") -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != but)


@pytest.mark.slow
def test_predictions_leave_as_segmentations(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "codes.yaml").write_text("foreground: {type: [SCT, 52988006, Lesion]}")
    images, codes = world / "data" / "a" / "images", tmp_path / "codes.yaml"
    told = ("--site", "a", "--images", images, "--out", tmp_path / "out", "--probabilities", "--codes", codes)
    assert call(world / "run", *told) == 0
    for number in range(6):
        series, file = images / f"v{number}", tmp_path / "out" / "masks" / f"v{number}.dcm"
        found = labels_of(read(series, file))
        as_nifti = tmp_path / "out" / "masks" / f"v{number}_foreground.nii.gz"
        assert found.any()
        assert np.array_equal(found, labels_of(read(series, as_nifti)))
        likely = nibabel.load(tmp_path / "out" / "probabilities" / f"v{number}_foreground.nii.gz")
        assert np.array_equal(likely.get_fdata() > 0.5, nibabel.load(as_nifti).get_fdata() > 0)
    head = pydicom.dcmread(file)
    assert head.PatientName == PATIENT
    assert head.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
    assert head.SegmentSequence[0].SegmentAlgorithmName == SUITE
    assert head.SoftwareVersions == suite_version()
    assert head.ManufacturerModelName == "fedper, personal model"
    said = capfd.readouterr()
    assert b"Planted" not in bytes_of(tmp_path / "out", but=".dcm")
    assert "Planted" not in said.out + said.err
    truth = labels_of(read(series, world / "data" / "a" / "masks" / "v5.dcm"))
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.5


@pytest.mark.slow
def test_no_personal_tag_is_in_a_run_or_a_check(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = [path.suffix for path in (world / "run" / "predictions").rglob("*") if path.is_file()]
    assert set(kept) == {".gz"}
    assert check.main([str(world / "data"), f"output={tmp_path / 'check'}"]) == 0
    series = save_series(tmp_path / "bad" / "a" / "images" / "v", volume(), PLAIN)
    (tmp_path / "bad" / "a" / "masks").mkdir()
    heads(series)[3][0].unlink()
    assert check.main([str(tmp_path / "bad"), f"output={tmp_path / 'check-bad'}"]) == 1
    said = capfd.readouterr()
    assert "uneven gaps" in said.out
    written = b"".join(map(bytes_of, (world / "run", tmp_path / "check", tmp_path / "check-bad")))
    written += (said.out + said.err).encode()
    assert b"foreground" in written
    for personal in (b"Planted", b"ID-4711", b"19700101"):
        assert personal in bytes_of(world / "data")
        assert personal not in written


@pytest.mark.slow
def test_one_series_may_be_given_and_codes_are_for_dicom_only(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    series = world / "data" / "b" / "images" / "v1"
    assert call(world / "run", "--site", "b", "--images", series, "--out", tmp_path / "out", "--no-overlay") == 0
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["v1.dcm", "v1_foreground.nii.gz"]
    (tmp_path / "codes.yaml").write_text("")
    image = save_volume(tmp_path / "i.nii", volume((20, 24, 4)))
    told = ("--site", "b", "--images", image, "--out", tmp_path / "no", "--codes", tmp_path / "codes.yaml")
    assert call(world / "run", *told) == 2
    assert "no image is a DICOM series; leave it out" in capfd.readouterr().err
    assert call(world / "run", *told[:-2]) == 0  # the cure


@pytest.mark.slow
def test_a_series_without_what_segmentations_refer_to_is_refused_before_the_work(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def anonymous(_: int, head: Any) -> None:
        del head.StudyInstanceUID

    save_series(tmp_path / "new" / "v", volume((20, 24, 4)), PLAIN, anonymous)
    told = ("--site", "b", "--images", tmp_path / "new", "--out", tmp_path / "out")
    assert call(world / "run", *told) == 2
    assert "without StudyInstanceUID, which a segmentation refers to" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert call(world / "run", *told) == 2
    assert f"needs the package highdicom to write segmentations; {install('dicom')}" in capfd.readouterr().err
