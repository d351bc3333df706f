"""Scores of cases: what the metrics mean, and how predictions are gathered."""

from evaluation.cases import CaseMasks, CaseScore, Predict, ScoredSite, evaluate, predict_cases
from evaluation.metrics import FULL, LOWER_IS_BETTER, METRICS, QUICK, Metric, check_metrics, score

__all__ = [
    "FULL",
    "LOWER_IS_BETTER",
    "METRICS",
    "QUICK",
    "CaseMasks",
    "CaseScore",
    "Metric",
    "Predict",
    "ScoredSite",
    "check_metrics",
    "evaluate",
    "predict_cases",
    "score",
]
