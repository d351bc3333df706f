"""DICOM: a series reads as the same volume stored as NIfTI does, and is refused where it is no whole volume."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.spatial.transform import Rotation

from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.cache import _identity
from fedseg.datamodules.cases import Case
from fedseg.datamodules.check.command import check
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import refuse
from fedseg.datamodules.fingerprints import file_digest
from fedseg.datamodules.readers import Reading, put_back, write_back
from fedseg.datamodules.readers.kinds import SERIES, install, stem_of, suffix_of
from fedseg.datamodules.readers.volumes import open_volume
from fedseg.datamodules.site_folders import image_files
from tests import readings
from tests.data_files import folder, save, save_series, save_volume, write_manifest
from tests.readings import SHAPE, labels_of, read, volume

PLAIN = np.diag([-1.0, -2.0, 3.0, 1.0])
SHIPPED = Path(str(pydicom.data.get_testdata_file("MR_small.dcm", download=False))).parent


def refused(path: Path, *told: str, mask: Path | None = None) -> str:
    """Refused without a word of what was planted in the file."""
    message = readings.refused(path, *told, mask=mask)
    assert "Planted" not in message
    return message


def heads(series: Path) -> list[tuple[Path, Any]]:
    """Files and data sets in the order of their numbers."""
    found = [(path, pydicom.dcmread(path)) for path in series.iterdir()]
    return sorted(found, key=lambda one: int(one[1].InstanceNumber))


# --- the same volume --------------------------------------------------------------------------------------------------


def oblique(codes: str, zooms: tuple[float, ...], angles: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A turned affine whose axes run roughly as the codes say."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, :3] = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = [10, -20, 30]
    return affine @ inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), shape)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codes=st.sampled_from(["LPS", "RAS", "PSL", "SAR", "IPR", "ASL"]),
    kind=st.sampled_from(["u1", "i2", "u2"]),
    zooms=st.tuples(*[st.sampled_from([0.3, 0.45, 1.2, 3.0])] * 3),
    angles=st.tuples(*[st.floats(-15, 15)] * 3),
    shape=st.sampled_from([(4, 5, 6), (5, 4, 2), (4, 5, 1)]),
    canonical=st.booleans(),
    axis=st.sampled_from(["auto", 0, 1, 2]),
)
def test_a_series_reads_as_the_same_volume_in_nifti_does(
    tmp_path: Path,
    codes: str,
    kind: str,
    zooms: tuple[float, ...],
    angles: tuple[float, ...],
    shape: tuple[int, ...],
    canonical: bool,
    axis: Any,
) -> None:
    affine = oblique(codes, zooms, angles, shape)
    array = volume(shape, kind)
    labels = (np.random.default_rng(3).random(shape) > 0.5).astype(np.uint8)
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    series = save_series(tmp_path / "s", array, affine)
    found = open_volume(series)
    right = np.linalg.det(affine[:3, :3]) > 0  # slices are ordered along their normal, whichever way they were counted
    there, back = (found.load(), found.affine) if right else _reversed(found.load(), found.affine)
    assert np.array_equal(there, array)
    assert there.dtype == array.dtype
    assert np.allclose(back, affine, atol=1e-5)
    knobs: dict[str, Any] = {"canonical": canonical, "axis": axis}
    if canonical or right:
        mask = save_volume(tmp_path / "m.nii", labels, affine)
        one, other = read(series, mask, **knobs), read(save_volume(tmp_path / "i.nii", array, affine), mask, **knobs)
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(labels_of(one), labels_of(other))
        assert one.spacing == pytest.approx(other.spacing, rel=1e-5)
        assert one.plane == other.plane
        written = write_back(labels_of(one), series, Reading(**knobs), tmp_path, "back")
        assert written.name == "back.nii.gz"
        assert np.array_equal(labels_of(read(series, written, **knobs)), labels_of(one))


def _reversed(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its slices counted the other way."""
    turn = np.diag([1.0, 1, -1, 1])
    turn[2, 3] = array.shape[2] - 1
    return array[..., ::-1], affine @ turn


