"""Closed-form map of the distillation loss."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.distillation._feature_map import FeatureMap, replaced, warn_once
from knowiso_train.ops.im2col import conv_weight
from knowiso_train.ops.residual_energy import gram_residual_energy, residual_energy
from knowiso_train.regression.moments import MIN_RELATIVE_STD, Moments, RunningMoments
from knowiso_train.regression.ridge import solve_ridge, solve_ridge_cholesky
from knowiso_train.utils.distributed import ProcessGroup

# Effective samples per regressor before a closed form is used; fewer would overfit
MIN_SAMPLES_PER_FEATURE = 10
# Samples per regressor from one batch: for 1×1 maps, and for larger maps. The moments of larger maps take most of the
# time of the loss. Half as many samples made students less accurate after one epoch, twice as many did not help
BATCH_SAMPLES_PER_FEATURE, BATCH_SAMPLES_PER_PATCH_FEATURE = 4, 2
# After warm-up, one randomly chosen call in every 2 updates the moments; consecutive batches are redundant
UPDATE_INTERVAL = 2
# Effective samples per regressor in the default window of the moments
WINDOW_SAMPLES_PER_FEATURE = 40
# Lower bound of the default window, in calls
MIN_WINDOW_CALLS = 20
# Ridge at the first call, its lower bound, and the calls after which it is half as large. With a small ridge the map
# also follows directions of little variance, along which its gradient is large and changes with every solve: students
# of short trainings were worse. With a large ridge these directions are never taught: students of long trainings were
# worse. Chosen on validation images, see docs/benchmarks.md#distillation
START_RIDGE, MIN_RIDGE, RIDGE_HALVING_CALLS = 0.3, 0.01, 500


def decaying_ridge(call: int) -> float:
    """Return the relative ridge `max(0.01, 0.3 / (1 + t / 500))` of a solve at call t of a training.

    Examples:
        >>> [round(decaying_ridge(call), 3) for call in (0, 1000, 20_000)]
        [0.3, 0.1, 0.01]
    """
    return max(MIN_RIDGE, START_RIDGE / (1 + call / RIDGE_HALVING_CALLS))


def updates_moments(call: int) -> bool:
    """Return whether the batch of a call updates the moments.

    One call of every `UPDATE_INTERVAL` is drawn at random, since loops may alternate between views or loaders. The
    draw depends on the call alone, so that it is the same in all processes.

    Examples:
        >>> [call for call in range(12) if updates_moments(call)]
        [1, 2, 4, 6, 8, 11]
    """
    return random.Random(call // UPDATE_INTERVAL).randrange(UPDATE_INTERVAL) == call % UPDATE_INTERVAL


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
        ridge: Ridge ρ ≥ 0, relative to the source's mean variance. "auto": see `decaying_ridge`.
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
        ridge: float | Literal["auto"] = 1e-3,
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
        """Return the loss of a batch under the map of earlier batches; 0 until the map is solved, and of no image.

        Args:
            x: Student feature, with gradient.
            y: Target feature on the same grid, without gradient.
            update: Solve the map where it is due, then add the batch to the moments: until the map is solved every
                batch, afterwards one in `UPDATE_INTERVAL`. Collective at a solve.
        """
        if update and self.solve_due:
            self.solve()
        loss = self.unexplained(x, y) if self.ready and y.numel() else 0 * x.float().sum()
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
        # New tensors: the loss of an earlier call may still need the old ones in its backward pass
        self.weight = replaced(self.weight, conv_weight(matrix, self.kernel_size))
        self.bias = replaced(self.bias, bias)
        if self.kernel_size == 1:
            self.center = replaced(self.center, moments.mean_x)
        self._update_gram()
        # Division by an infinite variance: the unexplained share of a constant is 0
        self.variance = torch.full_like(self.variance, math.inf if constant_target else variance)
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
        ridge = decaying_ridge(self.calls) if self.ridge == "auto" else self.ridge
        solution = solve_ridge_cholesky(moments, ridge, min_diagonal) if ridge > 0 else solve_ridge(moments, 0.0)
        return solution.weight, solution.bias

    def _update_gram(self) -> None:
        """Compute WᵀW in float64, except on MPS, which has no float64."""
        if self.use_gram:
            matrix = self.weight[:, :, 0, 0]
            matrix = matrix if matrix.device.type == "mps" else matrix.double()
            self.gram = replaced(self.gram, matrix.T @ matrix)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._update_gram()
        self.ready = bool(self.variance > 0)
