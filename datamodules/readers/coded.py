"""Writes masks of a DICOM series as a segmentation (SEG) with coded segments.

Of the patient it has what the standard wants in every file of a study, whatever else the series tells of a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fedseg.common.names import nearest
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.dicom import Series, open_series, quiet, read_header
from fedseg.datamodules.readers.enhanced import GROUPS
from fedseg.datamodules.readers.kinds import install, lacks

OF_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
OF_STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
"""Elements of type 2: they must be there, with the study's values, which may be empty."""
NAMED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
OF_SOURCE = (
    *(*NAMED, "PositionReferenceIndicator", "Modality", "Rows", "Columns", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices"),
)
LONGEST, SHORT = 64, 16  # characters of a text (LO), and of a code or its scheme (SH)
SERIES_NUMBER = 1000  # beyond those that a scanner gives
FORM = "lesion: {category: [SCT, 49755003, Morphologically Abnormal Structure], type: [SCT, 52988006, Lesion]}"


@dataclass(frozen=True)
class Code:
    """A concept of a terminology.

    Attributes:
        scheme: Its name in DICOM, such as SCT for SNOMED CT.
        value: The code.
        meaning: In words.
    """

    scheme: str
    value: str
    meaning: str


TISSUE = Code("SCT", "85756007", "Tissue")


@dataclass(frozen=True)
class Segment:
    """What a region is called and what it is; without further word it is some tissue.

    Attributes:
        name: Of the region.
        category: What kind of thing it is (SegmentedPropertyCategory).
        type: Which one (SegmentedPropertyType).
    """

    name: str
    category: Code = TISSUE
    type: Code = TISSUE


@dataclass(frozen=True)
class Maker:
    """What made the masks.

    Attributes:
        name: Of the program.
        version: Of the program.
        model: Which model, in a few words.
    """

    name: str
    version: str
    model: str


# --- codes ------------------------------------------------------------------------------------------------------------


def read_codes(table: Path | None, regions: Sequence[str]) -> list[Segment]:
    """The segments of all regions, in their order, coded as a table says.

    Args:
        table: YAML with a line for each region that is to be coded, such as ``FORM``; None: every region is tissue.
        regions: Names of all regions.

    Raises:
        DataError: It cannot be read, or names no region, or holds no codes.
    """
    told = {} if table is None else _table(table)
    for region in told:
        if region not in regions:
            raise DataError(f"{table}: there is no region {region!r}; {nearest(region, regions)}")
    if long := [name for name in regions if len(name) > LONGEST or "\\" in name]:
        raise DataError(
            f"the region {long[0][:LONGEST]!r} cannot name a segment in DICOM; give data.regions a name of at most "
            f"{LONGEST} characters without backslash"
        )
    return [Segment(region, **_codes(table, region, told.get(region, {}))) for region in regions]


def _table(path: Path) -> Mapping[str, Any]:
    try:
        told = yaml.BaseLoader(path.read_text(encoding="utf-8-sig")).get_single_data()  # texts, lists and mappings only
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); write lines such as {FORM}") from None
    if not isinstance(told, Mapping):
        raise DataError(f"{path}: expected lines such as {FORM}")
    return told


def _codes(table: Path | None, region: str, told: Any) -> dict[str, Code]:
    keys = [field.name for field in fields(Segment) if field.name != "name"]
    if not isinstance(told, Mapping) or not set(told) <= {*keys}:
        raise DataError(f"{table}: {region}: expected {' and '.join(keys)}, as in {FORM}")
    codes = {}
    for key, parts in told.items():
        limits = (SHORT, SHORT, LONGEST)
        whole = isinstance(parts, list) and len(parts) == len(limits) and all(isinstance(part, str) for part in parts)
        if not whole or not all(
            0 < len(part) <= most and part.isprintable() for part, most in zip(parts, limits, strict=True)
        ):
            raise DataError(f"{table}: {region}: {key} is no [scheme, code, meaning]; write it as in {FORM}")
        codes[key] = Code(*parts)
    return codes


# --- files ------------------------------------------------------------------------------------------------------------


