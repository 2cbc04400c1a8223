"""Estimators of the unexplained share: closed-form, learned and consensus maps."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.state import KeepPrecision
from knowiso_train.ops.im2col import conv_weight
from knowiso_train.ops.reference import channel_scale
from knowiso_train.ops.residual_energy import gram_residual_energy, residual_energy
from knowiso_train.regression.moments import Moments, RunningMoments
from knowiso_train.regression.ridge import solve_ridge, solve_ridge_cholesky
from knowiso_train.utils.distributed import ProcessGroup

MIN_RELATIVE_SPREAD = 1e-6  # a spread below this part of the mean is float32 rounding

MIN_SAMPLES_PER_FEATURE = 10  # effective rows per regressor before the map is used (DESIGN §1.4)
# Rows per regressor that one batch contributes where it has as many: more would cost time and change nothing
BATCH_SAMPLES_PER_FEATURE = 4
# Of so many calls in a row one, drawn at random, joins the moments once the map stands: neighboring steps say the same
UPDATE_INTERVAL = 2
WINDOW_SAMPLES_PER_FEATURE = 40  # effective rows per regressor that the forgetting leaves
MIN_WINDOW_STEPS = 20  # steps that the moments remember at least

# Part of the mean σ; a dead channel divided by its own σ would get an all but infinite gradient
MIN_RELATIVE_SCALE = 0.1

# Rows per regressor after which the peers' map no longer changes: teacher and peers are frozen
FREEZE_SAMPLES_PER_FEATURE = 200


def warn_once(part: Any, message: str) -> None:
    """A KnowisoWarning, the first time for this part of the loss."""
    if not getattr(part, "warned", False):
        warnings.warn(message, KnowisoWarning, stacklevel=2)
    part.warned = True


def updates_moments(call: int) -> bool:
    """Whether the batch of this call joins the moments: at random, since calls may come in turns (two views, two loaders); in all processes alike.

    Example:
        >>> [call for call in range(12) if updates_moments(call)]
        [1, 2, 4, 6, 8, 11]
    """
    return random.Random(call // UPDATE_INTERVAL).randrange(UPDATE_INTERVAL) == call % UPDATE_INTERVAL


class ClosedFormMap(KeepPrecision):
    """`‖y - g(x)‖² / Var(y)`, g solved from moments of earlier batches and constant between refreshes.

    The current batch never enters the map that judges it, so independent noise does not look explained. The ridge is
    relative to the source's own
    variance, so scaling the student's features gains nothing, and collapsed features explain nothing: the loss rises to
    1. At ridge 0 the gradient
    with g held constant is the gradient through g at its optimum (envelope theorem). Source: DESIGN §1.4.

    Args:
        source_channels: C_S of the student.
        target_channels: C_T of the teacher.
        kernel_size: odd k.
        name: of the pair, for messages.
        ridge: relative ρ ≥ 0.
        refresh: calls between solves.
        window: calls that the moments remember (time constant of the forgetting); None takes what gives 40 effective
            rows per regressor, 20 at least;
            math.inf forgets nothing.

    Shape:
        x (N, C_S, H, W), y (N, C_T, H, W) → scalar.
    """

    weight: Tensor
    bias: Tensor
    variance: Tensor
    center: Tensor
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
        # Mean of the source where the map was solved
        self.register_buffer("center", torch.zeros(source_channels if kernel_size == 1 else 0))
        self.register_buffer("gram", torch.zeros([source_channels if self.by_gram else 0] * 2), persistent=False)
        self.ready = False

    def forward(self, x: Tensor, y: Tensor, call: int, group: ProcessGroup) -> Tensor:
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
        if self.training and (not self.ready or updates_moments(call)):
            self.observe(x, y, call, group)
        return loss

    def unexplained(self, x: Tensor, y: Tensor) -> Tensor:
        """`Σ_c mean (y_c - g_c(x))² / Σ_c Var(y_c)`."""
        if self.kernel_size == 1:
            map_, gram = self.weight[:, :, 0, 0], self.gram if self.by_gram else None
            energy = gram_residual_energy(x, y, map_, gram, self.center, torch.addmv(self.bias, map_, self.center))
        else:
            energy = residual_energy(x, y, self.weight, self.bias)
        return energy / (len(y) * y.shape[2] * y.shape[3]) / self.variance

    def predict(self, x: Tensor) -> Tensor:
        """g(x), (N, C_T, H, W), without gradient to the map."""
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.kernel_size // 2)

    def observe(self, x: Tensor, y: Tensor, call: int, group: ProcessGroup) -> None:
        """Let the moments forget a little and take this batch in, at positions that are drawn anew each call and are the same for all its images."""
        cells, images = y.shape[2] * y.shape[3], len(y) * group.size
        if not y.numel():
            return
        # Until the map stands every batch counts, and twice the rows
        apart = UPDATE_INTERVAL if self.ready else 1
        taken = min(cells, math.ceil(BATCH_SAMPLES_PER_FEATURE * UPDATE_INTERVAL / apart * self.columns / images))
        least = math.ceil(MIN_SAMPLES_PER_FEATURE * self.columns / (images * taken)) + 1
        if self.window is not None and self.window < least and not self.ready:
            warn_once(
                self,
                f"{self.name}: a window of {self.window:g} calls holds no {MIN_SAMPLES_PER_FEATURE} rows for each of {self.columns} regressors, so this pair's loss "
                f"stays 0; with {len(y)} images a call it takes window={least} or more",
            )
        window = self.window or max(
            MIN_WINDOW_STEPS, math.ceil(WINDOW_SAMPLES_PER_FEATURE * self.columns * apart / (images * taken))
        )
        positions = None
        if taken < cells:
            generator = torch.Generator().manual_seed(call)  # its own: the user's random state is not touched
            positions = (
                torch.randperm(cells, generator=generator)[:taken].to(x.device, non_blocking=True).expand(len(y), -1)
            )
        self.moments.update(x, y, (1 - 1 / window) ** apart, positions)

    @torch.no_grad()
    def refresh(self, group: ProcessGroup) -> None:
        """Solve the map from the moments of all processes, where they hold rows enough. Collective."""
        m = self.moments.all_reduce(group)
        if float(m.count) < MIN_SAMPLES_PER_FEATURE * self.columns:
            return
        spread, middle = float(m.xx.diagonal().mean() / m.count), float(m.mean_x.square().mean())
        variance = float(m.yy.sum() / m.count)
        flat_target = variance <= MIN_RELATIVE_SPREAD**2 * float(m.mean_y.square().sum())
        if flat_target:
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
        elif spread <= MIN_RELATIVE_SPREAD**2 * middle:
            warn_once(self, f"{self.name}: the student's feature is constant: it explains nothing")
        map_ = self._solve(m, MIN_RELATIVE_SPREAD**2 * middle * float(m.count))
        self.weight.copy_(conv_weight(map_[0], self.kernel_size))
        self.bias.copy_(map_[1])
        if self.kernel_size == 1:
            self.center.copy_(m.mean_x)
        self._square()
        self.variance.fill_(math.inf if flat_target else variance)  # a share of nothing is 0
        self.ready = True

    def _solve(self, m: Moments, floor: float) -> tuple[Tensor, Tensor]:
        if not float(m.xx.diagonal().mean()) > 0:
            return torch.zeros_like(m.xy), m.mean_y
        solved = solve_ridge_cholesky(m, self.ridge, floor) if self.ridge > 0 else solve_ridge(m, 0.0)
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


class LearnedMap(KeepPrecision):
    """`‖y - g(x)‖² / Var(y) + λ Σ p_k²` with `g(x) = μ + s · h_K(x)`: h_K is the paper's recursion (arXiv 1908.01581, §3), its maps untied where the
    channels differ; μ and s are the target's channel means and its one overall spread, so that learning rates do not
    depend on the teacher's scale.

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

    def forward(self, x: Tensor, y: Tensor, call: int, group: ProcessGroup) -> Tensor:
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

    def penalized(self) -> Tensor:
        """`λ Σ p_k²`, the part of the loss that is no share."""
        return self.penalty * self.maps.gates.detach().square().sum()

    def _energy(self, x: Tensor, y: Tensor) -> Tensor:
        scale = channel_scale(x)
        x = x / scale.maximum(MIN_RELATIVE_SCALE * self.source_scale.to(scale))
        source, weight, bias = self.maps.last_step(x)
        return residual_energy(
            source, y, self.spread * weight, self.mean if bias is None else self.mean + self.spread * bias
        )

    @torch.no_grad()
    def _look(self, x: Tensor, y: Tensor, group: ProcessGroup) -> None:
        scale = torch.stack(
            [channel_scale(x).double().mean(), torch.ones((), dtype=torch.float64, device=x.device)]
        ).to(group.device)
        group.sum_(scale)
        if bool(scale.isfinite().all()):
            self.source_scale.copy_(scale[0] / scale[1])
        self.target.update(y[:, :1], y)
        m = self.target.all_reduce(group)
        variance = float(m.yy.mean() / m.count)
        if not variance > MIN_RELATIVE_SPREAD**2 * float(m.mean_y.square().mean()):
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
            return
        self.mean.copy_(m.mean_y)
        self.spread.fill_(math.sqrt(variance))
        self.ready = True

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.ready = bool(0 < self.spread < math.inf)


