"""Plots of a comparison; each is drawn on light and on dark ground."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedseg.evaluation.statistics import over_seeds
from fedseg.reporting.compare.analysis import (
    AGAINST_GLOBAL,
    AGAINST_LOCAL,
    LOCAL,
    OVERALL,
    PERSONAL,
    POOLED,
    Analysis,
    Model,
    of_patients,
)
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import CURVE_METRIC
from fedseg.reporting.compare.verdicts import Answer, Verdict
from fedseg.reporting.curves import COLOURS
from fedseg.reporting.units import signed

PANELS = 11  # sites with a panel of their own; with more, only the mean over sites is drawn
WIDTH, NARROW = 7.0, 5.0  # inches; the narrow ones can be read on a phone
MEGA = 1e6
DASHES = {LOCAL: ("--", "-.", (0, (8, 3))), POOLED: (":", (0, (1, 4)))}
"""Lines of baselines: one way for each of several, as of a tuned one beside the one untuned."""


@dataclass(frozen=True)
class Theme:
    """Colours of one ground."""

    ink: str
    faint: str
    grid: str
    good: str
    bad: str
    shared: str
    neutral: str
    middle: str
    lines: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """For `matplotlib.rc_context`: nothing but the marks is opaque."""
        edges = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), self.faint)
        words = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), self.ink
        )
        clear = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
        plain = {"font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
        more = {"legend.frameon": False, "grid.linewidth": 0.6, "svg.hashsalt": "compare", "axes.axisbelow": True}
        return {**edges, **words, **clear, **plain, **more, "grid.color": self.grid}


LIGHT = Theme("#1c2127", "#8a949e", "#e3e7eb", "#117733", "#bb3322", "#2a62a8", "#6b7580", "#f4f5f6", COLOURS)
# The same hues, the dark ones lighter.
ON_DARK = ("#CC6677", "#88CCEE", "#3FAE68", "#DDCC77", "#D27FC6", "#44AA99", "#DB6C97", "#B5B54A", "#9A8FEA")
DARK = Theme("#e6e9ec", "#79838d", "#343b43", "#5cc97f", "#ff8a75", "#7fb2f0", "#9aa4ae", "#2a3037", ON_DARK)
Draw = Callable[[Analysis, Theme], Figure | None]


def draw_all(analysis: Analysis, verdicts: Sequence[Verdict], theme: Theme) -> dict[str, Figure]:
    """Every plot that these runs allow, by name."""
    with mpl.rc_context(theme.settings()):
        drawn = {"gain": gain(analysis, verdicts, theme)}
        drawn |= {name: draw(analysis, theme) for name, draw in PLOTS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def gain(analysis: Analysis, verdicts: Sequence[Verdict], theme: Theme) -> Figure | None:
    """Over sites and at each the gain of the personal model over the global one: patients, mean, interval."""
    shown = [verdict for verdict in verdicts if verdict.test]
    if not shown:
        return None
    scale = analysis.options.scale
    figure = Figure(figsize=(NARROW, 0.9 + (0.62 if len(shown) < 10 else 0.42) * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=theme.faint, linewidth=1)
    generator = np.random.default_rng(0)
    for row, verdict in enumerate(shown):
        assert verdict.personal is not None  # a verdict with a test has both
        assert verdict.shared is not None
        table = analysis.gain(verdict.personal, verdict.shared, verdict.site)
        patients = over_seeds(of_patients(table).to_numpy()) * scale if table is not None else np.empty(0)
        colour = theme.neutral if verdict.provisional else answer_colour(verdict.answer, theme)
        jitter = row + generator.uniform(-0.2, 0.2, len(patients))
        axes.scatter(patients, jitter, s=11, color=colour, alpha=0.55, linewidths=0)
        low, mean, high = (verdict.test[key] * scale for key in ("low", "gain", "high"))
        axes.plot([low, high], [row, row], color=colour, linewidth=2.6, solid_capstyle="round")
        axes.plot(mean, row, "o", color=colour, markersize=8, markeredgecolor=theme.ink, markeredgewidth=0.8)
    labels = ["\n".join(filter(None, (v.site, v.test["no_interval"]))) for v in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.get_yticklabels()[0].set_fontweight("bold")
    margin = analysis.options.margin
    axes.axvspan(-margin, margin, color=theme.grid, zorder=0)
    axes.set_xlabel(f"gain in {analysis.options.title} ({analysis.options.unit})\nglobal better ←  → personal better")
    axes.grid(axis="x")
    return figure


def scores(analysis: Analysis, theme: Theme) -> Figure | None:
    """Mean and interval of every model, over sites and at each; local and pooled training as lines."""
    table = _chosen(analysis)
    panels = [OVERALL, *(analysis.sites if len(analysis.sites) <= PANELS else [])]
    models = [model for model in analysis.models if not analysis.is_baseline(model)]
    if not models:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, (0.5 + 0.27 * len(models)) * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, site in zip(grid, panels, strict=False):
        own = table[table["site"] == site]
        _score_panel(axes, analysis, own, models, theme)
        title = "\n".join(filter(None, (site, *sorted(set(own["no_interval"])))))
        axes.set_title(title, fontweight="bold" if site == OVERALL else "normal")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    grid[0].set_ylim(len(models) - 0.5, -0.5)
    for axes in grid[len(panels) - columns : len(panels)]:
        axes.tick_params(labelbottom=True)  # the lowest of its column, also where the last row is not full
    figure.supxlabel(f"test {analysis.options.title} ({analysis.options.unit})", fontsize=9.5)
    handles, labels = grid[0].get_legend_handles_labels()
    kinds = {"personal": ("o", theme.good), "global": ("s", theme.shared)}
    views = [view for view in kinds if any((model.view == view) for model in models)]
    marks = [Line2D([], [], marker=kinds[view][0], color=kinds[view][1], markersize=5) for view in views]
    figure.legend(
        [*marks, *handles], [*views, *labels], loc="outside upper right", ncols=len(views) + len(labels), fontsize=8.5
    )
    return figure


def _score_panel(axes: Axes, analysis: Analysis, rows: pd.DataFrame, models: Sequence[Model], theme: Theme) -> None:
    scale = analysis.options.scale
    for y, model in enumerate(models):
        own = rows[(rows["method"] == model.method) & (rows["view"] == model.view)]
        for row in own.to_dict("records"):
            colour = theme.good if model.view == PERSONAL else theme.shared
            axes.plot([row["low"] * scale, row["high"] * scale], [y, y], color=colour, linewidth=2, alpha=0.55)
            axes.plot(row["mean"] * scale, y, "o" if model.view == PERSONAL else "s", color=colour, markersize=5)
    baselines = [(m, s) for n, ways in DASHES.items() for m, s in zip(_called(analysis, n), cycle(ways), strict=False)]
    for model, style in baselines:
        own = rows[(rows["method"] == model.method) & (rows["view"] == model.view)]
        for mean in own["mean"]:
            axes.axvline(mean * scale, color=theme.neutral, linestyle=style, linewidth=1.3, label=model.method)
    axes.set_yticks(range(len(models)), [model.label for model in models])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.grid(axis="x")


def _called(analysis: Analysis, name: str) -> list[Model]:
    return [model for model in analysis.models if analysis.name(model) == name]


def tuning(analysis: Analysis, theme: Theme) -> Figure | None:
    """Mean over sites of every tuned method, as it comes and tuned."""
    if not analysis.tuned:
        return None
    overall = _chosen(analysis).query("site == @OVERALL").set_index(["method", "view"])["mean"] * analysis.options.scale
    figure = Figure(figsize=(NARROW, 1.3 + 0.24 * len(analysis.tuned)), layout="constrained")
    axes = figure.subplots()
    for row, pair in enumerate(analysis.tuned):
        before, after = overall[pair.before], overall[pair.after]
        colour = theme.good if pair.after.view == PERSONAL else theme.shared
        mark = "o" if pair.after.view == PERSONAL else "s"
        axes.plot([before, after], [row, row], color=colour, linewidth=1.6, alpha=0.55)
        axes.plot(before, row, mark, color=colour, markerfacecolor="none", markersize=5.5)
        axes.plot(after, row, mark, color=colour, markersize=5.5)
    axes.set_yticks(range(len(analysis.tuned)), [pair.label for pair in analysis.tuned])
    axes.set_ylim(len(analysis.tuned) - 0.4, -0.6)
    axes.set_xlabel(f"test {analysis.options.title}, mean over sites\n({analysis.options.unit})")
    axes.grid(axis="x")
    for mark, label in (("none", "as it comes"), ("full", "tuned")):
        axes.plot([], [], "o", color=theme.neutral, fillstyle=mark, markersize=5.5, label=label)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8.5)
    return figure


def personal_gains(analysis: Analysis, theme: Theme) -> Figure | None:
    """Every personal model against its global one, at every site."""
    return _tests_heatmap(analysis, AGAINST_GLOBAL, theme)


def transfer(analysis: Analysis, theme: Theme) -> Figure | None:
    """Every model against local training, at every site: red is negative transfer."""
    return _tests_heatmap(analysis, AGAINST_LOCAL, theme)


def _tests_heatmap(analysis: Analysis, question: str, theme: Theme) -> Figure | None:
    rows = analysis.answers_to(question)
    if rows.empty:
        return None
    order = [model.label for model in analysis.models if model.label in set(rows["model"])]
    places = [place for place in (OVERALL, *analysis.sites) if place in set(rows["site"])]
    gains = rows.pivot(index="site", columns="model", values="gain").loc[places, order] * analysis.options.scale
    sure = rows.pivot(index="site", columns="model", values="p_holm").loc[places, order] <= analysis.options.alpha
    figure = Figure(figsize=(max(4.2, 1.5 + 0.95 * len(order)), 1.25 + 0.36 * len(gains)), layout="constrained")
    axes = figure.subplots()
    limit = max(1e-9, float(np.nanmax(np.abs(gains.to_numpy()))))
    colours = gain_colours(theme)
    told = np.vectorize(lambda value, star: signed(value) + (" ✱" if star else ""))
    shown = heatmap(axes, gains, told(gains, sure), colours, TwoSlopeNorm(0, -limit, limit))
    colour_bar(figure, axes, shown, "better →")
    axes.set_xticks(range(len(order)), [_wrapped(label) for label in order])
    figure.supxlabel(
        f"gain in {analysis.options.title} ({analysis.options.unit}); ✱ significant after Holm", fontsize=8.5
    )
    return figure


def gain_colours(theme: Theme) -> mpl.colors.Colormap:
    """From worse to better."""
    return mpl.colors.LinearSegmentedColormap.from_list("gain", [theme.bad, theme.middle, theme.good])


def heatmap(axes: Axes, values: pd.DataFrame, words: Any, colours: Any, norm: Any, size: float = 9) -> AxesImage:
    """Coloured cells with words that can be read on them."""
    numbers = values.to_numpy()
    shown = axes.imshow(numbers, cmap=colours, norm=norm, aspect="auto")
    for (y, x), value in np.ndenumerate(numbers):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            ink = "#14181c" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "#ffffff"
            weight = "bold" if "✱" in words[y, x] else "normal"
            axes.text(x, y, words[y, x], ha="center", va="center", fontsize=size, color=ink, fontweight=weight)
    axes.set_yticks(range(len(values)), values.index)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return shown


def colour_bar(figure: Figure, axes: Axes, shown: AxesImage, label: str) -> None:
    """What the colours of a heat map mean."""
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02, aspect=14)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)


def _wrapped(label: str) -> str:
    """A model's name on two lines: method, view."""
    return "\n".join(label.rsplit(" ", 1))


