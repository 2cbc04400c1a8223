"""Map of the distillation loss to the part of the teacher that peers reproduce."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from knowiso_train.distillation._closed_form_map import ClosedFormMap
from knowiso_train.features.state import KeepPrecision
from knowiso_train.utils.distributed import ProcessGroup

# Ridge of the peers' map, which is to predict and not to guide a training
PEER_RIDGE = 1e-3
# Samples per regressor after which the peers' map is frozen; teacher and peers do not change
FREEZE_SAMPLES_PER_FEATURE = 200


class ConsensusMap(KeepPrecision):
    """Unexplained share `‖g_P(x_P) - g(x)‖² / Var(g_P(x_P))` of the teacher's part that peers reproduce.

    g_P maps the features of all peers to the teacher's, g the student's to the prediction of g_P. Parts of the
    teacher's feature that no peer explains are not in the target. Both maps are order-0 closed forms of moments without
    the current batch.

    Args:
        source_channels: Channels C_S of the student.
        target_channels: Channels C_T of the teacher.
        peer_channels: Channels C_P of all peers together.
        kernel_size: Odd kernel size k of both maps.
        name: Layer pair, for messages.
        refresh: Calls between solves of both maps.
        **options: Ridge and window of the student's map, see `ClosedFormMap`. The peers' map has a small ridge, and
            moments without a window.

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
        refresh: int = 10,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.peers = ClosedFormMap(
            peer_channels,
            target_channels,
            kernel_size,
            name=f"{name}, peers",
            ridge=PEER_RIDGE,
            refresh=refresh,
            window=math.inf,
        )
        self.student = ClosedFormMap(
            source_channels, target_channels, kernel_size, name=name, refresh=refresh, **options
        )
        self.frozen = False

    @property
    def calls(self) -> int:
        """Number of calls with `update=True`."""
        return self.peers.calls

    @calls.setter
    def calls(self, count: int) -> None:
        # Both maps are solved at the same calls, also if the student's starts later
        self.peers.calls = self.student.calls = count

    @property
    def ready(self) -> bool:
        """True once both maps are solved."""
        return self.peers.ready and self.student.ready

    def forward(self, x: Tensor, y: Tensor, peers: Tensor, update: bool = True) -> Tensor:
        """Return the loss of a batch; 0 until both maps are solved.

        Args:
            x: Student feature, with gradient.
            y: Teacher feature on the same grid, without gradient.
            peers: Features of all peers on that grid, concatenated along the channels, without gradient.
            update: Update both maps, as in `ClosedFormMap.forward`; the peers' map until it is frozen.
        """
        if update and not self.frozen and self.peers.solve_due:
            self.peers.solve()
            self._freeze_when_converged()
        if self.peers.ready:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                target = self.peers.predict(peers)
            loss: Tensor = self.student(x, target, update)
        else:
            loss = 0 * x.float().sum()
        if update:
            if not self.frozen:
                self.peers.update(peers, y)
            self.calls += 1
        return loss

    def _freeze_when_converged(self) -> None:
        self.frozen = self.peers.ready and self._has_converged(float(self.peers.moments.count))

    def _has_converged(self, samples: float) -> bool:
        """Return whether the peers' moments, in equal parts in all processes, hold enough samples."""
        return samples * ProcessGroup().size >= FREEZE_SAMPLES_PER_FEATURE * self.peers.num_features

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        count = state.get(f"{prefix}peers.moments.count")
        self.frozen = count is not None and self._has_converged(float(count))
