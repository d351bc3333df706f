"""From stored value to label id: every file format, depth and mode, and every cure that a refusal names."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fedseg.datamodules import Case, DataError, FolderDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.findings import KINDS
from fedseg.datamodules.readers import Reading, Stored, map_labels, read_case
from tests.data_files import folder, make_site, square
from tests.mask_files import (
    GREY_ALPHA,
    INDEXED,
    MINISBLACK,
    MINISWHITE,
    PALETTE,
    RGB,
    RGBA,
    TRUE_COLOUR,
    write_bmp,
    write_netpbm,
    write_png,
    write_tiff,
)

HEIGHT, WIDTH = 12, 13
BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)
COLOURFUL = [BLACK, *((37 * i % 256, 91 * i % 256, 255 - i) for i in range(1, 256))]  # no grey but black
GREYS = [(i, i, i) for i in range(256)]
Write = Callable[[Path, np.ndarray], Path]


def drawn(label: int = 1) -> np.ndarray:
    """Fewer pixels in than out, no symmetry."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:7, 3:11] = label
    return mask


def read(path: Path, **knobs: Any):
    """The sample of a mask, whose image has its size."""
    volume = path.name.endswith((".nii", ".nii.gz"))
    image = path.parent / ("image.nii" if volume else "image.npy")
    if volume:
        stored = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(stored.shape, np.uint8), stored.affine), image)
    else:
        np.save(image, np.zeros((HEIGHT, WIDTH), np.uint8))
    return read_case(Case("a", "c", "c", str(image), str(path)), Reading(**knobs))


def labels(path: Path, **knobs: Any) -> np.ndarray:
    sample = read(path, **knobs)
    assert sample.labels is not None
    return sample.labels[0]


def kinds(path: Path, **knobs: Any) -> list[str]:
    """The findings told on the way; each has a place, a cure and a known kind."""
    notes = read(path, **knobs).notes
    assert all(note.file == str(path) and note.site == "a" and note.case == "c" and note.cure for note in notes)
    assert all(note.kind in KINDS for note in notes)
    return [note.kind for note in notes]


def cured(path: Path, message: str, ids: Sequence[int] = (1, 2), **knobs: Any) -> np.ndarray:
    """Labels after following the message: the setting that it names, its open ids filled in rising order."""
    found = re.search(r"data\.label_values=(\{.*?\})", message)
    assert found, message
    rules = found.group(1)
    for label in ids:
        rules = rules.replace("ID", str(label), 1)
    return labels(path, label_values=yaml.safe_load(rules), **knobs)


def refusal(path: Path, **knobs: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **knobs)
    message = str(caught.value)
    assert message.startswith(f"site 'a', case 'c': mask {path}")
    assert len(message) < 450 + len(str(path))
    return message


# --- numbers in one channel: every depth of every format --------------------------------------------------------------


def png(bits: int, **more: Any) -> Write:
    return lambda path, ids: write_png(path.with_suffix(".png"), ids, bits, **more)


def tif(bits: int, kind: Any = np.uint32) -> Write:
    return lambda path, ids: write_tiff(path.with_suffix(".tif"), ids.astype(kind), bits)


def tif_palette(bits: int) -> Write:
    return lambda path, ids: write_tiff(path.with_suffix(".tif"), ids, bits, PALETTE, COLOURFUL[: 2**bits])


def compressed_tif(kind: Any, compression: str) -> Write:
    def write(path: Path, ids: np.ndarray) -> Path:
        Image.fromarray(ids.astype(kind)).save(path.with_suffix(".tif"), compression=compression)
        return path.with_suffix(".tif")

    return write


def netpbm(largest: int, text: bool) -> Write:
    return lambda path, ids: write_netpbm(path.with_suffix(".pgm"), ids, largest, text)


def bmp(bits: int, palette: Sequence[tuple[int, int, int]]) -> Write:
    return lambda path, ids: write_bmp(path.with_suffix(".bmp"), ids, bits, palette[: 2**bits])


def gif(palette: Sequence[tuple[int, int, int]]) -> Write:
    def write(path: Path, ids: np.ndarray) -> Path:
        image = Image.fromarray(ids.astype(np.uint8), mode="P")
        image.putpalette([part for colour in palette for part in colour])
        image.save(path.with_suffix(".gif"), optimize=False)
        return path.with_suffix(".gif")

    return write


def npy(kind: Any) -> Write:
    def write(path: Path, ids: np.ndarray) -> Path:
        np.save(path.with_suffix(".npy"), ids.astype(kind))
        return path.with_suffix(".npy")

    return write


def nifti(kind: Any) -> Write:
    def write(path: Path, ids: np.ndarray) -> Path:
        lps = ids.astype(kind).T[:, :, None]  # rows run to the back, columns to the left
        nibabel.save(nibabel.Nifti1Image(lps, np.diag([-1, -1, 1, 1])), path.with_suffix(".nii.gz"))
        return path.with_suffix(".nii.gz")

    return write


INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, ">u2", ">i4")
FLOATS = (np.float16, np.float32, np.float64, ">f4")
NUMBERS: dict[str, tuple[Write, int]] = {  # and the largest id that it can hold
    **{f"png {bits}": (png(bits), 2 ** min(bits, 8) - 1) for bits in (1, 2, 4, 8, 16)},
    **{f"png {bits} interlaced": (png(bits, interlaced=True), 2 ** min(bits, 8) - 1) for bits in (1, 2, 4, 8, 16)},
    **{f"tif {bits}": (tif(bits), 2 ** min(bits, 8) - 1) for bits in (1, 2, 4, 8, 16, 32)},
    **{f"tif {kind}": (tif(bits, kind), 127) for kind, bits in (("i1", 8), ("i2", 16), ("i4", 32), ("f4", 32))},
    **{f"tif {how}": (compressed_tif(np.uint8, how), 255) for how in ("tiff_lzw", "tiff_deflate", "packbits")},
    "tif 16 lzw": (compressed_tif(np.uint16, "tiff_lzw"), 255),
    "tif bilevel fax": (compressed_tif(bool, "group4"), 1),
    **{
        f"pgm {largest} {'text' if text else 'binary'}": (netpbm(largest, text), min(largest, 255))
        for largest in (1, 3, 100, 255, 1000, 65535)
        for text in (False, True)
    },
    "bmp greys": (bmp(8, GREYS), 255),
    "gif greys": (gif(GREYS), 255),
    "npy bool": (npy(bool), 1),
    **{f"npy {np.dtype(kind).str}": (npy(kind), 127) for kind in (*INTEGERS, *FLOATS)},
    **{f"nifti {np.dtype(kind).str}": (nifti(kind), 127) for kind in (*INTEGERS[:6], *FLOATS[1:3])},
    **{
        f"png palette {bits}": (png(bits, colour=INDEXED, palette=COLOURFUL[: 2**bits]), 2**bits - 1)
        for bits in (1, 2, 4, 8)
    },
    **{
        f"tif palette {bits}": (tif_palette(bits), 2**bits - 1)
        for bits in (1, 2, 4, 8)
    },
    **{f"bmp palette {bits}": (bmp(bits, COLOURFUL), 2**bits - 1) for bits in (1, 4, 8)},
    "gif palette": (gif(COLOURFUL), 255),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_come_back_from_whatever_format_holds_them(tmp_path: Path, name: str, data: st.DataObject) -> None:
    write, largest = NUMBERS[name]
    ids = data.draw(arrays(np.uint8, (HEIGHT, WIDTH), elements=st.integers(0, largest)))
    assert np.array_equal(labels(write(tmp_path / "mask", ids)), ids)


WHITES = {
    "png 2": 3,
    "png 4": 15,
    "png 8": 255,
    "png 16": 65535,
    "tif 2": 3,
    "tif 4": 15,
    "tif 8": 255,
    "tif 16": 65535,
    "tif 16 lzw": 65535,
    "pgm 3 binary": 3,
    "pgm 100 text": 100,
    "pgm 1000 binary": 1000,
    "bmp greys": 255,
    "gif greys": 255,
    "npy <u2": 65535,
    **dict.fromkeys(("npy <i8", "npy <f4", "nifti <i2", "nifti <f4"), 255),
}


@pytest.mark.parametrize(("name", "white"), WHITES.items())
def test_black_and_white_are_0_and_1_where_1_is_the_only_id(tmp_path: Path, name: str, white: int) -> None:
    ids = drawn()
    path = NUMBERS[name][0](tmp_path / "mask", ids.astype(np.uint32) * white)
    assert np.array_equal(labels(path, ids=(1,)), ids)
    assert kinds(path, ids=(1,)) == []
    if white < 256:
        assert set(np.unique(labels(path, ids=(1, 2)))) == {0, white}  # it would have to be mapped
    full = NUMBERS[name][0](tmp_path / "full", np.full((HEIGHT, WIDTH), white, np.uint32))
    assert labels(full, ids=(1,)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_white_as_zero_is_turned_and_told(tmp_path: Path, bits: int) -> None:
    white = 2**bits - 1
    path = write_tiff(tmp_path / "m.tif", (1 - drawn()).astype(np.uint32) * white, bits, MINISWHITE)
    assert np.array_equal(labels(path, ids=(1,)), drawn())
    assert kinds(path, ids=(1,)) == ["white is zero"]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_ids_that_count_down_from_white_are_refused_until_they_are_mapped(tmp_path: Path, bits: int) -> None:
    mask = drawn()
    mask[9:11, 2:5] = 2
    path = write_tiff(tmp_path / "m.tif", mask.astype(np.uint32), bits, MINISWHITE)
    for ids in ((1, 2), (1, 2, 3)):
        message = refusal(path, ids=ids)
        assert "white as zero" in message
        assert np.array_equal(cured(path, message), mask)
    binary = write_tiff(tmp_path / "b.tif", drawn().astype(np.uint32), bits, MINISWHITE)
    assert np.array_equal(cured(binary, refusal(binary, ids=(1,))), drawn())


RULES_OF_OTHERS: list[dict[int | str, int]] = [{">=128": 1, "<128": 0}, {0: 1, 255: 0}, {"<128": 1, ">=128": 0}]


@pytest.mark.parametrize("rules", RULES_OF_OTHERS, ids=str)
@pytest.mark.parametrize("name", ["png 8", "png 16", "tif 8", "npy <i8", "npy <f4", "nifti <i2", "png palette 8"])
def test_rules_for_another_site_never_flatten_a_mask_in_silence(
    tmp_path: Path, rules: dict[int | str, int], name: str
) -> None:
    path = NUMBERS[name][0](tmp_path / "m", drawn())
    assert "turns all of them into " in refusal(path, ids=(1,), label_values=rules)
    assert np.array_equal(labels(path, ids=(1,)), drawn())  # the cure: without it


def test_a_soft_map_is_not_flattened_by_thresholds_of_another_site(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH))
    assert "turns all of them into 0" in refusal(tmp_path / "m.npy", ids=(1,), label_values={">=128": 1, "<128": 0})


def test_a_soft_map_without_a_drawing_stays_empty_under_its_threshold(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.linspace(0, 0.4, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH))
    assert not labels(tmp_path / "m.npy", ids=(1,), label_values={">=0.5": 1, "<0.5": 0}).any()


@pytest.mark.parametrize("highest", [1, 2, 3, 100])
def test_ids_divided_by_255_are_no_rounding_errors(tmp_path: Path, highest: int) -> None:
    ids = tuple(range(1, highest + 1))
    np.save(tmp_path / "m.npy", drawn(highest) / np.float32(255))
    assert f"its highest value is {highest / 255:.3g}" in refusal(tmp_path / "m.npy", ids=ids)
    assert "data.label_values" not in refusal(tmp_path / "m.npy", ids=ids)
    np.save(tmp_path / "m.npy", drawn() * 1e-9)
    assert not labels(tmp_path / "m.npy", ids=ids).any()


def test_values_of_sixteen_bits_are_refused_until_they_are_mapped(tmp_path: Path) -> None:
    for name in ("png 16", "tif 16", "npy <u2", "nifti <i2"):
        path = NUMBERS[name][0](tmp_path / "m", drawn().astype(np.uint32) * 514)
        message = refusal(path, ids=(1, 2))
        assert "has values 0, 514, which are no label ids" in message
        assert np.array_equal(cured(path, message.replace("VALUE", "514"), ids=(2,)), drawn(2))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("rules", [{">=128": 1, "<128": 0}, {255: 1}, {">=1": 1}], ids=str)
def test_rules_for_eight_bits_serve_for_fewer(tmp_path: Path, bits: int, rules: dict[Any, int]) -> None:
    """Programs that shrink PNG files store black and white in fewer bits."""
    path = write_png(tmp_path / "m.png", drawn() * (2**bits - 1), bits)
    assert np.array_equal(labels(path, ids=(1,), label_values=rules), drawn())


# --- outlines that JPEG or smoothing blurred --------------------------------------------------------------------------


def ellipse(size: int = 96) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (((y - 40) / 25) ** 2 + ((x - 50) / 30) ** 2 <= 1).astype(np.uint8)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_jpeg_of_black_and_white_is_parted_at_the_middle(tmp_path: Path, quality: int) -> None:
    mask = ellipse()
    path = tmp_path / "m.jpg"
    Image.fromarray(mask * 255).save(path, quality=quality)
    sample = read_square(path, mask.shape, ids=(1,))
    assert overlap(sample.labels[0], mask) > 0.97
    (note,) = sample.notes
    assert note.kind == "lossy mask"
    assert re.search(r"holds \d+ values, those between 0 and 255 at outlines only", note.what)


def read_square(path: Path, shape: tuple[int, ...], **knobs: Any):
    np.save(path.parent / "i.npy", np.zeros(shape, np.uint8))
    return read_case(Case("a", "c", "c", str(path.parent / "i.npy"), str(path)), Reading(**knobs))


def test_smoothed_outlines_in_png_are_parted_and_told(tmp_path: Path) -> None:
    fine = np.kron(ellipse(), np.ones((4, 4), np.uint8)) * 255
    Image.fromarray(fine).resize((150, 150), Image.Resampling.BILINEAR).save(tmp_path / "m.png")
    sample = read_square(tmp_path / "m.png", (150, 150), ids=(1,))
    nearest = np.asarray(Image.fromarray(ellipse()).resize((150, 150), Image.Resampling.NEAREST))
    assert overlap(sample.labels[0], nearest) > 0.97
    assert [note.kind for note in sample.notes] == ["lossy mask"]


@pytest.mark.parametrize("quality", [50, 95])
def test_a_third_grey_is_never_taken_for_an_outline(tmp_path: Path, quality: int) -> None:
    mask = ellipse() * 255
    mask[36:44, 46:54] = 128  # another class
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=quality)
    sample = read_square(tmp_path / "m.jpg", mask.shape, ids=(1,))
    assert len(np.unique(sample.labels)) > 8  # told as unknown label ids by whoever knows the regions


