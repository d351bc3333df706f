"""From files to arrays: images, masks and volumes, with every assumption an argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.cases import Case, Sample
from datamodules.errors import DataError

Array = NDArray[Any]
Spacing = tuple[float, float, float]
Intensity = Literal["percentile", "minmax", "window", "unit"]

VOLUMES = (".nii", ".nii.gz")
FLAT = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".bmp", ".npy")
MOST_CHANNELS = 16
ORIENTATION = 0x0112  # entry of EXIF and TIFF
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}

GRID_CURE = "export both on one grid, or correct the pairing"


@dataclass(frozen=True)
class Reading:
    """How files become arrays.

    Attributes:
        intensity: How values other than 8-bit become float32 in [0, 1]; see :func:`scale`.
        percentiles: Of a case's values, that become 0 and 1 ("percentile").
        window: Values that become 0 and 1 ("window").
        label_values: Rules from stored mask values to label ids; see :func:`map_labels`.
        binary: Whether the label id 1 is the only one, so that a mask of 0 and 255 has one possible meaning.
        axis: Of a volume, along which it is cut: 0 left-right, 1 front-back, 2 foot-head when ``canonical``.
        canonical: Turn volumes to a common orientation first; else axes and directions are as stored.
    """

    intensity: Intensity = "percentile"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    label_values: Mapping[int | str, int] | None = None
    binary: bool = False
    axis: int = 2
    canonical: bool = True

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise DataError(f"data.percentiles=[{low}, {high}]: give two rising numbers from 0 to 100")
        if self.intensity == "window" and self.window is None:
            raise DataError("data.intensity=window needs data.window=[low, high], such as [-160, 240]")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise DataError(f"data.window={list(self.window)}: low must be below high")
        if self.axis not in (0, 1, 2):
            raise DataError(f"data.axis={self.axis}: a volume is cut along axis 0, 1 or 2")
        for key, label in (self.label_values or {}).items():
            _rule(key)
            if not 0 <= label <= 255:
                raise DataError(f"data.label_values maps {key!r} to {label}: label ids run from 0 to 255")


def suffix_of(path: Path) -> str:
    """The file's type in lower case; ``.nii.gz`` is one suffix."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The file's name without its type."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def read_case(case: Case, reading: Reading) -> Sample:
    """Decodes a case: an image, a volume, or a stack of images.

    Raises:
        DataError: A file is missing, unreadable, of an unknown type, or image and mask do not belong together.
    """
    parts = [_read_files(part, reading) for part in (case.slices or (case,))]
    kinds = sorted({f"{_size(part[0].shape[1:])} {part[0].dtype}" for part in parts})
    if len(kinds) > 1:
        raise DataError(f"{case}: its slices differ ({', '.join(kinds)}); export them alike, or set stack_slices=false")
    try:
        image = scale(np.concatenate([part[0] for part in parts]), reading)
    except DataError as error:
        raise DataError(f"{case}: {error}") from None
    masks = [part[1] for part in parts if part[1] is not None]
    labels = np.concatenate(masks) if masks else None
    return Sample(image, labels, parts[0][2])


def _read_files(case: Case, reading: Reading) -> tuple[Array, NDArray[np.uint8] | None, Spacing | None]:
    image, spacing = _load(case, case.image, reading, "image")
    if case.mask is None:
        return image, None, spacing
    stored, _ = _load(case, case.mask, reading, "mask")
    if stored.shape[:3] != image.shape[:3]:
        raise DataError(
            f"{case}: mask {case.mask} is {_size(stored.shape)} but the image is {_size(image.shape)}; {GRID_CURE}"
        )
    if told := misplaced(case, reading):
        raise DataError(f"{case}: mask {case.mask} {told}; {GRID_CURE}")
    try:
        return image, map_labels(stored, reading), spacing
    except DataError as error:
        raise DataError(f"{case}: mask {case.mask}: {error}") from None


def misplaced(case: Case, reading: Reading) -> str:
    """By how much a NIfTI mask lies elsewhere than its image, as both are read; empty where their corners agree.

    Equal shapes alone do not make voxels correspond: an axis that runs the other way would mirror the mask.
    """
    if case.mask is None or {suffix_of(Path(case.image)), suffix_of(Path(case.mask))} - {".nii", ".nii.gz"}:
        return ""
    places, voxel = [], 0.0
    for name in (case.mask, case.image):
        affine, shape = _geometry(Path(name), reading)
        corners = np.array(list(product((0, 1), repeat=3))) * (np.array(shape) - 1)
        places.append(corners @ affine[:3, :3].T + affine[:3, 3])
        voxel = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    apart = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    return f"lies up to {apart:.3g} (in its header's unit) from its image" if apart > voxel / 2 else ""


