"""Autotuning of Triton kernels; one fixed configuration under the interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

from knowiso_train.ops.triton.dispatch import interpreted


def autotuned(configs: list[dict[str, int]], key: list[str]) -> Callable[[Any], Any]:
    """Return a decorator that runs a kernel with its fastest configuration for every new value of `key`.

    The choice is cached on disk if this version of Triton can.

    Args:
        configs: Constants of the kernel, optionally with `num_warps` and `num_stages`. The interpreter uses the first.
        key: Names of the arguments that determine the shape.
    """
    if interpreted():
        return lambda kernel: _FixedConfig(kernel, configs[0])
    options = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    launch = ("num_warps", "num_stages")
    candidates = [
        triton.Config({k: v for k, v in c.items() if k not in launch}, **{k: v for k, v in c.items() if k in launch})
        for c in configs
    ]
    return triton.autotune(candidates, key=key, **options)  # type: ignore[no-any-return]


class _FixedConfig:
    """Kernel with one configuration, launched as an autotuned one."""

    def __init__(self, kernel: Any, config: dict[str, int]) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **more: self.kernel[grid](*args, **more, **self.config)
