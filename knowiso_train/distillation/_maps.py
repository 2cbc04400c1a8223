"""Estimators of the unexplained share: closed-form, learned and consensus maps."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.errors import KnowisoWarning, NonFiniteError
from knowiso_train.features.modules import LayerPair
from knowiso_train.features.state import KeepPrecision
from knowiso_train.ops.im2col import conv_weight
from knowiso_train.ops.reference import channel_scale
from knowiso_train.ops.residual_energy import gram_residual_energy, residual_energy
from knowiso_train.regression.moments import Moments, RunningMoments
from knowiso_train.regression.ridge import solve_ridge, solve_ridge_cholesky
from knowiso_train.utils.distributed import ProcessGroup

# Ratio of standard deviation to root mean square below which a feature is constant up to float32 rounding
MIN_RELATIVE_STD = 1e-6
# Effective samples per regressor before a closed form is used; fewer would overfit
MIN_SAMPLES_PER_FEATURE = 10
# Samples per regressor drawn from one batch, for 1×1 maps and for larger ones, whose moments take most of the time of
# the loss. With half of these samples students were less accurate after one epoch, with twice as many not better
BATCH_SAMPLES_PER_FEATURE, BATCH_SAMPLES_PER_PATCH_FEATURE = 4, 2
# After warm-up, one randomly chosen call in every 2 updates the moments; consecutive batches are redundant
UPDATE_INTERVAL = 2
# Effective samples per regressor in the default window of the moments
WINDOW_SAMPLES_PER_FEATURE = 40
# Lower bound of the default window, in calls
MIN_WINDOW_CALLS = 20
# Lower bound of a channel's σ as a fraction of the mean σ; a dead channel would get a nearly infinite gradient
MIN_RELATIVE_SCALE = 0.1
# Ridge of the peers' map, which is to predict and not to guide a training
PEER_RIDGE = 1e-3
# Samples per regressor after which the peers' map is frozen; teacher and peers do not change
FREEZE_SAMPLES_PER_FEATURE = 200


def warn_once(part: Any, message: str) -> None:
    """Issue a KnowisoWarning the first time that a part of the loss calls this."""
    if not getattr(part, "warned", False):
        warnings.warn(message, KnowisoWarning, stacklevel=2)
    part.warned = True


def check_finite(pair: LayerPair, loss: Tensor, feature: Tensor, target: Tensor, step: int) -> None:
    """Check that the loss is finite; reads it from its device.

    Raises:
        NonFiniteError: NaN or Inf; the message names layer and step.
    """
    if bool(loss.detach().isfinite()):
        return
    counts = [
        f"{role} {name!r}: {int((~values.isfinite()).sum())} of {values.numel()} values"
        for role, name, values in (
            ("student's", pair.source, feature.detach()),
            ("teacher's", pair.target, target),
        )
    ]
    raise NonFiniteError(
        f"NaN or Inf in the isomorphism loss at step {step} (counted from 0), not finite are {'; '.join(counts)}. "
        "The moments do not include that batch; check learning rate, images and the autocast dtype"
    )


def updates_moments(call: int) -> bool:
    """Return whether the batch of a call updates the moments.

    One call of every `UPDATE_INTERVAL` is drawn at random, since loops may alternate between views or loaders. The
    draw depends on the call alone, so that it is the same in all processes.

    Examples:
        >>> [call for call in range(12) if updates_moments(call)]
        [1, 2, 4, 6, 8, 11]
    """
    return random.Random(call // UPDATE_INTERVAL).randrange(UPDATE_INTERVAL) == call % UPDATE_INTERVAL


class FeatureMap(KeepPrecision):
    """Base of the maps g from student to teacher features; counts the calls with an update.

    Attributes:
        name: Layer pair, for messages.
        refresh: Calls between solves.
        calls: Number of calls with `update=True`; `IsomorphismLoss` saves and restores it.
        ready: Whether the map is solved; before that the loss is 0.
    """

    def __init__(self, name: str, refresh: int) -> None:
        super().__init__()
        self.name, self.refresh = name, refresh
        self.calls, self.ready = 0, False

    @property
    def solve_due(self) -> bool:
        """True if the coming call solves the map: at every `refresh`-th call, and until there are enough samples."""
        return self.calls % self.refresh == 0 or not self.ready


class ClosedFormMap(FeatureMap):
    """Unexplained share `‖y - g(x)‖² / Var(y)` of a linear map g, solved from moments of earlier batches.

    g is constant between solves and never includes the current batch, so that independent noise is not explained. The
    ridge is relative to the source's variance: scaled features have the same loss, and collapsed ones a loss of 1. At
    ridge 0 the gradient with g held constant equals the gradient through g at its optimum (envelope theorem).

    Args:
        source_channels: Channels C_S of the student.
        target_channels: Channels C_T of the teacher.
        kernel_size: Odd kernel size k.
        name: Layer pair, for messages.
        ridge: Ridge ρ ≥ 0, relative to the source's mean variance.
        refresh: Calls between solves.
        window: Time constant of the forgetting, in calls. None: 40 effective samples per regressor, at least 20 calls;
            `math.inf`: all calls count equally.

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
        super().__init__(name, refresh)
        self.ridge, self.window = ridge, window
        self.kernel_size, self.num_features = kernel_size, source_channels * kernel_size**2
        self.moments = RunningMoments(source_channels, target_channels, kernel_size)
        self.register_buffer("weight", torch.zeros(target_channels, source_channels, kernel_size, kernel_size))
        self.register_buffer("bias", torch.zeros(target_channels))
        self.register_buffer("variance", torch.zeros(()))  # Σ_c Var(y_c); 0 until the map is solved
        # The energy ‖y - Wx‖² needs WᵀW (C_S × C_S) in place of the product Wx where C_T is much larger than C_S
        self.use_gram = kernel_size == 1 and target_channels >= 2 * source_channels
        # Mean of the source at the last solve: products about it do not cancel
        self.register_buffer("center", torch.zeros(source_channels if kernel_size == 1 else 0))
        self.register_buffer("gram", torch.zeros([source_channels if self.use_gram else 0] * 2), persistent=False)

    def forward(self, x: Tensor, y: Tensor, update: bool = True) -> Tensor:
        """Return the loss of a batch under the map of earlier batches; 0 until the map is solved.

        Args:
            x: Student feature, with gradient.
            y: Target feature on the same grid, without gradient.
            update: Solve the map where it is due, then add the batch to the moments: until the map is solved every
                batch, afterwards one in `UPDATE_INTERVAL`. Collective at a solve.
        """
        if update and self.solve_due:
            self.solve()
        loss = self.unexplained(x, y) if self.ready else 0 * x.float().sum()
        if update:
            if not self.ready or updates_moments(self.calls):
                self.update(x, y)
            self.calls += 1
        return loss

    def unexplained(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `Σ_c mean (y_c - g_c(x))² / Σ_c Var(y_c)`."""
        if self.kernel_size == 1:
            # g(x) = W (x - center) + (b + W center)
            matrix, gram = self.weight[:, :, 0, 0], self.gram if self.use_gram else None
            energy = gram_residual_energy(x, y, matrix, gram, self.center, torch.addmv(self.bias, matrix, self.center))
        else:
            energy = residual_energy(x, y, self.weight, self.bias)
        return energy / (len(y) * y.shape[2] * y.shape[3]) / self.variance

    def predict(self, x: Tensor) -> Tensor:
        """Return g(x), (N, C_T, H, W), without gradient to the map."""
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.kernel_size // 2)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Decay the moments and add a batch, at positions drawn for this call and shared by its images."""
        positions, num_images = y.shape[2] * y.shape[3], len(y) * ProcessGroup().size
        if not y.numel():
            return
        # Once the map is solved only one call in UPDATE_INTERVAL adds samples, and it decays for all of them
        interval = UPDATE_INTERVAL if self.ready else 1
        per_feature = BATCH_SAMPLES_PER_FEATURE if self.kernel_size == 1 else BATCH_SAMPLES_PER_PATCH_FEATURE
        samples = per_feature * UPDATE_INTERVAL / interval * self.num_features
        num_positions = min(positions, math.ceil(samples / num_images))
        decay = 1 - 1 / self._window_calls(num_images * num_positions, interval, len(y))
        sampled_positions = None
        if num_positions < positions:
            # A generator of its own leaves the user's random state as it is, and draws alike in all processes
            generator = torch.Generator().manual_seed(self.calls)
            permutation = torch.randperm(positions, generator=generator)[:num_positions]
            sampled_positions = permutation.to(x.device, non_blocking=True).expand(len(y), -1)
        self.moments.update(x, y, decay**interval, sampled_positions)

    @torch.no_grad()
    def solve(self) -> None:
        """Solve the map from the moments of all processes, if they hold enough samples. Collective."""
        moments = self.moments.all_reduce(ProcessGroup())
        if float(moments.count) < MIN_SAMPLES_PER_FEATURE * self.num_features:
            return
        source_variance = float(moments.xx.diagonal().mean() / moments.count)
        min_source_variance = MIN_RELATIVE_STD**2 * float(moments.mean_x.square().mean())
        variance = float(moments.yy.sum() / moments.count)
        constant_target = variance <= MIN_RELATIVE_STD**2 * float(moments.mean_y.square().sum())
        if constant_target:
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
        elif source_variance <= min_source_variance:
            warn_once(self, f"{self.name}: the student's feature is constant: it explains nothing")
        matrix, bias = self._solve(moments, min_source_variance * float(moments.count))
        self.weight.copy_(conv_weight(matrix, self.kernel_size))
        self.bias.copy_(bias)
        if self.kernel_size == 1:
            self.center.copy_(moments.mean_x)
        self._update_gram()
        # Division by an infinite variance: the unexplained share of a constant is 0
        self.variance.fill_(math.inf if constant_target else variance)
        self.ready = True

    def _window_calls(self, samples: int, interval: int, batch_images: int) -> float:
        """Return the time constant of the forgetting in calls, for the samples that an update adds every `interval`."""
        min_window = math.ceil(MIN_SAMPLES_PER_FEATURE * self.num_features / samples) + 1
        if self.window is not None and self.window < min_window and not self.ready:
            warn_once(
                self,
                f"{self.name}: a window of {self.window:g} calls holds fewer than {MIN_SAMPLES_PER_FEATURE} samples "
                f"for each of {self.num_features} regressors, so this pair's loss stays 0. With {batch_images} images "
                f"a call pass window={min_window} or more",
            )
        window = math.ceil(WINDOW_SAMPLES_PER_FEATURE * self.num_features * interval / samples)
        return self.window or max(MIN_WINDOW_CALLS, window)

    def _solve(self, moments: Moments, min_diagonal: float) -> tuple[Tensor, Tensor]:
        """Return matrix and intercept of the ridge regression; the mean of the target for a source without variance."""
        if not float(moments.xx.diagonal().mean()) > 0:
            return torch.zeros_like(moments.xy), moments.mean_y
        if self.ridge > 0:
            solution = solve_ridge_cholesky(moments, self.ridge, min_diagonal)
        else:
            solution = solve_ridge(moments, 0.0)
        return solution.weight, solution.bias

    def _update_gram(self) -> None:
        """Compute WᵀW in float64, except on MPS, which has no float64."""
        if self.use_gram:
            matrix = self.weight[:, :, 0, 0]
            matrix = matrix if matrix.device.type == "mps" else matrix.double()
            self.gram.copy_(matrix.T @ matrix)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._update_gram()
        self.ready = bool(self.variance > 0)


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
        """Return the loss of a batch; 0 for a constant target.

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
        one = torch.ones((), dtype=torch.float64, device=x.device)
        scale_sum = torch.stack([channel_scale(x).double().mean(), one]).to(group.device)
        group.sum_(scale_sum)
        if bool(scale_sum.isfinite().all()):
            self.source_scale.copy_(scale_sum[0] / scale_sum[1])
        self.target.update(y[:, :1], y)
        moments = self.target.all_reduce(group)
        variance = float(moments.yy.mean() / moments.count)
        if not variance > MIN_RELATIVE_STD**2 * float(moments.mean_y.square().mean()):
            warn_once(self, f"{self.name}: the teacher's feature is constant: the loss of this pair is 0")
            return
        self.mean.copy_(moments.mean_y)
        self.spread.fill_(math.sqrt(variance))
        self.ready = True

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.ready = bool(0 < self.spread < math.inf)


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
        name, ridge, refresh, window: As for `ClosedFormMap`. The peers' map has a small ridge, and moments without a
            window.

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
            source_channels, target_channels, kernel_size, name=name, ridge=ridge, refresh=refresh, window=window
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
