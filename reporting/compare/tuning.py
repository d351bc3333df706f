"""What tuning brought: methods as they come beside what `sweep.py tune` found, as a table."""

from __future__ import annotations

from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import OVERALL, Analysis
from fedseg.reporting.compare.conditions import gain_cell
from fedseg.reporting.compare.sentences import score_cell
from fedseg.reporting.summary import Table


def tuning_text(analysis: Analysis) -> str:
    """Tuned methods as a Markdown table: the model that answers, as the method comes and tuned, and the gain.

    Raises:
        ReportingError: no method is there tuned and as it comes.
    """
    if not analysis.tuned:
        raise ReportingError("no method is there both as it comes and tuned (METHOD_tuned, of `sweep.py tune METHOD`)")
    options = analysis.options
    overview = analysis.overview.query("site == @OVERALL and seen and checkpoint == @options.checkpoint")
    scores = {(row["method"], row["view"]): row for row in overview.to_dict("records")}
    rows = []
    for name, plain, tuned in analysis.tuned:
        both = (score_cell(scores.get((model.method, model.view)), analysis) for model in (plain, tuned))
        test = analysis.compare(tuned, plain, OVERALL)
        gain = gain_cell({**test, "sure": False}, options.scale) if test else "–"
        rows.append((f"{name} {tuned.view}", *both, gain))
    note = (
        f"{options.unit.capitalize()}, {options.checkpoint} round, mean over sites ± standard deviation between seeds; "
        f"gain by tuning with its {options.confidence:.0%} interval (the outer of patients drawn again and of t)."
    )
    return Table((f"test {options.title}", "as it comes", "tuned", "gain"), tuple(rows), note).markdown()
