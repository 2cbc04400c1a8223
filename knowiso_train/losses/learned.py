"""`form="learned"`: the paper's network, orders 0…K, trained together with the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.losses.flat import RESOLUTION, warn_once
from knowiso_train.losses.full_state import FullState
from knowiso_train.ops import channel_scale, residual_energy
from knowiso_train.statistics import Group, RunningMoments

WEAKEST = 0.1  # part of the mean σ; a dead channel divided by its own σ would get an all but infinite gradient


class LearnedMap(FullState):
    """`‖y - g(x)‖² / Var(y) + λ Σ p_k²` with `g(x) = μ + s · h_K(x)`: h_K is the paper's recursion (arXiv 1908.01581, §3), its maps untied where the
    channels differ; μ and s are the target's channel means and its one overall spread, so that learning rates do not depend on the teacher's scale.

    Args:
        source_channels: C_S of the student.
        target_channels: C_T of the teacher.
        order: K.
        kernel_size: odd.
        name: of the pair, for messages.
        penalty: λ, 0.1 as published.
        refresh: calls between looks at μ and s, which are taken over all that was looked at.

    Shape:
        x (N, C_S, H, W), y (N, C_T, H, W) → scalar.
    """

    mean: Tensor
    spread: Tensor
    source_scale: Tensor

    def __init__(
        self,
        source_channels: int,
        target_channels: int,
        order: int = 0,
        kernel_size: int = 1,
        *,
        name: str = "",
        penalty: float = 0.1,
        refresh: int = 10,
    ) -> None:
        super().__init__()
        self.maps = PaperMaps(source_channels, target_channels, order, kernel_size)
        self.name, self.penalty, self.refresh_every = name, penalty, refresh
        self.target = RunningMoments(1, target_channels)
        self.register_buffer("mean", torch.zeros(target_channels))
        self.register_buffer("spread", torch.zeros(()))  # s, the root of the mean variance; 0 until it is known
        self.register_buffer("source_scale", torch.zeros(()))  # mean σ of the source at the last look
        self.ready = False

    def forward(self, x: Tensor, y: Tensor, call: int, group: Group) -> Tensor:
        """Loss of this batch; 0 where the target is constant.

        Args:
            x: student feature, with gradient.
            y: teacher feature on the same grid, without.
            call: number of this call.
            group: the processes that share μ and s.
        """
        if self.training and (call % self.refresh_every == 0 or not self.ready):
            self._look(x, y, group)
        if not self.ready:
            return 0 * x.float().sum()
        dtype = torch.promote_types(self.maps.gates.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            energy = self._energy(x.to(dtype), y)
            share: Tensor = energy / y.numel() / self.spread.square()
            return share + self.penalty * self.maps.gates.square().sum()

    def penalised(self) -> Tensor:
        """`λ Σ p_k²`, the part of the loss that is no share."""
        return self.penalty * self.maps.gates.detach().square().sum()

    def _energy(self, x: Tensor, y: Tensor) -> Tensor:
        scale = channel_scale(x)
        x = x / scale.maximum(WEAKEST * self.source_scale.to(scale))
        source, weight, bias = self.maps.last_step(x)
        return residual_energy(source, y, self.spread * weight, self.mean if bias is None else self.mean + self.spread * bias)

    @torch.no_grad()
    def _look(self, x: Tensor, y: Tensor, group: Group) -> None:
        scale = torch.stack([channel_scale(x).double().mean(), torch.ones((), dtype=torch.float64, device=x.device)]).to(group.device)
        group.sum_(scale)
        if bool(scale.isfinite().all()):
            self.source_scale.copy_(scale[0] / scale[1])
        self.target.observe(y[:, :1], y)
        m = self.target.share(group)
        variance = float(m.yy.mean() / m.count)
        if not variance > RESOLUTION**2 * float(m.mean_y.square().mean()):
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
            return
        self.mean.copy_(m.mean_y)
        self.spread.fill_(math.sqrt(variance))
        self.ready = True

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.ready = bool(0 < self.spread < math.inf)
