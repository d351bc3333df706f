"""Pictures of the worst, median and best case of a site, with the contours of truth and predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from fedseg.reporting.letters import legible
from fedseg.reporting.summary import BEST, ENTROPY, HEADLINE, OWN_STATISTICS, case_scores

TRUTH = "truth"
ROLES = ("worst", "median", "best")
# White, sky blue and yellow differ in lightness and hue for all kinds of colour blindness, also on a red fundus.
STYLES: Mapping[str, tuple[str, str, float]] = {
    TRUTH: ("#FFFFFF", "-", 2.6),
    "global": ("#3FA9F5", "--", 2.2),
    "personal": ("#FFD800", "-", 1.5),
    "adapted": ("#FFD800", "-", 1.5),  # of unseen sites, which have no personal model
    OWN_STATISTICS: ("#FFD800", "-", 1.5),  # likewise
    ENTROPY: ("#FFD800", "-", 1.5),  # likewise
}
SMALLEST_WINDOW = 0.35  # of the image's shorter side: closer views would show pixels, not anatomy
MOST_COLUMNS = 4


def aspect_of(spacing: tuple[float, float, float] | None) -> float:
    """How much taller than wide a pixel of a slice is, by its spacing (slice, row, column); a square if unknown."""
    return 1.0 if spacing is None else spacing[1] / spacing[2]


@dataclass(frozen=True)
class Picture:
    """One case to draw.

    Attributes:
        site: The case's site.
        case: Its id.
        image: (D, H, W, C) uint8, or float in [0, 1].
        truth: (R, D, H, W) bool, or None where it is not known.
        predictions: View to (R, D, H, W) bool.
        scores: View to region to Dice of the whole case, as reported.
        role: "worst", "median" or "best"; several of them, as in "worst, median", if there are few cases.
        judge: View by whose Dice it has that role; empty where it has none.
        aspect: How much taller than wide a pixel is.
        slices: Of the whole case, where image and masks hold one of them; else None.
        number: Of that slice, from 0.
    """

    site: str
    case: str
    image: NDArray[np.generic]
    truth: NDArray[np.bool_] | None
    predictions: Mapping[str, NDArray[np.bool_]]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    role: str = ""
    judge: str = ""
    aspect: float = 1.0
    slices: int | None = None
    number: int = 0

    @property
    def depth(self) -> int:
        """Slices of the whole case."""
        return self.slices or len(self.image)

    @property
    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """The truth, if it is known, and all predictions."""
        return {**({} if self.truth is None else {TRUTH: self.truth}), **self.predictions}


def pick_cases(scores: pd.DataFrame, site: str) -> dict[str, str]:
    """The worst, median and best test case of a site by mean Dice over regions, by the view that `judge_of` names.

    Ties go by case id.

    Returns:
        Case id to role, worst first; with fewer than three cases one case has several roles ("worst, median").
    """
    rows, view = _headline(scores, site), judge_of(scores, site)
    cases = case_scores(rows[rows["view"] == view]).dropna(subset=["value"]).sort_values(["value", "case"])["case"]
    names = [str(case) for case in cases]
    if not names:
        return {}
    roles: dict[str, list[str]] = {}
    for role, case in zip(ROLES, (names[0], names[(len(names) - 1) // 2], names[-1]), strict=True):
        roles.setdefault(case, []).append(role)
    return {case: ", ".join(of_case) for case, of_case in roles.items()}


def judge_of(scores: pd.DataFrame, site: str) -> str:
    """Who judges a site's cases: the personal model where there is one, at an unseen site the adapted one, else global.

    That with the site's own statistics where nothing else is. Empty where no model was scored there.
    """
    views = set(_headline(scores, site)["view"])
    return next((view for view in ("personal", "adapted", "global", OWN_STATISTICS) if view in views), "")


def _headline(scores: pd.DataFrame, site: str, checkpoint: str = BEST) -> pd.DataFrame:
    """Of test cases."""
    return scores[
        (scores["site"] == site)
        & (scores["checkpoint"] == checkpoint)
        & (scores["split"] == "test")
        & (scores["metric"] == HEADLINE)
    ]


def reported_scores(
    scores: pd.DataFrame, site: str, case: str, *, checkpoint: str = BEST
) -> dict[str, dict[str, float]]:
    """View to region to Dice of one test case, for `Picture.scores`."""
    rows = _headline(scores, site, checkpoint)
    rows = rows[rows["case"] == case]
    return {
        str(view): {str(region): float(value) for region, value in zip(group["region"], group["value"], strict=True)}
        for view, group in rows.groupby("view", sort=True)
    }


def best_slice(picture: Picture) -> int:
    """The slice with the largest true area; if the truth is empty, the largest predicted area; else the middle."""
    if picture.truth is not None and picture.truth.any():
        return most_shown(picture.truth)
    return _largest(sum((_areas(mask) for mask in picture.masks.values()), np.zeros(len(picture.image), np.int64)))


def most_shown(truth: NDArray[np.bool_]) -> int:
    """The slice of (R, D, H, W) masks with the largest true area; the middle one where the truth is empty."""
    return _largest(_areas(truth))


def _areas(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels of every slice of (R, D, H, W) masks that some region covers."""
    covered: NDArray[np.int64] = masks.any(axis=0).sum(axis=(1, 2))
    return covered


