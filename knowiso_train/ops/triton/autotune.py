"""Autotuning of Triton kernels; one fixed configuration under the interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

from knowiso_train.ops.triton.dispatch import interpreted


def autotuned(configs: list[dict[str, int]], key: list[str]) -> Callable[[Any], Any]:
    """Decorator of a kernel: the fastest of few configurations for every new value of `key`, kept on disk where Triton can.

    Args:
        configs: values of the kernel's constants, with `num_warps` and `num_stages` where they matter; the first is the
            interpreter's.
        key: names of the arguments that say the shape.
    """
    if interpreted():
        return lambda kernel: _FixedConfig(kernel, configs[0])
    options = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    launch = ("num_warps", "num_stages")
    made = [
        triton.Config({k: v for k, v in c.items() if k not in launch}, **{k: v for k, v in c.items() if k in launch})
        for c in configs
    ]
    return triton.autotune(made, key=key, **options)  # type: ignore[no-any-return]


class _FixedConfig:
    def __init__(self, kernel: Any, config: dict[str, int]) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **more: self.kernel[grid](*args, **more, **self.config)
