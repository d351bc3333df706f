"""From files to arrays: images, masks and volumes, with every assumption a setting.

``kinds`` names files, ``settings`` says how they are read, ``pictures`` and ``volumes`` decode them into ``stored``
values; ``drawing`` and ``labels`` give those of masks a meaning, ``intensity`` those of images, and ``case`` puts image
and mask together.
"""

from fedseg.datamodules.readers.case import (
    GRID_CURE,
    PLACE_CURE,
    Role,
    as_layer,
    cutting,
    join,
    kind,
    load_file,
    misplaced,
    nothing,
    read_case,
    with_absent,
)
from fedseg.datamodules.readers.coded import Maker, Segment, check_source, read_codes
from fedseg.datamodules.readers.drawing import SEGMENT, ids_by_colour
from fedseg.datamodules.readers.intensity import scale
from fedseg.datamodules.readers.kinds import FLAT, VOLUMES, Array, Spacing, sides, stem_of, suffix_of
from fedseg.datamodules.readers.labels import map_labels, unknown_labels
from fedseg.datamodules.readers.layers import Layer, combine
from fedseg.datamodules.readers.raters import settled
from fedseg.datamodules.readers.settings import (
    MAJORITY,
    OF_CASE,
    RANDOM,
    STAPLE,
    Axis,
    Intensity,
    MaskGeometry,
    Reading,
    Transparency,
)
from fedseg.datamodules.readers.stored import Stored, seen
from fedseg.datamodules.readers.volumes import AXIAL, put_back, segments_back, write_back

__all__ = [
    "AXIAL",
    "FLAT",
    "GRID_CURE",
    "MAJORITY",
    "OF_CASE",
    "PLACE_CURE",
    "RANDOM",
    "SEGMENT",
    "STAPLE",
    "VOLUMES",
    "Array",
    "Axis",
    "Intensity",
    "Layer",
    "Maker",
    "MaskGeometry",
    "Reading",
    "Role",
    "Segment",
    "Spacing",
    "Stored",
    "Transparency",
    "as_layer",
    "check_source",
    "combine",
    "cutting",
    "ids_by_colour",
    "join",
    "kind",
    "load_file",
    "map_labels",
    "misplaced",
    "nothing",
    "put_back",
    "read_case",
    "read_codes",
    "scale",
    "seen",
    "segments_back",
    "settled",
    "sides",
    "stem_of",
    "suffix_of",
    "unknown_labels",
    "with_absent",
    "write_back",
]