def _geometry(path: Path, reading: Reading) -> tuple[NDArray[np.float64], Sequence[int]]:
    """Affine and shape of a NIfTI file as it is read, from its header."""
    from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform

    volume = _volume(path)
    if not reading.canonical:
        return volume.affine, volume.shape
    turn = ornt_transform(io_orientation(volume.affine), _lps())
    shape = [0, 0, 0]
    for axis, size in zip(turn[:, 0].astype(int), volume.shape, strict=True):
        shape[axis] = size
    return volume.affine @ inv_ornt_aff(turn, volume.shape), shape


def _load(case: Case, name: str, reading: Reading, role: Literal["image", "mask"]) -> tuple[Array, Spacing | None]:
    """Decodes one file into (D, H, W, C) as stored."""
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{case}: {role} {path} does not exist; correct the path, or leave the case out")
    decode = _DECODERS.get(suffix_of(path))
    if decode is None:
        raise DataError(f"{case}: {role} {path} has an unknown type; convert it to one of {', '.join(_DECODERS)}")
    try:
        array, spacing = decode(path, reading, role)
    except DataError as error:
        raise DataError(f"{case}: {role} {path}: {error}") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        raise DataError(f"{case}: {role} {path} cannot be read ({error}); replace the file or leave it out") from error
    if 0 in array.shape:
        raise DataError(f"{case}: {role} {path} has no pixels; replace the file or leave it out")
    return array, spacing


# --- file types -------------------------------------------------------------------------------------------------------


def _picture(path: Path, reading: Reading, role: str) -> tuple[Array, None]:  # noqa: ARG001
    with Image.open(path) as file:
        picture: Image.Image = file
        _check_upright(file.getexif().get(ORIENTATION, 1))
        if picture.mode == "P" and (role == "image" or path.suffix.lower() == ".gif"):
            picture = picture.convert("RGB")  # a mask in PNG keeps its palette indices: they are the label ids
        elif picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA"):
            picture = picture.convert("RGB")
        array = np.asarray(picture)
        if picture.mode in ("RGBA", "LA"):
            array = array[..., :-1]  # transparency is no measurement
        if picture.mode == "1" and role == "image":
            array = array.astype(np.uint8) * 255
    return _flat(array), None


def _tiff(path: Path, reading: Reading, role: str) -> tuple[Array, None]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            array, axes = series.asarray(), series.axes
            page = file.pages.first
            colours, bits = page.photometric.name, int(page.bitspersample)
            _check_upright(page.tags.valueof(ORIENTATION, default=1))
    except (ValueError, KeyError):  # a compression that tifffile leaves to another package; Pillow knows most
        return _picture(path, reading, role)
    if colours == "MINISWHITE" and bits > 8:  # Pillow turns fewer bits only
        if array.dtype.kind != "u":
            raise DataError(f"holds {array.dtype} with white as zero (MINISWHITE); store it with black as zero")
        array = array.dtype.type(2**bits - 1) - array
    elif colours in ("PALETTE", "MINISWHITE"):
        return _picture(path, reading, role)  # turns them into what is seen
    if colours == "RGB" and axes == "YXS":
        array = array[..., :3]  # without transparency
    if array.ndim == 3 and axes[-1] != "S":
        if array.shape[0] > 4:
            raise DataError(f"{array.shape[0]} pages: store a stack as NIfTI, or as one file per slice")
        array = np.moveaxis(array, 0, -1)
    return _flat(array), None


def _check_upright(orientation: object) -> None:
    """Viewers turn such a picture, programs that draw masks may not: which way image and mask lie would be a guess."""
    if orientation in range(2, 9):
        raise DataError(
            f"its EXIF orientation is {orientation}: viewers turn it, its pixels lie otherwise; store it upright "
            "without that entry (Pillow: ImageOps.exif_transpose), and check that its mask lies as the image"
        )


def _numpy(path: Path, reading: Reading, role: str) -> tuple[Array, None]:  # noqa: ARG001
    return _flat(np.load(path, allow_pickle=False)), None


def _nifti(path: Path, reading: Reading, role: str) -> tuple[Array, Spacing]:  # noqa: ARG001
    import nibabel
    from nibabel.affines import voxel_sizes

    volume = _volume(path)
    if reading.canonical:
        to_lps = nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), _lps())
        volume = volume.as_reoriented(to_lps)
    array = np.asanyarray(volume.dataobj)
    unit = MILLIMETRES.get(volume.header.get_xyzt_units()[0], 1.0)
    zooms = [float(size) * unit for size in voxel_sizes(volume.affine)]  # a header's may contradict it
    return _cut(array, zooms, reading)


