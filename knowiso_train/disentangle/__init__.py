"""Maps that split a feature by non-linear order."""

from knowiso_train.disentangle.config import DisentangleConfig, NonlinearConfig, PaperConfig
from knowiso_train.disentangle.disentangler import Disentangler, make_fitter

__all__ = [
    "DisentangleConfig",
    "Disentangler",
    "NonlinearConfig",
    "PaperConfig",
    "make_fitter",
]
