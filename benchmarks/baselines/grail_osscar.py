"""What others do without gradients: batch-norm statistics computed anew, a channel-mixing ridge as GRAIL's, a local search as OSSCAR's.

Kept apart from the library on purpose: nothing is shared with what is compared.
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
    """Running means and variances of batch norms as averages over the batches, layer by layer as the network is now; nothing else changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the plain average
    for batch in batches:
        model(batch)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training


@torch.no_grad()
def input_grams(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], rows: int = 20, taps: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """(d, d) mean outer product, about the origin, of what each layer reads; d counts the taps of a kernel too, in the order of `weight.flatten(1)`.

    Args:
        model: the original.
        layers: convolutions of one group, linear layers.
        batches: of images.
        rows: per regressor, at positions drawn at random.
        taps: False for channels alone, d = C, at all positions.
        seed: of the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Any] = dict.fromkeys(layers, 0)
    seen: dict[str, int] = dict.fromkeys(layers, 0)
    images = sum(len(batch) for batch in batches)

    def add(name: str, layer: Any, x: Tensor) -> None:
        found = (
            _sample_patches(layer, x, math.ceil(rows * layer.weight[0].numel() / images), generator)
            if taps
            else _flatten_positions(x)
        )
        total[name] = total[name] + (found.T @ found).double()
        seen[name] += len(found)

    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(lambda m, x, name=name: add(name, m, x[0])).remove)
        for batch in batches:
            model(batch)
    return {name: total[name] / seen[name] for name in layers}


def _flatten_positions(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)


def _sample_patches(layer: Any, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C·k·k, L)
    at = torch.randperm(patches.shape[2], generator=generator)[:positions]
    return patches[:, :, at].movedim(1, 2).flatten(0, 1)


def grail_weights(weight: Tensor, gram: Tensor, kept: Sequence[int], ridge: float = 1e-3) -> Tensor:
    """GRAIL's compensation (Tang et al. 2026, arXiv 2602.23795): what reads the channels reads their ridge reconstruction from the kept ones.

    Args:
        weight: of the consumer, (out, C, ...).
        gram: of its C input channels in the original network, (C, C).
        kept: channels.
        ridge: relative to the mean square of the kept channels.

    Returns:
        (out, K, ...): W'[:, k] = Σ_c W[:, c] M[c, k], with M = G[:, K] (G[K, K] + λI)⁻¹.
    """
    at = torch.as_tensor(kept)
    inner = gram[at][:, at]
    damped = inner + ridge * inner.diagonal().mean() * torch.eye(len(at), dtype=gram.dtype)
    reconstruction = torch.linalg.solve(damped, gram[at]).T  # (C, K)
    return torch.einsum("oc...,ck->ok...", weight.double(), reconstruction).to(weight.dtype)


class OsscarRegression:
    """A consumer's output as a least-squares problem in a subset of its input channels, damped as OSSCAR does (Meng et al. 2024, 2403.12983).

    Args:
        weight: of the consumer, (out, C, ...).
        gram: of its inputs with all taps, (C·taps, C·taps).
        ridge: relative; added to the Gram matrix's diagonal.
    """

    def __init__(self, weight: Tensor, gram: Tensor, ridge: float = 1e-4) -> None:
        self.shape, self.channels = weight.shape, weight.shape[1]
        self.taps = weight[0, 0].numel()
        self.weight = weight.detach().flatten(1).double().T  # (d, out)
        self.gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.target = self.gram @ self.weight

    def columns(self, channels: Sequence[int]) -> Tensor:
        return (torch.as_tensor(channels)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def solve(self, kept: Sequence[int]) -> Tensor:
        """(K·taps, out) best weights for what is kept."""
        at = self.columns(kept)
        return torch.cholesky_solve(self.target[at], torch.linalg.cholesky(self.gram[at][:, at]))

    def error(self, kept: Sequence[int]) -> float:
        """Mean square of what the kept channels cannot give."""
        at = self.columns(kept)
        return float((self.weight * self.target).sum() - (self.solve(kept) * self.target[at]).sum())

    def losses(self, kept: Sequence[int]) -> Tensor:
        """(K,) rise of the error when a kept channel goes."""
        at = self.columns(kept)
        factor = torch.linalg.cholesky(self.gram[at][:, at])
        inverse = torch.cholesky_inverse(factor)
        weights = (inverse @ self.target[at]).unflatten(0, (len(kept), self.taps))
        own = torch.arange(len(at)).view(len(kept), self.taps)
        blocks = inverse[own[:, :, None], own[:, None, :]]
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def gains(self, kept: Sequence[int], offered: Sequence[int]) -> Tensor:
        """(M,) fall of the error when one of the offered channels joins."""
        at, new = self.columns(kept), self.columns(offered)
        # (k, m)
        across = torch.cholesky_solve(self.gram[at][:, new], torch.linalg.cholesky(self.gram[at][:, at]))
        left = (self.target[new] - across.T @ self.target[at]).unflatten(0, (len(offered), self.taps))
        rest = self.gram[new][:, new] - self.gram[new][:, at] @ across
        own = torch.arange(len(new)).view(len(offered), self.taps)
        return (left * torch.linalg.solve(rest[own[:, :, None], own[:, None, :]], left)).sum((1, 2))

    def search(self, width: int, tries: int = 4, swaps: int = 40) -> list[int]:
        """Channels to keep: greedy removal down to `width`, some at a time where there are many, then the best exchange until none helps."""
        kept = list(range(self.channels))
        while len(kept) > width:
            goes = min(len(kept) - width, max(1, len(kept) // 64))
            gone = set(self.losses(kept).argsort()[:goes].tolist())
            kept = [channel for at, channel in enumerate(kept) if at not in gone]
        for _ in range(swaps if 0 < width < self.channels else 0):
            better = self._swapped(kept, tries)
            if better is None:
                break
            kept = better
        return sorted(kept)

    def _swapped(self, kept: list[int], tries: int) -> list[int] | None:
        losses = self.losses(kept)
        outside = sorted(set(range(self.channels)) - set(kept))
        found: tuple[float, list[int]] | None = None
        for j in losses.argsort()[:tries].tolist() if len(kept) > 1 else []:
            rest = kept[:j] + kept[j + 1 :]
            gain, i = self.gains(rest, outside).max(0)
            change = float(losses[j] - gain)
            if change < -1e-9 * abs(float(losses[j])) and (found is None or change < found[0]):
                found = change, [*rest, outside[int(i)]]
        return None if found is None else found[1]

    def weights(self, kept: Sequence[int]) -> Tensor:
        """(out, K, ...) as the pruned consumer takes them."""
        return (
            self.solve(kept).T.unflatten(1, (len(kept), self.taps)).reshape(self.shape[0], len(kept), *self.shape[2:])
        )


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        own = model.get_submodule(name).weight
        if own.shape != weight.shape:
            raise ValueError(f"{name}: expected {tuple(own.shape)}, got {tuple(weight.shape)}")
        own.copy_(weight)
