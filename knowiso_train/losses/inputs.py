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
    """The images of one forward, the keyword under which they were passed, if any, and whether they were written to since."""

    images: Tensor
    keyword: str | None
    changed: bool = False


class InputTap:
    """The input of the student's last forward, remembered until it is taken."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: dict[int, int]

    def __init__(self) -> None:
        self.clear()

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Put the hook on the bare network."""
        return student.register_forward_pre_hook(_InputHook(self), with_kwargs=True)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what a forward was given."""
        self.args, self.kwargs, self.fired = args, kwargs, True
        if not torch.compiler.is_compiling():
            self.versions = {id(value): version for value in (*args, *kwargs.values()) if (version := _version(value)) is not None}

    def clear(self) -> None:
        """Forget it."""
        self.args, self.kwargs, self.versions, self.fired = (), {}, {}, False

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing."""
        return vars(InputTap())

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
                    return self._seen(self.args[0], None)
            else:
                keyword = next((key for key in INPUT_KEYS if isinstance(self.kwargs.get(key), Tensor)), None)
                if keyword is not None:
                    return self._seen(self.kwargs[keyword], keyword)
            kinds = [type(value).__name__ for value in self.args] + [f"{key}={type(value).__name__}" for key, value in self.kwargs.items()]
            raise CaptureError(
                f"expected the student to be called with a tensor of images as its first argument, or under one of {INPUT_KEYS}; "
                f"got ({', '.join(kinds)})"
            )
        finally:
            self.clear()

    def _seen(self, images: Tensor, keyword: str | None) -> StudentInput:
        before = self.versions.get(id(images))
        return StudentInput(images, keyword, before is not None and _version(images) != before)


class _InputHook(Hook):
    """Forward pre-hook of the student."""

    def __init__(self, tap: InputTap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not recomputing():
            self.tap.see(args, kwargs)


def _version(value: Any) -> int | None:
    """What every write to a tensor counts up; None where nothing counts."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def autocast_dtype(features: list[Tensor]) -> torch.dtype | None:
    """The precision that the student ran in, seen from its features: a half where any is one, so that the teacher follows."""
    return next((feature.dtype for feature in features if feature.dtype in (torch.bfloat16, torch.float16)), None)
