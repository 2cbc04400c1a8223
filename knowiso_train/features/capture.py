"""What a hook does: keep the tensor that a layer emitted, as it was emitted, in the step that is running."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

_CHECKPOINT_CODE = CheckpointFunction.forward.__code__


class Capture(NamedTuple):
    """One firing of a layer. `original` is None where overwriting cannot be watched."""

    tensor: Tensor
    original: Tensor | None
    version: int
    training: bool
    cloned: bool

    @property
    def overwritten(self) -> bool:
        """Whether the layer's tensor was written to after it was emitted."""
        return self.original is not None and self.original._version != self.version


class Step:
    """The running step of one network. `grad` is grad mode when the root's forward began, None where it was not seen to begin."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.grad: bool | None = None


class Slot:
    """Captures of one layer. Written by its hook; dynamo traces that code, so it only appends, assigns and never reads earlier captures."""

    def __init__(self, repeated: str, clone: bool | str) -> None:
        self.repeated = repeated
        self.clone = clone
        self.captures: list[Capture] = []
        self.more = 0  # firings that were not kept, where a second one is an error already
        self.problem: str | None = None
        self.checkpointed = False
        self.learned: dict[bool, bool] = {}  # layer in training mode? → overwritten later in the same forward?

    def clear(self) -> None:
        """Forget what was captured; what was learned about overwriting stays."""
        self.captures = []
        self.more = 0
        self.problem = None
        self.checkpointed = False

    def learn(self) -> None:
        """Take from a completed forward whether this layer's tensor is overwritten."""
        for capture in self.captures:
            if capture.original is not None:
                self.learned[capture.training] = self.learned.get(capture.training, False) or capture.overwritten

    def keep(self, tensor: Tensor, training: bool) -> None:
        """Add one firing."""
        if self.repeated == "first" and self.captures:
            return
        if self.repeated == "error" and not torch.compiler.is_compiling() and len(self.captures) > 1:
            self.more += 1
            return
        if torch.compiler.is_compiling() or tensor.is_inference():  # no version counter to watch
            capture = Capture(tensor.clone(), None, 0, training, True)
        else:
            copy = self.learned.get(training, True) if self.clone == "auto" else bool(self.clone)
            # clone and view are nodes of the graph at the same place, so gradients are added in the same order, to the bit, with either
            capture = Capture(tensor.clone() if copy else tensor.view_as(tensor), tensor, tensor._version, training, copy)
        if self.repeated == "last":
            self.captures = [capture]
        else:
            self.captures.append(capture)


class Hook:
    """A hook that stays behind when the network is copied or pickled: the copy holds a function of the standard library that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class StepHook(Hook):
    """Forward pre-hook of the root: a new forward drops whatever an earlier one left."""

    def __init__(self, step: Step, slots: Iterable[Slot]) -> None:
        self.step = step
        self.slots = tuple(slots)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if recomputing():
            return
        self.step.grad = torch.is_grad_enabled()
        for slot in self.slots:
            slot.clear()


class LayerHook(Hook):
    """Forward hook (output) or forward pre-hook (input) of a tapped layer, registered with keyword arguments."""

    def __init__(self, slot: Slot, step: Step) -> None:
        self.slot = slot
        self.step = step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        if recomputing():
            return
        tensor = _only_tensor(output[0]) if output else _first_tensor(args, kwargs)
        if tensor is None:
            self.slot.problem = _kinds(output[0] if output else (*args, kwargs))
            return
        if not torch.compiler.is_compiling() and self._lost_its_gradient():
            self.slot.checkpointed = True
        self.slot.keep(tensor, module.training)

    def _lost_its_gradient(self) -> bool:
        """Whether grad mode is off because a re-entrant checkpoint switched it off, and not because the caller wanted it so."""
        if torch.is_grad_enabled() or self.step.grad is False or torch.is_inference_mode_enabled():
            return False
        return _in_reentrant_checkpoint() and any(parameter.requires_grad for parameter in self.step.root.parameters())


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: gradient checkpointing, which repeats what was captured already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT_CODE:
            return True
        frame = frame.f_back
    return False


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first positional tensor; without positional tensors the only one passed by keyword."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    return _only_tensor(kwargs)


def _only_tensor(value: Any) -> Tensor | None:
    tensors = _tensors(value)
    return tensors[0] if len(tensors) == 1 else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _kinds(value: Any) -> str:
    """The types in a layer's output, for an error message."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {{{', '.join(f'{key}: {_kinds(item)}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(map(_kinds, value))})"
    return type(value).__name__
