"""What layers compute and hold, as a function of the widths that pruning chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.channel_group import ChannelGroup


def layer_places(model: nn.Module, run: Callable[[], Any], images: int) -> dict[str, float]:
    """For each convolution and linear layer that runs, the positions at which it works for one image, over all its calls.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> layer_places(model, lambda: model(torch.zeros(5, 3, 4, 4)), 5)
        {'0': 4.0, '2': 1.0}
    """
    found: dict[str, float] = {}

    def counting(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            found[name] = found.get(name, 0.0) + output.numel() / (images * len(layer.weight))

        return hook

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(counting(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def count_macs(model: nn.Module, run: Callable[[], Any], images: int) -> float:
    """Multiply-adds of convolutions and linear layers for one image, their biases left out.

    Example:
        >>> model = nn.Conv2d(3, 4, 3)
        >>> count_macs(model, lambda: model(torch.zeros(1, 3, 4, 4)), 1)
        432.0
    """
    modules: dict[str, Any] = dict(model.named_modules())
    return float(sum(places * modules[name].weight.numel() for name, places in layer_places(model, run, images).items()))


def affordable(model: nn.Module, images: Calibration, work: float, within: tuple[int, int], passes: int = 1) -> int:
    """Images for which so many passes of a network stay within a budget, at least and at most so many.

    Args:
        model: the network.
        images: one of them is run.
        work: multiply-adds of all passes together.
        within: at least and at most.
        passes: that all these images take.

    Example:
        >>> images = Calibration([torch.zeros(2, 3, 4, 4)])  # 432 multiply-adds each
        >>> [affordable(nn.Conv2d(3, 4, 3), images, work, (4, 64)) for work in (1e2, 1e4, 1e6)]
        [4, 23, 64]
    """
    each = count_macs(model, partial(images.run, model, images.some(1)), 1)
    return max(within[0], min(within[1], int(work / (each * passes + 1))))


@dataclass(frozen=True)
class LayerCost:
    """One layer: `unit · (inputs - what is gone) · (outputs - what is gone)`; of a depthwise convolution `unit · (outputs - what is gone)`.

    Attributes:
        unit: cost of one input channel for one output channel.
        inputs: of one group of the convolution.
        outputs: output channels.
        reads: channels of one group that a unit of each channel group stands for.
        writes: output channels that a unit stands for.
    """

    unit: float
    inputs: float
    outputs: float
    reads: Mapping[str, float] = field(default_factory=dict)
    writes: Mapping[str, float] = field(default_factory=dict)

    def at(self, gone: Mapping[str, int]) -> float:
        """Cost when so many units of each channel group are gone."""
        inputs = self.inputs - sum(times * gone.get(name, 0) for name, times in self.reads.items())
        outputs = self.outputs - sum(times * gone.get(name, 0) for name, times in self.writes.items())
        return self.unit * inputs * outputs


def layer_costs(model: nn.Module, groups: Sequence[ChannelGroup], places: Mapping[str, float], kind: str = "macs") -> dict[str, LayerCost]:
    """Cost of every layer in terms of the channel groups.

    Args:
        model: the network.
        groups: its channel groups.
        places: from `layer_places`.
        kind: "macs" for multiply-adds of an image, "params" for weights.

    Raises:
        OptionError: another kind.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
        >>> every = torch.arange(4)[:, None]
        >>> costs = layer_costs(model, [ChannelGroup("0", 4, {"1": every}, {"0": every})], {"0": 10.0, "1": 10.0})
        >>> sum(cost.at({}) for cost in costs.values()), sum(cost.at({"0": 2}) for cost in costs.values())
        (200.0, 100.0)
    """
    if kind not in ("macs", "params"):
        raise OptionError(f'kind must be "macs" or "params", got {kind!r}')
    found = {}
    for name, places_of in places.items():
        layer: Any = model.get_submodule(name)
        weight, convs = layer.weight, getattr(layer, "groups", 1)
        unit = (places_of if kind == "macs" else 1.0) * weight[0, 0].numel()
        depthwise = convs > 1 and weight.shape[1] == 1
        reads = {} if depthwise else {g.name: g.readers[name].shape[1] / convs for g in groups if name in g.readers}
        writes = {g.name: float(g.writers[name].shape[1]) for g in groups if name in g.writers}
        found[name] = LayerCost(unit, weight.shape[1], weight.shape[0], reads, writes)
    return found
