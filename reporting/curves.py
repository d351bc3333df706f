"""Learning curves: validation Dice of every site and view, and training loss, per round."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedseg.reporting.folder import DURING_TRAINING
from fedseg.reporting.letters import legible
from fedseg.reporting.summary import HEADLINE, site_scores

# Paul Tol's "muted" scheme: nine colours that stay apart for colour-blind readers.
COLOURS = ("#CC6677", "#88CCEE", "#117733", "#DDCC77", "#AA4499", "#44AA99", "#882255", "#999933", "#332288")
MEAN_COLOUR, WORST_COLOUR, CROWD_COLOUR = "#000000", "#CC3311", "#8899AA"
LOSS_TITLES = {"loss": "training", "loss_personal": "training, personal model"}
FEW_ROUNDS = 12  # up to this many points a line carries markers, so that a single round is visible too


def validation_curves(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Per view a table round x site of mean validation Dice during training, seen sites only."""
    rows = scores[
        (scores["checkpoint"] == DURING_TRAINING)
        & (scores["split"] == "val")
        & scores["seen"]
        & (scores["metric"] == HEADLINE)
    ]
    means = site_scores(rows)
    return {
        str(view): group.pivot(index="round", columns="site", values="mean").sort_index()
        for view, group in means.groupby("view", sort=False)
    }


def loss_curves(rounds: pd.DataFrame, name: str = "loss") -> pd.DataFrame:
    """A table round x site of the mean training loss; rounds in which a site did not train are missing.

    Args:
        rounds: rounds.csv of a run.
        name: the column: "loss", or "loss_personal" of the second model where a step trains two.
    """
    rows = rounds.dropna(subset=[name])
    return rows.pivot_table(index="round", columns="site", values=name, aggfunc="mean").sort_index()


def draw_curves(scores: pd.DataFrame, rounds: pd.DataFrame, *, title: str = "") -> Figure | None:
    """Draw one panel per view and one for the loss.

    Args:
        scores: metrics.csv of a run.
        rounds: rounds.csv of a run.
        title: What the run is, above the panels.

    Returns:
        The figure, or None if nothing was scored or trained yet.
    """
    curves = validation_curves(scores)
    told = {name: loss_curves(rounds, name) for name in LOSS_TITLES if name in rounds}
    losses = {name: table for name, table in told.items() if not table.empty}
    panels = len(curves) + len(losses)
    if panels == 0:
        return None
    sites = sorted({str(site) for table in [*curves.values(), *losses.values()] for site in table.columns})
    figure = Figure(figsize=(4.6 * panels + 1.6, 4.2), dpi=130, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis, (view, table) in zip(axes, curves.items(), strict=False):
        _draw_panel(axis, table, sites, worst="min")
        axis.set(title=f"{view} model", ylabel=f"validation {HEADLINE.capitalize()}, network's grid")
        axis.sharey(axes[0])
    for axis, (name, table) in zip(axes[len(curves) :], losses.items(), strict=True):
        _draw_panel(axis, table, sites, worst="max")
        axis.set(title=LOSS_TITLES[name], ylabel="training loss, mean over steps")
    _add_legend(figure, axes)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _draw_panel(axis: Axes, table: pd.DataFrame, sites: Sequence[str], *, worst: str) -> None:
    marker = "o" if len(table) <= FEW_ROUNDS else ""
    if len(sites) <= len(COLOURS):
        for site in table.columns:
            line = table[site].dropna()
            colour = COLOURS[sites.index(str(site))]
            axis.plot(line.index, line, color=colour, linewidth=1.4, marker=marker, markersize=3, label=str(site))
    else:
        _draw_crowd(axis, table, worst=worst)
    if len(table.columns) > 1:
        mean = table.mean(axis=1)
        label = "mean over sites"
        axis.plot(
            mean.index, mean, color=MEAN_COLOUR, linewidth=2.2, marker=marker, markersize=4, label=label, zorder=5
        )
    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_crowd(axis: Axes, table: pd.DataFrame, *, worst: str) -> None:
    """Too many sites for colours: thin lines, the band that holds the middle 80 %, the worst site of each round."""
    for column in table.columns:
        line = table[column].dropna()
        label = "one site" if column == table.columns[0] else None
        axis.plot(line.index, line, color=CROWD_COLOUR, linewidth=0.6, alpha=0.3, label=label)
    low, high = table.quantile(0.1, axis=1), table.quantile(0.9, axis=1)
    axis.fill_between(table.index, low, high, color=CROWD_COLOUR, alpha=0.4, linewidth=0, label="middle 80 % of sites")
    extreme = table.min(axis=1) if worst == "min" else table.max(axis=1)
    axis.plot(
        extreme.index, extreme, color=WORST_COLOUR, linewidth=1.8, linestyle="--", label="worst site of the round"
    )


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, to their right."""
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside right center", frameon=False, fontsize=9)


def save_curves(figure: Figure, folder: Path) -> list[Path]:
    """Write curves.png and curves.svg into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "curves.png", folder / "curves.svg"]
    legible(figure)
    for path in paths:
        figure.savefig(path)
        figure.set_layout_engine("none")  # the second picture keeps the first one's layout
    return paths
