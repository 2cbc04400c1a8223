"""Measurement of isomorphic shares and its report."""

from knowiso_train.measurement.functional import FunctionalShare
from knowiso_train.measurement.measure import measure
from knowiso_train.measurement.report import PairResult, Report

__all__ = [
    "FunctionalShare",
    "PairResult",
    "Report",
    "measure",
]