def test_compressed_masks_need_no_rule_and_their_rule_spares_other_sites(tmp_path: Path) -> None:
    """One site stores JPEG, another label ids: no setting is needed; thresholds are refused where they would empty."""
    make_site(tmp_path, "ids", first=100)
    make_site(tmp_path, "jpeg")
    for path in sorted((tmp_path / "jpeg" / "masks").iterdir()):
        Image.fromarray(square() * 255).save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    data = folder(tmp_path)
    for site in ("ids", "jpeg"):
        assert all(overlap(data.site(site).truth(case)[0], square()) > 0.9 for case in data.site(site).cases("train"))
    thresholds = {">=128": 1, "<128": 0}
    with pytest.raises(DataError, match=r"site 'ids', .* holds 0, 1, as label ids do, .* leave it out") as caught:
        folder(tmp_path, label_values=thresholds)
    assert len(str(caught.value)) < 450 + len(str(tmp_path))
    assert "site.yaml of the sites that need it" in str(caught.value)
    (tmp_path / "jpeg" / "site.yaml").write_text("label_values: {'>=128': 1, '<128': 0}\n")
    cured = folder(tmp_path)
    for site in ("ids", "jpeg"):
        assert all(overlap(cured.site(site).truth(case)[0], square()) > 0.9 for case in cured.site(site).cases("train"))


def test_errors_about_many_values_are_short(tmp_path: Path) -> None:
    make_site(tmp_path, "a")
    mask = np.linspace(0, 255, 480).astype(np.uint8).reshape(20, 24)
    for path in sorted((tmp_path / "a" / "masks").iterdir()):
        Image.fromarray(mask).save(path.with_suffix(".jpg"))
        path.unlink()
    for regions, cure in (({"x": [1]}, "data.label_values={'>=128': 1, '<128': 0}"), ({"x": [1], "y": [2]}, "as PNG")):
        with pytest.raises(DataError, match=r"in all\)") as caught:
            folder(tmp_path, regions=regions)
        assert cure in str(caught.value)
        assert len(str(caught.value)) < 450 + len(str(tmp_path))
    assert folder(tmp_path, label_values={">=128": 1, "<128": 0}).sites == ("a",)


# --- transparency -----------------------------------------------------------------------------------------------------


def with_opacity(path: Path, colours: np.ndarray, opacity: np.ndarray, how: str) -> Path:
    """A mask of (H, W, 3) colours and (H, W) opacity."""
    grey, deep = how.startswith("grey"), how.endswith("16")
    planes = np.dstack([colours[..., :1] if grey else colours, opacity]).astype(np.uint16) * (257 if deep else 1)
    if "tif" in how:
        photometric = MINISBLACK if grey else TRUE_COLOUR
        return write_tiff(path.with_suffix(".tif"), planes, 16 if deep else 8, photometric, alpha=True)
    return write_png(path.with_suffix(".png"), planes, 16 if deep else 8, GREY_ALPHA if grey else RGBA)


