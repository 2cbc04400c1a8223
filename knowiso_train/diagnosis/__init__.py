"""Diagnosis of a weak network beside strong ones, and stability over networks of one task."""

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

__all__ = [
    "ClassResult",
    "Confirmation",
    "Diagnosis",
    "FeatureDirection",
    "LayerDiagnosis",
    "OutputEffect",
    "RankedImage",
    "Thumbnail",
]
