"""`form="moment"`: the map is the order-0 closed form of running moments; nothing of it is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.disentangle.ridge import solve_factored, solve_ridge
from knowiso_train.losses.flat import RESOLUTION, warn_once
from knowiso_train.losses.full_state import FullState
from knowiso_train.ops import conv_weight, fixed_map_energy, residual_energy
from knowiso_train.statistics import Group, Moments, RunningMoments

ON = 10  # effective rows per regressor before the map is used (DESIGN §1.4)
ROWS = 4  # rows per regressor that one batch contributes where it has as many: more would cost time and change nothing
EVERY = 2  # of so many calls in a row one, drawn at random, joins the moments once the map stands: neighbouring steps say the same
REMEMBERED = 40  # effective rows per regressor that the forgetting leaves
SHORTEST = 20  # steps that the moments remember at least


def joins(call: int) -> bool:
    """Whether the batch of this call joins the moments: at random, since calls may come in turns (two views, two loaders); in all processes alike.

    Example:
        >>> [call for call in range(12) if joins(call)]
        [1, 2, 4, 6, 8, 11]
    """
    return random.Random(call // EVERY).randrange(EVERY) == call % EVERY


class MomentMap(FullState):
    """`‖y - g(x)‖² / Var(y)`, g solved from moments of earlier batches and constant between refreshes.

    The current batch never enters the map that judges it, so independent noise does not look explained. The ridge is relative to the source's own
    variance, so scaling the student's features gains nothing, and collapsed features explain nothing: the loss rises to 1. At ridge 0 the gradient
    with g held constant is the gradient through g at its optimum (envelope theorem). Source: DESIGN §1.4.

    Args:
        source_channels: C_S of the student.
        target_channels: C_T of the teacher.
        kernel_size: odd k.
        name: of the pair, for messages.
        ridge: relative ρ ≥ 0.
        refresh: calls between solves.
        window: calls that the moments remember (time constant of the forgetting); None takes what gives 40 effective rows per regressor, 20 at least;
            math.inf forgets nothing.

    Shape:
        x (N, C_S, H, W), y (N, C_T, H, W) → scalar.
    """

    weight: Tensor
    bias: Tensor
    variance: Tensor
    centre: Tensor
    gram: Tensor

    def __init__(
        self,
        source_channels: int,
        target_channels: int,
        kernel_size: int = 1,
        *,
        name: str = "",
        ridge: float = 1e-3,
        refresh: int = 10,
        window: float | None = None,
    ) -> None:
        super().__init__()
        self.name, self.ridge, self.refresh_every, self.window = name, ridge, refresh, window
        self.kernel_size, self.columns = kernel_size, source_channels * kernel_size**2
        self.moments = RunningMoments(source_channels, target_channels, kernel_size)
        self.register_buffer("weight", torch.zeros(target_channels, source_channels, kernel_size, kernel_size))
        self.register_buffer("bias", torch.zeros(target_channels))
        self.register_buffer("variance", torch.zeros(()))  # Σ_c Var(y_c); 0 until the map stands
        self.by_gram = kernel_size == 1 and target_channels >= 2 * source_channels
        self.register_buffer("centre", torch.zeros(source_channels if kernel_size == 1 else 0))  # mean of the source where the map was solved
        self.register_buffer("gram", torch.zeros([source_channels if self.by_gram else 0] * 2), persistent=False)
        self.ready = False

    def forward(self, x: Tensor, y: Tensor, call: int, group: Group) -> Tensor:
        """Loss of this batch under the map of earlier ones; 0 until that stands. In training mode the batch then joins the moments, and one of
        two once the map stands.

        Args:
            x: student feature, with gradient.
            y: teacher feature on the same grid, without.
            call: number of this call; the map is solved anew where it is a multiple of `refresh`.
            group: the processes that share the moments.
        """
        if self.training and (call % self.refresh_every == 0 or not self.ready):
            self.refresh(group)
        loss = self.unexplained(x, y) if self.ready else 0 * x.float().sum()
        if self.training and (not self.ready or joins(call)):
            self.observe(x, y, call, group)
        return loss

    def unexplained(self, x: Tensor, y: Tensor) -> Tensor:
        """`Σ_c mean (y_c - g_c(x))² / Σ_c Var(y_c)`."""
        if self.kernel_size == 1:
            map_, gram = self.weight[:, :, 0, 0], self.gram if self.by_gram else None
            energy = fixed_map_energy(x, y, map_, gram, self.centre, torch.addmv(self.bias, map_, self.centre))
        else:
            energy = residual_energy(x, y, self.weight, self.bias)
        return energy / (len(y) * y.shape[2] * y.shape[3]) / self.variance

    def predict(self, x: Tensor) -> Tensor:
        """g(x), (N, C_T, H, W), without gradient to the map."""
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.kernel_size // 2)

    def observe(self, x: Tensor, y: Tensor, call: int, group: Group) -> None:
        """Let the moments forget a little and take this batch in, at positions that are drawn anew each call and are the same for all its images."""
        cells, images = y.shape[2] * y.shape[3], len(y) * group.size
        if not y.numel():
            return
        apart = EVERY if self.ready else 1  # until the map stands every batch counts, and twice the rows
        taken = min(cells, math.ceil(ROWS * EVERY / apart * self.columns / images))
        least = math.ceil(ON * self.columns / (images * taken)) + 1
        if self.window is not None and self.window < least and not self.ready:
            warn_once(
                self,
                f"{self.name}: a window of {self.window:g} calls holds no {ON} rows for each of {self.columns} regressors, so this pair's loss "
                f"stays 0; with {len(y)} images a call it takes window={least} or more",
            )
        window = self.window or max(SHORTEST, math.ceil(REMEMBERED * self.columns * apart / (images * taken)))
        positions = None
        if taken < cells:
            generator = torch.Generator().manual_seed(call)  # its own: the user's random state is not touched
            positions = torch.randperm(cells, generator=generator)[:taken].to(x.device, non_blocking=True).expand(len(y), -1)
        self.moments.observe(x, y, (1 - 1 / window) ** apart, positions)

    @torch.no_grad()
    def refresh(self, group: Group) -> None:
        """Solve the map from the moments of all processes, where they hold rows enough. Collective."""
        m = self.moments.share(group)
        if float(m.count) < ON * self.columns:
            return
        spread, middle = float(m.xx.diagonal().mean() / m.count), float(m.mean_x.square().mean())
        variance = float(m.yy.sum() / m.count)
        flat_target = variance <= RESOLUTION**2 * float(m.mean_y.square().sum())
        if flat_target:
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
        elif spread <= RESOLUTION**2 * middle:
            warn_once(self, f"{self.name}: the student's feature is constant: it explains nothing")
        map_ = self._solve(m, RESOLUTION**2 * middle * float(m.count))
        self.weight.copy_(conv_weight(map_[0], self.kernel_size))
        self.bias.copy_(map_[1])
        if self.kernel_size == 1:
            self.centre.copy_(m.mean_x)
        self._square()
        self.variance.fill_(math.inf if flat_target else variance)  # a share of nothing is 0
        self.ready = True

    def _solve(self, m: Moments, floor: float) -> tuple[Tensor, Tensor]:
        if not float(m.xx.diagonal().mean()) > 0:
            return torch.zeros_like(m.xy), m.mean_y
        solved = solve_factored(m, self.ridge, floor) if self.ridge > 0 else solve_ridge(m, 0.0)
        return solved.weight, solved.bias

    def _square(self) -> None:
        if self.by_gram:
            map_ = self.weight[:, :, 0, 0]
            map_ = map_ if map_.device.type == "mps" else map_.double()  # which has no float64
            self.gram.copy_(map_.T @ map_)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._square()
        self.ready = bool(self.variance > 0)
