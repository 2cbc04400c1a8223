"""Scores and soft targets of peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.errors import DataError
from knowiso_train.features.hooks import call_input
from knowiso_train.refinement.models import ClassifierModel
from knowiso_train.regression.moments import Moments, batch_moments
from knowiso_train.regression.ridge import solve_ridge
from knowiso_train.utils.hashing import Stream, hash_unit, split_by_hash

MIN_SPLIT_IMAGES = 8  # images in each of the three parts

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PeerScore:
    """Order-0 shares between the pooled features of a network and of a peer, on images that were used neither to fit nor to select.

    Attributes:
        name: of the peer.
        r2_of_model: share of the network's features that the peer explains.
        r2_of_peer: share of the peer's features that the network explains.
        noise_floor: what the peer still "explains" when its rows are shuffled between the images.
        useful: whether `r2_of_model` is well above the floor.
        reason: why not, or an empty text.
    """

    name: str
    r2_of_model: float
    r2_of_peer: float
    noise_floor: float
    useful: bool
    reason: str = ""


def score_peer(
    own: Tensor, peer: Tensor, name: str = "peer", *, min_explained: float = 0.2, seed: int = 0
) -> PeerScore:
    """Judge a peer by its features, without labels.

    Args:
        own: (N, D) pooled features of the network.
        peer: (N, D') of the peer, on the same images.
        name: of the peer.
        min_explained: share above the noise floor that a useful peer explains. EfficientNet-Lites explain 0.27 (from 200
            photographs of clothes) to 0.48
            (from 3,068) of each other; networks trained on CIFAR-10 or digits 0.14 of them at most, untrained ones
            0.04, noise 0.00.
        seed: of split and shuffling.

    Raises:
        DataError: too few images to tell.

    Example:
        >>> shared = torch.randn(400, 4)
        >>> own, peer = (torch.cat([shared, torch.randn(400, 4)], 1) for _ in range(2))
        >>> score_peer(own, peer).useful, score_peer(own, torch.randn(400, 8)).useful
        (True, False)
    """
    masks = split_masks(len(own), seed)
    shuffled = peer[
        torch.from_numpy(np.argsort(hash_unit(np.arange(len(own), dtype=np.int64), seed, Stream.PERMUTATION)))
    ]
    explains, explained, floor = (explained_share(*pair, masks) for pair in ((peer, own), (own, peer), (shuffled, own)))
    useful = explains - max(floor, 0.0) >= min_explained
    reason = (
        ""
        if useful
        else f"explains {100 * explains:.1f} % of the network's features (noise floor {100 * floor:.1f} %): left out"
    )
    return PeerScore(name, explains, explained, floor, useful, reason)


def split_masks(count: int, seed: int = 0) -> list[Tensor]:
    """Masks (count,) of the images to fit, to select and to report on.

    Raises:
        DataError: too few images.
    """
    part = split_by_hash(np.arange(count, dtype=np.int64), (0.6, 0.2, 0.2), seed)
    masks = [torch.from_numpy(part == i) for i in range(3)]
    if min(int(mask.sum()) for mask in masks) < MIN_SPLIT_IMAGES:
        raise DataError(
            f"{count} unlabeled images are too few to tell what a peer knows; give {10 * MIN_SPLIT_IMAGES} or more, better some hundred"
        )
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


class PeerEnsemble:
    """What the peers say of the batch that they saw last, taken from the input of their classifiers.

    Args:
        peers: that the loss runs.
        heads: as for `fine_tune`.
        classes: of the network; peers whose classifiers tell others apart, and without heads, have no say. 0 asks none.
    """

    def __init__(self, peers: Sequence[ClassifierModel], heads: Mapping[int, Logits] | None, classes: int) -> None:
        same = {
            i: partial(_linear, peer.classifier) for i, peer in enumerate(peers) if peer.has_compatible_head(classes)
        }
        given = {
            i: partial(_linear, head) if isinstance(head, nn.Linear) else head for i, head in (heads or {}).items()
        }
        self.heads: Mapping[int, Logits] = {} if not classes else (same if heads is None else given)
        self._peers = peers
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PeerEnsemble:
        for i in self.heads:
            self._handles.append(
                self._peers[i].classifier.register_forward_pre_hook(partial(self._keep, i), with_kwargs=True)
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()

    @torch.no_grad()
    def targets(self, own: Tensor, temperature: float) -> Tensor:
        """Logits of the mean probability, at this temperature, of the frozen original and all peers that have a say."""
        if not self.heads:
            return own
        every = [own.float(), *(head(self._inputs[i].to(own.device).float()).float() for i, head in self.heads.items())]
        mean = torch.stack([(logits / temperature).softmax(1) for logits in every]).mean(0)
        return temperature * mean.clamp_min(1e-12).log()

    def _keep(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs[i] = call_input(args, kwargs).detach()


def _linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """In the features' dtype and on their device, whatever the layer's."""
    return F.linear(features, layer.weight.to(features), None if layer.bias is None else layer.bias.to(features))