@pytest.mark.parametrize("codes", ["LPS", "PSL", "SAR"])
def test_places_and_values_are_those_of_another_reader(tmp_path: Path, codes: str) -> None:
    def ct(_: int, head: Any) -> None:
        head.RescaleSlope, head.RescaleIntercept = "2", "-1024"

    affine = oblique(codes, (0.7, 0.8, 2.5), (10, 5, -8), SHAPE)
    series = save_series(tmp_path / "s", volume(), affine, ct)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    itk, own = reader.Execute(), open_volume(series)
    assert np.array_equal(own.load(), SimpleITK.GetArrayFromImage(itk).T)
    assert own.load().dtype == np.int32
    for voxel in ((0, 0, 0), (5, 0, 0), (0, 6, 0), (3, 2, 7)):
        place = np.array([-1, -1, 1]) * itk.TransformIndexToPhysicalPoint(voxel)
        assert own.affine[:3] @ [*voxel, 1] == pytest.approx(place, abs=1e-4)


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    def pet(number: int, head: Any) -> None:
        head.RescaleSlope, head.RescaleIntercept = f"{0.5 + number}", "1"

    found = open_volume(save_series(tmp_path / "s", volume(), PLAIN, pet)).load()
    assert np.array_equal(found, volume() * (0.5 + np.arange(SHAPE[2])) + 1)


def test_files_need_no_ending_and_names_say_nothing(tmp_path: Path) -> None:
    series = save_series(tmp_path / "1.2.840.4", volume(), PLAIN)
    expected = read(series).image
    (series / "DICOMDIR").write_bytes(b"x")
    (series / ".DS_Store").write_bytes(b"x")
    for number, (path, _) in enumerate(heads(save_series(tmp_path / "again", volume(), PLAIN))):
        path.rename(path.with_name(f"IM{(5 * number) % 8}"))
    assert np.array_equal(read(tmp_path / "again").image, expected)
    assert {suffix_of(series), suffix_of(tmp_path / "again")} == {SERIES}
    assert stem_of(series) == "1.2.840.4"
    assert np.array_equal(read(series).image, expected)


# --- what is refused, and its cure ------------------------------------------------------------------------------------

Spoil = Callable[[int, Any], None]


def at(number: int, **values: Any) -> Spoil:
    """Changes elements of one slice; None takes one away."""

    def change(own: int, head: Any) -> None:
        for tag, value in values.items() if number in (own, -1) else ():
            if value is None:
                delattr(head, tag)
            else:
                setattr(head, tag, value)

    return change


def _tilted(number: int, head: Any) -> None:
    x, y, z = head.ImagePositionPatient
    head.ImagePositionPatient = [x, float(y) + 0.3 * number, z]


