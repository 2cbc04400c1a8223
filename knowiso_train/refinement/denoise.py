"""The part of a network's features that its peers confirm, as a linear map of the features themselves: own → peers → own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from knowiso_train.disentangle.ridge import LinearMap, solve_ridge
from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.refinement.views import Scaling
from knowiso_train.statistics import Moments, batch_moments, hash_unit


@dataclass(frozen=True)
class Denoiser:
    """`matrix @ x + shift`, of a network's own channels.

    Attributes:
        matrix: (D, D), float64.
        shift: (D,), float64.
        ridges: chosen, own → peers and peers → own.
    """

    matrix: Tensor
    shift: Tensor
    ridges: tuple[float, float]

    def __call__(self, features: Tensor) -> Tensor:
        """Rows (N, D)."""
        return features.double() @ self.matrix.T + self.shift


def denoiser(own: Tensor, peers: Sequence[Tensor], *, ridge: float | str = "search", seed: int = 0) -> Denoiser:
    """The order-0 isomorphic part of a network's features: what its peers know of them, told from the features themselves. No labels.

    Two regressions, own → peers and peers → own, one after the other. With `ridge="search"` both ridges are chosen on held-out rows;
    a peer that is the network itself then gives the identity, and a peer that knows nothing gives little more than the mean.

    Args:
        own: (N, D) pooled features of the network.
        peers: (N, D_i) of each peer, on the same images.
        ridge: relative ridge of both regressions, or "search".
        seed: of the split, 75 % to fit and 25 % to select on.

    Raises:
        ShapeError: no peers, or other numbers of images.
        OptionError: a ridge without meaning.

    Example:
        >>> x = torch.randn(200, 3)
        >>> torch.allclose(denoiser(x, [x]).matrix, torch.eye(3).double(), atol=1e-4)
        True
    """
    if not peers or any(len(peer) != len(own) for peer in peers):
        raise ShapeError(f"expected peers on the same {len(own)} images, got {[tuple(peer.shape) for peer in peers]}")
    if ridge != "search" and (isinstance(ridge, str) or not ridge >= 0):
        raise OptionError(f'ridge must be "search" or a number >= 0, got {ridge!r}')
    scalings = [Scaling.of(rows, "the features") for rows in peers]
    other = torch.cat([scaling(rows) for scaling, rows in zip(scalings, peers, strict=True)], 1)
    rows = own.double()
    held = torch.from_numpy(hash_unit(np.arange(len(own), dtype=np.int64), seed) >= 0.75)
    there, back = _map(rows, other, held, ridge), _map(other, rows, held, ridge)
    matrix = (there.weight @ back.weight).T
    return Denoiser(matrix, back.bias + back.weight.T @ there.bias, (there.ridge, back.ridge))


def _map(x: Tensor, y: Tensor, held: Tensor, ridge: float | str) -> LinearMap:
    def moments(mask: Tensor) -> Moments:
        return batch_moments(x[mask][:, :, None, None], y[mask][:, :, None, None])

    if ridge != "search":
        return solve_ridge(batch_moments(x[:, :, None, None], y[:, :, None, None]), ridge)
    return solve_ridge(moments(~held), "search", moments(held))
