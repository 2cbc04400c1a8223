"""Fake accelerator device: computes on the CPU, but refuses to mix with CPU tensors, as a GPU does.

It detects tensors on the wrong device, and host-device synchronization, on machines without a GPU. GPU kernels, TF32,
autocast and streams are tested by tests marked `gpu`.

The device must be registered before the first backward pass of the process. Tests on it therefore run in a process of
their own, see `run_on_fake_device`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "fake_device"
ENABLE_VARIABLE = "KNOWISO_FAKE_DEVICE"
ENABLED = os.environ.get(ENABLE_VARIABLE) == "1"
# A private function of PyTorch, newer than 2.8
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
aten = torch.ops.aten
COPY_OPS = {aten._to_copy.default, aten.copy_.default}
# Operations whose result the host reads
SYNCHRONIZING_OPS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}
# Operations that accept indices of either device
INDEXING_OPS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class FakeDeviceTensor(Tensor):
    """Wrapper around a CPU tensor that reports the fake device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> FakeDeviceTensor:
        layout = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
            "layout": inner.layout,
        }
        wrapper: FakeDeviceTensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, **layout, device=torch.device(NAME, 0), requires_grad=requires_grad
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FakeDeviceTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        wrapper = FakeDeviceTensor(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            wrapper._is_param = True
        return memo.setdefault(id(self), wrapper)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: FakeDeviceTensor) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner


def is_fake_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested arguments, three times as fast as `tree_map`."""
    if type(value) in (tuple, list):
        return type(value)(map_leaves(function, part) for part in value)
    if type(value) is dict:
        return {key: map_leaves(function, part) for key, part in value.items()}
    return tree_map(function, value) if isinstance(value, (tuple, list, dict)) else function(value)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the wrapped tensors; raise if devices are mixed."""
    tensors: list[Tensor] = []
    map_leaves(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
    fake_tensors = [tensor for tensor in tensors if isinstance(tensor, FakeDeviceTensor)]
    # 0-d tensors are numbers, allowed from any device
    cpu_tensors = [tensor for tensor in tensors if not isinstance(tensor, FakeDeviceTensor) and tensor.ndim]
    if (
        fake_tensors
        and cpu_tensors
        and func not in COPY_OPS
        and not (func in INDEXING_OPS and isinstance(args[0], FakeDeviceTensor))
    ):
        got = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {got}")
    device = kwargs.get("device")
    _record_synchronization(func, args, kwargs, bool(fake_tensors))
    result_is_fake = (
        is_fake_device(device)
        if device is not None
        else isinstance(args[0], FakeDeviceTensor)
        if func is aten.copy_.default
        else bool(fake_tensors)
    )
    kwargs = {**kwargs, "device": torch.device("cpu")} if is_fake_device(device) else kwargs
    if not fake_tensors and not result_is_fake:
        return func(*args, **kwargs)
    inner_args, inner_kwargs = map_leaves(
        lambda leaf: leaf.inner if isinstance(leaf, FakeDeviceTensor) else leaf, (args, kwargs)
    )
    out = func(*inner_args, **inner_kwargs)
    wrappers = {id(tensor.inner): tensor for tensor in fake_tensors}  # in-place operations return the same wrapper
    return map_leaves(
        lambda leaf: (
            wrappers[id(leaf)]
            if id(leaf) in wrappers
            else FakeDeviceTensor(leaf)
            if isinstance(leaf, Tensor) and result_is_fake
            else leaf
        ),
        out,
    )


_records: list[list[str]] = []  # one per active `host_synchronizations` context


def _record_synchronization(func: Any, args: Any, kwargs: dict[str, Any], on_fake_device: bool) -> None:
    """Record an operation that would make the host wait for a GPU: a value read, or a blocking copy."""
    if not _records:
        return
    if func is aten._to_copy.default:
        synchronizes = kwargs.get("device") is not None and is_fake_device(kwargs["device"]) != on_fake_device
    elif func is aten.copy_.default:
        synchronizes = isinstance(args[0], FakeDeviceTensor) != isinstance(args[1], FakeDeviceTensor)
    elif func in INDEXING_OPS:
        synchronizes = on_fake_device and any(
            isinstance(index, Tensor) and (index.dtype == torch.bool or not isinstance(index, FakeDeviceTensor))
            for index in args[1]
        )
    else:
        synchronizes = on_fake_device and func in SYNCHRONIZING_OPS
    non_blocking = kwargs.get("non_blocking", False) or (func is aten.copy_.default and args[2:3] == (True,))
    if synchronizes and not non_blocking:
        stack = [line for line in traceback.format_stack() if "knowiso_train/" in line]
        for record in _records:
            record.append(f"{func}\n{''.join(stack)}")


@contextlib.contextmanager
def host_synchronizations() -> Iterator[list[str]]:
    """Record the operations in the context that make the host wait for the device, with their stack."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _CreationMode(TorchFunctionMode):
    """Mode for what PyTorch does below the dispatcher: creation of tensors and indices from lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_fake_device(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], FakeDeviceTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype).to(args[0].device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], FakeDeviceTensor):
            index = [
                torch.tensor(part) if isinstance(part, list) else part
                for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
            ]
            return func(args[0], tuple(index) if isinstance(args[1], tuple) else index[0], *args[2:])
        return func(*args, **kwargs)


class _BackendModule(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


if ENABLED:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _BackendModule())


@contextlib.contextmanager
def activate() -> Iterator[None]:
    """Make "fake_device" a device within the context."""
    with _DispatchMode(), _CreationMode():
        yield


def run_on_fake_device(file: str, without: str = "") -> None:
    """Run the tests of a file that use the fake device, in a process of their own; fail if one fails or is skipped.

    Args:
        file: Test file.
        without: Expression of pytest for tests to leave out. Default: none.
    """
    if not AVAILABLE:
        pytest.skip("this PyTorch version cannot register a device in Python")
    expression = f"{NAME} and not ({without})" if without else NAME
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", expression, file]
    process = subprocess.run(
        command,
        cwd=Path(file).parent,
        env={**os.environ, ENABLE_VARIABLE: "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout
