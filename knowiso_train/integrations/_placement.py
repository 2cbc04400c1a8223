"""Device of the networks of a loss in trainers, which move only their own model."""

from __future__ import annotations

import torch

from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.features.state import device_of


def move_frozen_networks(iso: IsomorphismLoss, device: torch.device | str) -> None:
    """Move teacher and peers that are on the CPU to a device. Those on another device stay where they are.

    Args:
        iso: Loss whose networks are moved.
        device: Device of the student.
    """
    for network in (iso.teacher, *iso.peers):
        if device_of(network) == torch.device("cpu"):
            network.to(device)
