"""What happens to images before the network of a MONAI bundle, and to its answers: from files to masks, as in training.

Every bundle holds a copy of this file. It needs MONAI with PyTorch, NumPy, nibabel, Pillow and OpenCV, and none of the
suite that trained the network; what it does is set in configs/inference.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

Item = dict[str, Any]
Array = NDArray[Any]
VOLUMES = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
BETWEEN = "_. -"  # signs between a case's name and its modality
COMMON = "LPS"  # orientation of volumes: to the patient's left, back and head
AXIAL = 2
COARSER = 1.5 * (1 - 1e-4)  # times as thick as the others are the voxels along the axis of the slices
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
REACH = 4  # standard deviations from the mean that become 0 and 1 by zscore
ORIENTATION = 0x0112  # EXIF's


def suffix_of(path: Path) -> str:
    """The file's type in lower case; that of ``.nii.gz`` is one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def cases(folder: str, modalities: Sequence[str], zeros: bool = False, lacks: Sequence[str] = ()) -> list[Item]:
    """Name and files of every case of a folder.

    Args:
        folder: of images: NAME.nii.gz or NAME.png; with modalities NAME_MODALITY of each.
        modalities: of a case, in the order of the network's channels; none: every file is a case.
        zeros: one that a case lacks is 0 everywhere (its place is under ``absent``), instead of an error.
        lacks: those that the site does not have at all: they are 0 everywhere.

    Raises:
        ValueError: no image, a file of another type, a case without one of its modalities, or one that the site lacks.
    """
    files = [path for path in sorted(Path(folder).iterdir()) if not path.name.startswith(".")]
    if foreign := [path.name for path in files if suffix_of(path) not in (*VOLUMES, *PICTURES)]:
        known = ", ".join((*VOLUMES, *PICTURES))
        raise ValueError(f"{folder}: {foreign[0]} is none of {known}; move or convert it")
    found: dict[str, dict[str, str]] = {}
    for path in files:
        stem = path.name[: -len(suffix_of(path))]
        name, modality = _parted(stem, modalities, path)
        if modality in found.setdefault(name, {}):
            raise ValueError(f"{path} and {found[name][modality]} are the same case; rename or remove one")
        found[name][modality] = str(path)
    if not found:
        raise ValueError(f"{folder} holds no image; set --dataset_dir to a folder that does")
    wanted = modalities or [""]
    for name, images in found.items():
        if extra := [modality for modality in lacks if modality in images]:
            raise ValueError(f"{images[extra[0]]} is there, although the site lacks {extra[0]}; move it")
        lacking = [modality for modality in wanted if modality not in images and modality not in lacks]
        if lacking and not zeros:
            raise ValueError(f"{folder}: {name} has no {', '.join(lacking)}; add it, or leave the case out")
        if lacking:
            print(f"warning: {name} has no {', '.join(lacking)}; the network sees 0 in its place")
    return [
        {
            "name": name,
            "image": [images[modality] for modality in wanted if modality in images],
            "absent": [place for place, modality in enumerate(wanted) if modality not in images],
        }
        for name, images in found.items()
    ]


def _parted(stem: str, modalities: Sequence[str], path: Path) -> tuple[str, str]:
    ends = [own for own in modalities if stem.endswith(own) and stem[: -len(own)][-1:] in {*BETWEEN}]
    if modalities and not ends:
        raise ValueError(f"{path} ends on none of {', '.join(modalities)}; rename it as NAME_MODALITY, or move it")
    longest = max(ends, key=len, default="")
    return (stem[: -len(longest) - 1], longest) if longest else (stem, "")


