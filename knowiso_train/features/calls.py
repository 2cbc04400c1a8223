"""Calls of networks, their logits, and messages for images of another dtype than the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, ShapeError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import get_inputs, tensor_leaves

OUTPUT_KEYS = ("logits", "out")  # of transformers, and of torchvision's segmentation networks


def call_model(model: nn.Module, images: Any) -> Any:
    """Run a network on images, and name images of another dtype than the weights if it fails.

    Raises:
        InputTypeError: A network that fails on images of another dtype than its weights.

    Examples:
        >>> call_model(nn.Linear(2, 3).bfloat16(), torch.zeros(4, 2))
        Traceback (most recent call last):
        knowiso_train.errors.InputTypeError: Linear has weights of bfloat16 and fails on images of float32 ...
    """

    def message(weights: torch.dtype, given: torch.dtype, error: Exception) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (weights, given)]
        return (
            f"{type(unwrap_model(model)).__name__} has weights of {names[0]} and fails on images of {names[1]} "
            f"({error}). Convert the images to {names[0]} in the loader, or in a transform"
        )

    with explain_dtype_errors(model, images, message):
        return model(images)


@contextmanager
def explain_dtype_errors(
    model: nn.Module, images: Any, message: Callable[[torch.dtype, torch.dtype, Exception], str]
) -> Iterator[None]:
    """Name the dtypes of images and weights in the place of an error that another dtype of the images causes.

    Args:
        model: Network that runs in the context.
        images: Its images.
        message: Function from the dtypes of weights and images, and the error, to the new message.

    Raises:
        InputTypeError: An error in the context, with images of another dtype than the weights.
    """
    try:
        yield
    except RuntimeError as error:
        weights = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
        # Other integers may be tokens
        is_images = isinstance(images, Tensor) and (
            images.is_floating_point() or images.dtype == torch.uint8 or images.ndim == 4
        )
        # Not of a subclass: memory ran out, or an error of a hook
        if not is_images or weights in (None, images.dtype) or type(error) not in (RuntimeError, NotImplementedError):
            raise
        raise InputTypeError(message(weights, images.dtype, error)) from error


def forward_override(
    network: nn.Module, forward: Callable[[nn.Module, Tensor], Any]
) -> Callable[[nn.Module, Any], Any]:
    """Return a `forward=` for two networks that applies a function to one of them and calls the other plainly.

    Examples:
        >>> teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> run = forward_override(teacher, lambda model, images: 2 * model(images))
        >>> batch = torch.ones(1, 2)
        >>> torch.equal(run(teacher, batch), 2 * teacher(batch)), torch.equal(run(student, batch), student(batch))
        (True, True)
    """

    def run(model: nn.Module, batch: Any) -> Any:
        images = get_inputs(batch)
        return forward(model, images) if unwrap_model(model) is unwrap_model(network) else model(images)

    return run


def find_logits(output: Any) -> Tensor:
    """Return the logits in a network's output: the tensor, the entry "logits" or "out", else the only floating tensor.

    Raises:
        ShapeError: No floating tensor, or several.

    Examples:
        >>> find_logits({"logits": torch.zeros(2, 10), "features": torch.zeros(2, 64)}).shape
        torch.Size([2, 10])
    """
    for key in OUTPUT_KEYS:
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor) and not isinstance(output, Tensor):
            return value
    tensors = [tensor for tensor in tensor_leaves(output) if tensor.is_floating_point()]
    if len(tensors) != 1:
        raise ShapeError(
            f"expected one tensor of logits, or an entry {' or '.join(map(repr, OUTPUT_KEYS))}, in the network's "
            f"output; got a {type(output).__name__} with {len(tensors)} floating tensors. Pass output=, a function "
            "that returns the logits, to a function that has this option, or wrap the network"
        )
    return tensors[0]
