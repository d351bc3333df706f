"""From files to arrays."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from fedseg.datamodules import Case, DataError
from fedseg.datamodules.readers import Reading, Stored, map_labels, read_case, scale
from tests.data_files import picture, save, save_volume, square

PLAIN = Reading()


def read(image: Path, mask: Path | None = None, reading: Reading = PLAIN):
    return read_case(Case("a", "c", "c", str(image), None if mask is None else str(mask)), reading)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".npy"])
def test_lossless_pictures_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    array = picture(1)
    sample = read(save(tmp_path / f"c{suffix}", array))
    assert sample.image.dtype == np.uint8
    assert np.array_equal(sample.image, array[None])
    assert sample.spacing is None


def test_lossy_and_grey_and_transparent_pictures(tmp_path: Path) -> None:
    grey = picture(1, channels=1)
    assert read(save(tmp_path / "c.gif", grey)).image.shape[:3] == (1, 20, 24)
    assert np.array_equal(read(save(tmp_path / "c.pgm", grey)).image, grey[None, :, :, None])
    assert read(save(tmp_path / "c.jpg", picture(1))).image.shape == (1, 20, 24, 3)
    assert np.array_equal(
        read(save(tmp_path / "t.png", picture(1, channels=4))).image, picture(1, channels=4)[None, ..., :3]
    )
    Image.fromarray(square() > 0).save(tmp_path / "bit.png")
    assert set(np.unique(read(tmp_path / "bit.png").image)) == {0, 255}


def test_tiff_pages_planes_and_float(tmp_path: Path) -> None:
    planes = picture(1).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read(tmp_path / "planar.tif").image[0], picture(1))
    values = np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)
    tifffile.imwrite(tmp_path / "float.tif", values)
    assert np.array_equal(read(tmp_path / "float.tif", reading=Reading("unit")).image[0, ..., 0], values)
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((9, 20, 24), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="9 pages"):
        read(tmp_path / "pages.tif")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_white_as_zero_is_turned_whatever_the_depth(tmp_path: Path, kind: type) -> None:
    values = np.linspace(0, np.iinfo(kind).max, 480).astype(kind).reshape(20, 24)
    images = []
    for name, photometric in {"black": "minisblack", "white": "miniswhite"}.items():
        stored = values if name == "black" else np.iinfo(kind).max - values
        tifffile.imwrite(tmp_path / f"{name}.tif", stored, photometric=photometric)
        images.append(read(tmp_path / f"{name}.tif").image)
    assert np.array_equal(*images)
    tifffile.imwrite(tmp_path / "float.tif", values.astype(np.float32), photometric="miniswhite")
    with pytest.raises(DataError, match=r"float.tif: holds float32 with white as zero .* store it with black as zero"):
        read(tmp_path / "float.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_pictures_that_viewers_turn_are_refused(tmp_path: Path, suffix: str) -> None:
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture(1)).save(tmp_path / f"{orientation}{suffix}", exif=exif)
    assert read(tmp_path / f"1{suffix}").image.shape == (1, 20, 24, 3)
    with pytest.raises(DataError, match=f"image .*6{suffix}: its EXIF orientation is 6: .* store it upright"):
        read(tmp_path / f"6{suffix}")


def test_sixteen_bit_png_is_scaled_per_case(tmp_path: Path) -> None:
    values = np.linspace(1000, 3000, 480).astype(np.uint16).reshape(20, 24)
    image = read(save(tmp_path / "c.png", values), reading=Reading("minmax")).image[0, ..., 0]
    assert image.dtype == np.float32
    assert np.allclose(image, (values - 1000) / 2000, atol=1e-6)


def test_intensity_policies() -> None:
    values = np.arange(101, dtype=np.int16).reshape(1, 1, 101, 1)
    assert np.allclose(scale(values, Reading("percentile", (10, 90)))[0, 0, [5, 10, 50, 95], 0], [0, 0, 0.5, 1])
    assert np.allclose(scale(values, Reading("window", window=(0, 200)))[0, 0, [0, 100], 0], [0, 0.5])
    assert scale(np.full((1, 2, 2, 1), 7.0), PLAIN).max() == 0
    mostly_empty = np.zeros((1, 1, 1000, 1), np.float32)
    mostly_empty[0, 0, 0] = 4
    assert scale(mostly_empty, PLAIN).max() == 1  # percentiles coincide: the full range counts
    brain = np.where(values % 2, 0, values).astype(np.float32)  # every other voxel lies outside
    inside = brain[brain != 0]
    seen = scale(brain, Reading("zscore"))
    assert np.allclose(8 * (seen[brain != 0] - 0.5), (inside - inside.mean()) / inside.std(), atol=1e-5)
    assert not seen[brain == 0].any()
    assert scale(brain * 0, Reading("zscore")).max() == scale(brain * 0 + 7, Reading("zscore")).max() == 0
    far = np.append(brain.ravel(), [1e6]).reshape(1, 1, -1, 1)
    assert scale(far, Reading("zscore")).max() == 1
    with pytest.raises(DataError, match="expects \\[0, 1\\]"):
        scale(values, Reading("unit"))
    with pytest.raises(DataError, match="not finite"):
        scale(np.full((1, 2, 2, 1), np.nan), PLAIN)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"intensity": "window"}, "needs data.window"),
        ({"window": (3, 1)}, "low must be below high"),
        ({"percentiles": (90.0, 10.0)}, "rising"),
        ({"axis": 3}, "axis 0, 1 or 2"),
        ({"label_values": {"red": 1}}, "neither a value"),
        ({"label_values": {255: 256}}, "0 to 255"),
    ],
)
def test_bad_settings_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Reading(**knobs)  # type: ignore[arg-type]


# --- volumes ----------------------------------------------------------------------------------------------------------


def volume_with_landmarks(codes: str) -> tuple[np.ndarray, np.ndarray]:
    """A volume of 4 (left-right) x 5 (front-back) x 6 (foot-head) mm spacing 1, 2, 3, stored in the given direction.

    Values: 1 at the left, front, foot corner; 2 at the right, front, foot corner; 3 at the left, back, head corner.
    """
    import nibabel.orientations as o

    lps = np.zeros((4, 5, 6), np.float32)  # x to the left, y to the back, z to the head
    lps[3, 0, 0], lps[0, 0, 0], lps[3, 4, 5] = 1, 2, 3
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])
    ornt = o.ornt_transform(o.axcodes2ornt(("L", "P", "S")), o.axcodes2ornt(tuple(codes)))
    return o.apply_orientation(lps, ornt), affine @ o.inv_ornt_aff(ornt, lps.shape)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize(
    ("axis", "shape", "spacing", "corners"),
    [
        (2, (6, 5, 4), (3, 2, 1), [(0, 0, 3), (0, 0, 0), (5, 4, 3)]),  # axial: rows to the back, columns to the left
        (1, (5, 6, 4), (2, 3, 1), [(0, 5, 3), (0, 5, 0), (4, 0, 3)]),  # coronal: head first
        (0, (4, 6, 5), (1, 3, 2), [(3, 5, 0), (0, 5, 0), (3, 0, 4)]),  # sagittal: head first
    ],
)
def test_volumes_look_the_same_however_they_are_stored(
    tmp_path: Path, codes: str, axis: int, shape: tuple[int, ...], spacing: tuple[float, ...], corners: list[tuple]
) -> None:
    array, affine = volume_with_landmarks(codes)
    path = save_volume(tmp_path / "c.nii.gz", array, affine)
    sample = read(path, path, Reading("minmax", axis=axis))
    assert sample.image.shape == (*shape, 1)
    assert sample.spacing == pytest.approx(spacing)
    assert sample.labels is not None
    assert [sample.labels[corner] for corner in corners] == [1, 2, 3]
    assert [sample.image[(*corner, 0)] for corner in corners] == pytest.approx([1 / 3, 2 / 3, 1])


def test_stored_orientation_keeps_axes_and_directions(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = save_volume(tmp_path / "c.nii", array, np.diag([1.0, 2.0, 3.0, 1.0]))
    sample = read(path, reading=Reading(axis=1, canonical=False))
    assert np.array_equal(sample.image[..., 0], array.transpose(1, 0, 2))
    assert sample.spacing == (2, 1, 3)


def test_scaled_nifti_values_are_real_values(tmp_path: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Image(np.linspace(-100, 300, 60).reshape(3, 4, 5), np.diag([-1.0, -1, 1, 1]))
    image.set_data_dtype(np.int16)  # stored as scaled integers
    nibabel.save(image, tmp_path / "c.nii.gz")
    scaled = read(tmp_path / "c.nii.gz", reading=Reading("window", window=(-100, 300))).image
    assert scaled[0, 0, 0, 0] == pytest.approx(0, abs=1e-3)
    assert scaled[4, 3, 2, 0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("unknown", 1), ("meter", 1e-3), ("micron", 1e3)])
def test_spacing_is_that_of_the_affine_in_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    affine = np.diag([-0.5 * factor, 2.0 * factor, 3.0 * factor, 1])
    volume = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    volume.header.set_xyzt_units(unit)
    volume.header["pixdim"][1:4] = 1  # contradicts the affine, as some tools leave it
    volume.header["qform_code"] = 0
    nibabel.save(volume, tmp_path / "v.nii")
    assert read(tmp_path / "v.nii").spacing == pytest.approx((3.0, 2.0, 0.5))


# --- masks ------------------------------------------------------------------------------------------------------------


def labels_of(values: object, **knobs: Any) -> list[int]:
    stored = Stored(np.array(values)[None, None, :, None])
    return map_labels(stored, Reading(**knobs))[0][0, 0].tolist()


def test_values_are_label_ids_unless_told_otherwise() -> None:
    assert labels_of(np.array([0, 1, 255], np.uint8)) == [0, 1, 255]
    assert labels_of([0.0, 2.0]) == [0, 2]
    assert labels_of([False, True]) == [0, 1]
    assert labels_of([0, 500], label_values={500: 3}) == [0, 3]


def test_the_first_rule_that_fits_wins() -> None:
    rules = {">=200": 2, ">=100": 1, "<100": 0}
    assert labels_of(np.array([3, 99, 100, 250], np.uint8), label_values=rules) == [0, 0, 1, 2]
    assert labels_of([0.2, 0.8], label_values={">=0.5": 1, "<0.5": 0}) == [0, 1]


def test_0_255_counts_as_0_1_only_where_1_is_the_only_label() -> None:
    mask = np.array([0, 255, 255], np.uint8)
    assert labels_of(mask, ids=(1,)) == [0, 1, 1]
    assert labels_of(mask, ids=(1, 2)) == [0, 255, 255]
    assert labels_of(np.array([0, 1, 255], np.uint8), ids=(1,)) == [0, 1, 255]  # 255 means something else here


def test_colours_are_mapped_by_name() -> None:
    mask = np.zeros((1, 1, 4, 3), np.uint8)
    mask[0, 0, 1], mask[0, 0, 2], mask[0, 0, 3] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    rules = {"255,0,0": 1, "0, 255, 0": 2, "255,255,255": 3}
    assert map_labels(Stored(mask), Reading(label_values=rules))[0][0, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"the colours 0, 255, 0,255,0, 255,0,0, .*data.label_values={'0,255,0': ID, "):
        map_labels(Stored(mask), PLAIN)


@pytest.mark.parametrize(
    ("mask", "message"),
    [([0.0, 0.4], "soft map"), ([0, -1], "no label ids"), ([0, 300], "no label ids"), ([0, np.nan], "not finite")],
)
def test_values_that_are_no_labels_are_refused(mask: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(mask)


def test_palette_masks_are_their_indices(tmp_path: Path) -> None:
    mask = Image.fromarray(square(label=2), mode="P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "m.png")
    sample = read(save(tmp_path / "c.png", picture(1)), tmp_path / "m.png")
    assert np.array_equal(sample.labels, square(label=2)[None])


# --- files that do not do ---------------------------------------------------------------------------------------------


def test_bad_files_are_named_with_a_cure(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", picture(1))
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "short.nii.gz").write_bytes(b"\x1f\x8b123")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("broken.png", "text.png", "short.nii.gz", "empty.npy"):
        with pytest.raises(DataError, match=rf"site 'a', case 'c': image .*{name} cannot be read .*; replace"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="does not exist; correct the path"):
        read(tmp_path / "absent.png")
    with pytest.raises(DataError, match="unknown type; convert"):
        read(save(tmp_path / "c.png", picture(1)).rename(tmp_path / "c.xyz"))


def test_pickled_arrays_are_never_run(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "c.npy")


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "c.png", picture(1)), save(tmp_path / "m.png", square(10, 24))
    with pytest.raises(DataError, match="1 x 10 x 24 x 1 but the image is 1 x 20 x 24 x 3"):
        read(image, mask)


def test_a_nifti_mask_must_lie_where_its_image_lies(tmp_path: Path) -> None:
    values, labels = np.random.default_rng(0).normal(size=(6, 5, 4)), np.zeros((6, 5, 4), np.uint8)
    labels[0, 1, 1] = 1
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    image = save_volume(tmp_path / "i.nii.gz", values, affine)
    shifted, mirrored, near = affine.copy(), affine.copy(), affine.copy()
    shifted[0, 3], near[0, 3] = 7, 0.1
    mirrored[0, 0] = -1
    for name, other in (("shifted", shifted), ("wider", np.diag([2.0, 2.0, 3.0, 1.0])), ("mirrored", mirrored)):
        with pytest.raises(DataError, match=rf"{name}.*lies up to .* from its image; export both on one grid"):
            read(image, save_volume(tmp_path / f"{name}.nii.gz", labels, other))
    expected = read(image, save_volume(tmp_path / "near.nii.gz", labels, near)).labels
    turned = affine @ np.array(
        [[-1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )  # the same, stored backwards
    assert np.array_equal(read(image, save_volume(tmp_path / "turned.nii.gz", labels[::-1], turned)).labels, expected)


def test_a_mask_that_is_not_flat_is_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "c.png", picture(1))
    with pytest.raises(DataError, match="not 2-D"):
        read(image, save(tmp_path / "m.npy", np.stack([square(), 1 - square()], -1)))
    with pytest.raises(DataError, match="more than 16 channels"):
        read(image, save(tmp_path / "v.npy", np.zeros((20, 24, 30), np.uint8)))
