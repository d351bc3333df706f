"""DICOM: a folder with one series of slices is a volume, and so is a file of many frames.

Nothing is kept but what pixels and places need.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import few
from fedseg.datamodules.readers.enhanced import ENHANCED, OF_FRAMES, PIXELS, Slice, frames_of
from fedseg.datamodules.readers.kinds import Array, in_series, install, is_dicom, lacks, sides
from fedseg.datamodules.readers.placed import Affine, Volume, check_affine

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts to the left and to the back
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # SEG, and as label maps
OF_SLICE = (
    *("SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "PixelRepresentation", "BitsAllocated", "BitsStored", "HighBit"),
)
"""All that is read of a slice beside its pixels: no name, date, number or text of a person."""
OFF_GRID = 0.1  # of a voxel, by which a slice may lie elsewhere than on an even grid
TURNED = 1e-3  # by which the cosines of two slices may differ, rounded as they are
AGAIN = "replace the file or leave it out"
ANEW = "export the series anew, or convert it to NIfTI on an even grid"
DECODE = "store it without compression, for instance with pydicom's decompress() where its decoder is installed"


@dataclass(frozen=True)
class Series:
    """The slices of a series, in order along their normal.

    Attributes:
        slices: Files, or frames of one.
        affine: From column, row and slice to the patient: to the right, to the front, to the head.
        frame: Names the space in which the places are measured; empty where the files do not tell.
    """

    slices: tuple[Slice, ...]
    affine: Affine
    frame: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices."""
        first = self.slices[0].head
        return int(first.Columns), int(first.Rows), len(self.slices)


def open_dicom(path: Path) -> Volume:
    """A series, not decoded yet.

    Raises:
        DataError: pydicom is not installed, or the folder or file does not hold one series of parallel, even, grey
            slices.
    """
    series = open_series(path)
    return Volume(series.shape, series.affine, lambda: _load(series), frame=series.frame)


def open_series(folder: Path) -> Series:
    """The headers of a series in a folder, or of an enhanced image, checked and in order; see `open_dicom`."""
    files = in_series(folder) if folder.is_dir() else [folder]
    if not folder.is_dir() and not is_enhanced(folder):
        what = "is a single DICOM file" if is_dicom(folder) else "does not start as a DICOM file"
        raise DataError(
            f"{what}; put the files of a series into a folder of its own ({folder.stem}/), or convert a picture to PNG"
        )
    return _series(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=4)  # a volume is opened several times while it is read
def _series(files: tuple[tuple[Path, int, int], ...]) -> Series:
    slices = [Slice(path, read_header(path, OF_SLICE)) for path, _, _ in files]
    if (several := next((one for one in slices if one.head.get("SOPClassUID") in ENHANCED), None)) is not None:
        if len(slices) > 1:
            raise DataError(
                f"holds {len(slices)} files, of which {several.name} holds a whole image (several frames); give it a "
                "folder of its own, or put it beside the folders of series"
            )
        whole = read_header(several.path, OF_FRAMES)
        with quiet():
            slices = frames_of(several.path, several.head, whole, ANEW)
    _check_one_series(slices)
    for one in slices:
        check_image(one)
    _check_alike(slices)
    ordered, steps = _in_order(slices)
    affine = _affine(ordered[0].head, steps)
    check_affine(affine, ANEW)
    return Series(tuple(ordered), affine, str(slices[0].head.get("FrameOfReferenceUID", "")))


def is_enhanced(path: Path) -> bool:
    """Whether a file is an image of many frames whose places it tells."""
    return is_dicom(path) and read_header(path, ("SOPClassUID",)).get("SOPClassUID") in ENHANCED


def read_header(path: Path, tags: Sequence[str], *, pixels: bool = False) -> Any:
    """Some elements of a file; others are passed over.

    Raises:
        DataError: It is no DICOM file, or broken. What a library says of it is left out: it may quote the file.
    """
    pydicom = _library()
    if path.is_dir():
        raise DataError(f"holds the folder {path.name}; give every series a folder of its own")
    if not is_dicom(path):
        raise DataError(f"holds {path.name}, which does not start as a DICOM file; move it elsewhere or replace it")
    try:
        with quiet():
            found = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=list(tags))
            for tag in tags:
                found.get(tag)  # a value is converted when it is asked for
    except Exception as error:  # it raises what it likes on broken bytes
        raise DataError(f"holds {path.name}, which is broken ({type(error).__name__}); {AGAIN}") from None
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Silences libraries of DICOM, which quote values of files in warnings and logs."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _library() -> Any:
    if needed := lacks(".dcm"):
        raise DataError(f"needs the package {needed[0]}; {install('dicom')}")
    import pydicom

    return pydicom