# --- from files to the network ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """Decodes the files of a case: ``image`` becomes a list of (slices, rows, columns, channels), one for each file.

    Attributes:
        axis: along which volumes are cut, once turned; "auto" is that of the thickest voxels, else foot to head.
        canonical: turn volumes to one orientation.
        spacing: millimetres (row, column) or (slice, row, column), whatever files say; None: as they say.
    """

    axis: int | str
    canonical: bool
    spacing: Sequence[float] | None

    def __call__(self, item: Item) -> Item:
        """Adds ``first`` (the first file), ``axis`` (along which it was cut), ``spacing`` and ``shape``."""
        paths = [Path(file) for file in item["image"]]
        if suffix_of(paths[0]) in PICTURES:
            images, axis, stored = [_picture(path) for path in paths], None, None
        else:
            images, axis, stored = self._volumes(paths)
        if len({image.shape[:3] for image in images}) > 1:
            raise ValueError(f"{item['name']}: its images differ in size; export them on one grid")
        spacing = stored
        if self.spacing is not None:
            *between, row, column = self.spacing
            spacing = (between[0] if between else stored[0] if stored else 1.0, row, column)
        own = {"image": images, "first": str(paths[0]), "axis": axis, "spacing": spacing, "shape": images[0].shape[:3]}
        return {**item, **own}

    def _volumes(self, paths: Sequence[Path]) -> tuple[list[Array], int, tuple[float, ...]]:
        volumes = [_opened(path, self.canonical) for path in paths]
        _, affine, unit = volumes[0]
        zooms = np.linalg.norm(affine[:3, :3], axis=0)
        axis = self.axis if isinstance(self.axis, int) else _slice_axis(volumes[0][0].shape, zooms)
        for path, (array, other, _) in zip(paths, volumes, strict=True):
            corners = [
                (affine - other) @ [*corner, 1] for corner in product(*((0, side - 1) for side in array.shape[:3]))
            ]
            if max(np.linalg.norm(apart) for apart in corners) > zooms.min() / 2:
                raise ValueError(f"{path} lies elsewhere than {paths[0].name}; export both on one grid")
        order = _order(axis, self.canonical)
        return [_cut(array, axis, self.canonical) for array, *_ in volumes], axis, tuple(zooms[order] * unit)


def _picture(path: Path) -> Array:
    with Image.open(path) as file:
        if file.getexif().get(ORIENTATION, 1) in range(2, 9):
            raise ValueError(f"{path} is turned by its EXIF orientation; store it upright without that entry")
        mode = file.mode
        if any(";16" in str(tile) for tile in file.tile) and not mode.startswith("I"):
            raise ValueError(f"{path} has 16 bits per colour, of which Pillow reads 8; store 8 bits, or grey")
        if mode in ("1", "P", "PA"):
            array = np.asarray(file.convert("L" if mode == "1" else "RGB"))
        elif mode in ("L", "RGB", "I", "F") or mode.startswith("I;16"):
            array = np.asarray(file)
        elif mode in ("LA", "RGBA"):
            array = np.asarray(file)[..., :-1]
        else:
            raise ValueError(f"{path} is stored as {mode}; store it as grey or RGB")
    return array[None] if array.ndim == 3 else array[None, ..., None]


def _opened(path: Path, canonical: bool) -> tuple[Array, Array, float]:
    """Voxels (x, y, z, channel), affine, and millimetres per unit of it."""
    image: Any = nibabel.load(path)
    array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    if array.ndim not in (3, 4) or not np.linalg.det(affine[:3, :3]):
        raise ValueError(f"{path} is no volume of three dimensions with voxels of a known size; write it anew")
    if canonical:
        turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(COMMON)))
        affine = affine @ inv_ornt_aff(turn, array.shape[:3])
        array = apply_orientation(array, turn)
    unit = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    return array.reshape(*array.shape[:3], -1), affine, unit


def _slice_axis(shape: Sequence[int], zooms: Array) -> int:
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if len(thin) == 1:
        return thin[0]
    coarsest = max(range(3), key=lambda axis: float(zooms[axis]))
    others = max(float(zoom) for axis, zoom in enumerate(zooms) if axis != coarsest)
    return coarsest if zooms[coarsest] >= COARSER * others else AXIAL


def _order(axis: int, canonical: bool) -> list[int]:
    """Axes x, y, z as slice, row, column."""
    rest = [other for other in (2, 1, 0) if other != axis]
    return [axis, *rest] if canonical else [axis, *reversed(rest)]


def _cut(array: Array, axis: int, canonical: bool) -> Array:
    slices = array.transpose([*_order(axis, canonical), 3])
    return np.ascontiguousarray(slices[:, ::-1] if canonical and axis != AXIAL else slices)


@dataclass(frozen=True)
class Scale:
    """Brings the values of every file to [0, 1], and joins the files as channels; 8-bit values may stay as they are.

    Attributes:
        intensity: percentile, minmax, window, zscore or unit.
        percentiles: of a case's values, that become 0 and 1.
        window: values that become 0 and 1.
        scale_8bit: treat 8-bit values as all others.
        stacked: values were scaled by patient, so that a flat image alone cannot be.
    """

    intensity: str
    percentiles: Sequence[float] | None
    window: Sequence[float] | None
    scale_8bit: bool
    stacked: bool

    def __call__(self, item: Item) -> Item:
        """``image`` becomes (slices, rows, columns, channels), uint8 or float32 in [0, 1]."""
        volume = item["axis"] is not None
        scaled = [self._scaled(image, item["name"], volume) for image in item["image"]]
        if len(scaled) > 1 and any(image.dtype != np.uint8 for image in scaled):
            scaled = [image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1) for image in scaled]
        joined = np.concatenate(scaled, axis=-1)
        for place in item["absent"]:
            joined = np.insert(joined, place, 0, axis=-1)
        return {**item, "image": joined}

    def _scaled(self, image: Array, name: str, volume: bool) -> Array:
        if image.dtype == np.uint8 and (not self.scale_8bit or self.intensity == "unit"):
            return image
        if self.stacked and not volume and self.intensity in ("percentile", "minmax", "zscore"):
            raise ValueError(f"{name} is a slice whose values were scaled by patient; give the patient's volume")
        values = image.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite; replace them")
        if self.intensity == "unit":
            if values.min() < 0 or values.max() > 1:
                raise ValueError(f"{name} runs from {values.min():g} to {values.max():g}, not within 0 and 1")
            return values
        parts = np.split(values, values.shape[-1], axis=-1) if volume else [values]
        return np.concatenate([self._limited(part) for part in parts], axis=-1)

    def _limited(self, values: NDArray[np.float32]) -> Array:
        low, high = float(values.min()), float(values.max())
        if self.intensity == "window" and self.window:
            low, high = self.window
        elif self.intensity == "percentile" and self.percentiles:
            bounds = [float(value) for value in np.percentile(values, self.percentiles)]
            low, high = bounds if bounds[0] < bounds[1] else (low, high)
        elif self.intensity == "zscore" and (inside := values[values != 0]).size:
            mean, deviation = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
            low, high = mean - REACH * deviation, mean + REACH * deviation
        if high <= low:
            return np.zeros_like(values)
        found: Array = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
        return np.where(values == 0, np.float32(0), found) if self.intensity == "zscore" else found


@dataclass(frozen=True)
class Fit:
    """Brings a case to the network's grid.

    Attributes:
        size: rows and columns of every slice; None where cases keep their own grid.
        resample: millimetres (slice, row, column) to which they are brought instead; None: their own.
        luminance: colour becomes grey.
        crop: cut volumes to the box of what is not 0 in some channel before that.
    """

    size: Sequence[int] | None
    resample: Sequence[float | None] | None
    luminance: bool
    crop: bool = False

    def __call__(self, item: Item) -> Item:
        """``image`` is on the network's grid; ``box`` is what it was cut to."""
        image: Array = item["image"]
        box = _box(image) if self.crop else None
        item = {**item, "box": box}
        image = image if box is None else image[box]
        if self.luminance and image.shape[-1] == 3:
            image = np.stack([cv2.cvtColor(plane, cv2.COLOR_RGB2GRAY) for plane in image])[..., None]
        if self.size is not None:
            return {**item, "image": resized(image, self.size)}
        if self.resample is not None:
            if item["spacing"] is None:
                raise ValueError(f"{item['name']}: its spacing is not known; write its volume with one")
            pairs = zip(image.shape, item["spacing"], self.resample, strict=False)
            shape = [max(round(side * own / wanted), 1) if wanted else side for side, own, wanted in pairs]
            if shape != list(image.shape[:3]):
                found = np.moveaxis(to_shape(np.moveaxis(image, -1, 0), shape), 0, -1)
                image = (found.round() if image.dtype == np.uint8 else found).astype(image.dtype)
        return {**item, "image": image}


