"""A second device that is not there: its tensors compute on the CPU, but cannot be mixed with tensors of the CPU, as those of a GPU cannot.

It finds what would fail on a GPU where there is none. What only a GPU does (its kernels, TF32, autocast, streams) is
for tests marked `gpu`.

PyTorch has to know of the device before its first backward pass, so tests on it run in processes of their own, see
`run_pretended`.
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

NAME = "pretended"
VARIABLE = "KNOWISO_PRETENDED"
ON = os.environ.get(VARIABLE) == "1"
# Private to PyTorch, and newer than 2.8
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# The host reads what is there
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
# By indices of either device
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Pretended(Tensor):
    """A tensor that says it is on the device, around the one of the CPU that it is."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Pretended:
        layout = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
            "layout": inner.layout,
        }
        made: Pretended = Tensor._make_wrapper_subclass(
            cls, inner.shape, **layout, device=torch.device(NAME, 0), requires_grad=requires_grad
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = Pretended(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        return memo.setdefault(id(self), made)

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
    def data(self, value: Pretended) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner


def here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def mapped(of: Callable[[Any], Any], value: Any) -> Any:
    """`tree_map` of what operations are called with and return, a third of its time."""
    if type(value) in (tuple, list):
        return type(value)(mapped(of, part) for part in value)
    if type(value) is dict:
        return {key: mapped(of, part) for key, part in value.items()}
    return tree_map(of, value) if isinstance(value, (tuple, list, dict)) else of(value)


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    mapped(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    # A number may come from anywhere
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.ndim]
    if there and others and func not in COPIES and not (func in INDEXED and isinstance(args[0], Pretended)):
        got = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {got}")
    wanted = kwargs.get("device")
    _watch(func, args, kwargs, bool(there))
    goes = (
        here(wanted)
        if wanted is not None
        else isinstance(args[0], Pretended)
        if func is aten.copy_.default
        else bool(there)
    )
    kwargs = {**kwargs, "device": torch.device("cpu")} if here(wanted) else kwargs
    if not there and not goes:
        return func(*args, **kwargs)
    inner_args, inner_kwargs = mapped(lambda leaf: leaf.inner if isinstance(leaf, Pretended) else leaf, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    given = {id(tensor.inner): tensor for tensor in there}  # what is changed in place comes back as itself
    return mapped(
        lambda leaf: (
            given[id(leaf)] if id(leaf) in given else Pretended(leaf) if isinstance(leaf, Tensor) and goes else leaf
        ),
        out,
    )


_noted: list[list[str]] = []  # by whoever asks now


def _watch(func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> None:
    """Note what makes the host wait for the device, as a GPU would: values that are read, and copies to or from it that may not be left to it."""
    if not _noted:
        return
    if func is aten._to_copy.default:
        crosses = kwargs.get("device") is not None and here(kwargs["device"]) != there
    elif func is aten.copy_.default:
        crosses = isinstance(args[0], Pretended) != isinstance(args[1], Pretended)
    elif func in INDEXED:
        crosses = there and any(
            isinstance(at, Tensor) and (at.dtype == torch.bool or not isinstance(at, Pretended)) for at in args[1]
        )
    else:
        crosses = there and func in WAITS
    waits_not = kwargs.get("non_blocking", False) or (func is aten.copy_.default and args[2:3] == (True,))
    if crosses and not waits_not:
        ours = [line for line in traceback.format_stack() if "knowiso_train/" in line]
        for noted in _noted:
            noted.append(f"{func}\n{''.join(ours)}")


@contextlib.contextmanager
def stops() -> Iterator[list[str]]:
    """What made the host wait for the device within it, with where."""
    _noted.append([])
    try:
        yield _noted[-1]
    finally:
        _noted.pop()


class _Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class _Making(TorchFunctionMode):
    """What PyTorch does below the dispatcher: tensors and indices from lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and here(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Pretended):
            return torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype).to(args[0].device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretended):
            at = [
                torch.tensor(part) if isinstance(part, list) else part
                for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
            ]
            return func(args[0], tuple(at) if isinstance(args[1], tuple) else at[0], *args[2:])
        return func(*args, **kwargs)


class _Module(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


if ON:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Within it, "pretended" is a device."""
    with _Dispatching(), _Making():
        yield


def run_pretended(file: str) -> None:
    """The tests of this file that are on the pretended device."""
    if not AVAILABLE:
        pytest.skip("this PyTorch cannot pretend a device")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", NAME, file]
    done = subprocess.run(
        command, cwd=Path(file).parent, env={**os.environ, VARIABLE: "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