# --- what is refused --------------------------------------------------------------------------------------------------


def _check_one_series(slices: Sequence[Slice]) -> None:
    """Refuses several series in one folder."""
    by_series: dict[str, Slice] = {}
    for one in slices:
        by_series.setdefault(str(one.head.get("SeriesInstanceUID", "")), one)
    if len(by_series) > 1:
        files = few([one.name for one in by_series.values()])
        raise DataError(f"holds {len(by_series)} series ({files} are of different ones); give each a folder of its own")


def check_image(one: Slice) -> None:
    """Refuses what is no grey slice with a place in the patient."""
    head = one.head
    kind, colours = _class(head), str(head.get("PhotometricInterpretation", ""))
    frames, samples = (int(_number(head, tag, 1)) for tag in ("NumberOfFrames", "SamplesPerPixel"))
    scout, own = "LOCALIZER" in (head.get("ImageType") or ()), "a folder of its own"
    files = "export the series with a file for each slice, or convert it to NIfTI"
    syntax = head.file_meta.get("TransferSyntaxUID")
    faults = (
        (head.get("SOPClassUID") in SEGMENTATIONS, "is a segmentation", "move it to the masks, or leave it out"),
        ("Rows" not in head or "Columns" not in head, f"is no image but {kind}", "leave it out"),
        (scout, "is a localiser", f"leave it out, or give it {own}"),
        (frames > 1 or "Enhanced" in kind, "holds several frames", files),
        (samples != 1 or colours == "PALETTE COLOR", "is in colour", "leave it out, or export pictures as PNG"),
        (colours == "MONOCHROME1", "has white as zero", "store it as MONOCHROME2"),
        ("ModalityLUTSequence" in head, "has a table that gives its values a meaning", "store the values themselves"),
        (_number(head, "RescaleSlope", 1) == 0, "has a rescale slope of 0", "correct it, or leave the case out"),
        (not _is_placed(head), "does not say where its pixels lie in the patient", ANEW),
        (not syntax, "does not say how its pixels are stored", ANEW),
    )
    for wrong, what, cure in faults:
        if wrong:
            raise DataError(f"holds {one.name}, which {what}; {cure}")
    _check_decoder(one.name, syntax)


def _number(head: Any, tag: str, default: float) -> float:
    """An element's number, or what an empty or missing one means."""
    told = head.get(tag)
    return default if told is None or told == "" else float(told)


def _class(head: Any) -> str:
    """What kind of object a file holds, by the standard's name."""
    uid = head.get("SOPClassUID")
    return getattr(uid, "name", "") or "an object of unknown kind"


def _is_placed(head: Any) -> bool:
    """Whether position, orientation and sizes are there and are numbers."""
    for tag, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        values = head.get(tag)
        if values is None or len(values) != count or not np.isfinite(np.array(values, float)).all():
            return False
    row, column = _cosines(head)
    turned = abs(np.linalg.norm(row) - 1) + abs(np.linalg.norm(column) - 1) + abs(row @ column)
    return bool(turned < 3 * TURNED and min(map(float, head.PixelSpacing)) > 0)


def _check_decoder(name: str, syntax: Any) -> None:
    """Refuses pixels that nothing installed reads; for some ways of storing, such as films, pydicom has no decoder."""
    from pydicom.pixels import get_decoder

    what = f"is compressed by a method that nothing installed reads ({syntax.name})"
    refused = DataError(f"holds {name}, which {what}; {DECODE}")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise refused from error
    if not decoder.is_available:
        raise refused


def _check_alike(slices: Sequence[Slice]) -> None:
    """Refuses slices of which one has another size, orientation or space than the first."""
    same: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("size", lambda head: (int(head.Rows), int(head.Columns))),
        ("size of pixels", lambda head: np.array(head.PixelSpacing, float)),
        ("orientation", lambda head: np.concatenate(_cosines(head))),
        ("frame of reference", lambda head: str(head.get("FrameOfReferenceUID", ""))),
        ("type of pixels", lambda head: (int(head.BitsAllocated), int(head.PixelRepresentation))),
    )
    first = slices[0]
    for other in slices[1:]:
        for name, of in same:
            one, own = of(first.head), of(other.head)
            alike = np.allclose(one, own, atol=TURNED) if isinstance(one, np.ndarray) else one == own
            if not alike:
                raise DataError(
                    f"{other.name} has another {name} than {first.name}; give every stack a folder of its own"
                )


