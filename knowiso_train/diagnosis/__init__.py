"""Diagnosis of a weak network beside strong ones, and stability over networks of one task."""

from knowiso_train.diagnosis.diagnose import diagnose
from knowiso_train.diagnosis.report import (
    ClassResult,
    Confirmation,
    Diagnosis,
    FeatureDirection,
    LayerDiagnosis,
    OutputEffect,
    RankedImage,
    Thumbnail,
)
from knowiso_train.diagnosis.stability import Spread, StabilityEntry, StabilityReport, stability

__all__ = [
    "ClassResult",
    "Confirmation",
    "Diagnosis",
    "FeatureDirection",
    "LayerDiagnosis",
    "OutputEffect",
    "RankedImage",
    "Spread",
    "StabilityEntry",
    "StabilityReport",
    "Thumbnail",
    "diagnose",
    "stability",
]
