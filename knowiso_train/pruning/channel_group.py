"""A set of channels that go or stay together, who writes them and who reads them: what pruning decides about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ChannelGroup:
    """J units, each of them one channel, one channel of every group of a grouped convolution, or one head.

    Attributes:
        name: of the layer that writes it.
        size: J.
        readers: for each layer that reads it (J, m), the input channels of each unit there; a flatten repeats a channel.
        writers: for each layer that writes it (J, m), the output channels of each unit.
        kind: "channels" or "heads".

    Example:
        >>> group = ChannelGroup("0", 3, {"2": torch.tensor([[0], [1], [2]])}, {"0": torch.tensor([[0], [1], [2]])})
        >>> group.masks({"2": 4}, [1])["2"].tolist()
        [True, False, True, True]
    """

    name: str
    size: int
    readers: Mapping[str, Tensor]
    writers: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = "channels"

    def masks(self, inputs: Mapping[str, int], removed: Sequence[int]) -> dict[str, Tensor]:
        """For each reader, of so many input channels, which of them stay when these units go."""
        found = {}
        for name, channels in self.readers.items():
            found[name] = torch.ones(inputs[name], dtype=torch.bool)
            found[name][channels[list(removed)].flatten()] = False
        return found


def unit_columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(J, m · taps): the regressors of each unit, in the order of `ops.patch_rows`; a convolution reads a channel at every tap.

    Args:
        layer: linear, or a convolution of one group.
        inputs: (J, m), the unit's input channels.

    Example:
        >>> unit_columns(nn.Conv2d(2, 8, 3), torch.tensor([[0], [1]]))[1].tolist()
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    if isinstance(layer, nn.Linear):
        return inputs
    weight: Tensor = layer.weight  # type: ignore[assignment]
    channels, taps = weight.shape[1], weight[0, 0].numel()
    columns: Tensor = inputs[:, None, :] + channels * torch.arange(taps)[None, :, None]
    return columns.flatten(1)


def inputs_of_layer(layer: Any) -> int:
    """Input channels of a convolution, or of a linear layer.

    Example:
        >>> inputs_of_layer(nn.Linear(3, 2)), inputs_of_layer(nn.Conv2d(4, 2, 1))
        (3, 4)
    """
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
