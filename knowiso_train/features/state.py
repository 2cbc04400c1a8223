"""Modes, devices, precision and random state of networks, restored after use."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, OptionError
from knowiso_train.features.hooks import DetachedOnCopyHook
from knowiso_train.features.modules import unwrap_model


@contextmanager
def preserve_state(*models: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Within the context networks are in eval mode; afterwards, also after an error, everything is as it was.

    Restored are each submodule's own `training` flag, each parameter's `requires_grad`, and the random state of python,
    numpy, torch and, if it was
    initialized when the context began, CUDA (which is never initialized here).

    Args:
        models: wrapped or not; one that is given twice counts once.
        eval_mode: False leaves the modes as they are within the context.

    Raises:
        InputTypeError: not a module.

    Example:
        >>> model = nn.Dropout()
        >>> with preserve_state(model):
        ...     inside = model.training
        >>> inside, model.training
        (False, True)
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    modules = {id(module): module for model in models for module in model.modules()}.values()
    modes = [(module, module.training) for module in modules]
    gradients = [
        (parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(recurse=False)
    ]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # what others draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        if eval_mode:
            # Flags, not .eval(): modules may override train() with work that cannot be undone
            for module in modules:
                module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def device_of(model: nn.Module) -> torch.device | None:
    """Device of the first parameter or buffer; None for a network without either."""
    first = next(chain(model.parameters(), model.buffers()), None)  # lazily: this is asked in every step
    return None if first is None else first.device


@contextmanager
def on_device(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Move the networks to a device, and back when the block ends, also by an error; None leaves them.

    Raises:
        OptionError: a network that is spread over several devices, which cannot be brought back.

    Example:
        >>> with on_device("meta", model := nn.Linear(2, 2, device="meta")):
        ...     str(device_of(model))
        'meta'
    """
    if device is None:
        yield
        return
    before: list[tuple[nn.Module, torch.device]] = []
    for model in models:
        places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(places) > 1:
            kind, found = type(unwrap_model(model)).__name__, sorted(map(str, places))
            raise OptionError(
                f"device={str(device)!r} needs networks on one device each; {kind} is on {found}. Leave device=None"
            )
        before += [(model, place) for place in places]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in before:
            model.to(place)


@contextmanager
def isolated_eval(*models: nn.Module) -> Iterator[None]:
    """Networks in eval mode, outside autocast, uncompiled, and unseen by this library's own hooks; afterwards, also by an error, all is as before.

    Of an attached `IsomorphismLoss` or `FeatureTaps` the hooks are off within the block, so what they captured before
    it still stands after it.

    Args:
        models: wrapped or not. Call the bare networks within: DDP's own forward talks to the other processes.

    Example:
        >>> from knowiso_train import FeatureTaps
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> with FeatureTaps(model, "0") as taps:
        ...     _ = model(torch.ones(4, 2))
        ...     with isolated_eval(model):
        ...         _ = model(torch.zeros(7, 2))
        ...     len(taps.collect()["0"]), model.training
        (4, True)
    """
    kinds = {"cpu", *(device.type for device in map(device_of, models) if device is not None)}
    autocasting = [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        stack.enter_context(preserve_state(*models))
        # Hooks that come after the first compiled call would not fire
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in autocasting:
            # Weights cast under no_grad must not serve the training in the same block (torch 2.8)
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.autocast(kind, enabled=False))
        for model in models:
            for module in unwrap_model(model).modules():
                stack.enter_context(_without_hooks(module._forward_pre_hooks))
                stack.enter_context(_without_hooks(module._forward_hooks))
        yield


@contextmanager
def _without_hooks(table: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Own hooks out of a module's table, and back in their places among those that others left there."""
    before = list(table.items())
    own = {key for key, hook in before if isinstance(hook, DetachedOnCopyHook)}
    if not own:
        yield
        return
    for key in own:
        del table[key]
    try:
        yield
    finally:
        now = dict(table)
        table.clear()
        table.update({key: hook for key, hook in before if key in own or key in now} | now)


class KeepPrecision(nn.Module):
    """A module whose buffers, and parameters, its parts' too, go to other devices and to a wider dtype, but never below their own.

    Example:
        >>> module = KeepPrecision()
        >>> module.register_buffer("mean", torch.zeros(2))
        >>> module.map = nn.Linear(2, 2)
        >>> module.half().mean.dtype, module.map.weight.dtype
        (torch.float32, torch.float32)
        >>> module.double().mean.dtype, module.map.weight.dtype
        (torch.float64, torch.float64)
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        buffers = dict(self._buffers)
        parameters = [(parameter, parameter.data) for parameter in self.parameters()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in buffers.items():
            moved = self._buffers[name]
            if own is not None and moved is not None and _narrower(moved, own):
                self._buffers[name] = own.to(moved.device)
        for parameter, own in parameters:
            if _narrower(parameter, own):
                gradient, parameter.grad = parameter.grad, None
                parameter.data = own.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(own.dtype)
        return self


def _narrower(moved: Tensor, own: Tensor) -> bool:
    return torch.promote_types(own.dtype, moved.dtype) != moved.dtype
