"""When does personalising pay? Personal minus global Dice against each dial of the phantom.

`python -m fedseg.reporting.dials FOLDER...` reads runs on the phantom (folders of runs, or folders that hold such
folders, as a sweep leaves them) and writes dials.csv, dials.png and dials.svg. A run counts where one dial is turned
and the others stand at 0; runs with all dials at 0 are where every curve begins.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedseg.common.files import write_atomic
from fedseg.console import steady_output
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.gather import DIAL_KEYS, own_settings
from fedseg.reporting.compare.runs import find_runs
from fedseg.reporting.curves import COLOURS
from fedseg.reporting.folder import NETWORK_GRID, RunFolder
from fedseg.reporting.letters import legible
from fedseg.reporting.summary import HEADLINE, Table, site_scores
from fedseg.reporting.units import grid_of

DIALS = {
    "appearance": "device",
    "annotation": "outlines",
    "structure": "patients",
    "amount": "number of cases",
}
"""Dial of the phantom to what differs between its hospitals."""
POINT = ["method", "dial", "level"]


@dataclass(frozen=True)
class Point:
    """One run: where its dials stand.

    Attributes:
        folder: of the run.
        method: of its algorithm.
        seed: of the run.
        levels: dials that are not at 0.
        settings: what all runs must have in common, beside the method's own.
        own: settings of the method.
    """

    folder: RunFolder
    method: str
    seed: int
    levels: Mapping[str, float]
    settings: Mapping[str, Any]
    own: Mapping[str, Any]

    @classmethod
    def read(cls, folder: RunFolder) -> Point | None:
        """Read a run's settings; None if it is no run on the phantom."""
        config = folder.settings()
        if config.get("data.name") != "phantom":
            return None
        if missing := [key for key in DIAL_KEYS if key not in config]:
            raise ReportingError(f"{folder.config_path} lacks {missing[0]}")
        told = own_settings({key: value for key, value in config.items() if key not in DIAL_KEYS})
        own = {key: value for key, value in told.items() if key.startswith("algorithm.")}
        shared = {key: value for key, value in told.items() if key not in own}
        levels = {key.removeprefix("data."): float(config[key]) for key in DIAL_KEYS if config[key]}
        return cls(folder, config["algorithm.preset"], config["seed"], levels, shared, own)


