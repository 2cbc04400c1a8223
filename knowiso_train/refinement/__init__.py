"""Refinement of trained networks by the part of their features that peers know too."""

from knowiso_train.refinement.fold import fold

__all__ = ["fold"]