def _largest(areas: NDArray[np.int64]) -> int:
    """The first of the largest; the middle one where all are empty."""
    return int(areas.argmax()) if areas.any() else len(areas) // 2


class Frame(NamedTuple):
    """A part of an image that is square in its true proportions, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def limits(self) -> dict[str, tuple[float, float]]:
        """Of axes that show nothing else."""
        left, top = self.left - 0.5, self.top - 0.5
        return {"xlim": (left, left + self.width), "ylim": (top + self.height, top)}


def window(picture: Picture, index: int) -> Frame:
    """The square that holds all contours of a slice with a margin, within the image."""
    height, width = picture.image.shape[1:3]
    aspect = picture.aspect
    rows, columns = np.nonzero(np.any([mask[:, index].any(axis=0) for mask in picture.masks.values()], axis=0))
    side = shorter = min(height * aspect, float(width))
    if len(rows):
        extent = max((np.ptp(rows) + 1) * aspect, np.ptp(columns) + 1)
        side = min(shorter, max(1.5 * extent, SMALLEST_WINDOW * shorter))
    wide, tall = max(1, int(side)), max(1, int(side / aspect))
    across, down = (columns.min() + columns.max(), rows.min() + rows.max()) if len(rows) else (width, height)
    left, top = (across - wide) // 2, (down - tall) // 2
    return Frame(int(np.clip(left, 0, width - wide)), int(np.clip(top, 0, height - tall)), wide, tall)


def displayed(image: NDArray[np.generic], index: int, *, flat: bool | None = None) -> NDArray[np.float32]:
    """One slice as grey (H, W) or colour (H, W, 3) in [0, 1]; grey images are stretched to their own range.

    Three channels of a flat image are colours; of a volume's channels (neighbours, sequences) the middle one is shown.

    Args:
        image: (D, H, W, C).
        index: Of the slice.
        flat: Whether the case is no volume; None: whether there is one slice.
    """
    plane = np.asarray(image[index], dtype=np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    if plane.shape[-1] == 3 and (len(image) == 1 if flat is None else flat):
        return plane.clip(0, 1)
    grey = plane[..., plane.shape[-1] // 2]
    low, high = np.percentile(grey, [0.5, 99.5])
    stretched: NDArray[np.float32] = (grey - low) / max(float(high - low), 1e-6)
    return stretched.clip(0, 1)


def draw_overlays(pictures: Sequence[Picture], regions: Sequence[str]) -> Figure:
    """Draw cases of one site side by side: the bare image above, and below its framed part with the contours.

    Args:
        pictures: At least one case, all of one site.
        regions: Names of the R regions.
    """
    figure = Figure(figsize=(3.5 * max(len(pictures), 2), 8.0), dpi=130, layout="constrained")
    grid = figure.subplots(2, len(pictures), squeeze=False)
    for column, picture in enumerate(pictures):
        index = best_slice(picture)
        frame = window(picture, index)
        _draw_bare(grid[0, column], picture, index, frame)
        grid[0, column].set_title(f"{picture.role or 'case'}: {_place(picture, index)}", fontsize=11, parse_math=False)
        draw_framed(grid[1, column], picture, regions, index, frame)
    judged = f"\nchosen by the Dice of the {pictures[0].judge} model" if pictures[0].judge else ""
    title = f"Site {pictures[0].site}: {', '.join(regions)}{judged}"
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    _add_legend(figure, pictures)
    return figure


def draw_prediction(picture: Picture, regions: Sequence[str]) -> Figure:
    """Draw a whole image, bare and with its predicted contours.

    Args:
        picture: One case.
        regions: Names of the R regions.
    """
    index = best_slice(picture)
    height, width = picture.image.shape[1] * picture.aspect, picture.image.shape[2]
    longest = 5.0 / max(height, width)  # inches of one picture
    rows, columns = (1, 2) if height >= width else (2, 1)
    inches = max(columns * width * longest, 4.0), max(rows * height * longest, 3.0) + 1.0
    figure = Figure(figsize=inches, dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns).flat)
    for axis in axes:
        _show(axis, picture, index)
    _draw_contours(axes[1], picture, regions, index)
    axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    title = f"{_place(picture, index)}\n{', '.join(regions)}"
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    _add_legend(figure, [picture])
    return figure


def draw_case(pictures: Mapping[str, Picture], regions: Sequence[str]) -> Figure:
    """Draw one case as several runs predict it: the bare image, and its framed part once per run.

    Args:
        pictures: Name of a run to the case with its predictions, at least one; image and truth are the same in all.
        regions: Names of the R regions.
    """
    first = next(iter(pictures.values()))
    everything = {f"{run}/{view}": mask for run, p in pictures.items() for view, mask in p.predictions.items()}
    together = replace(first, predictions=everything)  # all runs are shown in one slice and one frame
    index = best_slice(together)
    frame = window(together, index)
    columns = min(len(pictures) + 1, MOST_COLUMNS)
    rows = -(-(len(pictures) + 1) // columns)
    scores = 0.16 * (len(regions) + 2)  # inches above each square: heading, names of views, a line per region
    figure = Figure(figsize=(3.5 * columns, (3.5 + scores) * rows + 0.85), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(pictures) + 1 :]:
        axis.set_axis_off()
    _draw_bare(axes[0], first, index, frame)
    for axis, (name, picture) in zip(axes[1:], pictures.items(), strict=False):
        draw_framed(axis, picture, regions, index, frame, heading=_shortened(name))
    title = f"{first.site}, {_place(first, index)}: {', '.join(regions)}"
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    _add_legend(figure, list(pictures.values()))
    return figure


def _show(axis: Axes, picture: Picture, index: int) -> None:
    """The image in its true proportions: pixels as they are where there is room for them, else their means."""
    axis.imshow(
        displayed(picture.image, index, flat=picture.depth == 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="antialiased",
        aspect=picture.aspect,
    )
    axis.set(xticks=[], yticks=[])  # whoever looks for letters makes all ticks, also those that nobody sees
    axis.set_axis_off()


def _draw_bare(axis: Axes, picture: Picture, index: int, frame: Frame) -> None:
    """The image, and the frame of what is shown larger."""
    _show(axis, picture, index)
    place = frame.left - 0.5, frame.top - 0.5
    style: dict[str, Any] = {"fill": False, "edgecolor": "white", "linewidth": 0.8, "alpha": 0.8}
    axis.add_patch(Rectangle(place, frame.width, frame.height, **style))


def draw_framed(
    axis: Axes, picture: Picture, regions: Sequence[str], index: int, frame: Frame, heading: str = ""
) -> None:
    """The framed part of the image with the contours, and the scores above."""
    _show(axis, picture, index)
    told = _score_lines(picture, regions) if picture.predictions else "no model for this site"
    title = "\n".join(filter(None, (heading, told)))
    axis.set_title(title, fontsize=9, family="monospace", loc="left", parse_math=False)
    _draw_contours(axis, picture, regions, index)
    axis.set(**frame.limits())


def _place(picture: Picture, index: int) -> str:
    told = f", slice {picture.number + index + 1} of {picture.depth}" if picture.depth > 1 else ""
    return _shortened(picture.case) + told


def _add_legend(figure: Figure, pictures: Sequence[Picture]) -> None:
    views = [view for view in STYLES if any(view in picture.masks for picture in pictures)]
    figure.legend(handles=[_legend_line(v) for v in views], loc="outside lower center", ncols=len(views), frameon=True,
                  facecolor="#777777", labelcolor="white", fontsize=10)  # fmt: skip


def shrunk(plane: NDArray[Any], aspect: float, longest: int) -> NDArray[Any]:
    """A slice (H, W, ...) with square pixels, in its true proportions, at most so many along its longer side.

    Where pixels are no squares they are repeated; where there are too many some are left out.
    """
    height, width = plane.shape[0] * max(1.0, aspect), plane.shape[1] * max(1.0, 1 / aspect)
    scale = min(1.0, longest / max(height, width))
    rows, columns = (
        np.minimum((np.arange(max(1, round(size * scale))) + 0.5) * there / max(1, round(size * scale)), there - 1)
        for size, there in ((height, plane.shape[0]), (width, plane.shape[1]))
    )
    small: NDArray[Any] = plane[rows.astype(int)][:, columns.astype(int)]
    return small


def save_overlays(figure: Figure, path: Path) -> None:
    """Write the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    legible(figure).savefig(path, bbox_inches="tight", pad_inches=0.08)


