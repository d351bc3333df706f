"""What tuning brought: methods as they come beside what `sweep.py tune` found, as a table."""

from __future__ import annotations

from typing import Any

from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.conditions import gain_cell
from fedseg.reporting.compare.gather import signature
from fedseg.reporting.compare.sentences import score_cell, seed_words
from fedseg.reporting.summary import Table


def tuning_text(analysis: Analysis) -> str:
    """Tuned methods as a Markdown table: the model that answers, as the method comes and tuned, gain and settings.

    Raises:
        ReportingError: no method is there tuned and as it comes, each with all seeds and sites.
    """
    if not analysis.tuned:
        raise ReportingError(
            "no method is there once as it comes and tuned (METHOD_tuned, of `sweep.py tune METHOD`), both with all "
            "seeds and sites"
        )
    options = analysis.options
    overview = analysis.overview.query("site == @OVERALL and seen and checkpoint == @options.checkpoint")
    scores = {Model(row["method"], row["view"]): row for row in overview.to_dict("records")}
    rows = []
    for pair in analysis.tuned:
        both = (score_cell(scores.get(model), analysis) for model in (pair.before, pair.after))
        test = analysis.compare(pair.after, pair.before, OVERALL)
        gain = gain_cell(test, options.scale) if test else "–"
        found = ", ".join(
            f"{key.removeprefix('algorithm.')} {_short(new)} ({_short(old)})"
            for key, (old, new) in pair.found().items()
        )
        rows.append((pair.label, *both, gain, found or "what it comes with"))
    note = (
        f"{options.unit.capitalize()}, {options.checkpoint} round, mean over sites; {seed_words(analysis)}; gain by "
        f"tuning with its {options.confidence:.0%} interval, no narrower than its t interval."
    )
    return Table(
        (f"test {options.title}", "as it comes", "tuned", "gain", "found (as it comes)"), tuple(rows), note
    ).markdown()


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else signature(value)