def ranks(analysis: Analysis, theme: Theme) -> Figure | None:
    """The rank of every model at every site: mean over seeds, and the range over them."""
    table = analysis.rank_table
    if table.empty or len(table.columns) < 2:
        return None
    by_site = table.groupby("site")
    mean, low, high = by_site.mean(), by_site.min(), by_site.max()
    order = mean.mean().sort_values().index
    figure = Figure(figsize=(max(4.2, 1.6 + 0.72 * len(mean)), 1.1 + 0.34 * len(order)), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colors.LinearSegmentedColormap.from_list("rank", [theme.good, theme.middle, theme.bad])
    span = np.vectorize(lambda m, a, b: f"{m:.1f}" if a == b else f"{m:.1f}\n{a:g}–{b:g}")
    words = span(mean[order], low[order], high[order]).T
    shown = heatmap(axes, mean[order].T, words, colours, Normalize(1, len(order)), size=7.5)
    colour_bar(figure, axes, shown, "rank, 1 is best")
    axes.set_xticks(range(len(mean)), mean.index, rotation=0 if len(mean) <= 6 else 45)
    return figure


def critical_difference(analysis: Analysis, theme: Theme) -> Figure | None:
    """Average ranks over patients; models under one bar are not told apart (Nemenyi)."""
    found = analysis.ranks
    if not np.isfinite(found.critical_difference):
        return None
    order = np.argsort(found.ranks)
    names = [analysis.patient_table.columns[i] for i in order]
    places = found.ranks[order]
    bars = _groups(places, found.critical_difference)
    height = 1.0 + 0.2 * len(bars) + 0.24 * ((len(names) + 1) // 2)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    _rank_axis(axes, len(names), theme)
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        left = i < (len(names) + 1) // 2
        depth = -0.75 - 0.2 * len(bars) - 0.34 * (i if left else len(names) - 1 - i)
        end = 0.75 if left else len(names) + 0.25
        axes.plot([place, place, end], [0, depth, depth], color=theme.ink, linewidth=1)
        told = f"{name}  {place:.2f} " if left else f" {place:.2f}  {name}"
        axes.text(end, depth, told, ha="right" if left else "left", va="center", fontsize=9)
    for row, (first, last) in enumerate(bars):
        y = -0.3 - 0.2 * row
        axes.plot(
            [places[first] - 0.04, places[last] + 0.04], [y, y], color=theme.ink, linewidth=3.5, solid_capstyle="round"
        )
    width = found.critical_difference
    axes.plot([1, 1 + width], [0.75, 0.75], color=theme.bad, linewidth=2, marker="|", markersize=8)
    axes.text(1 + width + 0.08, 0.75, f"critical difference {width:.2f}", va="center", fontsize=8.5)
    axes.set_xlim(-1.6, len(names) + 2.6)
    return figure


def _rank_axis(axes: Axes, models: int, theme: Theme) -> None:
    axes.plot([1, models], [0, 0], color=theme.ink, linewidth=1)
    for tick in range(1, models + 1):
        axes.plot([tick, tick], [0, 0.1], color=theme.ink, linewidth=1)
        axes.text(tick, 0.2, str(tick), ha="center", va="bottom", fontsize=8.5)


def _groups(places: Any, width: float) -> list[tuple[int, int]]:
    """Longest runs of models, in order of rank, whose ends are not further apart than the critical difference."""
    spans = [(i, max(j for j in range(len(places)) if places[j] - places[i] <= width)) for i in range(len(places))]
    return [(i, j) for n, (i, j) in enumerate(spans) if j > i and not any(k < i and m >= j for k, m in spans[:n])]


def win_tie_loss(analysis: Analysis, theme: Theme) -> Figure | None:
    """On what share of the patients the model of the row beats that of the column; a tie is half a win."""
    counts, patients = analysis.wins, len(analysis.patient_table)
    if not patients or len(counts) < 2:
        return None
    ties = patients - counts.to_numpy() - counts.to_numpy().T
    share = (counts.to_numpy() + ties / 2) / patients
    np.fill_diagonal(share, np.nan)
    side = 1.7 + 0.55 * len(counts)
    figure = Figure(figsize=(max(4.2, side + 0.4), side), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colors.LinearSegmentedColormap.from_list("share", [theme.bad, theme.middle, theme.good])
    table = pd.DataFrame(share, index=counts.index, columns=counts.columns)
    shown = heatmap(axes, table, np.vectorize("{:.0%}".format)(share), colours, Normalize(0, 1), size=8.5)
    colour_bar(figure, axes, shown, "share of patients won by the row")
    axes.set_xticks(range(len(counts)), [_wrapped(label) for label in counts.columns], rotation=50, ha="left")
    return figure


def progress(analysis: Analysis, theme: Theme) -> Figure | None:
    """Validation Dice against rounds, bytes and, with a simulated clock, time: mean over seeds, and their range."""
    curves = analysis.curves
    models = [
        model
        for model in analysis.models
        if ((curves["method"] == model.method) & (curves["view"] == model.view)).any()
    ]
    if not models:
        return None
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    clocked = analysis.options.clock is not None
    left, right, *timed = figure.subplots(1, 3 if clocked else 2, sharey=True)
    methods = sorted({model.method for model in models})
    for model in models:
        own = curves[(curves["method"] == model.method) & (curves["view"] == model.view)]
        look = {
            "color": theme.lines[methods.index(model.method) % len(theme.lines)],
            "linestyle": "-" if model.view == PERSONAL else "--",
        }
        by_round = own.groupby("round").agg({"value": ["mean", "min", "max"], "bytes": "mean", "seconds": "mean"})
        mean = by_round["value", "mean"] * 100
        left.plot(by_round.index, mean, label=model.label, linewidth=1.8, **look)
        band = {"color": look["color"], "alpha": 0.13, "linewidth": 0}
        left.fill_between(by_round.index, by_round["value", "min"] * 100, by_round["value", "max"] * 100, **band)
        if by_round["bytes", "mean"].max() > 0:
            right.plot(by_round["bytes", "mean"] / MEGA, mean, linewidth=1.8, **look)
        for axes in timed:
            axes.plot(by_round["seconds", "mean"], mean, linewidth=1.8, **look)
            axes.set(xlabel="simulated seconds")
    goal = analysis.target[0] * 100
    for axes in (left, right, *timed):
        if np.isfinite(goal):
            axes.axhline(goal, color=theme.faint, linewidth=1, linestyle=":")
        axes.grid()
    left.set(xlabel="round", ylabel=f"validation {CURVE_METRIC.capitalize()} (points of 100, network's grid)")
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    right.set(xlabel="megabytes, both ways, all sites")
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def draw_heterogeneity(
    differences: pd.DataFrame, gains: Mapping[str, float], options: Options, theme: Theme
) -> Figure | None:
    """Gain from personalisation against how different a site is, one panel per kind of difference.

    Args:
        differences: site, measure, value: a site against all others.
        gains: site -> gain of its personal model over the global one.
        options: unit of the gains.
        theme: colours.
    """
    measures = list(differences["measure"].unique())
    if not measures:
        return None
    with mpl.rc_context(theme.settings()):
        columns = min(3, len(measures))
        lines = -(-len(measures) // columns)
        figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, measure in zip(grid, measures, strict=False):
            own = differences[differences["measure"] == measure]
            axes.axhline(0, color=theme.faint, linewidth=1)  # no gain
            for site, value in zip(own["site"], own["value"], strict=True):
                axes.plot(value, gains[site] * options.scale, "o", color=theme.good, markersize=6)
                axes.annotate(
                    site, (value, gains[site] * options.scale), (4, 4), textcoords="offset points", fontsize=7.5
                )
            axes.set_title(measure)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(0.2)
            axes.grid()
        for axes in grid[len(measures) :]:
            axes.set_axis_off()
        figure.supylabel(f"gain in {options.title} ({options.unit})\n← global better   personal better →", fontsize=9.5)
        figure.supxlabel("difference of the site from all other sites", fontsize=9.5)
    return figure


def answer_colour(answer: Answer, theme: Theme) -> str:
    """Green for personal, blue for global, red for training alone, grey where nothing is shown."""
    return {"personal": theme.good, "global": theme.shared, "alone": theme.bad}.get(answer, theme.neutral)


def _chosen(analysis: Analysis) -> pd.DataFrame:
    table = analysis.overview
    return table[table["seen"] & (table["checkpoint"] == analysis.options.checkpoint)]


PLOTS: dict[str, Draw] = {
    "scores": scores,
    "tuning": tuning,
    "personal_gains": personal_gains,
    "transfer": transfer,
    "critical_difference": critical_difference,
    "ranks": ranks,
    "win_tie_loss": win_tie_loss,
    "progress": progress,
}
