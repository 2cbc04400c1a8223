"""Label-free scores of peers, and soft targets from their classifiers."""

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

SPLIT_FRACTIONS = (0.6, 0.2, 0.2)  # of the images that fit, select the ridge, and report
MIN_SPLIT_IMAGES = 8  # images in each of the three parts

PeerHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PeerScore:
    """Linear predictability between the pooled features of a network and of a peer, on held-out images.

    R² = 1 − FVU is the fraction of variance that the best linear map explains.

    Attributes:
        name: Name of the peer.
        r2_of_model: R² of the network's features, predicted from the peer's.
        r2_of_peer: R² of the peer's features, predicted from the network's.
        noise_floor: Permutation baseline: `r2_of_model` with the peer's features shuffled among the images.
        useful: True where `r2_of_model` exceeds the noise floor by `min_explained`.
        reason: Reason why the peer is left out. Empty: it is useful.
    """

    name: str
    r2_of_model: float
    r2_of_peer: float
    noise_floor: float
    useful: bool
    reason: str = ""


def score_peer(
    model_features: Tensor,
    peer_features: Tensor,
    name: str = "peer",
    *,
    min_explained: float = 0.2,
    seed: int = 0,
) -> PeerScore:
    """Score a peer by its features, without labels.

    Args:
        model_features: (N, D) pooled features of the network.
        peer_features: (N, D') pooled features of the peer, on the same images.
        name: Name of the peer.
        min_explained: R² above the noise floor of a useful peer. EfficientNet-Lites reach 0.27 (from 200 photographs
            of clothes) to 0.48 (from 3,068) with each other; networks trained on CIFAR-10 or digits 0.14 at most,
            untrained networks 0.04, noise 0.00.
        seed: Seed of split and permutation.

    Raises:
        DataError: Too few images.

    Examples:
        >>> shared = torch.randn(400, 4)
        >>> features, peer = (torch.cat([shared, torch.randn(400, 4)], 1) for _ in range(2))
        >>> score_peer(features, peer).useful, score_peer(features, torch.randn(400, 8)).useful
        (True, False)
    """
    masks = split_masks(len(model_features), seed)
    hashes = hash_unit(np.arange(len(model_features), dtype=np.int64), seed, Stream.PERMUTATION)
    shuffled = peer_features[torch.from_numpy(np.argsort(hashes))]
    r2_of_model = explained_share(peer_features, model_features, masks)
    r2_of_peer = explained_share(model_features, peer_features, masks)
    noise_floor = explained_share(shuffled, model_features, masks)
    useful = r2_of_model - max(noise_floor, 0.0) >= min_explained
    shares = f"{100 * r2_of_model:.1f} % of the network's features (noise floor {100 * noise_floor:.1f} %)"
    reason = f"explains {shares}, less than min_explained={min_explained:g} above it: left out"
    return PeerScore(name, r2_of_model, r2_of_peer, noise_floor, useful, "" if useful else reason)


def split_masks(num_images: int, seed: int = 0) -> list[Tensor]:
    """Split images into 60 % to fit, 20 % to select the ridge, and 20 % to report on.

    Returns:
        Three masks (num_images,).

    Raises:
        DataError: Too few images.
    """
    part = split_by_hash(np.arange(num_images, dtype=np.int64), SPLIT_FRACTIONS, seed)
    masks = [torch.from_numpy(part == i) for i in range(len(SPLIT_FRACTIONS))]
    if min(int(mask.sum()) for mask in masks) < MIN_SPLIT_IMAGES:
        raise DataError(
            f"{num_images} unlabeled images are too few to score a peer; give {10 * MIN_SPLIT_IMAGES} or more, "
            "better some hundred"
        )
    return masks


def explained_share(source: Tensor, target: Tensor, masks: Sequence[Tensor]) -> float:
    """Compute the held-out R² of a linear map from source to target features.

    Args:
        source: (N, D).
        target: (N, D').
        masks: (N,) masks of the rows that fit the map, select its ridge, and report.
    """
    fit, select = (row_moments(source[mask], target[mask]) for mask in masks[:2])
    solution = solve_ridge(fit, "search", select)
    x, y = source[masks[2]].double(), target[masks[2]].double()
    residual = (y - x @ solution.weight - solution.bias).square().sum()
    total = (y - y.mean(0)).square().sum()
    return float(1 - residual / total) if total > 0 else 0.0


def row_moments(x: Tensor, y: Tensor) -> Moments:
    """Compute second moments of pooled features (N, D) and (N, D'), in float64."""
    return batch_moments(x.double()[:, :, None, None], y.double()[:, :, None, None])


class PeerEnsemble:
    """Context manager that records the inputs of the peers' classifiers, for the soft targets of a batch.

    Args:
        peers: Networks that the consensus loss runs.
        heads: By index of the peer, a function from its pooled features to logits. None: the peers' own classifiers
            where they have the same number of classes.
        num_classes: Number of classes of the network. 0: no peer contributes.
    """

    def __init__(
        self, peers: Sequence[ClassifierModel], heads: Mapping[int, PeerHead] | None, num_classes: int
    ) -> None:
        if not num_classes:
            self.heads: dict[int, PeerHead] = {}
        elif heads is None:
            compatible = ((i, peer) for i, peer in enumerate(peers) if peer.has_compatible_head(num_classes))
            self.heads = {i: partial(_linear, peer.classifier) for i, peer in compatible}
        else:
            self.heads = {i: partial(_linear, h) if isinstance(h, nn.Linear) else h for i, h in heads.items()}
        self._peers = peers
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PeerEnsemble:
        for i in self.heads:
            hook = partial(self._record_input, i)
            self._handles.append(self._peers[i].classifier.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    @torch.no_grad()
    def soft_targets(self, model_logits: Tensor, temperature: float) -> Tensor:
        """Compute the logits of the mean probability of the network and its peers, on the peers' latest batch.

        The softmax of the result at the given temperature is the mean of the softmaxes at that temperature.

        Args:
            model_logits: (N, C) logits of the frozen network, on the same batch.
            temperature: Temperature of the softmax.

        Returns:
            (N, C), float32; the network's own logits where no peer contributes.
        """
        if not self.heads:
            return model_logits
        peer_logits = [head(self._inputs[i].to(model_logits.device).float()).float() for i, head in self.heads.items()]
        probabilities = [(logits / temperature).softmax(1) for logits in (model_logits.float(), *peer_logits)]
        return temperature * torch.stack(probabilities).mean(0).clamp_min(1e-12).log()

    def _record_input(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs[i] = call_input(args, kwargs).detach()


def _linear(layer: nn.Linear, features: Tensor) -> Tensor:
    # In the features' dtype and on their device: heads in closed form lie on the CPU in float32
    return F.linear(features, layer.weight.to(features), None if layer.bias is None else layer.bias.to(features))
