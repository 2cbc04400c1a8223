"""Refinement of trained classifiers by features that their peers reproduce."""

from knowiso_train.refinement.api import refine
from knowiso_train.refinement.classifier_folding import FoldedScore, FoldReport, FoldResult, fold_classifier
from knowiso_train.refinement.config import RefineConfig, RefineFinetuneConfig
from knowiso_train.refinement.finetune import BatchCycle, RefineTrainer, consensus_loss
from knowiso_train.refinement.folding import PeerProjection, fit_peer_projection, fold
from knowiso_train.refinement.heads import ConsensusFeatures, Head, HeadConfig, consensus_head, ridge_head
from knowiso_train.refinement.models import classifier_model
from knowiso_train.refinement.peers import PeerEnsemble, PeerScore, score_peer
from knowiso_train.refinement.report import RefineReport, RefineResult

__all__ = [
    "BatchCycle",
    "ConsensusFeatures",
    "FoldReport",
    "FoldResult",
    "FoldedScore",
    "Head",
    "HeadConfig",
    "PeerEnsemble",
    "PeerProjection",
    "PeerScore",
    "RefineConfig",
    "RefineFinetuneConfig",
    "RefineReport",
    "RefineResult",
    "RefineTrainer",
    "classifier_model",
    "consensus_head",
    "consensus_loss",
    "fit_peer_projection",
    "fold",
    "fold_classifier",
    "refine",
    "ridge_head",
    "score_peer",
]