FAULTS: dict[str, tuple[Spoil, str, str]] = {
    "series": (at(3, SeriesInstanceUID="1.2.3"), "holds 2 series", "a folder of its own"),
    "space": (at(3, FrameOfReferenceUID="1.2.3"), "another frame of reference", "a folder of its own"),
    "orientation": (at(3, ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), "another orientation", "a folder of its own"),
    "pixels": (at(3, PixelSpacing=[1, 1]), "another size of pixels", "a folder of its own"),
    "twice": (at(3, ImagePositionPatient=[0, 0, 12]), "two slices at one place", "a folder of its own"),
    "all at one place": (at(-1, ImagePositionPatient=[0, 0, 12]), "two slices at one place", "a folder of its own"),
    "shifted": (at(3, ImagePositionPatient=[0, 0, 10]), "uneven gaps", "add the missing slices"),
    "tilt": (_tilted, "is sheared", "on an even grid"),
    "colour": (at(-1, PhotometricInterpretation="PALETTE COLOR"), "in colour", "leave it out"),
    "samples": (at(2, SamplesPerPixel=3), "in colour", "leave it out"),
    "white": (at(-1, PhotometricInterpretation="MONOCHROME1"), "white as zero", "MONOCHROME2"),
    "localiser": (at(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localiser", "leave it out"),
    "frames": (at(-1, NumberOfFrames=2), "several frames", "a file for each slice"),
    "enhanced": (at(-1, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"), "several frames", "a folder of its own"),
    "segmentation": (at(-1, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), "is a segmentation", "to the masks"),
    "no place": (at(-1, ImagePositionPatient=None), "does not say where", "export the series anew"),
    "no size": (at(-1, PixelSpacing=[0, 1]), "does not say where", "export the series anew"),
    "no rotation": (at(-1, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "does not say where", "export"),
    "slope": (at(-1, RescaleSlope="0", RescaleIntercept="0"), "slope of 0", "correct it"),
    "table": (at(-1, ModalityLUTSequence=[]), "has a table", "store the values"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_volume_is_refused(tmp_path: Path, fault: str) -> None:
    spoil, told, cure = FAULTS[fault]
    refused(save_series(tmp_path / "s", volume(), PLAIN, spoil), told, cure)
    assert read(save_series(tmp_path / "anew", volume(), PLAIN)).spacing == (3.0, 2.0, 1.0)
    assert read(save_volume(tmp_path / "anew.nii", volume(), PLAIN)).spacing == (3.0, 2.0, 1.0)


def test_a_missing_slice_is_told_and_its_return_cures(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    path, _ = heads(series)[5]
    path.rename(tmp_path / "away.dcm")
    assert "6 mm between" in refused(series, "uneven gaps", "3 mm elsewhere", "add the missing slices")
    shutil.copy(tmp_path / "away.dcm", path)
    assert read(series).image.shape[0] == SHAPE[2]
    shutil.copy(path, series / "copy.dcm")
    refused(series, "two slices at one place", "copy.dcm")


def test_two_series_are_read_from_folders_of_their_own(tmp_path: Path) -> None:
    one, other = (save_series(tmp_path / name, volume(), PLAIN) for name in "ab")
    for path in other.iterdir():
        shutil.copy(path, one / f"b{path.name}")
    refused(one, "holds 2 series", "a folder of its own")
    for path in one.glob("b*"):
        if (other / path.name.removeprefix("b")).exists() and len(path.stem) == 9:
            path.unlink()
    assert np.array_equal(read(one).image, read(other).image)


def test_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    def smaller(number: int, head: Any) -> None:
        if number == 2:
            head.Rows, head.PixelData = 6, head.PixelData[: 2 * 6 * 6]

    refused(save_series(tmp_path / "s", volume(), PLAIN, smaller), "another size than", "a folder of its own")


@pytest.mark.parametrize("spoil", ["short", "text", "no magic", "folder"])
def test_other_and_broken_files_in_a_series_are_refused(tmp_path: Path, spoil: str) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    path = heads(series)[2][0]
    if spoil == "short":
        path.write_bytes(path.read_bytes()[:-30])
        refused(series, path.name, "pixels are broken", "replace the file")
    elif spoil == "text":
        (series / "notes.txt").write_text("x")
        refused(series, "notes.txt", "does not start as a DICOM file", "move it elsewhere")
        (series / "notes.txt").unlink()  # the cure
        read(series)
    elif spoil == "no magic":
        path.write_bytes(path.read_bytes()[132:])
        refused(series, path.name, "does not start as a DICOM file")
    else:
        (series / "more").mkdir()
        refused(series, "the folder more", "a folder of its own")


def test_a_single_file_is_no_volume(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume((6, 7, 1)), PLAIN)
    (path,) = series.iterdir()
    alone = shutil.copy(path, tmp_path / "p1.dcm")
    refused(Path(alone), "is a single DICOM file", "a folder of its own (p1/)", "convert a picture to PNG")
    assert read(series).spacing == (3.0, 2.0, 1.0)  # the cure
    head = pydicom.dcmread(path)
    del head.SliceThickness
    head.save_as(path)
    refused(series, "does not say how thick it is", "export the series anew")


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume((6, 7, 2)), PLAIN)
    path = heads(series)[0][0]
    content, rng = path.read_bytes(), np.random.default_rng(0)
    told = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(132, len(content) - 84, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read(series)
        except DataError as error:
            told.add(str(error))
    assert told
    assert "Planted" not in str(told)


# --- files that pydicom ships -----------------------------------------------------------------------------------------


def alone(tmp_path: Path, name: str) -> Path:
    """A file that pydicom ships, as a series of one slice."""
    (tmp_path / name).mkdir()
    shutil.copy(SHIPPED / name, tmp_path / name)
    return tmp_path / name


SMALL = ("RLE", "bigendian", "expb", "implicit", "jpeg_ls_lossless", "padded", "jp2klossless")


@pytest.mark.parametrize("kind", SMALL)
def test_the_same_slice_stored_in_many_ways_reads_alike(tmp_path: Path, kind: str) -> None:
    expected = read(alone(tmp_path, "MR_small.dcm"))
    found = read(alone(tmp_path, f"MR_small_{kind}.dcm"))
    assert np.array_equal(found.image, expected.image)
    assert found.spacing == expected.spacing
    assert expected.image.shape == (1, 64, 64, 1)


def test_hounsfield_units_are_read(tmp_path: Path) -> None:
    series = alone(tmp_path, "CT_small.dcm")
    head = pydicom.dcmread(SHIPPED / "CT_small.dcm")
    expected = head.pixel_array.astype(int) * int(head.RescaleSlope) + int(head.RescaleIntercept)
    assert np.array_equal(open_volume(series).load()[..., 0].T, expected)


ODD = {
    "examples_rgb_color.dcm": "in colour",
    "examples_palette.dcm": "in colour",
    "examples_ybr_color.dcm": "several frames",
    "rtdose.dcm": "several frames",
    "rtplan.dcm": "is no image but RT Plan",
    "test-SR.dcm": "is no image but Comprehensive SR",
    "waveform_ecg.dcm": "is no image but 12-lead ECG",
    "liver_1frame.dcm": "is a segmentation",
    "MR_truncated.dcm": "pixels are broken",
    "JPGExtended.dcm": "does not say where",
    "no_meta.dcm": "does not start as a DICOM file",
}


@pytest.mark.parametrize("name", ODD)
def test_shipped_files_that_are_no_slices_are_refused(tmp_path: Path, name: str) -> None:
    refused(alone(tmp_path, name), name, ODD[name])


def test_a_method_of_compression_that_nothing_reads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = alone(tmp_path, "MR_small_RLE.dcm")
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", property(lambda _: False))
    refused(series, "RLE Lossless", "without compression", "decompress()")
    monkeypatch.undo()
    head = pydicom.dcmread(series / "MR_small_RLE.dcm")  # the cure
    head.decompress()
    head.save_as(series / "MR_small_RLE.dcm")
    read(series)


def test_a_way_of_storing_that_is_unknown_or_not_told_is_refused(tmp_path: Path) -> None:
    for name in ("unknown", "untold"):
        (tmp_path / name).mkdir()
    plain = SHIPPED / "MR_small.dcm"
    known, unknown = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"
    content = plain.read_bytes()
    assert content.count(known) == 1
    (tmp_path / "unknown" / "one.dcm").write_bytes(content.replace(known, unknown))
    refused(tmp_path / "unknown", "one.dcm", "1.2.840.10008.1.2.9", "decompress()")
    head = pydicom.dcmread(plain)
    del head.file_meta.TransferSyntaxUID
    head.save_as(tmp_path / "untold" / "one.dcm", implicit_vr=False, little_endian=True)
    refused(tmp_path / "untold", "one.dcm", "does not say how its pixels are stored", "convert it to NIfTI")


# --- folders, checks and what else looks at files ---------------------------------------------------------------------


def make_site(root: Path, site: str, count: int = 6, *, dicom: bool = True) -> None:
    for number in range(count):
        labels = np.zeros((16, 16, 4), np.uint8)
        labels[4:9, 3 + number : 8 + number] = 1
        image = (np.random.default_rng(number).normal(100, 10, labels.shape) + 50 * labels).astype(np.int16)
        images = root / site / "images"
        if dicom:
            save_series(images / f"v{number}", image, PLAIN)
        else:
            save_volume(images / f"v{number}.nii.gz", image, PLAIN)
        save_volume(root / site / "masks" / f"v{number}.nii.gz", labels, PLAIN)


def errors_of(root: Path, **knobs: Any) -> list[Any]:
    found = check(FolderDataModule(root=str(root), size=[20, 24], **knobs)).findings
    return [finding for finding in found if finding.severity == "error"]


def test_sites_of_series_are_listed_and_read(tmp_path: Path) -> None:
    make_site(tmp_path / "one", "a")
    make_site(tmp_path / "two", "a", dicom=False)
    one, two = (folder(tmp_path / name) for name in ("one", "two"))
    assert [case.case for case in one.cases()] == [f"v{number}" for number in range(6)]
    for case in one.cases():
        assert np.array_equal(one.site("a").image(case.case), two.site("a").image(case.case))
    assert not errors_of(tmp_path / "one")


def test_the_check_tells_of_every_case_that_is_no_volume(tmp_path: Path) -> None:
    make_site(tmp_path, "a")
    images = tmp_path / "a" / "images"
    next(iter(heads(images / "v1")[1:]))[0].unlink()
    (images / "v2" / "notes.txt").write_text("x")
    (images / "empty").mkdir()
    told = {(finding.kind, finding.case): finding.what for finding in errors_of(tmp_path)}
    assert "uneven gaps" in told.pop(("unreadable file", "v1"))
    assert "notes.txt" in told.pop(("unreadable file", "v2"))
    assert "folder among images" in told.pop(("foreign file", "empty"))
    assert not told


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_modalities_are_series_of_their_own(tmp_path: Path, named: bool) -> None:
    for number in range(6):
        array = volume() + number
        for place, of in enumerate(("t1", "t2")):
            home = tmp_path / "a" / "images"
            save_series(home / f"v{number}_{of}" if named else home / of / f"v{number}", array * (1 + place), PLAIN)
        save_volume(tmp_path / "a" / "masks" / f"v{number}.nii.gz", (volume() > 100).astype(np.uint8), PLAIN)
    data = folder(tmp_path, modalities=["t1", "t2"])
    assert data.site("a").image("v0").shape[-1] == 2


def test_a_manifest_names_folders(tmp_path: Path) -> None:
    make_site(tmp_path, "a")
    rows = [{"site": "a", "image": f"a/images/v{number}", "mask": f"a/masks/v{number}.nii.gz"} for number in range(5)]
    write_manifest(tmp_path / "sites.csv", rows)
    data = folder(tmp_path)
    assert [case.case for case in data.cases()] == [f"v{number}" for number in range(5)]
    listed = {(finding.kind, Path(finding.file).name) for finding in data.findings}
    assert ("not in the manifest", "v5") in listed
    write_manifest(tmp_path / "sites.csv", [*rows, rows[0] | {"image": "a/images/lost"}])
    assert any("lost does not exist" in finding.what for finding in errors_of(tmp_path))


def test_folders_without_dicom_stay_foreign(tmp_path: Path) -> None:
    save(tmp_path / "more" / "a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "b.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="more is a folder among images"):
        image_files(tmp_path, refuse)


def test_changed_slices_are_noticed_and_other_names_are_not(tmp_path: Path) -> None:
    series = save_series(tmp_path / "s", volume(), PLAIN)
    case = Case("a", "a", "a", str(series))
    digest, identity = file_digest(str(series)), _identity(case)
    path, head = heads(series)[4]
    path.rename(series / "zzz.dcm")
    assert file_digest(str(series)) == digest
    head.PixelData = head.PixelData[::-1]
    head.save_as(series / "zzz.dcm")
    assert file_digest(str(series)) != digest
    assert _identity(case) != identity
    assert not np.array_equal(read(series).image, read(save_series(tmp_path / "t", volume(), PLAIN)).image)


def test_probabilities_are_put_back_as_nifti(tmp_path: Path) -> None:
    affine = oblique("PSL", (0.7, 0.8, 2.5), (10, 5, -8), SHAPE)
    series = save_series(tmp_path / "s", volume(), affine)
    image = read(series).image[..., 0]
    back = put_back(image, series, Reading())
    own = open_volume(series)
    assert np.allclose(back.affine, own.affine)
    assert np.allclose(back.dataobj, own.load() / 250, atol=1e-6)


# --- privacy, and the missing library ---------------------------------------------------------------------------------


def test_nothing_personal_is_held_or_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from fedseg.datamodules.readers.dicom import open_series

    def invalid(_: int, head: Any) -> None:  # a library that converts it quotes it
        head.PatientBirthDate = "Planted"

    with pydicom.config.disable_value_validation():
        series = save_series(tmp_path / "s", volume(), PLAIN, invalid)
    assert b"Planted" in heads(series)[0][0].read_bytes()
    read(series)
    told = "".join(str(one.head) for one in open_series(series).slices)
    assert "Pixel Spacing" in told
    assert "Planted" not in told
    assert "ID-4711" not in told
    said = capfd.readouterr()
    assert not re.search("Planted|ID-4711", said.out + said.err + caplog.text)


def test_the_missing_library_is_told_once_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path, "a")
    make_site(tmp_path, "b", dicom=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    errors = errors_of(tmp_path)
    assert [(finding.kind, finding.cure) for finding in errors] == [("unreadable file", install("dicom"))]
    assert "needs the package pydicom, as 5 more cases do" in errors[0].what
    refused(tmp_path / "a/images/v0", "needs the package pydicom", "[dicom]")


def test_the_extra_that_messages_name_exists() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert {re.split("[<>=]", one)[0] for one in project["optional-dependencies"]["dicom"]} == {"pydicom", "highdicom"}
    assert "dicom" in re.findall(r"\w+", project["optional-dependencies"]["dev"][0].partition("[")[2])
