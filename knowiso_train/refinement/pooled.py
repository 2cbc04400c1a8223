"""The layer that gives a network's classifier what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError
from knowiso_train.features import bare, called_on, device_of, inputs_of, named_layers
from knowiso_train.refinement.networks import Network

USUAL = "global_pool"  # in most of timm's networks
PROBED = 2  # images


@torch.no_grad()
def pooled_layer(net: Network, batch: Any) -> str:
    """Name of the first layer whose output is the classifier's input; `global_pool` where there is one.

    Args:
        net: in eval mode.
        batch: of images.

    Raises:
        OptionError: there is none, since the network's own `forward` pools.

    Example:
        >>> from knowiso_train.refinement.networks import network
        >>> small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> pooled_layer(network(small, "small"), torch.rand(2, 3, 8, 8))
        '2'
    """
    layers = named_layers(bare(net.model))
    if USUAL in layers:
        return USUAL
    emitted: list[tuple[str, Tensor]] = []
    found: list[str] = []

    def finished(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                emitted.append((name, output))

        return hook

    def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = called_on(args, kwargs)
        found.extend(name for name, output in emitted if output.shape == x.shape and output.data_ptr() == x.data_ptr())

    handles = [layer.register_forward_hook(finished(name)) for name, layer in layers.items()]
    handles.append(net.classifier.register_forward_pre_hook(read, with_kwargs=True))
    images = inputs_of(batch)[:PROBED].to(device_of(net.model) or "cpu")
    try:
        net.model(images if net.transform is None else net.transform(images))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise OptionError(
            f"{net.name} has no layer that emits what its classifier {net.head!r} reads; say with FineTuning(layers=[...]), and peer_layers for the "
            "peers, where it is to agree with them"
        )
    return found[0]
