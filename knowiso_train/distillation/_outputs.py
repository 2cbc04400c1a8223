"""Outputs of the student in the graph of the loss, which DDP and FSDP need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.features.hooks import DetachedOnCopyHook, is_recomputing
from knowiso_train.utils.batch import tensor_leaves


class OutputCapture:
    """Outputs of the student's last forward that carry gradient."""

    tensors: tuple[Tensor, ...] = ()

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Register the hook on the unwrapped student."""
        return student.register_forward_hook(_OutputHook(self))

    def clear(self) -> None:
        """Drop the outputs."""
        self.tensors = ()

    def take(self) -> tuple[Tensor, ...]:
        """Return and drop the outputs."""
        tensors, self.tensors = self.tensors, ()
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of an empty capture."""
        return {}


class _OutputHook(DetachedOnCopyHook):
    """Forward hook of the student."""

    def __init__(self, capture: OutputCapture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not is_recomputing():
            self.capture.tensors = tuple(tensor for tensor in tensor_leaves(output) if tensor.requires_grad)


class _ConnectOutputs(torch.autograd.Function):
    """Identity of the loss with a gradient of 0 to every output."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.outputs = [(output.shape, output.dtype, output.device) for output in outputs]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.outputs]
        return gradients[0], *zeros


def connect_outputs(loss: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
    """Return the loss with a gradient of 0 to the outputs, which adds nothing to the student's gradients.

    DDP and FSDP wait for the gradients of all parameters. A loss of inner features alone has none for later layers.

    Examples:
        >>> feature = torch.ones(2, requires_grad=True)
        >>> head = torch.ones(2, requires_grad=True)
        >>> connect_outputs(feature.sum(), (feature * head,)).backward()
        >>> feature.grad, head.grad
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    if not outputs or not loss.requires_grad:
        return loss
    connected: Tensor = _ConnectOutputs.apply(loss, *outputs)
    return connected
