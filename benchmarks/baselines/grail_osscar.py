"""Gradient-free baselines: recomputed batch-norm statistics, GRAIL's ridge compensation, OSSCAR's local search.

They share no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of batch norms to averages over the batches; change nothing else.

    Statistics are those of the current network, with its batch norms in training mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    previous = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: cumulative average
    for batch in batches:
        model(batch)
    for norm, (momentum, training) in zip(norms, previous, strict=True):
        norm.momentum, norm.training = momentum, training


@torch.no_grad()
def input_grams(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], rows: int = 20, taps: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Compute the mean outer product (about the origin) of each layer's input, (d, d).

    Args:
        model: Original network.
        layers: Names of convolutions of one group and of linear layers.
        batches: Images.
        rows: Samples per feature, at random positions.
        taps: Count kernel positions as features, in the order of `weight.flatten(1)`. False: channels only, d = C,
            at all positions.
        seed: Seed of the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Any] = dict.fromkeys(layers, 0)
    counts: dict[str, int] = dict.fromkeys(layers, 0)
    images = sum(len(batch) for batch in batches)

    def add(name: str, layer: Any, x: Tensor) -> None:
        samples = (
            _sample_patches(layer, x, math.ceil(rows * layer.weight[0].numel() / images), generator)
            if taps
            else _flatten_positions(x)
        )
        total[name] = total[name] + (samples.T @ samples).double()
        counts[name] += len(samples)

    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(lambda m, x, name=name: add(name, m, x[0])).remove)
        for batch in batches:
            model(batch)
    return {name: total[name] / counts[name] for name in layers}


def _flatten_positions(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)


def _sample_patches(layer: Any, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C·k·k, L)
    positions_drawn = torch.randperm(patches.shape[2], generator=generator)[:positions]
    return patches[:, :, positions_drawn].movedim(1, 2).flatten(0, 1)


def grail_weights(weight: Tensor, gram: Tensor, kept: Sequence[int], ridge: float = 1e-3) -> Tensor:
    """Compute GRAIL's compensated weights (Tang et al. 2026, arXiv 2602.23795).

    The consumer reads the ridge reconstruction of all channels from the kept ones.

    Args:
        weight: Weight of the consumer, (out, C, ...).
        gram: Gram matrix of its C input channels in the original network, (C, C).
        kept: Indices of the kept channels.
        ridge: Ridge relative to the mean square of the kept channels.

    Returns:
        (out, K, ...): W'[:, k] = Σ_c W[:, c] M[c, k], with M = G[:, K] (G[K, K] + λI)⁻¹.
    """
    indices = torch.as_tensor(kept)
    inner = gram[indices][:, indices]
    damped = inner + ridge * inner.diagonal().mean() * torch.eye(len(indices), dtype=gram.dtype)
    reconstruction = torch.linalg.solve(damped, gram[indices]).T  # (C, K)
    return torch.einsum("oc...,ck->ok...", weight.double(), reconstruction).to(weight.dtype)


class OsscarRegression:
    """Least squares of a consumer's output on a subset of its input channels, damped as in OSSCAR.

    Source: Meng et al. 2024, arXiv 2403.12983.

    Args:
        weight: Weight of the consumer, (out, C, ...).
        gram: Gram matrix of its inputs with all kernel positions, (C·taps, C·taps).
        ridge: Ridge relative to the mean diagonal of the Gram matrix.
    """

    def __init__(self, weight: Tensor, gram: Tensor, ridge: float = 1e-4) -> None:
        self.shape, self.channels = weight.shape, weight.shape[1]
        self.taps = weight[0, 0].numel()
        self.weight = weight.detach().flatten(1).double().T  # (d, out)
        self.gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.target = self.gram @ self.weight

    def columns(self, channels: Sequence[int]) -> Tensor:
        """Return the indices of the features of some channels."""
        return (torch.as_tensor(channels)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def solve(self, kept: Sequence[int]) -> Tensor:
        """Compute the optimal weights for the kept channels, (K·taps, out)."""
        columns = self.columns(kept)
        return torch.cholesky_solve(self.target[columns], torch.linalg.cholesky(self.gram[columns][:, columns]))

    def error(self, kept: Sequence[int]) -> float:
        """Compute the squared error of the optimal weights for the kept channels."""
        columns = self.columns(kept)
        return float((self.weight * self.target).sum() - (self.solve(kept) * self.target[columns]).sum())

    def losses(self, kept: Sequence[int]) -> Tensor:
        """Compute the rise of the error for the removal of each kept channel, (K,)."""
        columns = self.columns(kept)
        factor = torch.linalg.cholesky(self.gram[columns][:, columns])
        inverse = torch.cholesky_inverse(factor)
        weights = (inverse @ self.target[columns]).unflatten(0, (len(kept), self.taps))
        block_columns = torch.arange(len(columns)).view(len(kept), self.taps)
        blocks = inverse[block_columns[:, :, None], block_columns[:, None, :]]
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def gains(self, kept: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """Compute the fall of the error for the addition of each candidate channel, (M,)."""
        columns, new = self.columns(kept), self.columns(candidates)
        # (K·taps, M·taps): regression of the candidates on the kept features
        across = torch.cholesky_solve(self.gram[columns][:, new], torch.linalg.cholesky(self.gram[columns][:, columns]))
        residual_target = (self.target[new] - across.T @ self.target[columns]).unflatten(
            0, (len(candidates), self.taps)
        )
        # Schur complement: Gram matrix of what the kept features do not explain
        schur = self.gram[new][:, new] - self.gram[new][:, columns] @ across
        block_columns = torch.arange(len(new)).view(len(candidates), self.taps)
        return (
            residual_target
            * torch.linalg.solve(schur[block_columns[:, :, None], block_columns[:, None, :]], residual_target)
        ).sum((1, 2))

    def search(self, width: int, tries: int = 4, swaps: int = 40) -> list[int]:
        """Select the channels to keep: greedy removal down to `width`, then the best exchange until none helps."""
        kept = list(range(self.channels))
        while len(kept) > width:
            num_removed = min(len(kept) - width, max(1, len(kept) // 64))
            removed = set(self.losses(kept).argsort()[:num_removed].tolist())
            kept = [channel for i, channel in enumerate(kept) if i not in removed]
        for _ in range(swaps if 0 < width < self.channels else 0):
            exchanged = self._swapped(kept, tries)
            if exchanged is None:
                break
            kept = exchanged
        return sorted(kept)

    def _swapped(self, kept: list[int], tries: int) -> list[int] | None:
        """Return the kept channels after the best exchange, or None if no exchange reduces the error."""
        losses = self.losses(kept)
        outside = sorted(set(range(self.channels)) - set(kept))
        best: tuple[float, list[int]] | None = None
        for j in losses.argsort()[:tries].tolist() if len(kept) > 1 else []:
            remaining = kept[:j] + kept[j + 1 :]
            gain, i = self.gains(remaining, outside).max(0)
            change = float(losses[j] - gain)
            if change < -1e-9 * abs(float(losses[j])) and (best is None or change < best[0]):
                best = change, [*remaining, outside[int(i)]]
        return None if best is None else best[1]

    def weights(self, kept: Sequence[int]) -> Tensor:
        """Return the optimal weights in the shape of the pruned consumer, (out, K, ...)."""
        return (
            self.solve(kept).T.unflatten(1, (len(kept), self.taps)).reshape(self.shape[0], len(kept), *self.shape[2:])
        )


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the layers of a model, by name."""
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        if parameter.shape != weight.shape:
            raise ValueError(f"{name}: expected {tuple(parameter.shape)}, got {tuple(weight.shape)}")
        parameter.copy_(weight)
