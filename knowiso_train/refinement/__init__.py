"""Refinement of trained networks by the part of their features that peers know too."""

from knowiso_train.refinement.denoise import Denoiser, denoiser
from knowiso_train.refinement.finetune import FineTuning
from knowiso_train.refinement.fold import fold
from knowiso_train.refinement.head import Consensus, Head, HeadRecipe, consensus_head, ridge_head
from knowiso_train.refinement.refine import refine
from knowiso_train.refinement.result import Refined, RefineReport
from knowiso_train.refinement.worth import Worth, worth

__all__ = [
    "Consensus",
    "Denoiser",
    "FineTuning",
    "Head",
    "HeadRecipe",
    "RefineReport",
    "Refined",
    "Worth",
    "consensus_head",
    "denoiser",
    "fold",
    "refine",
    "ridge_head",
    "worth",
]