def _box(image: Array) -> tuple[slice, ...] | None:
    inside: NDArray[np.bool_] = (image != 0).max(axis=-1)
    ends = [np.flatnonzero(inside.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(own[0]), int(own[-1]) + 1) for own in ends) if inside.any() else None


def resized(planes: Array, size: Sequence[int]) -> Array:
    """Slices (D, H, W, C) in another size: by area where that means fewer pixels, else linearly."""
    if tuple(planes.shape[1:3]) == tuple(size):
        return planes
    fewer = size[0] * size[1] < planes.shape[1] * planes.shape[2]
    how, (height, width) = cv2.INTER_AREA if fewer else cv2.INTER_LINEAR, size
    parts = [np.ascontiguousarray(planes[..., first : first + 4]) for first in range(0, planes.shape[-1], 4)]
    moved = [[cv2.resize(plane, (width, height), interpolation=how) for plane in part] for part in parts]
    return np.concatenate([np.stack(part).reshape(len(planes), height, width, -1) for part in moved], axis=-1)


def to_shape(maps: Array, shape: Sequence[int]) -> NDArray[np.float32]:
    """Maps (R, D, H, W) on another grid of the same extent: smaller by area, larger linearly, axis by axis."""
    found: Tensor = torch.from_numpy(np.ascontiguousarray(maps)).float()[None]
    smaller = [min(old, new) for old, new in zip(found.shape[2:], shape, strict=True)]
    if smaller != list(found.shape[2:]):
        found = nn.functional.adaptive_avg_pool3d(found, (smaller[0], smaller[1], smaller[2]))
    if smaller != list(shape):
        found = nn.functional.interpolate(found, size=tuple(shape), mode="trilinear", align_corners=False)
    result: NDArray[np.float32] = found[0].numpy()
    return result


