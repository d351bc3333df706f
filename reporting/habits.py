"""How each site outlines, estimated from a trained model: does it draw larger than the other sites, or smaller?

The global model learnt one outline from all sites. Where a site's masks lie outside of it more than other sites' masks
do, the site draws larger. Where images tell the site, the model follows the site's habit, and shows less of it.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from fedseg.evaluation import OFFSET
from fedseg.reporting.summary import BEST, CASES, WHOLE, Table, final_scores
from fedseg.reporting.units import MIXED, in_common, signed

COLUMNS = ("site", "region", "larger", "error", "cases", "unit")


def habits(scores: pd.DataFrame) -> pd.DataFrame:
    """By how much each site's outlines lie outside of those of the others, of each region.

    Of the best global model's `offset` at a site's validation cases the mean is taken, and of these means, the sign
    turned, that of the other sites subtracted: what the model does alike everywhere is no site's habit.

    Args:
        scores: metrics.csv.

    Returns:
        Columns site, region, larger (mm or px, below 0: smaller), error (standard error, from the spread between cases;
        NaN where a site told no cases, or has one), cases, unit. Only sites that train; empty where fewer than two of
        them have such scores, and where some are in mm and others in px.
    """
    asked = scores[(scores["metric"] == OFFSET) & (scores["split"] == "val")]
    found = final_scores(asked[(asked["view"] == "global") & (asked["checkpoint"] == BEST)])
    found = found[found["seen"].astype(bool)].dropna(subset=["mean"])
    if in_common(found["unit"]) == MIXED:
        return pd.DataFrame(columns=list(COLUMNS))
    named = [name for name in asked["region"].unique() if name != WHOLE]
    if len(named) == 1:  # its scores are those of the whole
        found["region"] = named[0]
    regions = [name for name in found["region"].unique() if name != WHOLE] or [WHOLE]
    rows = [row for region in regions for row in _of_region(found[found["region"] == region])]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_region(found: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    """One row for each site of several."""
    means, squares = found["mean"].to_numpy(float), (found["std"] ** 2 / found[CASES]).to_numpy(float)
    others = len(means) - 1
    if others < 1:
        return
    told = zip(found["site"], found["region"], means, squares, found[CASES], found["unit"], strict=True)
    for site, region, mean, square, cases, unit in told:
        larger = (means.sum() - mean) / others - mean
        error = np.sqrt(square + (squares.sum() - square) / others**2)
        yield site, region, larger, error, int(cases), unit


def habits_table(found: pd.DataFrame) -> Table | None:
    """Rows: sites. Columns: regions, with standard errors; None where there is nothing to show."""
    if found.empty:
        return None
    regions = list(found["region"].unique())
    cells = {(row["site"], row["region"]): _cell(row["larger"], row["error"]) for row in found.to_dict("records")}
    cases = found.groupby("site")["cases"].max()
    rows = tuple(
        (str(site), str(count), *(cells.get((site, region), "no case") for region in regions))
        for site, count in cases.items()
    )
    note = (
        "By how much the site's outlines lie outside of the others' (+) or inside (−), by the best global model at "
        "validation cases;\n± standard error. Where images tell the site, the model follows its habit: habits are then "
        "larger than shown."
    )
    return Table((f"outlines drawn larger by, {in_common(found['unit'])}", "cases", *map(str, regions)), rows, note)


def _cell(larger: float, error: float) -> str:
    return signed(larger, 2) + (f" ± {error:.2f}" if np.isfinite(error) else "")
