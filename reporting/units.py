"""On which grid scores stand, and in which unit their lengths are: said wherever a number stands."""

from collections.abc import Iterable

import pandas as pd

from fedseg.evaluation import METRICS

GRIDS = {"own": "own grid", "network": "network's grid"}
"""Names of `evaluation.grid`: each case's own pixels, or those of the network."""
EXPLAINED = {
    "own": "Scores are on every case's own grid: its image's or volume's pixels as stored.",
    "network": "Scores are on the network's grid (data.size).",
}
MIXED = "mm and px"
UNKNOWN = "mm or px"
"""Of folders of earlier versions, which did not say."""


def in_common(values: Iterable[object]) -> str:
    """The one value that all agree on; several are named side by side; empty ones say nothing."""
    parts = {part for value in values if isinstance(value, str) for part in value.split(" and ")}
    return " and ".join(sorted(parts - {""}))


def stated(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Unit and grid of scores, by these columns."""
    known = scores.reindex(columns=[*keys, "unit", "grid"]).drop_duplicates()
    return known.groupby(keys, sort=False)[["unit", "grid"]].agg(in_common).reset_index()


def grid_of(table: pd.DataFrame) -> str:
    """The name of the grid that scores stand on; empty where nothing says so."""
    found = in_common(table["grid"]) if "grid" in table else ""
    return GRIDS.get(found, found)


def unit_of(metric: str, told: str) -> str:
    """What a metric's numbers are in; empty for shares."""
    return (told or UNKNOWN) if metric in METRICS and METRICS[metric].is_length else ""


def titled(metric: str, told: str) -> str:
    """A metric with its unit."""
    unit = unit_of(metric, told)
    return f"{metric}, {unit}" if unit else metric


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, a minus being one; what rounds to nothing is +0.0, on whichever side it lies."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")
