"""How files become arrays: every assumption is a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import Spacing
from fedseg.datamodules.readers.rules import rule

Transparency = Literal["auto", "ignore", "drawing"]
Axis = Literal["auto"] | int
MaskGeometry = Literal["header", "image"]
Intensity = Literal["percentile", "minmax", "window", "zscore", "unit"]
MAJORITY = "majority"
STAPLE = "staple"
RANDOM = "random"
OF_CASE: tuple[Intensity, ...] = ("percentile", "minmax", "zscore")
"""Those that depend on all values of a case: a slice alone would be scaled otherwise."""
READ_BY: Mapping[str, Intensity] = {"window": "window", "percentiles": "percentile"}
"""Settings that one kind of intensity reads."""


@dataclass(frozen=True)
class Reading:
    """How files become arrays.

    Attributes:
        intensity: How values other than 8-bit become float32 in [0, 1]; see :func:`scale`.
        percentiles: Of a case's values, that become 0 and 1 ("percentile").
        window: Values that become 0 and 1 ("window").
        label_values: Rules from stored mask values to label ids; see :func:`map_labels`.
        transparency: What counts in a mask whose colours and opacity both vary: "ignore" opacity, take it as the
            "drawing", or "auto", which refuses where that is not certain.
        ids: Label ids that masks may hold besides 0, rising; where 1 is the only one, a mask of 0 and 255 has one
            possible meaning.
        regions: Region name to label ids, for masks in several files.
        ignored: Those of ``ids`` whose pixels do not count.
        scale_8bit: Whether 8-bit images, too, become [0, 1] by ``intensity``.
        axis: Of a volume, along which it is cut: 0 left-right, 1 front-back, 2 foot-head when ``canonical``; "auto"
            takes the one of the thickest voxels, see :func:`datamodules.readers.volumes.slice_axis`.
        canonical: Turn volumes to a common orientation first; else axes and directions are as stored.
        mask_geometry: Where a volume's mask lies: as its "header" says, or voxel by voxel on its "image".
        spacing: Millimetres per pixel (row, column) or voxel (slice, row, column), whatever files say; None: as
            they say.
        raters_train: Of a case with masks of several raters, what is learnt: what most outline ("majority"), what is
            most probable if each has a reliability of its own ("staple"), one of them drawn each time anew ("random"),
            or the name of a rater.
        raters_test: Likewise, what validation and test cases are scored against; not "random".
        frame: Which frame of a volume in time is read, from 0; None of volumes without time.
    """

    intensity: Intensity = "percentile"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    label_values: Mapping[int | str, int] | None = None
    transparency: Transparency = "auto"
    ids: tuple[int, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: tuple[int, ...] = ()
    scale_8bit: bool = False
    axis: Axis = "auto"
    canonical: bool = True
    mask_geometry: MaskGeometry = "header"
    spacing: tuple[float, ...] | None = None
    raters_train: str = MAJORITY
    raters_test: str = MAJORITY
    frame: int | None = None

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise DataError(f"data.percentiles=[{low}, {high}]: give two rising numbers from 0 to 100")
        if self.intensity == "window" and self.window is None:
            raise DataError("data.intensity=window needs data.window=[low, high], such as [-160, 240]")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise DataError(f"data.window={list(self.window)}: low must be below high")
        if self.axis not in (0, 1, 2, "auto"):
            raise DataError(f"data.axis={self.axis}: a volume is cut along axis 0, 1 or 2, or auto")
        if self.spacing is not None and (len(self.spacing) not in (2, 3) or not min(self.spacing) > 0):
            raise DataError(f"data.spacing={list(self.spacing)}: give [row, column] or [slice, row, column] in mm")
        if self.raters_test == RANDOM:
            raise DataError("data.raters_test=random: scores need one truth; take majority, staple or a rater's name")
        for key, label in (self.label_values or {}).items():
            rule(key)
            if not 0 <= label <= 255:
                raise DataError(f"data.label_values maps {key!r} to {label}: label ids run from 0 to 255")

    def spacing_of(self, stored: Spacing | None) -> Spacing | None:
        """Millimetres (slice, row, column) of a file, which may tell its own; slices are 1 apart where nobody says."""
        if self.spacing is None:
            return stored
        *between, row, column = self.spacing
        return (between[0] if between else stored[0] if stored else 1.0), row, column

    def at(self, frame: int | None) -> Reading:
        """The same of one frame, which a case and not a setting tells."""
        return self if frame == self.frame else replace(self, frame=frame)

    @property
    def binary(self) -> bool:
        """Whether the label id 1 is the only one."""
        return self.ids == (1,)
