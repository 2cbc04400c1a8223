"""What the student just saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.errors import CaptureError
from knowiso_train.features.batches import INPUT_KEYS
from knowiso_train.features.capture import Hook, recomputing


@dataclass(frozen=True)
class StudentInput:
    """The images of one forward, and the keyword under which they were passed, if any."""

    images: Tensor
    keyword: str | None


class InputTap(Hook):
    """Forward pre-hook of the student: remembers the input of its last forward until it is taken."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.fired = False

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Put the hook on the bare network."""
        return student.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not recomputing():
            self.args, self.kwargs, self.fired = args, kwargs, True

    def clear(self) -> None:
        """Forget it."""
        self.args, self.kwargs, self.fired = (), {}, False

    def take(self) -> StudentInput:
        """The images: the first positional argument, or the keyword that holds them.

        Raises:
            CaptureError: no forward since the last call, or no images in it.
        """
        try:
            if not self.fired:
                raise CaptureError(
                    "the student has not run since the last iso(): call student(x) before iso(), inside `with iso:`. A student that was compiled and "
                    "called before the hooks were attached never fires them: attach first, or call torch.compiler.reset() after attaching."
                )
            if self.args:
                if isinstance(self.args[0], Tensor):
                    return StudentInput(self.args[0], None)
            else:
                keyword = next((key for key in INPUT_KEYS if isinstance(self.kwargs.get(key), Tensor)), None)
                if keyword is not None:
                    return StudentInput(self.kwargs[keyword], keyword)
            kinds = [type(value).__name__ for value in self.args] + [f"{key}={type(value).__name__}" for key, value in self.kwargs.items()]
            raise CaptureError(
                f"expected the student to be called with a tensor of images as its first argument, or under one of {INPUT_KEYS}; "
                f"got ({', '.join(kinds)})"
            )
        finally:
            self.clear()


def autocast_dtype(features: list[Tensor]) -> torch.dtype | None:
    """The precision that the student ran in, seen from its features: a half where any is one, so that the teacher follows."""
    return next((feature.dtype for feature in features if feature.dtype in (torch.bfloat16, torch.float16)), None)
