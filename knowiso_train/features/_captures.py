"""Captures of a layer's tensors during a forward pass, which the hooks write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class CapturedTensor(NamedTuple):
    """Capture of one call of a layer; `original` is None if overwriting cannot be detected."""

    tensor: Tensor
    original: Tensor | None
    version: int
    training: bool
    cloned: bool

    @property
    def overwritten(self) -> bool:
        """True if the layer's tensor was written to after the capture."""
        return self.original is not None and self.original._version != self.version


class ForwardState:
    """State of one network's forward pass.

    Attributes:
        root: Unwrapped network.
        grad: Grad mode at the start of the pass. None: the root was not called.
        autocast_dtype: Half precision of autocast at a captured layer, whose output may be in float32. None: no
            autocast, or compiled code.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.grad: bool | None = None
        self.autocast_dtype: torch.dtype | None = None


class CaptureBuffer:
    """Captures of one layer, written by its hook.

    torch.compile traces `append` as part of the hook. Under compilation it therefore only assigns and appends: a branch
    on earlier captures would become a guard and recompile the network in the next step.
    """

    def __init__(self, repeated: str, clone: bool | str) -> None:
        self.repeated = repeated
        self.clone = clone
        self.captures: list[CapturedTensor] = []
        # Calls after the second one, which are counted for the error message but not stored.
        self.num_dropped = 0
        self.problem: str | None = None
        self.checkpointed = False
        # By training mode of the layer: True if its tensor was overwritten later in the same forward pass.
        self.overwritten_in: dict[bool, bool] = {}

    def clear(self) -> None:
        """Discard the captures, but not the observations of overwriting."""
        self.captures = []
        self.num_dropped = 0
        self.problem = None
        self.checkpointed = False

    def observe_overwriting(self) -> None:
        """Record for later passes if this layer's tensor was overwritten."""
        for capture in self.captures:
            if capture.original is not None:
                self.overwritten_in[capture.training] = (
                    self.overwritten_in.get(capture.training, False) or capture.overwritten
                )

    def append(self, tensor: Tensor, training: bool) -> None:
        """Append the capture of one call, and discard captures in another mode, such as those of an evaluation."""
        if not torch.compiler.is_compiling() and self.captures and self.captures[0].training != training:
            self.clear()
        if self.repeated == "first" and self.captures:
            return
        if self.repeated == "error" and not torch.compiler.is_compiling() and len(self.captures) > 1:
            self.num_dropped += 1
            return
        # Neither compiled code nor inference tensors have a version counter that shows later writes.
        if torch.compiler.is_compiling() or tensor.is_inference():
            capture = CapturedTensor(tensor.clone(), None, 0, training, True)
        else:
            copy = self.overwritten_in.get(training, True) if self.clone == "auto" else bool(self.clone)
            # Both clone() and view_as() add one autograd node at this place, so that gradients are summed in the same
            # order and are bitwise equal with either.
            capture = CapturedTensor(
                tensor.clone() if copy else tensor.view_as(tensor), tensor, tensor._version, training, copy
            )
        if self.repeated == "last":
            self.captures = [capture]
        else:
            self.captures.append(capture)
