"""What peers say of the images that a loss has just shown them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.features import called_on
from knowiso_train.refinement.networks import Network

Logits = Callable[[Tensor], Tensor]


class Told:
    """What the peers say of the batch that they saw last, taken from the input of their classifiers.

    Args:
        peers: that the loss runs.
        heads: as for `fine_tune`.
        classes: of the network; peers whose classifiers tell others apart, and without heads, have no say. 0 asks none.
    """

    def __init__(self, peers: Sequence[Network], heads: Mapping[int, Logits] | None, classes: int) -> None:
        same = {i: partial(_linear, peer.classifier) for i, peer in enumerate(peers) if peer.speaks(classes)}
        given = {i: partial(_linear, head) if isinstance(head, nn.Linear) else head for i, head in (heads or {}).items()}
        self.heads: Mapping[int, Logits] = {} if not classes else (same if heads is None else given)
        self._peers = peers
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Told:
        for i in self.heads:
            self._handles.append(self._peers[i].classifier.register_forward_pre_hook(partial(self._keep, i), with_kwargs=True))
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
        self._inputs[i] = called_on(args, kwargs).detach()


def _linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """In the features' dtype and on their device, whatever the layer's."""
    return F.linear(features, layer.weight.to(features), None if layer.bias is None else layer.bias.to(features))