def _draw_contours(axis: Axes, picture: Picture, regions: Sequence[str], index: int) -> None:
    """The contours of all masks of one slice, and the names of regions where there are several."""
    for view, masks in picture.masks.items():
        colour, line, thickness = STYLES[view]
        outline = [patheffects.Stroke(linewidth=thickness + 1.4, foreground="black", alpha=0.7), patheffects.Normal()]
        for mask in masks[:, index]:
            if mask.any() and not mask.all():
                rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
                part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                padded = np.pad(part, 1).astype(float)  # so that a region at the border has a closed contour
                places = np.arange(columns[0] - 1, columns[-1] + 2), np.arange(rows[0] - 1, rows[-1] + 2)
                drawn = axis.contour(
                    *places, padded, levels=[0.5], colors=colour, linewidths=thickness, linestyles=line
                )
                drawn.set_path_effects(outline)
    if len(regions) > 1 and picture.masks:
        _name_regions(axis, next(iter(picture.masks.values()))[:, index], regions)


def _name_regions(axis: Axes, masks: NDArray[np.bool_], regions: Sequence[str]) -> None:
    """Write each region's name at the top of its true contour, or of the predicted one where no truth is known."""
    for name, mask in zip(regions, masks, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            top = int(rows.argmin())
            place = float(columns[rows == rows[top]].mean()), float(rows[top])
            text = axis.annotate(
                name, place, (0, 3), textcoords="offset points", ha="center", va="bottom", color="white", fontsize=8
            )
            text.set_parse_math(False)
            text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def _score_lines(picture: Picture, regions: Sequence[str]) -> str:
    """Dice per region and view as an aligned block of text."""
    views = [view for view in STYLES if view in picture.scores and view in picture.predictions]
    if not views:
        return ""
    width = max(len(name) for name in ("Dice", *regions))
    lines = ["Dice".ljust(width) + "".join(f"  {view:>8}" for view in views)]
    for region in regions:
        values = (picture.scores[view].get(region, float("nan")) for view in views)
        lines.append(region.ljust(width) + "".join(f"  {value:8.3f}" for value in values))
    return "\n".join(lines)


def _legend_line(view: str) -> Line2D:
    colour, line, thickness = STYLES[view]
    return Line2D([], [], color=colour, linestyle=line, linewidth=thickness, label=view)


def _shortened(text: str, length: int = 28) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 + 3 :]}"
