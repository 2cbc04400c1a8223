"""Numbers that describe reports, tensors and weights, for `benchmarks.regression_guard`."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Numbers = dict[str, Any]


def keyed(place: str, **values: Any) -> Numbers:
    """Flatten numbers, lists of numbers and tensors into one level of keys."""
    found: Numbers = {}
    for name, value in values.items():
        key = f"{place} / {name.replace('_', ' ')}"
        if isinstance(value, Tensor):
            found |= keyed(key, **statistics(value))
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                found |= keyed(key, **{str(i): item})
        elif isinstance(value, float) and not math.isfinite(value):
            found[key] = str(value)  # JSON has no NaN
        else:
            found[key] = value
    return found


def statistics(value: Tensor) -> Numbers:
    """Describe a tensor by a few numbers and the hash of its bytes."""
    value = value.detach().cpu().contiguous()
    exact = value.double()
    return {
        "shape": "x".join(map(str, value.shape)) or "scalar",
        "mean": float(exact.mean()),
        "norm": float(exact.square().sum().sqrt()),
        "largest": float(exact.abs().max()),
        "sha256": "sha256:" + digest([value]),
    }


def digest(tensors: Iterable[Tensor], names: Iterable[str] | None = None) -> str:
    """Hash tensors, with their names where given."""
    total = hashlib.sha256()
    for i, tensor in enumerate(tensors):
        shape = f"{tuple(tensor.shape)} {tensor.dtype} {'' if names is None else list(names)[i]}"
        total.update(shape.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def state_numbers(place: str, model: nn.Module, named: bool = True) -> Numbers:
    """Describe the weights of a module.

    Args:
        place: the first part of the keys.
        model: the module.
        named: hash the names too; False for modules of the library, whose names and order of tensors may change.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    floats = [value.double().flatten() for value in state.values() if value.is_floating_point()]
    together = torch.cat(floats) if floats else torch.zeros(1, dtype=torch.float64)
    if not named:
        together = together.sort().values
    if named:
        hashed = digest(state.values(), list(state))
    else:
        hashed = hashlib.sha256("".join(sorted(digest([value]) for value in state.values())).encode()).hexdigest()
    return keyed(
        place,
        count=together.numel(),
        sum=float(together.sum()),
        norm=float(together.square().sum().sqrt()),
        sha256="sha256:" + hashed,
    )


def require_equal(saved: Any, loaded: Any, what: str) -> None:
    """Stop where what was loaded is not what was saved."""
    if saved != loaded:
        raise RuntimeError(f"{what}: numbers differ after saving and loading")


def environment() -> dict[str, str]:
    """Return the versions that bits depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = {name: version(name) for name in ("torch", "numpy", "timm", "torch-pruning")}
    return packages | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def relative(old: Any, new: Any) -> float:
    """Return the relative difference of two values; infinite where they cannot be compared as numbers."""
    both = (old, new)
    if old == new:
        return 0.0
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in both):
        return math.inf
    return abs(new - old) / max(abs(old), abs(new))


def compare(old: dict[str, Numbers], new: dict[str, Numbers], rtol: float) -> tuple[int, int]:
    """Print every value that differs; return how many differ, and how many by more than rtol."""
    differing = failing = 0
    for section, numbers in new.items():
        before = old.get(section, {})
        for key in dict.fromkeys((*before, *numbers)):
            was, now = before.get(key, "missing"), numbers.get(key, "missing")
            hashed = all(isinstance(value, str) and value.startswith("sha256:") for value in (was, now))
            if was == now or (hashed and rtol > 0):
                continue
            apart = relative(was, now)
            differing, failing = differing + 1, failing + (apart > rtol)
            print(f"{section} | {key} | old {was} | new {now} | relative {apart:.3g}")
    return differing, failing
