"""A loss's own parameters in several processes, whether or not it went through DDP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.statistics import Group


def share_gradients(parameters: Sequence[nn.Parameter], group: Group) -> list[RemovableHandle]:
    """Set parameters to those of the first process, and give all the mean of their gradients from now on.

    Returns:
        Handles of the hooks; none where there is a single process or nothing to share.

    Example:
        >>> share_gradients([nn.Parameter(torch.zeros(2))], Group())
        []
    """
    if group.size == 1 or not parameters:
        return []
    with torch.no_grad():
        group.broadcast_([parameter.data for parameter in parameters])

    def mean(gradient: Tensor) -> Tensor:
        total = gradient.to(group.device, copy=True)
        group.sum_(total)
        return (total / group.size).to(gradient.device)

    return [parameter.register_hook(mean) for parameter in parameters if parameter.requires_grad]  # type: ignore[no-untyped-call]
