"""Map of a layer pair, by the options of the loss."""

from __future__ import annotations

from typing import Any

from knowiso_train.distillation._closed_form_map import ClosedFormMap
from knowiso_train.distillation._consensus_map import ConsensusMap
from knowiso_train.distillation._learned_map import LearnedMap
from knowiso_train.distillation.config import IsomorphismLossConfig
from knowiso_train.features.modules import LayerPair


def make_map(
    config: IsomorphismLossConfig, pair: LayerPair, channels: tuple[int, int], kernel_size: int, peer_channels: int
) -> ClosedFormMap | LearnedMap | ConsensusMap:
    """Return the map of a layer pair.

    Args:
        config: Options of the loss.
        pair: Layer pair, for messages.
        channels: Channels of the student and of the teacher.
        kernel_size: Odd kernel size.
        peer_channels: Channels of all peers together.
    """
    options: dict[str, Any] = {"name": f"{pair.source} → {pair.target}", "refresh": config.refresh}
    if config.solver == "learned":
        return LearnedMap(*channels, config.order, kernel_size, penalty=config.penalty, **options)
    options |= {"ridge": config.ridge, "window": config.window}
    if config.target == "teacher":
        return ClosedFormMap(*channels, kernel_size, **options)
    return ConsensusMap(*channels, peer_channels, kernel_size, **options)