def check_source(series: Path) -> None:
    """Refuses a series of which no segmentation can be written.

    Raises:
        DataError: highdicom is not installed, or a file lacks a name that a segmentation refers to.
    """
    if lacks(".dcm") or _highdicom() is None:
        raise DataError(f"needs the package highdicom to write segmentations; {install('dicom')}")
    for path in _files(open_series(series)):
        head = read_header(path, NAMED)
        if lacking := [name for name in NAMED if not head.get(name)]:
            raise DataError(
                f"holds {path.name} without {lacking[0]}, which a segmentation refers to; export the series anew, or "
                "convert it to NIfTI"
            )


def write_segmentation(
    file: Path, series: Path, masks: NDArray[np.bool_], segments: Sequence[Segment], maker: Maker
) -> Path:
    """Writes all masks of a series as one file, a segment for each; they may overlap.

    Args:
        file: To write.
        series: The folder of the series, or an enhanced image.
        masks: (R, slice, row, column) in the order of `open_series`.
        segments: Of each mask.
        maker: Told as the algorithm and the equipment.
    """
    check_source(series)
    opened = open_series(series)
    paths = _files(opened)
    frames = [one.frame for one in opened.slices if one.frame is not None]
    with quiet():
        if frames:  # a segmentation's go in the order of the image's
            masks, sources = masks.take(np.argsort(frames), axis=1), [_enhanced(opened)]
        else:
            sources = [_source(path) for path in paths]
        made = _segmentation(sources, masks, segments, maker)
        _name_patient(made, paths[0])
        made.save_as(file)
    return file


def _files(series: Series) -> list[Path]:
    """Of a series, in order; one of an enhanced image."""
    return list(dict.fromkeys(one.path for one in series.slices))


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError:
        return None
    return highdicom


def _source(path: Path) -> Any:
    """A slice's header with nothing of the patient's: the library copies what it finds, and logs odd names."""
    head = read_header(path, OF_SOURCE)
    for tag in (*OF_PATIENT, *OF_STUDY):
        setattr(head, tag, None)
    return head


def _enhanced(series: Series) -> Any:
    """As `_source`, of an enhanced image: of its frames what a segmentation needs."""
    head = _source(series.slices[0].path)
    head.NumberOfFrames = len(series.slices)
    frames = sorted(series.slices, key=lambda one: one.frame or 0)
    head.SharedFunctionalGroupsSequence = [_groups(frames[0].head, "PixelMeasuresSequence", "PlaneOrientationSequence")]
    head.PerFrameFunctionalGroupsSequence = [_groups(one.head, "PlanePositionSequence") for one in frames]
    return head


def _groups(frame: Any, *names: str) -> Any:
    from pydicom import Dataset

    made = Dataset()
    for name in names:
        item = Dataset()
        for tag in GROUPS[name]:
            if tag in frame:
                item.add(frame[tag])
        setattr(made, name, [item])
    return made


def _segmentation(source: Sequence[Any], masks: NDArray[np.bool_], segments: Sequence[Segment], maker: Maker) -> Any:
    hd = _highdicom()
    from pydicom.sr.codedict import codes

    told = hd.AlgorithmIdentificationSequence(maker.name, codes.DCM.ArtificialIntelligence, maker.version)
    described = [
        hd.seg.SegmentDescription(
            number, segment.name, _concept(segment.category), _concept(segment.type),
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm_identification=told,
        )
        for number, segment in enumerate(segments, start=1)
    ]  # fmt: skip
    return hd.seg.Segmentation(
        source,
        np.ascontiguousarray(np.moveaxis(masks, 0, -1).astype(np.uint8)),
        hd.seg.SegmentationTypeValues.BINARY,
        described,
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=maker.name,
        manufacturer_model_name=maker.model[:LONGEST],
        software_versions=maker.version,
        device_serial_number="none",
        series_description=f"{maker.name}: {maker.model}"[:LONGEST],
        specific_character_set="ISO_IR 192",
    )


def _concept(code: Code) -> Any:
    return _highdicom().sr.CodedConcept(code.value, code.scheme, code.meaning)


def _name_patient(made: Any, first: Path) -> None:
    """Gives a segmentation the patient and the study of its series, as texts, which it writes in UTF-8."""
    import pydicom

    of = read_header(first, (*OF_PATIENT, *OF_STUDY))
    with pydicom.config.disable_value_validation():
        for tag in (*OF_PATIENT, *OF_STUDY):
            value = of.get(tag)
            setattr(made, tag, None if value is None else str(value))
