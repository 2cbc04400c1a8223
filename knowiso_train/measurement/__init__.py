"""Measurement of isomorphic shares and its report."""

from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import PairResult, Report

__all__ = [
    "PairResult",
    "Report",
    "measure",
]