class ConsensusMap(nn.Module):
    """`‖g_P(x_P) - g(x)‖² / Var(g_P(x_P))`: g_P explains the teacher from all peers together, g the outcome from the student.

    What no peer knows is not in the target (DESIGN §1.4). Both maps are order-0 closed forms of moments that exclude
    the current batch.

    Args:
        source_channels: C_S of the student.
        target_channels: C_T of the teacher.
        peer_channels: sum of the peers' channels.
        kernel_size: odd k, of both maps.
        name, ridge, refresh, window: as for `ClosedFormMap`; the peers' map forgets nothing.

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
        self.peers = ClosedFormMap(
            peer_channels, target_channels, kernel_size, name=f"{name}, peers", window=math.inf, **options
        )
        self.student = ClosedFormMap(source_channels, target_channels, kernel_size, name=name, window=window, **options)
        self.settled = False

    @property
    def ready(self) -> bool:
        """Whether both maps stand."""
        return self.peers.ready and self.student.ready

    def forward(self, x: Tensor, y: Tensor, call: int, group: ProcessGroup, peers: Tensor) -> Tensor:
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

    def _settle(self, group: ProcessGroup) -> None:
        self.settled = (
            self.peers.ready
            and float(self.peers.moments.count) * group.size >= FREEZE_SAMPLES_PER_FEATURE * self.peers.columns
        )

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        count = state.get(f"{prefix}peers.moments.count")
        self.settled = (
            count is not None and float(count) * ProcessGroup().size >= FREEZE_SAMPLES_PER_FEATURE * self.peers.columns
        )
