"""NRRD and MetaImage volumes: read as the same volume stored as NIfTI is, refused where their headers mislead."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from fedseg.datamodules import FolderDataModule
from fedseg.datamodules.cache import _identity
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.check.command import check
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import refuse
from fedseg.datamodules.fingerprints import file_digest
from fedseg.datamodules.readers import Reading, put_back, stem_of, write_back
from fedseg.datamodules.readers.itk import INSTALL
from fedseg.datamodules.site_folders import image_files
from tests.data_files import folder, save_volume
from tests.readings import SHAPE, labels_of, read, refused, volume

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def store(path: Path, array: np.ndarray, affine: np.ndarray, compress: bool = False) -> Path:
    """Stores an array (x, y, z and, of channels, a fourth axis) with a RAS affine."""
    if path.name.endswith((".nii", ".nii.gz")):
        return save_volume(path, array, affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = array.ndim == 4
    axes = (2, 1, 0, 3) if vector else (2, 1, 0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(axes)), isVector=vector)
    place = FLIP @ affine
    zooms = np.linalg.norm(place[:3, :3], axis=0)
    image.SetSpacing(zooms.tolist())
    image.SetDirection((place[:3, :3] / zooms).ravel().tolist())
    image.SetOrigin(place[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), compress)
    return path


def edited(path: Path, change: Callable[[str], str]) -> Path:
    """The same file with another header."""
    content = path.read_bytes()
    inside = re.search(rb"\n\n|ElementDataFile = LOCAL\n", content)
    end = inside.end() if inside else len(content)
    path.write_bytes(change(content[:end].decode("latin-1")).encode("latin-1") + content[end:])
    return path


# --- the same volume, whatever its format -----------------------------------------------------------------------------


def same(one: Sample, other: Sample) -> None:
    assert one.image.dtype == other.image.dtype
    assert np.array_equal(one.image, other.image)
    assert (one.labels is None) == (other.labels is None)
    if one.labels is not None:
        assert np.array_equal(one.labels, labels_of(other))
    assert one.spacing == pytest.approx(other.spacing, rel=1e-5)
    assert one.plane == other.plane
    assert [(note.kind, note.what) for note in one.notes] == [(note.kind, note.what) for note in other.notes]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ending=st.sampled_from(ENDINGS),
    codes=st.sampled_from(["LPS", "RAS", "PSL", "SAR", "IPR", "ASL"]),
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]),
    zooms=st.tuples(*[st.sampled_from([0.3, 0.45, 1.0, 1.2, 3.0])] * 3),
    angle=st.floats(-20, 20),
    channels=st.sampled_from([0, 2, 3]),
    shape=st.sampled_from([(4, 5, 6), (1, 5, 6), (5, 1, 4), (4, 5, 1)]),
    compress=st.booleans(),
    canonical=st.booleans(),
    axis=st.sampled_from(["auto", 0, 1, 2]),
    mixed=st.booleans(),
)
def test_a_volume_reads_alike_in_every_format(
    tmp_path: Path,
    ending: str,
    codes: str,
    kind: str,
    zooms: tuple[float, ...],
    angle: float,
    channels: int,
    shape: tuple[int, ...],
    compress: bool,
    canonical: bool,
    axis: Any,
    mixed: bool,
) -> None:
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    radians = np.deg2rad(angle)
    oblique = np.eye(4)
    oblique[:2, :2] = [[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]]
    affine = oblique @ np.diag([*zooms, 1.0])
    affine[:3, 3] = [10, -20, 30]
    affine = affine @ inv_ornt_aff(turn, shape)
    array = volume((*shape, channels) if channels else shape, kind)
    array.flat[0] = 7  # two values at least
    labels = (np.random.default_rng(3).random(shape) > 0.5).astype(np.uint8)
    files = {}
    for name in (".nii", ending):
        image = store(tmp_path / f"image{name}", array, affine, compress)
        mask = store(tmp_path / f"mask{'.nii' if mixed else name}", labels, affine, compress)
        files[name] = read(image, mask, canonical=canonical, axis=axis)
    same(files[ending], files[".nii"])
    labels_back = np.asarray(files[ending].labels)
    reading = Reading(canonical=canonical, axis=axis)
    written = write_back(labels_back, tmp_path / f"image{ending}", reading, tmp_path, "back")
    back = SimpleITK.ReadImage(str(written))
    stored = SimpleITK.ReadImage(str(tmp_path / f"image{ending}"))
    assert back.GetSize() == stored.GetSize()
    assert back.GetSpacing() == pytest.approx(stored.GetSpacing(), rel=1e-12)
    assert back.GetOrigin() == pytest.approx(stored.GetOrigin(), rel=1e-12)
    assert back.GetDirection() == pytest.approx(stored.GetDirection(), abs=1e-12)
    assert np.array_equal(SimpleITK.GetArrayFromImage(back), labels.T)
    nifti = put_back(labels_back, tmp_path / "image.nii", reading)
    assert np.array_equal(np.asanyarray(nifti.dataobj), labels)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("other", [".nii.gz", ".nrrd", ".mha"])
def test_image_and_mask_of_any_formats_must_lie_on_each_other(tmp_path: Path, ending: str, other: str) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    image = store(tmp_path / f"i{ending}", volume(), affine)
    labels = (volume() % 2).astype(np.uint8)
    expected = read(image, store(tmp_path / f"right{other}", labels, affine)).labels
    moved = affine.copy()
    moved[0, 3] = 5
    lost = store(tmp_path / f"lost{other}", labels, moved)
    refused(image, "lies up to 5", "data.mask_geometry=image", mask=lost)
    assert np.array_equal(labels_of(read(image, lost, mask_geometry="image")), expected)
    mirrored = affine @ np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = SHAPE[0] - 1
    turned = store(tmp_path / f"turned{other}", labels[::-1], mirrored)
    assert np.array_equal(labels_of(read(image, turned)), expected)


def test_a_ras_header_is_turned(tmp_path: Path) -> None:
    """A NRRD file may count to the right, as NIfTI does."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    (tmp_path / "voxels.raw").write_bytes(volume().tobytes(order="F"))
    path = tmp_path / "a.nhdr"
    path.write_text(
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 6 7 8\n"
        "space directions: (1,0,0) (0,2,0) (0,0,3)\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        "space origin: (0,0,0)\ndata file: voxels.raw\n"
    )
    same(read(path), read(store(tmp_path / "a.nii", volume(), affine)))


