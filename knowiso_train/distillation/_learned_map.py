"""Learned map of the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.distillation._feature_map import FeatureMap, replaced, warn_once
from knowiso_train.ops.reference import channel_scale
from knowiso_train.ops.residual_energy import residual_energy
from knowiso_train.regression.moments import MIN_RELATIVE_STD, RunningMoments
from knowiso_train.utils.distributed import ProcessGroup

# Lower bound of a channel's σ as a fraction of the mean σ; a dead channel would get a nearly infinite gradient
MIN_RELATIVE_SCALE = 0.1


class LearnedMap(FeatureMap):
    """Unexplained share `‖y - g(x)‖² / Var(y) + λ Σ p_k²` of the paper's network g, which trains with the student.

    `g(x) = μ + s · h_K(x)`: h_K is the recursion of arXiv 1908.01581, section 3, untied where the channels differ. μ
    are the target's channel means and s² its mean variance, so that learning rates do not depend on the teacher's
    scale. Both are averaged over the batch of every solve.

    Args:
        source_channels: Channels C_S of the student.
        target_channels: Channels C_T of the teacher.
        order: Number K of non-linear steps.
        kernel_size: Odd kernel size k.
        name: Layer pair, for messages.
        penalty: Factor λ of the gates' squares; 0.1 as published.
        refresh: Calls between updates of μ and s.

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
        super().__init__(name, refresh)
        self.kernel_size = kernel_size
        self.maps = PaperMaps(source_channels, target_channels, order, kernel_size)
        self.penalty = penalty
        self.target = RunningMoments(1, target_channels)
        self.register_buffer("mean", torch.zeros(target_channels))
        self.register_buffer("spread", torch.zeros(()))  # s; 0 until the first update
        self.register_buffer("source_scale", torch.zeros(()))  # mean σ of the source at the last update

    def forward(self, x: Tensor, y: Tensor, update: bool = True) -> Tensor:
        """Return the loss of a batch; 0 for a constant target and for no image.

        Args:
            x: Student feature, with gradient.
            y: Teacher feature on the same grid, without gradient.
            update: Update μ and s from this batch where it is due. Collective at an update.
        """
        if update:
            if self.solve_due:
                self._update_scales(x, y)
            self.calls += 1
        if not self.ready:
            return 0 * x.float().sum()
        if not y.numel():
            # The gradients of the maps are reduced over the processes in the backward pass, also from here
            return 0 * (x.float().sum() + sum(parameter.sum() for parameter in self.maps.parameters()))
        dtype = torch.promote_types(self.maps.gates.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            energy = self._energy(x.to(dtype), y)
            unexplained: Tensor = energy / y.numel() / self.spread.square()
            return unexplained + self.penalty * self.maps.gates.square().sum()

    def gate_penalty(self) -> Tensor:
        """Return `λ Σ p_k²`, the part of the loss that is not an unexplained share."""
        return self.penalty * self.maps.gates.detach().square().sum()

    def _energy(self, x: Tensor, y: Tensor) -> Tensor:
        scale = channel_scale(x)
        x = x / scale.maximum(MIN_RELATIVE_SCALE * self.source_scale.to(scale))
        source, weight, bias = self.maps.last_step(x)
        # y - μ - s (W a + b): μ and s go into the weights, so that one fused operation gives the energy
        return residual_energy(
            source, y, self.spread * weight, self.mean if bias is None else self.mean + self.spread * bias
        )

    @torch.no_grad()
    def _update_scales(self, x: Tensor, y: Tensor) -> None:
        """Add a batch to the target's moments and recompute μ, s and the source's mean σ over all processes."""
        group = ProcessGroup()
        # A process without images adds nothing
        scale_sum = torch.zeros(2, dtype=torch.float64, device=x.device)
        if y.numel():
            scale_sum[0], scale_sum[1] = channel_scale(x).double().mean(), 1
            self.target.update(y[:, :1], y)
        scale_sum = scale_sum.to(group.device)
        group.sum_(scale_sum)
        if bool(scale_sum.isfinite().all() & (scale_sum[1] > 0)):
            self.source_scale = replaced(self.source_scale, scale_sum[0] / scale_sum[1])
        moments = self.target.all_reduce(group)
        if not float(moments.count):
            return
        variance = float(moments.yy.mean() / moments.count)
        if not variance > MIN_RELATIVE_STD**2 * float(moments.mean_y.square().mean()):
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
            return
        # New tensors: the loss of an earlier call may still need the old ones in its backward pass
        self.mean = replaced(self.mean, moments.mean_y)
        self.spread = torch.full_like(self.spread, math.sqrt(variance))
        self.ready = True

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.ready = bool(0 < self.spread < math.inf)


def is_trained(map_: nn.Module) -> bool:
    """Return whether a map is learned and its scales are known; before, it returns 0 without its penalty."""
    return isinstance(map_, LearnedMap) and map_.ready
