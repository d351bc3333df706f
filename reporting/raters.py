"""How far the raters of the test cases agree, beside the scores of the models."""

import pandas as pd

from fedseg.reporting.summary import BEST, HEADLINE, VIEWS, WHOLE, Table, final_scores, shown_number
from fedseg.reporting.units import grid_of


def raters_table(agreement: pd.DataFrame, scores: pd.DataFrame) -> Table | None:
    """Rows: sites with masks of several raters. Columns: Dice of raters with each other, and of the best models.

    Args:
        agreement: raters.csv, from `RunFolder.raters`.
        scores: metrics.csv.

    Returns:
        Of test cases, means over regions, then over cases; None where no test case has several masks.
    """
    tested = agreement[agreement["split"] == "test"]
    if tested.empty:
        return None
    cases = tested.groupby(["site", "case"])["dice"].mean().groupby("site")
    shown = final_scores(scores[(scores["split"] == "test") & (scores["metric"] == HEADLINE)])
    shown = shown[(shown["checkpoint"] == BEST) & (shown["region"] == WHOLE)]
    means = {(str(row["site"]), str(row["view"])): float(row["mean"]) for row in shown.to_dict("records")}
    views = [view for view in VIEWS if any(own == view for _, own in means)]
    rows = []
    for site, of_site in cases:
        models = (means.get((str(site), view)) for view in views)
        told = ("not scored" if mean is None else shown_number(mean) for mean in models)
        rows.append((str(site), str(len(of_site)), shown_number(float(of_site.mean())), *told))
    note = (
        "raters: Dice of one rater with another, mean over pairs, on the cases' own grid. A model that learnt from "
        "several raters\ncan agree with what they have in common better than they agree with each other."
    )
    grid = grid_of(scores[scores["checkpoint"] == BEST])
    return Table(
        (f"test {HEADLINE}, {grid}", "cases", "raters", *(f"{view} {BEST}" for view in views)), tuple(rows), note
    )