def gains(runs: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Test Dice of both models at every site, by dial.

    Args:
        runs: folders of runs, finished or not.

    Returns:
        Columns method, dial, level, seed, site, global, personal, gain, grid; and what was left out, and why.

    Raises:
        ReportingError: no run can be used, or runs differ in more than method, seed and dials.
    """
    points: list[Point] = []
    left_out: list[str] = []
    tables: list[pd.DataFrame] = []
    for folder in map(RunFolder, runs):
        point = Point.read(folder)
        table = None if point is None else _scores(point)
        if point is None or table is None:
            reason = "it is no run on the phantom" if point is None else "it has no final scores of both models"
            left_out.append(f"{folder.path}: {reason}")
        elif len(point.levels) > 1:
            left_out.append(f"{folder.path}: more than one dial is turned ({', '.join(point.levels)})")
        else:
            points.append(point)
            tables += [table.assign(dial=dial, level=level) for dial, level in (point.levels or _origin()).items()]
    if not tables:
        raise ReportingError("none of these runs can be used:\n" + "\n".join(left_out))
    _check_alike(points)
    columns = [*POINT, "seed", "site", "global", "personal", "gain", "grid"]
    found = pd.concat(tables, ignore_index=True)[columns]
    _check_grid(found, points)
    return found, left_out


def _check_grid(found: pd.DataFrame, points: Sequence[Point]) -> None:
    """Gains on two grids are not drawn as one."""
    if found["grid"].nunique() > 1:
        other = next(point.folder for point in points if point.folder.scores()["grid"].eq(NETWORK_GRID).all())
        raise ReportingError(
            f"these runs are scored on different grids ({', '.join(sorted(found['grid'].unique()))}); score the saved "
            f"models of such as {other.path} again: python evaluate.py {other.path} evaluation.grid=own"
        )


def _origin() -> dict[str, float]:
    return dict.fromkeys(DIALS, 0.0)


def _scores(point: Point) -> pd.DataFrame | None:
    """Site, global, personal, gain of one run; None where a model is missing."""
    scores = point.folder.scores()
    final = scores[
        (scores["checkpoint"] == "best") & (scores["split"] == "test") & (scores["metric"] == HEADLINE) & scores["seen"]
    ]
    table = site_scores(final).pivot_table(index="site", columns="view", values="mean").reset_index()
    if not {"global", "personal"} <= set(table.columns):
        return None
    gain = table["personal"] - table["global"]
    of_run = table[["site", "global", "personal"]].assign(gain=gain, method=point.method, seed=point.seed)
    return of_run.assign(grid=grid_of(final))


def _check_alike(points: Sequence[Point]) -> None:
    """Runs differ in method, seed and dials only, those of one method not in its settings; none counts twice."""
    first: dict[str, Point] = {}
    known: dict[tuple[str, int, str], Point] = {}
    for point in points:
        for other, here, there in (
            (points[0], points[0].settings, point.settings),
            (own := first.setdefault(point.method, point), own.own, point.own),
        ):
            for key in sorted(here.keys() | there.keys()):
                if here.get(key) != there.get(key):
                    raise ReportingError(
                        f"runs that differ in more than method, seed and dials make no curve: {key} is {here.get(key)} "
                        f"in {other.folder.path}, {there.get(key)} in {point.folder.path}"
                    )
        place = point.method, point.seed, str(sorted(point.levels.items()))
        if (twin := known.setdefault(place, point)) is not point:
            raise ReportingError(
                f"{twin.folder.path} and {point.folder.path} have the same settings and seed; leave one of them out"
            )


def summary_table(table: pd.DataFrame) -> Table:
    """One row per method, dial and level: means over sites and seeds, and the least and the most gain of a site."""
    header = ("method", "dial", "level", "runs", "global", "personal", "gain", "least gain", "most gain")
    rows = []
    for (method, dial, level), group in table.groupby(POINT, sort=False):
        by_site = group.groupby("site")["gain"].mean()
        means = (f"{group[column].mean():.4f}" for column in ("global", "personal"))
        signed = (f"{value:+.4f}" for value in (group["gain"].mean(), by_site.min(), by_site.max()))
        rows.append((str(method), str(dial), f"{level:g}", str(group["seed"].nunique()), *means, *signed))
    order = {dial: place for place, dial in enumerate(DIALS)}
    rows.sort(key=lambda row: (row[0], order[row[1]], float(row[2])))
    grid = ", ".join(table["grid"].unique())
    note = f"test Dice of the best models, {grid}; gain: personal minus global; least, most: of a site, mean over seeds"
    return Table(header, tuple(rows), note)


def draw_gains(table: pd.DataFrame) -> Figure:
    """One panel per dial: a dot per site and seed, a line through the means of each method."""
    dials = [dial for dial in DIALS if (table.loc[table["dial"] == dial, "level"] > 0).any()] or list(DIALS)
    figure = Figure(figsize=(3.1 * len(dials) + 1.2, 3.8), dpi=130, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(dials), sharey=True, squeeze=False)[0])
    methods = sorted(set(table["method"]))
    for axis, dial in zip(axes, dials, strict=True):
        axis.axhline(0, color="black", linewidth=0.8)
        for number, method in enumerate(methods):
            rows = table[(table["dial"] == dial) & (table["method"] == method)]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(rows["level"], rows["gain"], "o", color=colour, markersize=3.5, alpha=0.4, markeredgewidth=0)
            means = rows.groupby("level")["gain"].mean()
            axis.plot(means.index, means, color=colour, linewidth=2, marker="D", markersize=5, label=method)
        axis.set(title=f"{dial}\n({DIALS[dial]})", xlabel="dial: 0 alike, 1 strongly different")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"personal minus global\n(test Dice, {', '.join(table['grid'].unique())})")
    if len(methods) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    runs = table.groupby(POINT)["seed"].nunique()
    seeds = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
    method = f"{methods[0]}: " if len(methods) == 1 else ""
    figure.suptitle(
        f"When does personalising pay? {method}dots are sites, lines are means, {seeds} seed(s)", fontsize=11
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2 if there is nothing to draw)."""
    parser = argparse.ArgumentParser(
        prog="python -m fedseg.reporting.dials",
        description="Personal minus global Dice against each dial of the phantom.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or folders that hold them")
    parser.add_argument("--out", type=Path, help="where to write; the first folder by default")
    options = parser.parse_args(arguments)
    out: Path = options.out or options.runs[0]
    try:
        table, left_out = gains(find_runs([str(folder) for folder in options.runs]))
    except ReportingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    write_atomic(out / "dials.csv", table.to_csv(index=False))
    figure = legible(draw_gains(table))
    for ending in ("png", "svg"):
        figure.savefig(out / f"dials.{ending}")
    print(summary_table(table).text(sys.stdout), end="")
    print(f"\n{out / 'dials.png'}")
    return 0


if __name__ == "__main__":
    with steady_output():
        code = main()
    sys.exit(code)
