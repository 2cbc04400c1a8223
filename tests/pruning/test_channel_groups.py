"""Channel groups: masks of input channels."""

from __future__ import annotations

import torch

from knowiso_train.pruning._channel_group import ChannelGroup


def test_units_of_a_group() -> None:
    group = ChannelGroup("x", 2, {"fc": torch.tensor([[0, 1], [2, 3]])})
    assert group.input_masks({"fc": 5}, [0])["fc"].tolist() == [False, False, True, True, True]
