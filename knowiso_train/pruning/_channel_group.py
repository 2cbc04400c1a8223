"""Group of channels or heads that must be removed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Group of J units: channels, channels at the same place of every convolution group, or attention heads.

    Attributes:
        name: Name of the layer that produces the group.
        size: J.
        consumers: For each layer that consumes the group (J, m), the input channels of each unit. A flatten repeats
            a channel.
        producers: For each layer that produces the group (J, m), the output channels of each unit.
        kind: "channels" or "heads".

    Examples:
        >>> units = torch.tensor([[0], [1], [2]])
        >>> ChannelGroup("0", 3, {"2": units}, {"0": units}).input_masks({"2": 4}, [1])["2"].tolist()
        [True, False, True, True]
    """

    name: str
    size: int
    consumers: Mapping[str, Tensor]
    producers: Mapping[str, Tensor] = field(default_factory=dict)
    kind: Literal["channels", "heads"] = "channels"

    def input_masks(self, num_inputs: Mapping[str, int], removed: Sequence[int]) -> dict[str, Tensor]:
        """Return the mask of remaining input channels of each consumer, for its number of input channels."""
        masks = {}
        for name, channels in self.consumers.items():
            masks[name] = torch.ones(num_inputs[name], dtype=torch.bool)
            masks[name][channels[list(removed)].flatten()] = False
        return masks