def test_thick_slices_do_not_depend_on_rounding(tmp_path: Path) -> None:
    affine = np.diag([0.45, 0.3, 0.3, 1.0])
    found = {read(store(tmp_path / f"a{ending}", volume(), affine)).image.shape[0] for ending in (".nii", ".nrrd")}
    assert found == {SHAPE[0]}


# --- headers ----------------------------------------------------------------------------------------------------------

NO_SIZES: dict[str, Callable[[str], str]] = {
    "left out": lambda text: re.sub(r"(space directions|ElementSpacing).*\n", "", text),
    "zero": lambda text: text.replace("(0,2,0)", "(0,0,0)").replace("Spacing = 1 2 3", "Spacing = 1 0 3"),
    "nan": lambda text: text.replace("(0,2,0)", "(nan,nan,nan)").replace("Spacing = 1 2 3", "Spacing = 1 nan 3"),
}
PLAIN = np.diag([-1.0, -2.0, 3.0, 1.0])


@pytest.mark.parametrize("fault", NO_SIZES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_headers_without_voxel_size_are_refused(tmp_path: Path, ending: str, fault: str) -> None:
    path = edited(store(tmp_path / f"a{ending}", volume(), PLAIN), NO_SIZES[fault])
    refused(path, "no voxel size along an axis", "SimpleITK.GetImageFromArray")
    image = SimpleITK.GetImageFromArray(volume().T)  # the cure
    image.SetSpacing((1, 2, 3))
    SimpleITK.WriteImage(image, str(path))
    assert read(path).spacing == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_axes_that_run_the_same_way_are_refused(tmp_path: Path, ending: str) -> None:
    def change(text: str) -> str:
        return text.replace("(0,2,0)", "(2,0,0)").replace("Matrix = 1 0 0 0 1 0", "Matrix = 1 0 0 1 0 0")

    refused(edited(store(tmp_path / f"a{ending}", volume(), PLAIN), change), "run the same way")


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_units_are_refused(tmp_path: Path, ending: str) -> None:
    def change(text: str) -> str:
        text = text.replace("encoding:", 'space units: "um" "um" "um"\nencoding:')
        return text.replace("DimSize", "DistanceUnits = um\nDimSize")

    path = store(tmp_path / f"a{ending}", volume(), PLAIN)
    refused(edited(path, change), "measured in um", "in mm")
    assert read(edited(path, lambda text: text.replace("um", "mm"))).spacing == (3.0, 2.0, 1.0)  # the cure


def test_values_that_want_to_be_scaled_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "a.mha", volume(), PLAIN)
    edited(path, lambda text: text.replace("DimSize", "ElementToIntensityFunctionSlope = 0.5\nDimSize"))
    refused(path, "wants its values scaled", "store them")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("sizes", ["6 7 9", "6 7 7"])
