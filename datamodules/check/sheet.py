"""One picture of all sites: a row of cases with the outlines of their masks, and the site's intensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fedseg.datamodules.cases import Case, Pixels
from fedseg.datamodules.check.reading import Opened
from fedseg.datamodules.check.statistics import SiteStatistics
from fedseg.datamodules.mixture import LEVELS
from fedseg.datamodules.regions import Regions

PER_SITE = 6
GAP = 6
DOTS = 100  # per inch; rooms are in inches
HEAD, ROOM, FOOT = 0.35, 0.45, 0.4
# told apart with any kind of colour blindness (Okabe and Ito), the lighter ones first: they show on dark and on red
COLOURS = ("#F0E442", "#56B4E9", "#FFFFFF", "#E69F00", "#CC79A7", "#009E73")
CHANNELS = (("#D55E00", "-"), ("#009E73", "--"), ("#0072B2", ":"), ("#000000", "-."))
BINS = 64
NEARLY_BLACK = 5  # bins


@dataclass
class Sheet:
    """Collects a few small pictures per site while cases pass by.

    Args:
        cases: Site to its cases, in the order in which they will be offered.
        regions: What is outlined.
    """

    cases: Mapping[str, Sequence[Case]]
    regions: Regions
    thumbnails: dict[str, list[tuple[str, NDArray[np.uint8]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.side = int(np.clip(6000 / max(len(self.cases), 1), 96, 240))
        self._wanted: dict[str, list[int]] = {}
        self._passed: dict[str, int] = {}
        for site, cases in self.cases.items():
            labelled = [n for n, case in enumerate(cases) if case.labelled] or list(range(len(cases)))
            places = np.linspace(0, len(labelled) - 1, min(PER_SITE, len(labelled))).round().astype(int)
            self._wanted[site] = [labelled[place] for place in places]
            self._passed[site] = 0
            self.thumbnails[site] = []

    def offer(self, opened: Opened) -> None:
        """Keeps the case's picture if it is one of those spread over the site, or stands in for an unreadable one."""
        site = opened.case.site
        number, self._passed[site] = self._passed[site], self._passed[site] + 1
        wanted = self._wanted[site]
        if opened.image is None or not wanted or number < wanted[0]:
            return
        if opened.labels is None and opened.case.labelled:
            return
        wanted.pop(0)
        self.thumbnails[site].append((opened.case.case, self._draw(opened.image, opened.labels)))

    def _draw(self, image: Pixels, labels: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """(at most side, at most side, 3) with the outlines of the slice that shows most."""
        index = len(image) // 2
        if labels is not None:
            areas = np.isin(labels, list(self.regions.ids)).sum(axis=(1, 2))
            index = int(areas.argmax()) if areas.any() else index
        plane = _colours(image[index])
        height, width = plane.shape[:2]
        factor = self.side / max(height, width)
        small: NDArray[np.uint8] = cv2.resize(
            plane, (max(1, round(width * factor)), max(1, round(height * factor))), interpolation=cv2.INTER_AREA
        )
        if labels is not None:
            self._outline(small, labels[index], factor)
        return small

    def _outline(self, picture: NDArray[np.uint8], labels: NDArray[np.uint8], factor: float) -> None:
        """Draws at the picture's scale what was found at the mask's own."""
        shift = 4
        drawings = []
        for number, ids in enumerate(self.regions.labels.values()):
            mask = np.isin(labels, ids).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            points = [np.round(((c + 0.5) * factor - 0.5) * 2**shift).astype(np.int32) for c in contours]
            drawings.append((points, _rgb(COLOURS[number % len(COLOURS)])))
        fine = sum(len(contour) for points, _ in drawings for contour in points) * factor > 12 * self.side
        if not fine:  # a dark rim makes outlines visible on bright ground, and thin structures invisible
            for points, _ in drawings:
                cv2.polylines(picture, points, True, (0, 0, 0), 3, cv2.LINE_AA, shift)
        for points, colour in drawings:
            cv2.polylines(picture, points, True, colour, 1, cv2.LINE_AA, shift)


def draw_sheet(sheet: Sheet, sites: Sequence[SiteStatistics], title: str) -> Figure:
    """A row per site.

    Args:
        sheet: The pictures.
        sites: The numbers of the same sites; one row each, in this order.
        title: Above all rows.
    """
    cells = [_tallest(sheet, site) / DOTS for site in sites]
    wide = PER_SITE * (sheet.side + GAP) / DOTS
    width, height = wide + 3.2, HEAD + FOOT + sum(cells) + ROOM * len(sites)
    figure = Figure(figsize=(width, height), dpi=DOTS)
    everywhere = _average(sites)
    bottom = height - HEAD
    for site, cell in zip(sites, cells, strict=True):
        bottom -= cell + ROOM
        pictures = figure.add_axes((0.1 / width, (bottom + 0.17) / height, wide / width, cell / height))
        _show_row(pictures, sheet, site)
        place = ((wide + 0.3) / width, (bottom + 0.25) / height, 2.75 / width, (cell - 0.08) / height)
        _show_intensities(figure.add_axes(place), site, everywhere)
    figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=11, weight="bold", va="top")
    names = list(sheet.regions.names)
    lines = [Line2D([], [], color=COLOURS[n % len(COLOURS)], linewidth=2, label=name) for n, name in enumerate(names)]
    figure.legend(
        handles=lines, loc="lower left", ncols=max(len(names), 1), facecolor="#555555", labelcolor="white", fontsize=9
    )
    note = "right: pixels per value, black left out (red solid, green dashed, blue dotted); grey area: all sites"
    figure.text(1 - 0.1 / width, 0.12 / height, note, fontsize=8, ha="right")
    return figure