@dataclass(frozen=True)
class ToInput:
    """Makes the network's input of a case on its grid.

    Attributes:
        channels: of an image, before neighbours; a grey image is repeated where there are three.
        neighbours: slices on either side that join a slice as further channels.
        dimensions: 2, every slice is an image; or 3, the volume is one.
    """

    channels: int
    neighbours: int
    dimensions: int

    def __call__(self, item: Item) -> Item:
        """``image`` becomes (N, C, ...) in [0, 1]: N slices, or one volume."""
        image: Array = item["image"]
        if image.shape[-1] != self.channels:
            if (image.shape[-1], self.channels) != (1, 3):
                raise ValueError(f"{item['name']} has {image.shape[-1]} channel(s), the network takes {self.channels}")
            image = np.repeat(image, 3, axis=-1)
        count = len(image)
        if self.neighbours and count == 1:
            raise ValueError(f"{item['name']} is a single slice, but the network takes its neighbours; give a volume")
        around = range(-self.neighbours, self.neighbours + 1)
        image = np.concatenate([image[np.clip(np.arange(count) + step, 0, count - 1)] for step in around], axis=-1)
        found = torch.from_numpy(np.moveaxis(image if self.dimensions == 2 else image[None], -1, 1).copy())
        return {**item, "image": found.float() / 255 if found.dtype == torch.uint8 else found.clamp(0, 1)}


# --- from the network to files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activate:
    """Turns answers into one probability per region.

    Attributes:
        activation: sigmoid or softmax (whose first channel is the background); none where the network has done it.
    """

    activation: str

    def __call__(self, item: Item) -> Item:
        """``pred`` becomes (N, R, ...)."""
        found: Tensor = item["pred"]
        if not found.isfinite().all():
            raise ValueError(f"{item['name']}: the network's answer is not finite")
        if self.activation == "sigmoid":
            found = found.sigmoid()
        elif self.activation == "softmax":
            found = found.softmax(dim=1)[:, 1:]
        return {**item, "pred": found}