def test_sizes_that_do_not_fit_the_voxels_are_refused(tmp_path: Path, ending: str, compress: bool, sizes: str) -> None:
    """Fewer slices would be read without a word by the library."""
    path = store(tmp_path / f"a{ending}", volume(), PLAIN, compress)
    read(path)
    edited(path, lambda text: re.sub(r"(sizes: |DimSize = )6 7 8", rf"\g<1>{sizes}", text))
    refused(path, *(("cut short",) if sizes.endswith("9") else ("other sizes than its voxels", "export it again")))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("compress", [False, True])
def test_files_cut_short_are_refused(tmp_path: Path, ending: str, compress: bool, capfd: Any) -> None:
    path = store(tmp_path / f"a{ending}", volume(), PLAIN, compress)
    held = next((file for file in tmp_path.iterdir() if "raw" in file.name), path)
    held.write_bytes(held.read_bytes()[:-40])
    refused(path, "cut short", "replace the file")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "content", [b"", b"this is no picture\n" * 9, b"\x89PNG\r\n\x1a\n\x00\x00", b"NRRD0004\ntype: x\n\n"]
)
def test_other_files_are_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    refused(path, "replace the file")


IMPOSSIBLE = (
    *((".mha", r"NDims = 3", f"NDims = {number}") for number in ("-3", "0", "99", "x", "")),
    *((".mha", r"DimSize = .*", f"DimSize = {sizes}") for sizes in ("6 7", "6 7 -8", "6 7 8 9", "6 7 9999999999999")),
    (".mha", r"TransformMatrix = .*", "TransformMatrix = 1 0 0 1"),
    (".mha", r"Offset = .*", "Offset = 0 0"),
    (".mha", r"CompressedDataSize = .*", "CompressedDataSize = -1"),
    (".mha", r"ElementType = .*", "ElementType = short"),
    (".nrrd", r"dimension: 3", "dimension: -3"),
    (".nrrd", r"sizes: .*", "sizes: 6 7 9999999999999"),
)


@pytest.mark.parametrize(("ending", "right", "wrong"), IMPOSSIBLE)
def test_headers_that_cannot_be_right_are_refused(tmp_path: Path, ending: str, right: str, wrong: str) -> None:
    """Some of these end the process in the library."""
    path = store(tmp_path / f"a{ending}", volume(), PLAIN, compress=True)
    assert re.search(right, path.read_bytes().decode("latin-1"))
    refused(edited(path, lambda text: re.sub(right, wrong, text)), "cannot be right", "replace the file")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("compress", [False, True])
def test_damaged_headers_are_read_or_refused(tmp_path: Path, ending: str, compress: bool) -> None:
    path = store(tmp_path / f"a{ending}", volume(), PLAIN, compress)
    content, rng = path.read_bytes(), random.Random(0)
    told = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(damaged), 400))
            damaged[place : place + rng.randint(0, 3)] = rng.choice([b"9", b"-", b" ", b"\n", b"%d", b"x", b""])
        path.write_bytes(damaged)
        told.append(told_of(path))
    assert "" in told
    assert {*told} - {""}
    assert not [message for message in told if "\n" in message or len(message) > 900]


