"""NRRD and MetaImage (MHA, MHD) through SimpleITK: what their headers say, and the way back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.headers import (
    AGAIN,
    META,
    Header,
    check_bytes,
    check_files,
    check_numbers,
    check_text,
    read_header,
)
from fedseg.datamodules.readers.kinds import Array, install, lacks, suffix_of
from fedseg.datamodules.readers.placed import Affine, Volume, check_affine, check_shape

TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK counts to the left and to the back
INSTALL = install("itk")
CURE = "write it anew, for instance with SimpleITK.GetImageFromArray(array) and SetSpacing((X, Y, Z)), in mm"
SEGMENT = re.compile(r"^Segment(\d+)_(LabelValue|Name|Layer)$")
TIMES = {"s", "ms", "us", "ns", "min", "sec", "msec", "second", "seconds"}


def open_itk(path: Path) -> Volume:
    """A NRRD or MetaImage file, not decoded yet.

    Raises:
        DataError: SimpleITK is not installed; other dimensions, a time series, segments that overlap, or a header that
            does not say where the voxels lie.
    """
    itk, header = _library(), read_header(path)
    check_numbers(header)
    check_files(header)
    reader = _reader(itk, path)
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
    shape = _shape(size, channels)
    segments = _segments(header.keys, shape)
    if len(shape) == 4 and (told := _time(header)):
        raise DataError(
            f"is a time series of {shape[3]} frames by its header ({told}); write one 3-D file per frame, or, if its "
            "fourth axis holds channels, take that out of the header"
        )
    check_shape(shape)
    check_text(header, CURE)
    affine = _affine(reader)
    check_affine(affine, CURE)
    expected = math.prod(size) * channels * _bytes(kind)
    return Volume(shape, affine, lambda: _load(itk, header, expected, shape), segments=segments)


def _shape(size: Sequence[int], channels: int) -> tuple[int, ...]:
    """Of a volume's axes and, where there are several, its channels."""
    shape = (*size, channels) if channels > 1 and len(size) > 2 else tuple(size)
    return shape[:3] if len(shape) == 4 and shape[3] == 1 else shape


def _affine(reader: Any) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = TO_RAS @ _direction(reader) * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = TO_RAS @ reader.GetOrigin()[:3]
    return affine


def _direction(reader: Any) -> Array:
    """Of the first three axes."""
    sides = reader.GetDimension()
    turn: Array = np.array(reader.GetDirection()).reshape(sides, sides)[:3, :3]
    return turn


def itk_like(path: Path, array: Array) -> Any:
    """A SimpleITK image of an array (x, y, z) with the spacing, origin and direction of a file."""
    itk = _library()
    reader = _reader(itk, path)
    image = itk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(reader.GetSpacing()[:3])
    image.SetOrigin(reader.GetOrigin()[:3])
    image.SetDirection(_direction(reader).ravel().tolist())
    return image


def save_itk(image: Any, like: Path, folder: Path, name: str) -> Path:
    """Writes one compressed file: MHA for a MetaImage, else NRRD."""
    path = folder / f"{name}{'.mha' if suffix_of(like) in META else '.nrrd'}"
    _library().WriteImage(image, str(path), useCompression=True)
    return path


def _library() -> Any:
    if lacks(".nrrd"):
        raise DataError(f"needs the package SimpleITK; {INSTALL}")
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what it warns of is refused here
    return SimpleITK


def _reader(itk: Any, path: Path) -> Any:
    reader = itk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if suffix_of(path) in META else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(error) from error
    return reader


def _load(itk: Any, header: Header, expected: int, shape: tuple[int, ...]) -> Array:
    check_bytes(header, expected)
    try:
        image = _reader(itk, header.path).Execute()
    except RuntimeError as error:
        raise _unreadable(error) from error
    array: Array = itk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        return array.transpose(2, 1, 0, 3)
    return array.T.reshape(shape)  # a fourth axis of one is left out


def _unreadable(error: RuntimeError) -> DataError:
    """What a library says over many lines, with the places of its sources, in one."""
    told = re.split(r"ERROR:\s*", str(error))[-1]
    told = told.split("[nrrd]")[-1]  # the library's cause comes last
    told = re.sub(r"\w+\(0x[0-9a-f]+\):\s*", "", " ".join(told.split()))
    return DataError(f"cannot be read ({told[:300]}); {AGAIN}")


def _bytes(kind: str) -> int:
    """Bytes of one value of a type such as "vector of 16-bit signed integer"."""
    found = re.search(r"(\d+)-bit", kind)
    if not found or "complex" in kind:
        raise DataError(f"has values of another type ({kind}); store real numbers")
    return int(found.group(1)) // 8


def _time(header: Header) -> str:
    """What says that a fourth axis is one of time; empty where nothing does."""
    kinds = header.fields.get("kinds", "").split()
    if "time" in kinds:
        return f"kinds: {' '.join(kinds)}"
    if header.fields.get("space", "").lower().endswith(("time", "rast", "last", "lpst")):
        return f"space: {header.fields['space']}"
    for key, value in header.keys.items():
        axis = re.match(r"^axis \d+ index (name|unit)$", key)
        if axis and (value.lower() == "time" if axis.group(1) == "name" else value.lower() in TIMES):
            return f"{key}:={value}"
        if key == "MultiVolume.FrameIdentifyingDICOMTagName" and "time" in value.lower():
            return f"{key}:={value}"
    return ""


def _segments(keys: Mapping[str, str], shape: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
    """Label ids and names of the segments that 3D Slicer wrote; segments that may overlap are refused."""
    told: dict[str, dict[str, str]] = {}
    for key, value in keys.items():
        if found := SEGMENT.match(key):
            told.setdefault(found.group(1), {})[found.group(2)] = value
    if told and (len(shape) == 4 or len({segment.get("Layer", "0") for segment in told.values()}) > 1):
        layers = shape[3] if len(shape) == 4 else "several"
        raise DataError(
            f"holds segments in {layers} layers, which may overlap: a voxel has one label; export it as a label map "
            "(3D Slicer: Segmentations, Export to labelmap), or where they do, every segment as a mask of its own"
        )
    named = [segment for segment in told.values() if "LabelValue" in segment]
    return tuple(sorted((int(segment["LabelValue"]), segment.get("Name", "")) for segment in named))
