"""From files to arrays: images, masks and volumes, with every assumption a setting.

``kinds`` names files, ``settings`` says how they are read, ``pictures`` and ``volumes`` decode them into ``stored``
values; ``drawing`` and ``labels`` give those of masks a meaning, ``intensity`` those of images, and ``case`` puts image
and mask together.
"""

from datamodules.readers.case import GRID_CURE, PLACE_CURE, cutting, load_file, misplaced, read_case
from datamodules.readers.drawing import ids_by_colour
from datamodules.readers.intensity import scale
from datamodules.readers.kinds import FLAT, VOLUMES, Array, Spacing, sides, stem_of, suffix_of
from datamodules.readers.labels import map_labels, unknown_labels
from datamodules.readers.settings import Axis, Intensity, MaskGeometry, Reading, Transparency
from datamodules.readers.stored import Stored, seen
from datamodules.readers.volumes import put_back

__all__ = [
    "FLAT",
    "GRID_CURE",
    "PLACE_CURE",
    "VOLUMES",
    "Array",
    "Axis",
    "Intensity",
    "MaskGeometry",
    "Reading",
    "Spacing",
    "Stored",
    "Transparency",
    "cutting",
    "ids_by_colour",
    "load_file",
    "map_labels",
    "misplaced",
    "put_back",
    "read_case",
    "scale",
    "seen",
    "sides",
    "stem_of",
    "suffix_of",
    "unknown_labels",
]
