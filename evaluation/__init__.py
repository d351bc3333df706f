"""Scores of cases: what the metrics mean, and how predictions are gathered.

Predicting needs torch, reading a finished run's scores does not: what predicts is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from fedseg import one_copy
from fedseg.evaluation.metrics import (
    FULL,
    INVENTED,
    LENGTHS,
    LOWER_IS_BETTER,
    METRICS,
    OFFSET,
    QUICK,
    Metric,
    check_metrics,
    score,
)

if TYPE_CHECKING:
    from fedseg.evaluation.cases import (
        CaseMasks,
        CaseScore,
        DivergedError,
        Grid,
        Predict,
        ScoredSite,
        evaluate,
        predict_cases,
    )

__all__ = [
    "FULL",
    "INVENTED",
    "LENGTHS",
    "LOWER_IS_BETTER",
    "METRICS",
    "OFFSET",
    "QUICK",
    "CaseMasks",
    "CaseScore",
    "DivergedError",
    "Grid",
    "Metric",
    "Predict",
    "ScoredSite",
    "check_metrics",
    "evaluate",
    "predict_cases",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedseg.evaluation import cases

    return getattr(cases, name)


one_copy(__name__)