def _in_order(slices: Sequence[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices along their normal, and the way from one to the next.

    Raises:
        DataError: Two lie at one place, gaps are uneven, or the stack is sheared, as by a tilted gantry.
    """
    row, column = _cosines(slices[0].head)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    ordered = sorted(slices, key=lambda one: float(_place(one.head) @ normal))
    if len(ordered) == 1:
        return ordered, normal * _thickness(ordered[0])
    places = np.array([_place(one.head) for one in ordered])
    heights = places @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (close := np.flatnonzero(gaps <= OFF_GRID * usual)).size or usual <= 0:
        pair = int(close[0]) if close.size else 0
        names = f"{ordered[pair].name} and {ordered[pair + 1].name}"
        raise DataError(
            f"has two slices at one place ({names}): copies, or several times, echoes or directions in one series; "
            "give each a folder of its own"
        )
    step = (heights[-1] - heights[0]) / (len(ordered) - 1)
    if np.abs(heights - heights[0] - step * np.arange(len(ordered))).max() > OFF_GRID * step:
        widest = int(np.argmax(np.abs(gaps - usual)))
        raise DataError(
            f"has uneven gaps: {gaps[widest]:.4g} mm between {ordered[widest].name} and "
            f"{ordered[widest + 1].name}, {usual:.4g} mm elsewhere; add the missing slices, or {ANEW}"
        )
    aside = places - places[0] - np.outer(heights - heights[0], normal)
    if (far := float(np.linalg.norm(aside, axis=1).max())) > OFF_GRID * min(map(float, slices[0].head.PixelSpacing)):
        raise DataError(f"is sheared: its slices shift by up to {far:.3g} mm (a tilted gantry?); {ANEW}")
    return ordered, normal * step


def _thickness(only: Slice) -> float:
    """Of a series of one slice."""
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        if (told := only.head.get(tag)) is not None and float(told) > 0:
            return float(told)
    raise DataError(f"holds {only.name}, which is the only slice and does not say how thick it is; {ANEW}")


# --- places and values ------------------------------------------------------------------------------------------------


def _cosines(head: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions in which the columns and the rows of a slice are counted."""
    cosines = np.array(head.ImageOrientationPatient, float)
    return cosines[:3], cosines[3:]


def _place(head: Any) -> NDArray[np.float64]:
    return np.array(head.ImagePositionPatient, float)


def _affine(first: Any, step: NDArray[np.float64]) -> Affine:
    """From (column, row, slice) to the patient."""
    (between_rows, between_columns), (row, column) = map(float, first.PixelSpacing), _cosines(first)
    affine = np.eye(4)
    affine[:3] = np.stack([row * between_columns, column * between_rows, step, _place(first)], axis=1)
    found: Affine = TO_RAS @ affine
    return found


def _load(series: Series) -> Array:
    """Voxels (column, row, slice), as what they mean: stored values times slope plus intercept."""
    planes = _planes(series.slices)
    heads = [one.head for one in series.slices]
    scales = [(float(head.get("RescaleSlope") or 1), float(head.get("RescaleIntercept") or 0)) for head in heads]
    if any(plane.shape != series.shape[1::-1] for plane in planes):
        raise DataError(f"has slices whose pixels are not the {sides(series.shape[1::-1])} of its header; {AGAIN}")
    if {*scales} != {(1.0, 0.0)}:
        planes = [plane * slope + intercept for plane, (slope, intercept) in zip(planes, scales, strict=True)]
    values = np.stack(planes).transpose(2, 1, 0)
    if all(slope.is_integer() and intercept.is_integer() for slope, intercept in scales) and values.dtype.kind == "f":
        return values.astype(np.int32)
    return values


def _planes(slices: Sequence[Slice]) -> list[Array]:
    """The pixels of every slice as stored."""
    if slices[0].frame is None:
        return [pixels_of(one.path, (*OF_SLICE, "PixelData")) for one in slices]
    whole = pixels_of(slices[0].path, (*OF_SLICE, *PIXELS))
    whole = whole[None] if whole.ndim == 2 else whole
    if len(whole) != len(slices):
        raise DataError(
            f"holds {slices[0].path.name}, which has {len(whole)} frames and tells of {len(slices)}; {AGAIN}"
        )
    return [whole[one.frame] for one in slices]


def pixels_of(path: Path, tags: Sequence[str]) -> Array:
    """The pixels of a file as stored.

    Args:
        path: The file.
        tags: Elements that decoding needs.
    """
    head = read_header(path, tags, pixels=True)
    try:
        with quiet():
            pixels: Array = head.pixel_array
    except Exception as error:  # decoders raise what they like on broken bytes
        raise DataError(f"holds {path.name}, whose pixels are broken ({type(error).__name__}); {AGAIN}") from None
    return pixels
