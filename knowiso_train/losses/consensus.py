"""`form="consensus"`: what is taught is the part of the teacher that its peers reproduce."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.losses.moment import MomentMap
from knowiso_train.statistics import Group

SETTLED = 200  # rows per regressor after which the peers' map no longer changes: teacher and peers are frozen


class ConsensusMap(nn.Module):
    """`‖g_P(x_P) - g(x)‖² / Var(g_P(x_P))`: g_P explains the teacher from all peers together, g the outcome from the student.

    What no peer knows is not in the target (DESIGN §1.4). Both maps are order-0 closed forms of moments that exclude the current batch.

    Args:
        source_channels: C_S of the student.
        target_channels: C_T of the teacher.
        peer_channels: sum of the peers' channels.
        kernel_size: odd k, of both maps.
        name, ridge, refresh, window: as for `MomentMap`; the peers' map forgets nothing.

    Shape:
        x (N, C_S, H, W), y (N, C_T, H, W), peers (N, C_P, H, W) → scalar.
    """

    def __init__(
        self,
        source_channels: int,
        target_channels: int,
        peer_channels: int,
        kernel_size: int = 1,
        *,
        name: str = "",
        ridge: float = 1e-3,
        refresh: int = 10,
        window: float | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"ridge": ridge, "refresh": refresh}
        self.peers = MomentMap(peer_channels, target_channels, kernel_size, name=f"{name}, peers", window=math.inf, **options)
        self.student = MomentMap(source_channels, target_channels, kernel_size, name=name, window=window, **options)
        self.settled = False

    @property
    def ready(self) -> bool:
        """Whether both maps stand."""
        return self.peers.ready and self.student.ready

    def forward(self, x: Tensor, y: Tensor, call: int, group: Group, peers: Tensor) -> Tensor:
        """Loss of this batch; arguments as for `MomentMap.forward`, and the peers' features side by side on the teacher's grid."""
        learning = self.training and not self.settled
        if learning and (call % self.peers.refresh_every == 0 or not self.peers.ready):
            self.peers.refresh(group)
            self._settle(group)
        if self.peers.ready:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                target = self.peers.predict(peers)
            loss: Tensor = self.student(x, target, call, group)
        else:
            loss = 0 * x.float().sum()
        if learning and not self.settled:
            self.peers.observe(peers, y, call, group)
        return loss

    def _settle(self, group: Group) -> None:
        self.settled = self.peers.ready and float(self.peers.moments.count) * group.size >= SETTLED * self.peers.columns

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        count = state.get(f"{prefix}peers.moments.count")
        self.settled = count is not None and float(count) * Group().size >= SETTLED * self.peers.columns