def save_sheet(figure: Figure, path: Path) -> None:
    """Writes the picture."""
    figure.savefig(path, pil_kwargs={"compress_level": 3})


def _tallest(sheet: Sheet, site: SiteStatistics) -> int:
    """Height of a site's pictures."""
    return max((len(picture) for _, picture in sheet.thumbnails[site.site]), default=sheet.side // 2)


def _show_row(axis: Axes, sheet: Sheet, site: SiteStatistics) -> None:
    side, tallest = sheet.side, _tallest(sheet, site)
    strip = np.full((tallest, PER_SITE * (side + GAP) - GAP, 3), 255, np.uint8)
    shown = sheet.thumbnails[site.site]
    for number, (name, picture) in enumerate(shown):
        height, width = picture.shape[:2]
        left = number * (side + GAP)
        strip[(tallest - height) // 2 :, left + (side - width) // 2 :][:height, :width] = picture
        fits = max(6, side // 7)
        told = name if len(name) <= fits else f"…{name[1 - fits :]}"
        axis.text(left, tallest + 2, told, fontsize=6.5, va="top", color="#444444")
    axis.imshow(strip, interpolation="none", aspect="auto")
    axis.set_axis_off()
    if not shown:
        axis.text(0, tallest / 2, "no case could be read", fontsize=10, va="center")
    axis.set_title(f"{site.site}  ({len(site.cases)} cases)", loc="left", fontsize=9.5, weight="bold", pad=3)


def _show_intensities(axis: Axes, site: SiteStatistics, everywhere: NDArray[np.float64] | None) -> None:
    values = (np.arange(BINS) + 0.5) / BINS
    curves = [] if everywhere is None else [everywhere]
    if everywhere is not None:
        axis.fill_between(values, everywhere, color="#BBBBBB", alpha=0.6, linewidth=0)
    for channels, histogram in site.histograms.items():
        styles = (("#000000", "-"),) if channels == 1 else CHANNELS
        for channel in range(channels):
            colour, line = styles[channel % len(styles)]
            curves.append(_curve(histogram[channel]))
            axis.plot(values, curves[-1], color=colour, linestyle=line, linewidth=1.2)
    axis.set(xlim=(0, 1), yticks=[], xticks=[0, 0.5, 1])
    highest = max((float(curve[NEARLY_BLACK:].max()) for curve in curves), default=1.0)
    axis.set_ylim(0, 1.1 * highest or 1.0)  # the peak of a dark background runs out of the panel
    axis.tick_params(labelsize=7, length=2, pad=1)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _average(sites: Sequence[SiteStatistics]) -> NDArray[np.float64] | None:
    """The curve of all sites, each with the same weight."""
    curves = [
        np.mean([_curve(row) for row in histogram], axis=0) for site in sites for histogram in site.histograms.values()
    ]
    average: NDArray[np.float64] | None = np.mean(curves, axis=0) if curves else None
    return average


def _curve(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares of pixels in 64 bins, without black, which would dwarf all others."""
    kept = histogram.astype(np.float64)
    kept[0] = 0
    shares: NDArray[np.float64] = kept.reshape(BINS, LEVELS // BINS).sum(axis=1) / max(kept.sum(), 1)
    return shares


def _colours(plane: Pixels) -> NDArray[np.uint8]:
    """(H, W, 3): three channels as colours, others as grey of the middle channel."""
    levels = (plane if plane.dtype == np.uint8 else np.round(plane * 255)).astype(np.uint8)
    if levels.shape[-1] != 3:
        levels = np.repeat(levels[..., levels.shape[-1] // 2, None], 3, axis=-1)
    return np.ascontiguousarray(levels, dtype=np.uint8)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