def _volume(path: Path) -> Any:
    """A NIfTI image of three dimensions, not decoded yet."""
    import nibabel

    volume: Any = nibabel.load(path)
    if len(volume.shape) == 4 and volume.shape[3] == 1:
        volume = volume.slicer[..., 0]
    if len(volume.shape) != 3:
        raise DataError(f"has {len(volume.shape)} dimensions; write one 3-D file per frame or modality")
    return volume


def _lps() -> Array:
    """The common orientation: to the patient's left, back and head."""
    import nibabel

    orientation: Array = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    return orientation


def put_back(slices: Array, path: Path, reading: Reading) -> Any:
    """Slices put together again on the grid of the NIfTI file that they were read from: the inverse of reading.

    Args:
        slices: (D, H, W), as `read_case` cuts the file.
        path: The file; its affine and header are kept, but for the type and range of values.
        reading: As it was read.

    Returns:
        A nibabel image of three dimensions.
    """
    import nibabel

    original = _volume(path)
    if reading.canonical and reading.axis != 2:
        slices = slices[:, ::-1]
    array = slices.transpose(np.argsort(_order(reading)))
    if reading.canonical:
        back = nibabel.orientations.ornt_transform(_lps(), nibabel.io_orientation(original.affine))
        array = nibabel.apply_orientation(array, back)
    header = original.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    return type(original)(np.ascontiguousarray(array), original.affine, header)


def _order(reading: Reading) -> list[int]:
    """Axes of a volume (x, y, z) as slice, row, column."""
    rest = [axis for axis in (2, 1, 0) if axis != reading.axis]  # rows: the later axis, columns: the earlier one
    return [reading.axis, *rest] if reading.canonical else [reading.axis, *reversed(rest)]


def _cut(volume: Array, zooms: Sequence[float], reading: Reading) -> tuple[Array, Spacing]:
    """Slices (D, H, W, 1) of a volume whose axes are x, y, z.

    In the common orientation x runs to the patient's left, y to the back, z to the head. Rows and columns are as a
    radiologist sees them: axial rows run front to back, others head to foot; slices keep their order along the axis.
    """
    order = _order(reading)
    array = volume.transpose(order)
    if reading.canonical and reading.axis != 2:
        array = array[:, ::-1]
    spacing = (zooms[order[0]], zooms[order[1]], zooms[order[2]])
    return np.ascontiguousarray(array)[..., None], spacing


_DECODERS: dict[str, Callable[[Path, Reading, str], tuple[Array, Spacing | None]]] = {
    **dict.fromkeys(FLAT, _picture),
    ".tif": _tiff,
    ".tiff": _tiff,
    ".npy": _numpy,
    **dict.fromkeys(VOLUMES, _nifti),
}


def _flat(array: Array) -> Array:
    """(H, W) or (H, W, C) to (1, H, W, C)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"is {_size(array.shape)}: a 2-D image is (H, W) or (H, W, C)")
    if array.shape[2] > MOST_CHANNELS:
        raise DataError(
            f"is {_size(array.shape)}: more than {MOST_CHANNELS} channels; channels come last, and volumes are NIfTI"
        )
    return array[None]


# --- values -----------------------------------------------------------------------------------------------------------


def scale(image: Array, reading: Reading) -> NDArray[np.uint8] | NDArray[np.float32]:
    """8-bit values stay as they are (255 becomes 1 when a batch is made); all others become float32 in [0, 1].

    * "percentile": the case's percentiles become 0 and 1, the rest is clipped (its full range where they coincide).
    * "minmax": the case's smallest and largest value become 0 and 1.
    * "window": two fixed values become 0 and 1, the rest is clipped; for CT, or to keep the sites' differences.
    * "unit": values are in [0, 1] already.

    A constant image becomes 0 under the first two.

    Raises:
        DataError: Values that are not finite, complex or, for "unit", outside [0, 1].
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return np.where(image, 255, 0).astype(np.uint8)
    if image.dtype.kind not in "iuf":
        raise DataError(f"the image has values of type {image.dtype}; store numbers")
    values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("the image has values that are not finite; replace them, for instance with np.nan_to_num")
    if reading.intensity == "unit":
        if values.min() < 0 or values.max() > 1:
            raise DataError(
                f"the image runs from {values.min():g} to {values.max():g}, but data.intensity=unit expects [0, 1]; "
                "choose percentile, minmax or window"
            )
        return values
    low, high = _limits(values, reading)
    if high <= low:
        return np.zeros_like(values)
    unit: NDArray[np.float32] = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return unit


