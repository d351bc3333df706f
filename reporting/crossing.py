"""Every model at every site: how far a site's own model serves others (cross_sites.csv)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedseg.reporting.summary import HEADLINE, Table

SHARED = "global"
COLUMNS = ("model", "site", "seen", "case", "region", "metric", "value")
TITLE = f"Every model (rows) at every site's test cases (columns): mean {HEADLINE.capitalize()}"
NOTE = "The best models, chosen on validation; a row is the model of that site, a column where it is tested."


def matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Models x sites: mean over test cases of the means over regions; the global model first, own sites in one order.

    Args:
        table: cross_sites.csv; with a further column ``patient`` a patient's cases are averaged first.
    """
    rows = table[(table["metric"] == HEADLINE) & table["value"].notna()]
    cases = rows.groupby(["model", "site", "case"], observed=True)["value"].mean()
    if "patient" in rows:
        patients = rows.drop_duplicates(["model", "site", "case"]).set_index(["model", "site", "case"])["patient"]
        cases = cases.groupby(["model", "site", patients.reindex(cases.index)], observed=True).mean()
    means = cases.groupby(["model", "site"], observed=True).mean().unstack("site")
    seen = set(table.loc[table["seen"].astype(bool), "site"])
    sites = sorted(means.columns, key=lambda site: (site not in seen, site))
    return means.reindex(index=sorted(means.index, key=lambda model: (model != SHARED, model)), columns=sites)


def matrix_table(values: pd.DataFrame) -> Table:
    """For a terminal or a document; a site's own model at home is marked."""
    rows = tuple(
        (str(model), *(_cell(float(values.loc[model, site]), home=model == site) for site in values.columns))
        for model in values.index
    )
    return Table(("model, tested at", *map(str, values.columns)), rows, f"{NOTE} *: at home.")


def _cell(value: float, *, home: bool) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}{'*' if home else ''}"


def draw_matrix(values: pd.DataFrame, *, ink: str = "#1c2127") -> Figure:
    """Heat map of `matrix`, with its colour bar; frames mark models at home."""
    count = values.shape
    figure = Figure(figsize=(2.9 + 0.85 * count[1], 1.6 + 0.42 * count[0]), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values.to_numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if np.isfinite(value):
            home = values.index[row] == values.columns[column]
            colour, weight = "black" if value > 0.6 else "white", "bold" if home else "normal"
            box = {"boxstyle": "square,pad=0.25", "fill": False, "edgecolor": colour} if home else None
            word = f"{100 * value:.1f}"
            axes.text(
                column, row, word, ha="center", va="center", fontsize=9, bbox=box, color=colour, fontweight=weight
            )
    _named(axes.set_xticks, values.columns, rotation=30 if count[1] > 4 else 0)
    _named(axes.set_yticks, values.index)
    axes.tick_params(length=0, colors=ink)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tested at", color=ink)
    axes.set_ylabel("model of", color=ink)
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(f"test {HEADLINE.capitalize()}", color=ink)
    bar.ax.tick_params(colors=ink)
    return figure


def _named(place: object, names: Sequence[object] | pd.Index, **options: object) -> None:
    assert callable(place)
    place(range(len(names)), [str(name) for name in names], fontsize=9, **options)


def off_home(values: pd.DataFrame) -> tuple[float, float]:
    """Mean of sites' own models at home and elsewhere, over sites that have one; NaN where there is none."""
    own = [name for name in values.index if name in values.columns]
    numbers: NDArray[np.float64] = values.loc[own, own].to_numpy(dtype=float)
    home = np.eye(len(own), dtype=bool)
    if len(own) < 2:
        return float("nan"), float("nan")
    return float(np.nanmean(numbers[home])), float(np.nanmean(numbers[~home]))
