"""Modes, devices, precision and random state of networks, restored after use."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from knowiso_train.errors import InputTypeError, OptionError, OptionTypeError
from knowiso_train.features.hooks import DetachedOnCopyHook
from knowiso_train.features.wrappers import sharded_classes, unwrap_model

PLAIN_TYPES = (bool, int, float, str, type(None))


class BufferSnapshot:
    """Copies of the buffers of modules, to be restored after forward passes that change them.

    Observers, counters, caches and some running statistics change in eval mode too. Restored are values, shapes,
    storages, identities and names, so buffers that share memory share it again. If a forward pass replaced a buffer,
    the plain attributes of that module (numbers, text and None) are restored with it, as they describe the buffer.

    Args:
        modules: Modules, without their submodules.

    Examples:
        >>> layer = nn.BatchNorm1d(2)
        >>> snapshot = BufferSnapshot([layer])
        >>> _ = layer(torch.ones(4, 2))
        >>> snapshot.restore()
        >>> layer.running_mean
        tensor([0., 0.])
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        # TorchScript fixes the names of buffers, and its tables cannot be written
        self._tables = [_Table(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        buffers = {id(buffer): buffer for module in modules for buffer in module.buffers(recurse=False)}
        self._contents = [_Content(buffer) for buffer in buffers.values() if not is_lazy(buffer)]

    def restore(self) -> None:
        """Restore all buffers."""
        for table in self._tables:
            table.restore()
        for content in self._contents:
            content.restore()


class _Table:
    """Names and identities of a module's buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.buffers = module, dict(module._buffers)
        self.non_persistent = set(module._non_persistent_buffers_set)
        self.attributes: dict[str, Any] = {}
        if self.buffers:
            self.attributes = {name: value for name, value in vars(module).items() if isinstance(value, PLAIN_TYPES)}

    def restore(self) -> None:
        table = self.module._buffers
        same = len(table) == len(self.buffers) and all(
            name in table and table[name] is buffer for name, buffer in self.buffers.items()
        )
        if same:
            return
        table.clear()
        table.update(self.buffers)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.non_persistent)
        vars(self.module).update(self.attributes)


class _Content:
    """Values, shape and storage of one buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        # `.data` shares the storage but no version counter: restoring does not invalidate a pending backward pass
        self.view = buffer.data
        self.values = _distinct(self.view).clone()

    def restore(self) -> None:
        with torch.inference_mode(self.buffer.is_inference()), torch.no_grad():
            _distinct(self.view).copy_(self.values)
            # A resized buffer, or one whose `.data` was assigned
            if self.buffer.layout == torch.strided and (
                self.buffer.data_ptr() != self.view.data_ptr()
                or self.buffer.shape != self.view.shape
                or self.buffer.stride() != self.view.stride()
                or self.buffer.dtype != self.view.dtype
            ):
                self.buffer.data = self.view


def _distinct(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor without the repetitions of an expanded axis, which cannot be written."""
    if tensor.layout == torch.strided:
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[axis] > 1:
                tensor = tensor.narrow(axis, 0, 1)
    return tensor


@contextmanager
def preserve_state(*models: nn.Module, eval_mode: bool = True, updated: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Set networks to eval mode within the context, and restore modes, buffers, flags and random state after it.

    Restored are the `training` flag and every buffer of each submodule (see `BufferSnapshot`), `requires_grad` of each
    parameter, and the random state of Python, NumPy, torch and CUDA, also after an error. CUDA is not initialized by
    this. Networks that FSDP2 shards are sharded again: a forward without backward leaves the weights of the root
    gathered, and an optimizer of these would train nothing.

    Args:
        models: Networks, wrapped or not.
        eval_mode: False keeps the modes within the context.
        updated: Modules whose own buffers are not restored, such as the batch norms of a network that is trained.

    Raises:
        InputTypeError: Not a module.

    Examples:
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
    excluded = {id(module) for module in updated}
    buffers = BufferSnapshot(module for module in modules if id(module) not in excluded)
    sharded = [(module, list(module.parameters())) for module in modules if isinstance(module, sharded_classes())]
    with preserve_random_state():
        try:
            if eval_mode:
                # Flags instead of .eval(): a module may override train() with changes that cannot be undone.
                for module in modules:
                    module.training = False
            yield
        finally:
            for module, parameters in sharded:
                if any(now is not before for now, before in zip(module.parameters(), parameters, strict=True)):
                    module.reshard()
            buffers.restore()
            for module, mode in modes:
                module.training = mode
            for parameter, needed in gradients:
                parameter.requires_grad_(needed)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and CUDA after the context, also after an error.

    CUDA is not initialized by this.

    Examples:
        >>> before = torch.get_rng_state()
        >>> with preserve_random_state():
        ...     _ = torch.rand(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def restore_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the parameters and buffers of a network that is changed in place, after an error within the context.

    Restored are values, identities and names, so that an added bias is removed again.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> try:
        ...     with restore_on_error(model):
        ...         _ = model.weight.data.zero_()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     bool((model.weight == before).all())
        True
    """
    modules = list(model.modules())
    buffers = BufferSnapshot(modules)
    tables = [(module, dict(module._parameters)) for module in modules]
    values = [(parameter, parameter.detach().clone()) for parameter in model.parameters() if not is_lazy(parameter)]
    try:
        yield
    except BaseException:
        buffers.restore()
        for module, table in tables:
            module._parameters.clear()
            module._parameters.update(table)
        for parameter, value in values:
            parameter.data.copy_(value)
        raise


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None for a network without either."""
    # The iterators are lazy, as this is called in every training step.
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def check_materialized(*models: nn.Module) -> None:
    """Check that networks hold values.

    Raises:
        OptionError: A network with parameters or buffers on the meta device.

    Examples:
        >>> check_materialized(nn.Linear(2, 2))
    """
    for model in models:
        if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
            raise OptionError(
                f"this {type(unwrap_model(model)).__name__} is on the meta device and has no data; load its weights "
                "first"
            )


def checked_device(device: torch.device | str | int | None, *models: nn.Module) -> torch.device | None:
    """Return a device that tensors can be moved to.

    Args:
        device: Device, its name, or the index of an accelerator. None: no device.
        models: Networks to be moved. Only networks that are on the meta device already can stay there, as it holds no
            values.

    Raises:
        OptionError: Not a device, one that is not available, or the meta device.

    Examples:
        >>> checked_device("cpu")
        device(type='cpu')
    """
    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise OptionTypeError(f"device must be a device or its name, such as 'cuda', got {device!r}")
    try:
        result = torch.device(device)
        torch.empty(0, device=result)
    # AssertionError: torch without CUDA; NotImplementedError: a backend that is not built
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(f"device={device!r} cannot be used here: {reason}") from error
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    if result.type == "meta" and not (models and all(tensor.is_meta for tensor in tensors)):
        raise OptionError("device='meta' would discard the weights. Choose a device that holds values, such as 'cpu'")
    return result


@contextmanager
def on_device(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Move networks to a device, and back at the end of the block, also after an error; None moves nothing.

    Raises:
        OptionError: A network on several devices, which could not be restored, or a device as `checked_device` refuses.

    Examples:
        >>> with on_device("meta", model := nn.Linear(2, 2, device="meta")):
        ...     str(device_of(model))
        'meta'
    """
    device = checked_device(device, *models)
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
    """Run networks in eval mode without autocast, compilation and this library's hooks; restore these afterwards.

    Hooks of an attached `IsomorphismLoss` or `FeatureTaps` are disabled within the block, so that earlier captures are
    preserved.

    Args:
        models: Networks, wrapped or not. Call them unwrapped within the block, as the forward pass of DDP
            communicates with the other processes.

    Examples:
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
    # Networks on the meta device have no autocast
    autocasting = [kind for kind in sorted(kinds - {"meta"}) if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        stack.enter_context(preserve_state(*models))
        # Compiled code would not run hooks that are registered after its first call.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in autocasting:
            # Weights that autocast cached under no_grad must not be reused in training (torch 2.8).
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.autocast(kind, enabled=False))
        for model in models:
            for module in unwrap_model(model).modules():
                stack.enter_context(_without_hooks(module._forward_pre_hooks))
                stack.enter_context(_without_hooks(module._forward_hooks))
        yield


@contextmanager
def _without_hooks(table: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Remove this library's hooks from a module's table, and restore them in their order afterwards."""
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
    """Module whose buffers and parameters are never cast to a narrower dtype, as by `.half()`; devices may change.

    Examples:
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
