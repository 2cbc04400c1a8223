"""Refinement of trained networks by features that peers reproduce."""

from knowiso_train.refinement.api import refine
from knowiso_train.refinement.finetune import RefineFinetuneConfig
from knowiso_train.refinement.folding import PeerProjection, fit_peer_projection, fold
from knowiso_train.refinement.heads import ConsensusFeatures, Head, HeadConfig, consensus_head, ridge_head
from knowiso_train.refinement.peers import PeerScore, score_peer
from knowiso_train.refinement.report import RefineReport, RefineResult

__all__ = [
    "ConsensusFeatures",
    "RefineFinetuneConfig",
    "Head",
    "HeadConfig",
    "PeerProjection",
    "PeerScore",
    "RefineReport",
    "RefineResult",
    "consensus_head",
    "fit_peer_projection",
    "fold",
    "refine",
    "ridge_head",
    "score_peer",
]