def told_of(path: Path) -> str:
    """Why a file is refused; empty where it is read."""
    try:
        read(path)
    except DataError as error:
        return str(error)
    return ""


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "a.nrrd", volume(), PLAIN)
    refused(edited(path, lambda text: text.replace("encoding: raw", "encoding: odd")), "odd", "replace the file")


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_that_are_not_there_are_named(tmp_path: Path, ending: str) -> None:
    path = store(tmp_path / f"a{ending}", volume(), PLAIN)
    (tmp_path / "a.raw").rename(tmp_path / "elsewhere.raw")
    refused(path, "a.raw", "copy it beside the header")
    (tmp_path / "elsewhere.raw").rename(tmp_path / "a.raw")  # the cure
    assert read(path).spacing == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_flat_and_five_dimensional_files_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    for channels in (1, 3):
        array = np.zeros((8, 9) if channels == 1 else (8, 9, channels), np.uint8)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=channels > 1), str(path))
        refused(path, "has 2 dimensions")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((2, 3, 4, 5, 3), np.uint8), isVector=True), str(path))
    refused(path, "has 5 dimensions")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, ending: str) -> None:
    array = np.ones(SHAPE, np.float32)
    array[0, 0, 0] = np.nan
    path = store(tmp_path / f"a{ending}", array, PLAIN)
    with pytest.raises(DataError) as told:
        read(path)
    twin = store(tmp_path / "a.nii", array, PLAIN)
    with pytest.raises(DataError) as expected:
        read(twin)
    assert str(told.value) == str(expected.value)


def test_complex_values_are_refused(tmp_path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones(SHAPE, np.complex64)), str(tmp_path / "c.nrrd"))
    refused(tmp_path / "c.nrrd", "complex", "store real numbers")


# --- a fourth axis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("frames", [1, 3, 17])
def test_a_fourth_axis_holds_channels(tmp_path: Path, ending: str, frames: int) -> None:
    path = tmp_path / f"a{ending}"
    array = volume((*SHAPE, frames))
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T), isVector=False)
    SimpleITK.WriteImage(image, str(path))
    assert image.GetDimension() == 4
    if frames > 16:
        refused(path, "at most 16")
        return
    array = array[..., 0] if frames == 1 else array
    same(read(path), read(store(tmp_path / "a.nii", array, np.diag([-1.0, -1.0, 1.0, 1.0]))))


TIME: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "kind": (
        lambda text: text.replace("domain domain domain domain", "domain domain domain time"),
        lambda text: text.replace("domain time", "domain domain"),
    ),
    "sequence": (
        lambda text: text.replace("encoding:", "axis 3 index name:=time\nencoding:"),
        lambda text: text.replace("axis 3 index name:=time\n", ""),
    ),
    "frames": (
        lambda text: text.replace("encoding:", "MultiVolume.FrameIdentifyingDICOMTagName:=AcquisitionTime\nencoding:"),
        lambda text: re.sub("MultiVolume.*\n", "", text),
    ),
}


@pytest.mark.parametrize("told", TIME)
def test_time_series_are_refused(tmp_path: Path, told: str) -> None:
    path = tmp_path / "a.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume((3, 8, 7, 6)), isVector=False), str(path))
    spoil, cure = TIME[told]
    refused(edited(path, spoil), "is a time series of 3 frames", "take that out of the header")
    assert read(edited(path, cure)).image.shape[-1] == 3


# --- segmentations of 3D Slicer ---------------------------------------------------------------------------------------


def segmentation(path: Path, labels: np.ndarray, *segments: tuple[int, str, int]) -> Path:
    """As 3D Slicer stores them: names as free pairs in the header."""
    store(path, labels, PLAIN)
    told = "".join(
        f"Segment{number}_LabelValue:={label}\nSegment{number}_Name:={name}\nSegment{number}_Layer:={layer}\n"
        for number, (label, name, layer) in enumerate(segments)
    )
    return edited(path, lambda text: text.replace("encoding:", f"{told}encoding:"))


def test_segments_in_one_layer_are_labels(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3], labels[3:5] = 1, 2
    image = store(tmp_path / "a.nrrd", volume(), PLAIN)
    mask = segmentation(tmp_path / "a.seg.nrrd", labels, (1, "disc", 0), (2, "cup", 0))
    expected = read(image, store(tmp_path / "m.nii", labels, PLAIN), ids=(1, 2)).labels
    assert np.array_equal(labels_of(read(image, mask, ids=(1, 2))), expected)
    assert stem_of(mask) == stem_of(image) == "a"


