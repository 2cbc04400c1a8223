"""Gradients that were made in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.errors import OptionError


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient waits for its factor: before the mean is taken, float16 would overflow, and a factor of 1 / n would vanish in it."""
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(kept: Tensor, upstream: Tensor) -> Tensor:
    """A gradient from the forward pass times what arrives at its scalar: in place where the graph goes with this backward, else a copy.

    A copy is as large as the feature, and the only large thing that such a backward would make.
    """
    if type(kept) is Tensor and torch.is_grad_enabled():
        raise OptionError(
            "a gradient of a gradient through this operation is not made: create_graph=True, as gradient penalties and Hessians need it. Leave the "
            "isomorphism loss out of what is differentiated twice"
        )
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    factor = upstream.to(kept.dtype)
    if type(kept) is not Tensor or keeps_graph is None or keeps_graph():  # another type: being traced
        return kept * factor
    return kept.mul_(factor)
