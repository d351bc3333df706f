"""Gains of many models over one, under several conditions side by side: as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from fedseg.evaluation.statistics import holm
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.plots import Theme, colour_bar, gain_colours, heatmap
from fedseg.reporting.compare.sentences import named_model
from fedseg.reporting.summary import Table
from fedseg.reporting.units import signed

SURE = " ✱"
TALLEST = 36  # rows of one column of the picture
MOST = 0.9  # share of the gains that colours reach


def gains(conditions: Mapping[str, Analysis], label: str) -> pd.DataFrame:
    """Every model's gain over one, mean over sites, under every condition; models that are one count once.

    Args:
        conditions: name -> the comparison of its runs.
        label: the model that all others are held against, such as "fedavg global".

    Returns:
        (model, condition, gain, low, high, sure): `sure` where the difference is significant after Holm's correction
        over all models of the condition. Models with the best mean over conditions first.

    Raises:
        ReportingError: a condition lacks the model, or all others.
    """
    rows = [
        row for name, analysis in conditions.items() for row in _gains(name, analysis, named_model(analysis, label))
    ]
    if not rows:
        raise ReportingError(f"there is no model beside {label}")
    table = pd.DataFrame(rows)
    means = table.groupby("model")["gain"].mean()
    order = sorted(means.index, key=lambda model: (-means[model], model))
    return table.set_index("model").loc[order].reset_index()


def _gains(condition: str, analysis: Analysis, other: Model) -> Iterator[dict[str, Any]]:
    tests = [row for model in analysis.models if model != other and (row := analysis.compare(model, other, OVERALL))]
    for row, p in zip(tests, holm([row["p"] for row in tests]), strict=True):
        told = {key: row[key] for key in ("model", "gain", "low", "high")}
        yield {**told, "condition": condition, "sure": p <= analysis.options.alpha}


def gains_text(conditions: Mapping[str, Analysis], label: str) -> str:
    """The gains as a Markdown table: models x conditions, with intervals."""
    table = gains(conditions, label)
    options = next(iter(conditions.values())).options
    cells = {
        (row["model"], row["condition"]): gain_cell(row, options.scale, sure=row["sure"])
        for row in table.to_dict("records")
    }
    models = table["model"].unique()
    rows = tuple((model, *(cells.get((model, name), "–") for name in conditions)) for model in models)
    note = (
        f"Gain in {options.title} over {label}, {options.unit}, {options.checkpoint} round, mean over sites, with its "
        f"{options.confidence:.0%} interval;{SURE} significant after Holm's correction over the models of a column."
    )
    return Table((f"against {label}", *conditions), rows, note).markdown()


def gain_cell(row: Mapping[Any, Any], scale: float, *, sure: bool = False) -> str:
    """A gain, whether it is sure, and its interval where it has one."""
    gain, low, high = (float(row[key]) * scale for key in ("gain", "low", "high"))
    between = f" ({signed(low)} to {signed(high)})" if np.isfinite(low) else ""
    return f"{signed(gain)}{SURE if sure else ''}{between}"


def draw_gains(conditions: Mapping[str, Analysis], label: str, theme: Theme) -> Figure:
    """The gains as a heat map, in as many columns as are needed for it to be read."""
    table = gains(conditions, label)
    options = next(iter(conditions.values())).options
    wide = table.pivot(index="model", columns="condition", values="gain").loc[table["model"].unique(), list(conditions)]
    sure = table.pivot(index="model", columns="condition", values="sure").loc[wide.index, wide.columns].fillna(False)
    wide *= options.scale
    parts = np.array_split(np.arange(len(wide)), -(-len(wide) // TALLEST))
    limit = max(
        1e-9, float(np.nanquantile(np.abs(wide.to_numpy()), MOST))
    )  # a few that fail leave the others no colour
    with mpl.rc_context(theme.settings()):
        size = ((3.1 + 0.75 * wide.shape[1]) * len(parts) + 0.6, 1.3 + 0.24 * len(parts[0]))
        figure = Figure(figsize=size, layout="constrained")
        for axes, rows in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            words = _words(wide.iloc[rows], sure.iloc[rows])
            shown = heatmap(axes, wide.iloc[rows], words, gain_colours(theme), TwoSlopeNorm(0, -limit, limit), size=8)
            axes.set_xticks(range(wide.shape[1]), wide.columns, fontsize=8)
        colour_bar(figure, axes, shown, "better →")
        figure.supxlabel(
            f"gain in {options.title} ({options.unit}) over {label}, mean over sites;{SURE} significant after Holm",
            fontsize=8.5,
        )
    return figure


def _words(gains: pd.DataFrame, sure: pd.DataFrame) -> Any:
    return np.vectorize(lambda gain, star: signed(gain) + (SURE if star else ""))(gains.to_numpy(), sure.to_numpy())