OPAQUE = np.full((HEIGHT, WIDTH), 255)
TRANSPARENT = np.full((HEIGHT, WIDTH), 0)


def paint(ground: tuple[int, int, int], brush: tuple[int, int, int]) -> np.ndarray:
    return np.where(drawn()[..., None] > 0, brush, ground)


TRANSPARENCIES = ["png", "grey png", "png 16", "grey png 16", "tif", "grey tif", "tif 16", "grey tif 16"]
IN_ALPHA = {
    "black brush": (paint(BLACK, BLACK), drawn() * 255),
    "white brush": (paint(WHITE, WHITE), drawn() * 255),
    "half transparent brush": (paint(WHITE, WHITE), drawn() * 128),
    "black on white": (paint(WHITE, BLACK), drawn() * 255),
    "nothing drawn, white": (paint(WHITE, WHITE), TRANSPARENT),
    "nothing drawn, black": (paint(BLACK, BLACK), TRANSPARENT),
}
IN_COLOURS = {
    "opaque": (paint(BLACK, WHITE), OPAQUE),
    "evenly half transparent": (paint(BLACK, WHITE), OPAQUE // 2),
    "opaque and empty": (paint(BLACK, BLACK), OPAQUE),
    "black where transparent": (paint(BLACK, WHITE), drawn() * 255),
}


@pytest.mark.parametrize("how", TRANSPARENCIES)
@pytest.mark.parametrize("name", [*IN_ALPHA, *IN_COLOURS])
def test_the_drawing_is_read_from_where_it_is(tmp_path: Path, how: str, name: str) -> None:
    colours, opacity = (IN_ALPHA | IN_COLOURS)[name]
    path = with_opacity(tmp_path / "m", colours, opacity, how)
    empty = "nothing" in name or "empty" in name
    assert np.array_equal(labels(path, ids=(1,)), drawn() * (not empty))
    assert kinds(path, ids=(1,)) == (["drawing in transparency"] if name in IN_ALPHA else [])
    for choice in ("ignore", "drawing"):  # what is certain stays so under the cures of what is not
        if name not in ("black on white", "black where transparent"):
            assert np.array_equal(labels(path, ids=(1,), transparency=choice), drawn() * (not empty))


@pytest.mark.parametrize("how", ["png", "png 16", "tif"])
def test_colours_on_a_transparent_ground(tmp_path: Path, how: str) -> None:
    two = paint(BLACK, RED)
    two[3:5, 4:6] = GREEN
    expected = np.where((two == GREEN).all(axis=-1), 2, drawn())
    for ground in (BLACK, WHITE):
        colours = np.where(drawn()[..., None] > 0, two, ground)
        path = with_opacity(tmp_path / "m", colours, drawn() * 255, how)
        assert np.array_equal(labels(path, label_values={"255,0,0": 1, "0,255,0": 2}), expected)


def test_smooth_strokes_in_transparency_are_parted_at_the_middle(tmp_path: Path) -> None:
    fine = np.kron(ellipse(), np.ones((4, 4), np.uint8)) * 255
    opacity = np.asarray(Image.fromarray(fine).resize((150, 150), Image.Resampling.BILINEAR))
    for brush in (0, 255):
        write_png(tmp_path / "m.png", np.dstack([np.full_like(opacity, brush), opacity]), 8, GREY_ALPHA)
        sample = read_square(tmp_path / "m.png", (150, 150), ids=(1,))
        assert np.array_equal(sample.labels[0], opacity > 127)
        assert [note.kind for note in sample.notes] == ["drawing in transparency", "lossy mask"]


@pytest.mark.parametrize("how", TRANSPARENCIES)
def test_two_drawings_are_refused_until_one_is_chosen(tmp_path: Path, how: str) -> None:
    other = np.zeros_like(drawn())
    other[5:9, 6:12] = 255
    path = with_opacity(tmp_path / "m", paint(BLACK, WHITE), other, how)
    message = refusal(path, ids=(1,))
    assert "data.transparency=ignore" in message
    assert "data.transparency=drawing" in message
    assert np.array_equal(labels(path, ids=(1,), transparency="ignore"), drawn())
    assert np.array_equal(labels(path, ids=(1,), transparency="drawing"), other // 255)


def test_images_lose_their_transparency(tmp_path: Path) -> None:
    for how in TRANSPARENCIES:
        path = with_opacity(tmp_path / "i", paint(BLACK, WHITE), drawn() * 100, how)
        image = read_case(Case("a", "c", "c", str(path)), Reading("minmax")).image[0]
        assert image.shape == (HEIGHT, WIDTH, 1 if how.startswith("grey") else 3), how
        assert np.array_equal(image[..., 0] > 0, drawn() > 0)


# --- palettes ---------------------------------------------------------------------------------------------------------


def indexed(path: Path, indices: np.ndarray, palette: Sequence[tuple[int, int, int]], suffix: str) -> Path:
    path = path.with_suffix(suffix)
    if suffix == ".png":
        return write_png(path, indices, 8, INDEXED, palette)
    if suffix == ".tif":
        return write_tiff(path, indices, 8, PALETTE, palette)
    if suffix == ".bmp":
        return write_bmp(path, indices, 8, palette)
    return gif(palette)(path, indices)


INDEXED_TYPES = [".png", ".tif", ".bmp", ".gif"]


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
@pytest.mark.parametrize("black", [0, 1, 7, 255])
@pytest.mark.parametrize("white", [0, 1, 7, 255])
@pytest.mark.parametrize("rest", [GREYS, COLOURFUL], ids=["greys", "colours"])
def test_black_and_white_palettes_mean_their_colours(
    tmp_path: Path, suffix: str, black: int, white: int, rest: list[tuple[int, int, int]]
) -> None:
    if black == white:
        return
    palette = [*rest]
    palette[black], palette[white] = BLACK, WHITE
    path = indexed(tmp_path / "m", np.where(drawn() > 0, white, black).astype(np.uint8), palette, suffix)
    for rules in (None, {255: 1}, {">=1": 1}, {">=128": 1, "<128": 0}, {"255,255,255": 1}):
        assert np.array_equal(labels(path, ids=(1,), label_values=rules), drawn())


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
def test_programs_that_sort_their_palette_do_not_invert_masks(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(drawn() * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"m{suffix}")
    assert np.array_equal(labels(tmp_path / f"m{suffix}", ids=(1,)), drawn())


UNCERTAIN: dict[str, list[tuple[int, int, int]]] = {  # palettes of the indices 0, 1, 2
    "greys, falling": [WHITE, (128, 128, 128), BLACK],
    "greys, rising": [BLACK, (128, 128, 128), WHITE],  # 1 and 2, unless a file lacks a class and shifts its indices
    "colours, black last": [RED, GREEN, BLACK],
    "colours without black": [(120, 120, 120), RED, GREEN],
    "black twice": [BLACK, RED, BLACK],
}


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
@pytest.mark.parametrize("name", UNCERTAIN)
def test_palettes_of_two_meanings_are_refused_until_colours_are_mapped(tmp_path: Path, suffix: str, name: str) -> None:
    palette = [*UNCERTAIN[name], *[(9, 9, 9)] * 253]
    indices = drawn()
    indices[9:11, 2:5] = 2
    path = indexed(tmp_path / "m", indices, palette, suffix)
    message = refusal(path, ids=(1, 2, 3))
    assert "has a palette (0 is " in message
    others = [colour for colour in dict.fromkeys(palette[:3]) if colour != BLACK]
    expected = np.array([0 if colour == BLACK else 1 + others.index(colour) for colour in palette[:3]])[indices]
    assert np.array_equal(cured(path, message, (1, 2, 3)), expected)


def test_greys_of_a_palette_mean_themselves_where_rules_or_outlines_say_so(tmp_path: Path) -> None:
    fine = np.kron(ellipse(), np.ones((4, 4), np.uint8)) * 255
    smooth = np.asarray(Image.fromarray(fine).resize((150, 150), Image.Resampling.BILINEAR))
    palette = [(255 - i, 255 - i, 255 - i) for i in range(256)]
    for suffix in INDEXED_TYPES:
        path = indexed(tmp_path / "m", 255 - smooth, palette, suffix)
        assert np.array_equal(read_square(path, smooth.shape, ids=(1,)).labels[0], smooth > 127)
        rules = {">=128": 1, "<128": 0}
        assert np.array_equal(read_square(path, smooth.shape, ids=(1,), label_values=rules).labels[0], smooth > 127)
        two = indexed(tmp_path / "two", 1 - drawn(), [(200, 200, 200), BLACK, *[(9, 9, 9)] * 254], suffix)
        assert set(np.unique(labels(two, ids=(1,)))) == {0, 200}  # told as unknown; the rule then works
        assert np.array_equal(labels(two, ids=(1,), label_values={200: 1}), drawn())


def test_numbers_map_the_indices_of_a_palette_of_colours(tmp_path: Path) -> None:
    for suffix in INDEXED_TYPES:
        path = indexed(tmp_path / "m", drawn(2), COLOURFUL, suffix)
        assert np.array_equal(labels(path, ids=(1,), label_values={2: 1}), drawn())


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
def test_palettes_numbered_anew_for_each_file_are_refused_until_colours_are_mapped(tmp_path: Path, suffix: str) -> None:
    """A program that keeps only the colours of a file numbers a file without the first class otherwise."""
    make_site(tmp_path, "a")
    masks = sorted((tmp_path / "a" / "masks").iterdir())
    for number, path in enumerate(masks):
        path.unlink()
        only_green = number == 3
        mask = square(label=1)
        mask[12:15, 2:9] = 0 if only_green else 2
        palette = [BLACK, GREEN] if only_green else [BLACK, RED, GREEN]
        indexed(path, mask, [*palette, *[(9, 9, 9)] * (256 - len(palette))], suffix)
    regions = {"x": [1], "y": [2]}
    with pytest.raises(DataError, match=r"index 1 of its palette, case .* has .*; say what the colours mean") as caught:
        folder(tmp_path, regions=regions)
    (finding,) = [
        f for f in check(FolderDataModule(root=str(tmp_path), regions=regions)).findings if f.severity == "error"
    ]
    assert finding.kind == "palettes differ"
    assert str(finding) == str(caught.value)
    found = re.search(r"data\.label_values=(\{.*?\})", str(caught.value))
    assert found
    rules = yaml.safe_load(found.group(1).replace("ID", "1", 1).replace("ID", "2", 1))
    data = folder(tmp_path, regions=regions, label_values=rules)
    site = data.site("a")
    (green,) = [label for colour, label in rules.items() if colour == "0,255,0"]
    for split in ("train", "val", "test"):
        for case in site.cases(split):
            assert site.truth(case)[0, 3, 4] == (green if case.case == "case_03" else 3 - green)


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
def test_a_palette_of_one_colour_says_nothing_and_its_indices_count(tmp_path: Path, suffix: str) -> None:
    assert np.array_equal(labels(indexed(tmp_path / "m", drawn(2), [BLACK] * 256, suffix)), drawn(2))


def test_a_palette_that_differs_in_transparency_only(tmp_path: Path) -> None:
    write_png(tmp_path / "m.png", 1 - drawn(), 8, INDEXED, [BLACK, BLACK], opacity=[255, 0])
    assert np.array_equal(labels(tmp_path / "m.png", ids=(1,)), drawn())
    assert kinds(tmp_path / "m.png", ids=(1,)) == ["drawing in transparency"]
    write_png(tmp_path / "n.png", drawn(), 8, INDEXED, [BLACK, RED], opacity=[0, 255])
    assert np.array_equal(labels(tmp_path / "n.png"), drawn())  # label ids, whatever shows through


@pytest.mark.parametrize("suffix", INDEXED_TYPES)
def test_images_take_the_colours_of_their_palette(tmp_path: Path, suffix: str) -> None:
    path = indexed(tmp_path / "i", drawn(), [RED, GREEN, *[(9, 9, 9)] * 254], suffix)
    assert np.array_equal(read_case(Case("a", "c", "c", str(path)), Reading()).image[0], paint(RED, GREEN))


def outcome(path: Path, **knobs: Any) -> object:
    """Labels, or the refusal without its place."""
    try:
        return labels(path, **knobs).tolist()
    except DataError as error:
        return str(error).partition(path.name)[2]


RULES: list[dict[int | str, int] | None] = [
    None,
    {255: 1},
    {">=128": 1, "<128": 0},
    {"255,0,0": 1, "255,255,255": 2},
    {2: 1},
]
COLOURS_OF_PALETTES = [BLACK, WHITE, RED, GREEN, (128, 128, 128), (1, 1, 1), (2, 2, 2)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    indices=arrays(np.uint8, (HEIGHT, WIDTH), elements=st.integers(0, 3)),
    palette=st.lists(st.sampled_from(COLOURS_OF_PALETTES), min_size=4, max_size=4),
    ids=st.sampled_from([(1,), (1, 2), (2,), (1, 2, 3)]),
    rules=st.sampled_from(RULES),
)
def test_one_picture_has_one_meaning_in_every_indexed_format(
    tmp_path: Path, indices: np.ndarray, palette: list[tuple[int, int, int]], ids: tuple[int, ...], rules: Any
) -> None:
    filled = [*palette, *[(9, 9, 9)] * 252]
    outcomes = [
        outcome(indexed(tmp_path / "m", indices, filled, suffix), ids=ids, label_values=rules)
        for suffix in INDEXED_TYPES
    ]
    assert all(other == outcomes[0] for other in outcomes[1:])


@st.composite
def stored_masks(draw: st.DrawFn) -> Stored:
    """Any combination of palette, channels and transparency."""
    shape = (1, 3, 4)
    palette = draw(st.one_of(st.none(), st.lists(st.sampled_from(COLOURS_OF_PALETTES), min_size=4, max_size=4)))
    levels = st.sampled_from([[0, 1], [0, 255], [0, 1, 2, 3], [0, 128, 255], [255], [0], list(range(256))])

    def plane(values: Sequence[int]) -> np.ndarray:
        return draw(arrays(np.uint8, shape, elements=st.sampled_from(values)))

    alpha = plane(draw(levels)) if draw(st.booleans()) else None
    if palette is not None:
        return Stored(plane(range(4))[..., None], None, None, np.array(palette, np.uint8), alpha)
    planes = [plane(draw(levels)) for _ in range(draw(st.sampled_from([1, 3])))]
    return Stored(np.stack(planes, -1), None, draw(st.sampled_from([None, 255])), None, alpha, draw(st.booleans()))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    stored=stored_masks(),
    ids=st.sampled_from([(), (1,), (1, 2)]),
    rules=st.sampled_from(RULES),
    transparency=st.sampled_from(["auto", "ignore", "drawing"]),
)
def test_whatever_a_mask_holds_it_is_labels_or_a_refusal_with_a_cure(
    stored: Stored, ids: tuple[int, ...], rules: Any, transparency: Any
) -> None:
    told = ""
    try:
        found, notes = map_labels(stored, Reading(ids=ids, label_values=rules, transparency=transparency))
    except DataError as error:
        told = str(error)
    else:
        assert found.shape == stored.values.shape[:3]
        assert found.dtype == np.uint8
        assert all(note.kind in KINDS and note.cure for note in notes)
    assert not told or "; " in told


# --- numbers that are almost label ids, and soft maps -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.int8, np.uint16])
@pytest.mark.parametrize("highest", [1, 2, 5, 20])
def test_labels_of_a_scaled_volume_are_whole_and_told(tmp_path: Path, kind: Any, highest: int) -> None:
    ids = np.zeros((HEIGHT, WIDTH, 3))
    ids[2:9, 3:10] = np.arange(1, 4) % (highest + 1)
    ids[0, 0, 0] = highest
    volume = nibabel.Nifti1Image(ids, np.diag([-1, -1, 1, 1]))
    volume.set_data_dtype(kind)
    nibabel.save(volume, tmp_path / "m.nii.gz")
    stored = np.asanyarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)
    found = read(tmp_path / "m.nii.gz").labels
    assert np.array_equal(found, ids.transpose(2, 1, 0))
    assert kinds(tmp_path / "m.nii.gz") == (["labels rounded"] if (stored % 1).any() else [])


@pytest.mark.parametrize("off", [0.004, -0.004, 0.0099])
def test_floats_beside_label_ids_are_rounded_and_told(tmp_path: Path, off: float) -> None:
    np.save(tmp_path / "m.npy", drawn(2) + np.float32(off) * (drawn() > 0))
    assert np.array_equal(labels(tmp_path / "m.npy"), drawn(2))
    assert kinds(tmp_path / "m.npy") == ["labels rounded"]
    assert np.array_equal(labels(tmp_path / "m.npy", label_values={2: 1}), drawn())
    exact = {f"{2 + off:g}": 3}
    assert labels(tmp_path / "m.npy", label_values=exact | {">=1": 4}).max() >= 3  # a rule may name what is not whole


@pytest.mark.parametrize("ids", [(1,), (2,), (1, 2), (1, 2, 3), (1, 3), (2, 7)])
@pytest.mark.parametrize("off", [0.2, -0.2])
def test_the_cure_of_a_soft_map_keeps_every_id(tmp_path: Path, ids: tuple[int, ...], off: float) -> None:
    mask = np.zeros((HEIGHT, WIDTH))
    for number, label in enumerate(ids):
        mask[3 * number : 3 * number + 3, 2:9] = label
    np.save(tmp_path / "m.npy", mask + off * (mask > 0))
    found = cured(tmp_path / "m.npy", refusal(tmp_path / "m.npy", ids=ids))
    assert np.array_equal(found, mask)


def test_a_probability_of_one_among_several_regions_names_no_threshold(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", drawn() * 0.6)
    assert "data.label_values" not in refusal(tmp_path / "m.npy", ids=(1, 2))
    message = refusal(tmp_path / "m.npy", ids=(3,))
    assert np.array_equal(cured(tmp_path / "m.npy", message), drawn(3))


# --- colours ----------------------------------------------------------------------------------------------------------


def colour_files(path: Path, colours: np.ndarray) -> list[Path]:
    np.save(path.with_suffix(".npy"), colours.astype(np.uint8))
    Image.fromarray(colours.astype(np.uint8)).save(path.with_suffix(".bmp"))
    return [
        path.with_suffix(".npy"),
        path.with_suffix(".bmp"),
        write_png(path.with_suffix(".png"), colours, 8, RGB),
        write_png(path.with_name("deep.png"), colours * 257, 16, RGB),
        write_tiff(path.with_suffix(".tif"), colours.astype(np.uint8), 8, TRUE_COLOUR),
        write_netpbm(path.with_suffix(".ppm"), colours, 255),
    ]


def test_colours_are_refused_until_they_are_mapped(tmp_path: Path) -> None:
    colours = paint(BLACK, (0, 0, 255))
    colours[9:11, 2:6] = RED
    colours[0, 0] = WHITE
    expected = np.where((colours == RED).all(axis=-1), 2, drawn())
    expected[0, 0] = 9
    for path in colour_files(tmp_path / "m", colours):
        message = refusal(path, ids=(1, 2, 9))
        assert np.array_equal(cured(path, message.replace("{'", "{'255,255,255': 9, '", 1)), expected), path


def test_black_and_one_colour_are_0_and_1_where_1_is_the_only_id(tmp_path: Path) -> None:
    for path in colour_files(tmp_path / "m", paint(BLACK, (0, 0, 255))):
        assert np.array_equal(labels(path, ids=(1,)), drawn()), path
        assert "the colours 0, 0,0,255" in refusal(path, ids=(1, 2))


def test_maps_per_label_are_refused(tmp_path: Path) -> None:
    for channels in (2, 4, 5):
        np.save(tmp_path / "m.npy", np.dstack([drawn() * (k % 2) for k in range(channels)]))
        assert "np.argmax" in refusal(tmp_path / "m.npy")


def test_many_colours_are_listed_in_short(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
    assert "in all)" in refusal(write_png(tmp_path / "m.png", colours, 8, RGB))


# --- images at their own depth ----------------------------------------------------------------------------------------


DEEP = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)


def deep_images(path: Path) -> list[Path]:
    tifffile.imwrite(path.with_suffix(".tif"), DEEP, photometric="rgb")
    tifffile.imwrite(path.with_name("zip.tif"), DEEP, photometric="rgb", compression="zlib")
    cv2.imwrite(str(path.with_name("lzw.tif")), DEEP[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    np.save(path.with_suffix(".npy"), DEEP)
    return [
        path.with_suffix(".tif"),
        path.with_name("zip.tif"),
        path.with_name("lzw.tif"),
        path.with_suffix(".npy"),
        write_png(path.with_suffix(".png"), DEEP, 16, RGB),
        write_png(path.with_name("alpha.png"), np.dstack([DEEP, DEEP[..., :1]]), 16, RGBA),
        write_png(path.with_name("laced.png"), DEEP, 16, RGB, interlaced=True),
        write_netpbm(path.with_suffix(".ppm"), DEEP, 65535),
        write_netpbm(path.with_name("text.ppm"), DEEP, 65535, text=True),
    ]


def test_colours_of_sixteen_bits_are_read_at_sixteen_bits(tmp_path: Path) -> None:
    reading = Reading("window", window=(0, 65535))
    for path in deep_images(tmp_path / "i"):
        image = read_case(Case("a", "c", "c", str(path)), reading).image[0]
        assert np.array_equal(np.rint(image * 65535), DEEP), path


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_an_image_are_spread_over_all_greys(tmp_path: Path, bits: int) -> None:
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2**bits
    files = [
        write_png(tmp_path / "i.png", values, bits),
        write_tiff(tmp_path / "i.tif", values.astype(np.uint8), bits),
        write_netpbm(tmp_path / "i.pgm", values, 2**bits - 1),
    ]
    for path in files:
        image = read_case(Case("a", "c", "c", str(path)), Reading()).image[0, ..., 0]
        assert image.dtype == np.uint8
        assert np.array_equal(image, values * 255 // (2**bits - 1)), path


# --- files that cannot be read whole ----------------------------------------------------------------------------------


WHOLE: dict[str, Callable[[Path, np.ndarray], object]] = {
    ".png": lambda path, array: Image.fromarray(array).save(path),
    "16.png": lambda path, array: write_png(path, np.dstack([array * np.uint16(257)] * 3), 16, RGB),
    ".jpg": lambda path, array: Image.fromarray(array).save(path),
    ".gif": lambda path, array: Image.fromarray(array).save(path),
    ".bmp": lambda path, array: Image.fromarray(array).save(path),
    ".pgm": lambda path, array: write_netpbm(path, array, 255),
    "200.pgm": lambda path, array: write_netpbm(path, array // 2, 200),
    "text.pgm": lambda path, array: write_netpbm(path, array, 255, text=True),
    ".tif": lambda path, array: tifffile.imwrite(path, array),
    "zip.tif": lambda path, array: tifffile.imwrite(path, array, compression="zlib"),
    "lzw.tif": lambda path, array: Image.fromarray(array).save(path, compression="tiff_lzw"),
    ".npy": lambda path, array: np.save(path, array),
    ".nii": lambda path, array: nibabel.save(nibabel.Nifti1Image(array[..., None], np.eye(4)), path),
    ".nii.gz": lambda path, array: nibabel.save(nibabel.Nifti1Image(array[..., None], np.eye(4)), path),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kept", [0, 1, 0.02, 0.3, 0.6, 0.95])
def test_files_cut_short_are_refused_with_a_reason(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / f"m{name}"
    WHOLE[name](path, np.random.default_rng(0).integers(0, 256, (64, 80)).astype(np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept in (0, 1) else kept * len(content))])
    with pytest.raises(DataError, match=rf"image {re.escape(str(path))}(:| cannot be read \([^)]{{3}}).*") as caught:
        read_case(Case("a", "c", "c", str(path)), Reading())
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EOFError

    np.save(tmp_path / "m.npy", drawn())
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(DataError, match=r"cannot be read \(EOFError\); replace"):
        read_case(Case("a", "c", "c", str(tmp_path / "m.npy")), Reading())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_large_pictures_are_read_up_to_a_limit_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Pillow refuses 179 megapixels as an attack; slides and their masks have more."""
    assert Image.MAX_IMAGE_PIXELS is None
    path = tmp_path / f"m{suffix}"
    Image.fromarray(drawn()).save(path)
    assert np.array_equal(labels(path), drawn())
    monkeypatch.setattr("fedseg.datamodules.readers.pictures.MOST_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match=r"is 12 x 13, more than .* million pixels; cut it into tiles, or export"):
        labels(path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(drawn() * number) for number in (1, 200)]
    how = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
    frames[0].save(tmp_path / f"m{suffix}", save_all=True, append_images=frames[1:], **how)
    assert "2 frames or pages; store one picture per file" in refusal(tmp_path / f"m{suffix}")


# --- what a run and the data check tell -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_run_and_the_check_tell_the_same_of_masks(tmp_path: Path, cache: str) -> None:
    root = tmp_path / "data"
    for site in ("a", "b"):
        make_site(root, site, first=100 * (site == "b"))
    for number, path in enumerate(sorted((root / "b" / "masks").iterdir())):
        if number % 2:
            Image.fromarray(square() * 255).save(path.with_suffix(".jpg"), quality=70)
            path.unlink()
        else:
            write_png(path, np.dstack([square() * 0, square() * 255]), 8, GREY_ALPHA)
    for _ in range(2):  # the second time from the cache
        told = folder(root, cache=cache, cache_dir=str(tmp_path / "cache")).findings
        run = [finding for finding in told if finding.kind in ("drawing in transparency", "lossy mask")]
        assert sorted({(finding.kind, finding.site) for finding in run}) == [
            ("drawing in transparency", "b"),
            ("lossy mask", "b"),
        ]
        assert len(run) == 6
        checked = check(FolderDataModule(root=str(root), size=[20, 24])).findings
        assert set(run) <= set(checked)


DEPTHS = {
    "16-bit png": lambda path, pixels: write_png(path.with_suffix(".png"), pixels * 257, 16, RGB),
    "float tif": lambda path, pixels: tifffile.imwrite(
        path.with_suffix(".tif"), (pixels / 255).astype(np.float32), photometric="rgb"
    ),
}


@pytest.mark.parametrize("how", DEPTHS)
def test_one_picture_at_two_depths_is_told_and_made_alike_by_the_cure(tmp_path: Path, how: str) -> None:
    make_site(tmp_path, "a")
    make_site(tmp_path, "b")
    rng = np.random.default_rng(0)
    for image in sorted((tmp_path / "a" / "images").iterdir()):
        pixels = rng.integers(40, 90, (20, 24, 3)).astype(np.uint16)
        Image.fromarray(pixels.astype(np.uint8)).save(image)
        (tmp_path / "b" / "images" / image.name).unlink()
        DEPTHS[how](tmp_path / "b" / "images" / image.name, pixels)

    def difference(data: FolderDataModule) -> float:
        case = data.site("a").cases("train")[0].case
        return float(np.abs(as_unit(data.site("a").image(case)) - as_unit(data.site("b").image(case))).max())

    data = folder(tmp_path)
    (finding,) = [finding for finding in data.findings if finding.kind == "mixed bit depth"]
    assert finding in check(FolderDataModule(root=str(tmp_path))).findings
    assert "8-bit images at a (6), deeper ones at b (6)" in finding.what
    assert "data.scale_8bit=true" in finding.cure
    assert difference(data) > 0.1
    cured = folder(tmp_path, scale_8bit=True)
    assert "mixed bit depth" not in [finding.kind for finding in cured.findings]
    assert difference(cured) < 1e-3
    kinds = [finding.kind for finding in check(FolderDataModule(root=str(tmp_path), scale_8bit=True)).findings]
    assert "mixed bit depth" not in kinds


@pytest.mark.parametrize(("knobs", "told"), [({"intensity": "zscore"}, True), ({"intensity": "minmax"}, False)])
def test_a_scaling_that_8_bit_images_do_not_get_is_told_and_both_cures_work(
    tmp_path: Path, knobs: dict[str, str], told: bool
) -> None:
    make_site(tmp_path, "a")
    for more in ({}, {"scale_8bit": True}):
        found = folder(tmp_path, **knobs, **more).findings
        assert [one.kind for one in found].count("intensity not applied") == (told and not more)
        assert [one.kind for one in check(FolderDataModule(root=str(tmp_path), **knobs, **more)).findings].count(
            "intensity not applied"
        ) == (told and not more)
    assert "intensity not applied" not in [one.kind for one in folder(tmp_path).findings]


def as_unit(image: np.ndarray) -> np.ndarray:
    return image / 255 if image.dtype == np.uint8 else image
