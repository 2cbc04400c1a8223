"""What a peer knows of a network, without labels: a peer that knows nothing is noticed before it can do harm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from knowiso_train.disentangle.ridge import solve_ridge
from knowiso_train.errors import DataError
from knowiso_train.statistics import Moments, batch_moments, hash_unit

FEWEST = 8  # images in each of the three parts


@dataclass(frozen=True)
class Worth:
    """Order-0 shares between the pooled features of a network and of a peer, on images that were used neither to fit nor to select.

    Attributes:
        name: of the peer.
        explains: share of the network's features that the peer explains.
        explained: share of the peer's features that the network explains.
        noise_floor: what the peer still "explains" when its rows are shuffled between the images.
        useful: whether `explains` is well above the floor.
        reason: why not, or an empty text.
    """

    name: str
    explains: float
    explained: float
    noise_floor: float
    useful: bool
    reason: str = ""


def worth(own: Tensor, peer: Tensor, name: str = "peer", *, least: float = 0.2, seed: int = 0) -> Worth:
    """Judge a peer by its features, without labels.

    Args:
        own: (N, D) pooled features of the network.
        peer: (N, D') of the peer, on the same images.
        name: of the peer.
        least: share above the noise floor that a useful peer explains. EfficientNet-Lites explain 0.27 (from 200 photographs of clothes) to 0.48
            (from 3,068) of each other; networks trained on CIFAR-10 or digits 0.14 of them at most, untrained ones 0.04, noise 0.00.
        seed: of split and shuffling.

    Raises:
        DataError: too few images to tell.

    Example:
        >>> shared = torch.randn(400, 4)
        >>> own, peer = (torch.cat([shared, torch.randn(400, 4)], 1) for _ in range(2))
        >>> worth(own, peer).useful, worth(own, torch.randn(400, 8)).useful
        (True, False)
    """
    masks = parts(len(own), seed)
    shuffled = peer[torch.from_numpy(np.argsort(hash_unit(np.arange(len(own), dtype=np.int64), seed, stream=3)))]
    explains, explained, floor = (explained_share(*pair, masks) for pair in ((peer, own), (own, peer), (shuffled, own)))
    useful = explains - max(floor, 0.0) >= least
    reason = "" if useful else f"explains {100 * explains:.1f} % of the network's features (noise floor {100 * floor:.1f} %): left out"
    return Worth(name, explains, explained, floor, useful, reason)


def parts(count: int, seed: int = 0) -> list[Tensor]:
    """Masks (count,) of the images to fit, to select and to report on.

    Raises:
        DataError: too few images.
    """
    part = np.searchsorted([0.6, 0.8], hash_unit(np.arange(count, dtype=np.int64), seed), side="right")
    masks = [torch.from_numpy(part == i) for i in range(3)]
    if min(int(mask.sum()) for mask in masks) < FEWEST:
        raise DataError(f"{count} unlabelled images are too few to tell what a peer knows; give {10 * FEWEST} or more, better some hundred")
    return masks


def explained_share(source: Tensor, target: Tensor, masks: list[Tensor]) -> float:
    """Share of the target's variance that a linear map from the source explains: fitted, its ridge selected, and measured on three sets of rows.

    Args:
        source: (N, D).
        target: (N, D').
        masks: three (N,) booleans.
    """
    fit, select = (_moments(source[mask], target[mask]) for mask in masks[:2])
    found = solve_ridge(fit, "search", select)
    x, y = source[masks[2]].double(), target[masks[2]].double()
    left = (y - x @ found.weight - found.bias).square().sum()
    total = (y - y.mean(0)).square().sum()
    return float(1 - left / total) if total > 0 else 0.0


def _moments(x: Tensor, y: Tensor) -> Moments:
    return batch_moments(x.double()[:, :, None, None], y.double()[:, :, None, None])
