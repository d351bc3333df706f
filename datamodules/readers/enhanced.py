"""Enhanced multi-frame images in DICOM (PS3.3, C.7.6.16): the frames of one file as the slices of a series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import few

ENHANCED = (
    *("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.130"),  # MR, CT, PET
    *("1.2.840.10008.5.1.4.1.1.4.4", "1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.128.1"),  # converted
)
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
OF_FRAMES = (SHARED, PER_FRAME, "NumberOfFrames", "ConcatenationUID", "InConcatenationTotalNumber")
PIXELS = ("PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
"""What a frame says of itself, or all frames together, that a slice of a series says in its own header."""
ONE_OF: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("stacks", "FrameContentSequence", ("StackID",)),
    ("points in time", "FrameContentSequence", ("TemporalPositionIndex",)),
    ("echoes", "MREchoSequence", ("EffectiveEchoTime",)),
    ("b-values", "MRDiffusionSequence", ("DiffusionBValue",)),
    ("kinds of image", "MRImageFrameTypeSequence", ("FrameType", "ComplexImageComponent")),
    ("kinds of image", "CTImageFrameTypeSequence", ("FrameType",)),
    ("kinds of image", "PETFrameTypeSequence", ("FrameType",)),
)
"""Of what all frames of a volume have the same."""

CODES = {
    *("ORIGINAL", "DERIVED", "MIXED", "PRIMARY", "VOLUME", "AXIAL", "LOCALIZER", "NONE"),
    *("MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "WATER", "FAT", "IN_PHASE", "OUT_OF_PHASE"),
}
"""Words of the standard that tell kinds of image apart."""


@dataclass(frozen=True)
class Slice:
    """A slice of a series: a file, or a frame of one.

    Attributes:
        path: The file.
        head: Its elements.
        frame: Which frame of the file, from 0; None where the file is the slice.
    """

    path: Path
    head: Any
    frame: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name if self.frame is None else f"frame {self.frame + 1} of {self.path.name}"


def frames_of(path: Path, head: Any, whole: Any, anew: str) -> list[Slice]:
    """The frames of an enhanced image, in the order of the file.

    Args:
        path: The file.
        head: Elements that a slice has, as far as an enhanced image has them for all frames.
        whole: Those of `OF_FRAMES`.
        anew: The cure where the file does not say what it must.

    Raises:
        DataError: It is a part of an image, does not say where its frames lie, or holds several stacks, times, echoes,
            b-values or kinds of image.
    """
    if "ConcatenationUID" in whole and int(whole.get("InConcatenationTotalNumber") or 2) > 1:
        raise DataError(f"holds {path.name}, which is a part of an image (a concatenation); have it joined, or {anew}")
    own, count = whole.get(PER_FRAME) or [], int(whole.get("NumberOfFrames") or 0)
    if not own or len(own) != count:
        raise DataError(f"holds {path.name}, which has {count} frames and says of {len(own)} where they lie; {anew}")
    shared = (whole.get(SHARED) or [{}])[0]
    try:
        _check_one(path, own, shared)
        return [Slice(path, _as_slice(head, item, shared), number) for number, item in enumerate(own)]
    except DataError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:  # whose text may quote the file
        raise DataError(
            f"holds {path.name}, whose frames do not say what they are ({type(error).__name__}); {anew}"
        ) from None


def _check_one(path: Path, own: Any, shared: Any) -> None:
    """Refuses frames of several volumes."""
    for what, group, tags in ONE_OF:
        told = [tuple(_told(item, shared, group, tag) for tag in tags) for item in own]
        kinds = {tuple(_comparable(value) for value in values): values for values in told}
        if len(kinds) > 1:
            named = [" ".join(_shown(value) for value in values if value is not None) for values in kinds.values()]
            names = f" ({few(named)})" if all(named) else ""
            raise DataError(
                f"holds {path.name}, whose frames are of {len(kinds)} {what}{names}; export each as a file of its own, "
                "or convert one to NIfTI"
            )


def _as_slice(head: Any, item: Any, shared: Any) -> Any:
    """Elements of a frame as a slice of a series has them, and no others."""
    from pydicom import Dataset

    made = Dataset()
    for element in head:
        if element.keyword not in ("SOPClassUID", "NumberOfFrames"):
            made.add(element)
    made.file_meta = head.file_meta
    for group, tags in GROUPS.items():
        for tag in tags:
            if (value := _told(item, shared, group, tag)) is not None:
                setattr(made, tag, value)
    return made


def _told(item: Any, shared: Any, group: str, tag: str) -> Any:
    """What a frame says, or all frames together; None where neither does."""
    found = item if group in item else shared
    return found[group][0].get(tag) if group in found else None


def _comparable(value: Any) -> Any:
    """Times of a scanner differ in their last digits."""
    if isinstance(value, float):
        return round(value, 2)
    return str(value)


def _shown(value: Any) -> str:
    """A number, or one of the standard's codes: other text of a file must not get into a message."""
    if isinstance(value, int | float):
        return f"{value:g}"
    parts = [value] if isinstance(value, str) else [str(part) for part in value]
    return "/".join(part for part in parts if part in CODES or part.isdecimal())
