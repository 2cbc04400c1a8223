"""Measurement of isomorphic shares and its report."""

from knowiso_train.measurement.functional import FunctionalShare
from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import PairResult, Report
from knowiso_train.measurement.similarity import linear_cka, procrustes_similarity, regression_r2

__all__ = [
    "FunctionalShare",
    "PairResult",
    "Report",
    "linear_cka",
    "measure",
    "procrustes_similarity",
    "regression_r2",
]