def test_segments_that_may_overlap_are_refused(tmp_path: Path) -> None:
    image = store(tmp_path / "a.nrrd", volume(), PLAIN)
    layers = np.zeros((*SHAPE, 2), np.uint8)
    layers[1:3, ..., 0], layers[2:5, ..., 1] = 1, 1
    mask = segmentation(tmp_path / "a.seg.nrrd", layers, (1, "disc", 0), (1, "cup", 1))
    refused(image, "in 2 layers", "export it as a label map", mask=mask)
    store(mask, layers.max(-1), PLAIN)  # the cure
    assert np.asarray(read(image, mask).labels).sum() == layers.max(-1).sum()


def test_a_segmentation_is_no_image(tmp_path: Path) -> None:
    refused(
        segmentation(tmp_path / "a.nrrd", volume(kind=np.uint8), (1, "disc", 0)), "is a segmentation", "to the masks"
    )


def segmented(root: Path, *named: tuple[tuple[int, str], ...]) -> None:
    """A site whose segmentations name their labels as given, the last of them in all further files."""
    for number in range(6):
        labels = np.zeros((16, 16, 3), np.uint8)
        labels[2:6, 3 + number : 8], labels[8:12, 3 + number : 8] = 1, 2
        image = (np.random.default_rng(number).normal(100, 10, labels.shape) + 50 * labels).astype(np.int16)
        store(root / "a" / "images" / f"v{number}.nrrd", image, PLAIN)
        (root / "a" / "masks").mkdir(parents=True, exist_ok=True)
        segments = ((label, name, 0) for label, name in named[min(number, len(named) - 1)])
        segmentation(root / "a" / "masks" / f"v{number}.seg.nrrd", labels, *segments)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ((((1, "disc"), (2, "cup")), ((1, "Disc"), (2, " cup"))), ""),
        ((((1, "disc"), (2, "cup")), ((1, "cup"), (2, "disc"))), "has 'cup' as label 1, case 'v0' has it as 2"),
        ((((1, "disc"), (2, "cup")), ((1, "disc"), (2, "vessel"))), "has 'vessel' as label 2, case 'v0' has 'cup'"),
        ((((1, "disc"),), ()), ""),
    ],
)
def test_segments_of_other_names_are_told(tmp_path: Path, named: Any, told: str) -> None:
    segmented(tmp_path, *named)
    knobs: dict[str, Any] = {"regions": {"disc": [1], "cup": [2]}, "size": [20, 24]}
    of_run = folder(tmp_path, **knobs).findings
    of_check = check(FolderDataModule(root=str(tmp_path), **knobs)).findings
    for findings in (of_run, of_check):
        found = [finding for finding in findings if finding.kind == "segments differ"]
        assert len(found) == bool(told)
        assert not found or (told in found[0].what and found[0].case == "v1" and found[0].severity == "warning")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_names_of_segments_survive_the_cache(tmp_path: Path, cache: str) -> None:
    segmented(tmp_path / "data", ((1, "disc"),), ((1, "cup"),))
    knobs: dict[str, Any] = {"regions": {"disc": [1], "cup": [2]}, "cache": cache, "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):
        kinds = [finding.kind for finding in folder(tmp_path / "data", **knobs).findings]
        assert kinds.count("segments differ") == 1


# --- folders ----------------------------------------------------------------------------------------------------------


def make_site(root: Path, site: str, ending: str, mask_ending: str, count: int = 6) -> None:
    for number in range(count):
        labels = np.zeros((16, 16, 3), np.uint8)
        labels[4:9, 3 + number : 8 + number] = 1
        image = (np.random.default_rng(number).normal(100, 10, labels.shape) + 50 * labels).astype(np.int16)
        store(root / site / "images" / f"v{number}{ending}", image, PLAIN)
        store(root / site / "masks" / f"v{number}{mask_ending}", labels, PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "mask_ending"), [(".nrrd", ".seg.nrrd"), (".mha", ".nii.gz"), (".nhdr", ".mhd"), (".nii", ".nrrd")]
)
def test_sites_of_every_format_are_listed_and_read(tmp_path: Path, ending: str, mask_ending: str) -> None:
    make_site(tmp_path / "one", "a", ending, mask_ending)
    make_site(tmp_path / "two", "a", ".nii.gz", ".nii.gz")
    one, two = (folder(tmp_path / name) for name in ("one", "two"))
    assert [case.case for case in one.cases()] == [f"v{number}" for number in range(6)]
    for case in one.cases():
        assert np.array_equal(one.site("a").image(case.case), two.site("a").image(case.case))
    assert one.splits() == [row | {} for row in two.splits()]
    checked = check(FolderDataModule(root=str(tmp_path / "one"), size=[20, 24]))
    assert not [finding for finding in checked.findings if finding.severity == "error"]