class ToOwnGrid:
    """Brings probabilities back to the grid of the case's file."""

    def __call__(self, item: Item) -> Item:
        """``pred`` becomes (D, R, H, W)."""
        maps: Array = item["pred"].numpy()
        maps = maps[0].swapaxes(0, 1) if maps.ndim == 5 else maps
        box = item["box"]
        shape = item["shape"] if box is None else [own.stop - own.start for own in box]
        if len(maps) == shape[0]:
            maps = resized(maps.transpose(0, 2, 3, 1), shape[1:]).transpose(0, 3, 1, 2)
        else:
            maps = to_shape(maps.swapaxes(0, 1), shape).swapaxes(0, 1)
        if box is not None:
            whole = np.zeros((item["shape"][0], maps.shape[1], *item["shape"][1:]), np.float32)
            whole[box[0], :, box[1], box[2]] = maps
            maps = whole
        return {**item, "pred": torch.from_numpy(np.ascontiguousarray(maps))}


@dataclass(frozen=True)
class Decide:
    """Turns probabilities into masks.

    Attributes:
        exclusive: each pixel goes to the most probable of background and regions; else to all above 1/2.
    """

    exclusive: bool

    def __call__(self, item: Item) -> Item:
        """``pred`` becomes bool."""
        chances: Tensor = item["pred"]
        if not self.exclusive:
            return {**item, "pred": chances > 0.5}
        background = 1 - chances.sum(dim=1, keepdim=True)
        winner = torch.cat([background, chances], dim=1).argmax(dim=1, keepdim=True)
        return {**item, "pred": winner == torch.arange(1, chances.shape[1] + 1).view(1, -1, 1, 1)}


@dataclass(frozen=True)
class Write:
    """Writes a mask of every region: NAME_REGION.nii.gz (0 and 1) of a volume, .png (0 and 255) of a picture.

    Attributes:
        folder: is made where it is missing.
        regions: as names of files.
        canonical: whether volumes were turned.
    """

    folder: str
    regions: Sequence[str]
    canonical: bool

    def __call__(self, item: Item) -> Item:
        """Adds ``written``, the files."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        written = []
        for region, mask in zip(self.regions, item["pred"].numpy().astype(np.uint8).swapaxes(0, 1), strict=True):
            path = Path(self.folder) / f"{item['name']}_{region}{'.png' if item['axis'] is None else '.nii.gz'}"
            if item["axis"] is None:
                Image.fromarray(mask[0] * np.uint8(255)).save(path)
            else:
                nibabel.save(self._volume(mask, item), path)
            written.append(str(path))
        return {**item, "written": written}

    def _volume(self, slices: Array, item: Item) -> Any:
        original: Any = nibabel.load(item["first"])
        axis = item["axis"]
        if self.canonical and axis != AXIAL:
            slices = slices[:, ::-1]
        array = slices.transpose(np.argsort(_order(axis, self.canonical)))
        if self.canonical:
            own = io_orientation(np.asarray(original.affine, np.float64))
            array = apply_orientation(array, ornt_transform(axcodes2ornt(tuple(COMMON)), own))
        header = original.header.copy()
        header.set_data_dtype(np.uint8)
        header["cal_min"] = header["cal_max"] = 0
        return type(original)(np.ascontiguousarray(array), original.affine, header)


@dataclass(frozen=True)
class Outlining:
    """Outlines the regions in every case, one after the other.

    Attributes:
        dataset: of cases, prepared.
        network: of the bundle.
        inferer: of MONAI.
        postprocessing: from answers to files.
        device: on which the network works.
        batch: images at a time.
    """

    dataset: Iterable[Item]
    network: nn.Module
    inferer: Callable[[Tensor, nn.Module], Tensor]
    postprocessing: Callable[[Item], Item]
    device: torch.device
    batch: int

    def run(self) -> list[str]:
        """The files that were written."""
        written: list[str] = []
        for item in self.dataset:
            with torch.no_grad():
                parts = [self.inferer(part.to(self.device), self.network) for part in item["image"].split(self.batch)]
            written += self.postprocessing({**item, "pred": torch.cat(parts).float().cpu()})["written"]
        return written