def _limits(values: NDArray[np.float32], reading: Reading) -> tuple[float, float]:
    if reading.intensity == "window" and reading.window is not None:
        return reading.window
    if reading.intensity == "percentile":
        low, high = (float(value) for value in np.percentile(values, reading.percentiles))
        if low < high:
            return low, high
    return float(values.min()), float(values.max())


def map_labels(stored: Array, reading: Reading) -> NDArray[np.uint8]:
    """Label ids of a mask.

    ``label_values`` maps stored values to ids: the key is a grey value (``255``), a threshold (``">=128"``) or a colour
    (``"255,0,0"``); the first rule that fits a pixel wins and other pixels keep their value. Without rules, values are
    ids, with one exception: where the label 1 is the only one there is, a mask of nothing but 0 and 255 means 0 and 1.

    Args:
        stored: (D, H, W, C), one channel or a picture of a mask in several.
        reading: Holds the rules.

    Returns:
        (D, H, W) label ids.

    Raises:
        DataError: A colour without a rule, a value that is not whole or does not fit an id.
    """
    values = _one_channel(stored)
    if reading.label_values:
        stored = values
        for key, label in reversed(
            list(reading.label_values.items())
        ):  # the first rule is applied last, over all others
            values = np.where(_rule(key)(stored), np.int64(label), values)
    elif reading.binary and values.max() == 255 and set(np.unique(values).tolist()) <= {0, 255}:
        values = values == 255
    if values.dtype in (np.uint8, np.bool_):
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("has values that are not finite; replace them by label ids")
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise DataError(
            "has values between the label ids (a soft map?); give thresholds, data.label_values={'>=0.5': 1, '<0.5': 0}"
        )
    if whole.min() < 0 or whole.max() > 255:
        raise DataError(
            f"has values {_few(whole)}, which are no label ids (0 to 255); map them with "
            "data.label_values={VALUE: ID}, a colour as {'R,G,B': ID}"
        )
    return whole.astype(np.uint8)


def unknown_labels(found: set[int]) -> str:
    """The end of an error about label ids that no region knows."""
    hint = " (a compressed 0/255 mask? then data.label_values={'>=128': 1, '<128': 0})" if len(found) > 8 else ""
    few = ", ".join(str(value) for value in sorted(found)[:8])
    return (
        f"{few}{', ...' if len(found) > 8 else ''}, not in any of data.regions{hint}; add them to a region, map them "
        "with data.label_values={VALUE: ID}, or list them in data.ignore_labels to count as background"
    )


def _one_channel(stored: Array) -> Array:
    """Grey values as they are; a colour (r, g, b) as r * 65536 + g * 256 + b when it is not grey."""
    if stored.dtype.kind not in "iufb":
        raise DataError(f"has values of type {stored.dtype}; store label ids")
    if stored.shape[-1] == 1:
        return stored[..., 0]
    red = stored[..., 0]
    if all(np.array_equal(red, stored[..., i]) for i in range(1, stored.shape[-1])):
        return red
    if stored.shape[-1] != 3 or stored.dtype != np.uint8:
        raise DataError(f"is not 2-D: it has {stored.shape[-1]} different channels; store label ids in one channel")
    wide = stored.astype(np.int64)
    grey = (wide[..., 0] == wide[..., 1]) & (wide[..., 1] == wide[..., 2])
    return np.where(grey, wide[..., 0], wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2])


def _rule(key: int | str) -> Callable[[Array], NDArray[np.bool_]]:
    """The test that a key of ``label_values`` stands for."""
    text = str(key).replace(" ", "")
    if colour := re.fullmatch(r"(\d+),(\d+),(\d+)", text):
        red, green, blue = (int(part) for part in colour.groups())
        code = red if red == green == blue else red << 16 | green << 8 | blue
        return lambda values: values == code
    found = re.fullmatch(r"(>=|<=|>|<)?(-?\d+(?:\.\d+)?)", text)
    if not found:
        raise DataError(f"data.label_values: key {key!r} is neither a value (255), a threshold ('>=128') nor 'R,G,B'")
    limit = float(found.group(2))
    compare = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less, None: np.equal}
    return lambda values: compare[found.group(1)](values, limit)


def _few(values: Array) -> str:
    found = np.unique(values).tolist()
    return ", ".join(str(value) for value in found[:8]) + (", ..." if len(found) > 8 else "")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