def test_voxels_without_header_are_foreign(tmp_path: Path) -> None:
    store(tmp_path / "a.mhd", volume(), PLAIN)
    assert list(image_files(tmp_path, refuse)) == ["a"]
    (tmp_path / "b.raw").write_bytes(b"x")
    with pytest.raises(DataError, match=r"b\.raw"):
        image_files(tmp_path, refuse)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_changed_voxels_are_noticed(tmp_path: Path, ending: str) -> None:
    path = store(tmp_path / f"a{ending}", volume(), PLAIN)
    case = Case("a", "a", "a", str(path))
    before = file_digest(str(path)), _identity(case)
    header = path.read_bytes()
    (tmp_path / "a.raw").write_bytes((volume() + 1).tobytes(order="F"))
    assert path.read_bytes() == header
    assert file_digest(str(path)) != before[0]
    assert _identity(case) != before[1]


LISTS = {
    "mhd list": (
        ".mhd",
        "ElementDataFile = a.raw",
        "ElementDataFile = LIST\n" + "".join(f"s{k}.raw\n" for k in range(8)),
    ),
    "mhd pattern": (".mhd", "ElementDataFile = a.raw", "ElementDataFile = s%01d.raw 0 7 1"),
    "nhdr list": (".nhdr", "data file: a.raw", "data file: LIST\n" + "\n".join(f"s{k}.raw" for k in range(8))),
    "nhdr pattern": (".nhdr", "data file: a.raw", "data file: s%01d.raw 0 7 1"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_voxels_in_a_file_for_each_slice(tmp_path: Path, kind: str) -> None:
    ending, before, after = LISTS[kind]
    path = store(tmp_path / f"a{ending}", volume(), PLAIN)
    expected, alone = read(path).image, file_digest(str(path))
    (tmp_path / "a.raw").unlink()
    for number in range(SHAPE[2]):
        (tmp_path / f"s{number}.raw").write_bytes(volume()[..., number].tobytes(order="F"))
    edited(path, lambda text: text.replace(before, after))
    assert np.array_equal(read(path).image, expected)
    assert list(image_files(tmp_path, refuse)) == ["a"]
    digest = file_digest(str(path))
    assert digest != alone
    content = (tmp_path / "s5.raw").read_bytes()
    (tmp_path / "s5.raw").write_bytes(content[::-1])
    assert file_digest(str(path)) != digest
    (tmp_path / "s5.raw").write_bytes(content[:-2])
    refused(path, "cut short")
    (tmp_path / "s5.raw").unlink()
    refused(path, "s5.raw", "copy it beside the header")


# --- without the library ----------------------------------------------------------------------------------------------


def test_the_missing_library_is_told_once_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path, "a", ".nrrd", ".nii.gz")
    make_site(tmp_path, "b", ".nii.gz", ".nii.gz")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(DataError) as told:
        folder(tmp_path)
    assert "v0.nrrd needs the package SimpleITK, as 5 more cases do; " in str(told.value)
    assert "[itk]" in str(told.value)
    checked = check(FolderDataModule(root=str(tmp_path), size=[20, 24]))
    errors = [finding for finding in checked.findings if finding.severity == "error"]
    assert [(finding.kind, finding.cure) for finding in errors] == [("unreadable file", INSTALL)]
    refused(tmp_path / "a/images/v0.nrrd", "needs the package SimpleITK", INSTALL)


def test_the_extra_that_messages_name_exists() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert any("SimpleITK" in package for package in project["optional-dependencies"]["itk"])
    assert "itk" in re.findall(r"\w+", project["optional-dependencies"]["dev"][0].partition("[")[2])
