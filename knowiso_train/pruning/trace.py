"""What becomes of a layer's output: the affine steps after it, and the residual sum that they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

SUMS = {"add", "__add__", "__iadd__", "add_", "__radd__"}
PRODUCTS = {"mul", "__mul__", "__imul__", "mul_", "__rmul__"}
PLAIN = {"pad", "__getitem__", "avg_pool2d", "max_pool2d"}  # steps of a shortcut that need no weights, and can be taken ahead of time
SAME = {"dropout", "dropout2d", "contiguous"}  # in eval mode
RETURNED = "return"  # what a network gives is read by whoever called it


@dataclass(frozen=True)
class Tail:
    """What follows one layer.

    Attributes:
        norm: name of the batch norm that reads the layer's output alone, or None.
        scale: name of the parameter that multiplies its channels (layer scale), or None.
        total: number of the operation that adds the output to a residual stream, or None.
        other: number of the operation that made the other term, or what leads to it by `steps`; None where it is not there when the layer runs.
        steps: of the shortcut from there to the other term.
        limits: of the rectifier that alone reads what comes of all that; None where there is no such one, or where the other term is not known.
    """

    norm: str | None = None
    scale: str | None = None
    total: int | None = None
    other: int | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    limits: tuple[float, float] | None = None


class Operations(TorchFunctionMode):
    """Numbers the tensor operations of a forward pass and shows each result to `seen(number, name, arguments, result)`."""

    def __init__(self, seen: Callable[[int, str, tuple[Any, ...], Tensor], None]) -> None:
        super().__init__()
        self.seen, self.count, self.paused = seen, 0, False
        self.step: Callable[[Tensor], Tensor] | None = None  # the present operation, where it reads one tensor and nothing else that could differ

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and isinstance(result, Tensor):
            self.paused = True
            name, rest = getattr(func, "__name__", ""), args[1:]
            single = name in PLAIN and not any(isinstance(value, Tensor) for value in (*rest, *(kwargs or {}).values()))
            self.step = (lambda value: func(value, *rest, **(kwargs or {}))) if single else None
            try:
                self.seen(self.count, getattr(func, "__name__", ""), (*args, *(kwargs or {}).values()), result)
            finally:
                self.paused = False
            self.count += 1
        return result

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Operations within are neither counted nor shown."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def tails(model: nn.Module, layers: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tail]:
    """What follows each layer that runs exactly once, in the order in which they run.

    Args:
        model: in eval mode.
        layers: by name.
        run: calls the model on a small batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     tails(model, {"0": model[0]}, lambda: model(torch.zeros(1, 3, 2, 2)))
        {'0': Tail(norm='1', scale=None, total=None, other=None, steps=(), limits=(0.0, inf))}
    """
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None
    }
    fixed = set(parameters)  # parameters, and what is made of nothing else
    made: dict[int, int] = {}
    alive: list[Any] = []  # keeps identities unique
    steps: dict[int, tuple[int, Callable[[Tensor], Tensor]]] = {}
    users: dict[int, list[tuple[int, str, tuple[Any, ...], list[int]]]] = {}

    def seen(number: int, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if tensors and all(id(value) in fixed for value in tensors):
            fixed.add(id(result))
            alive.append((result, args))
            return
        sources = [made[id(value)] for value in tensors if id(value) in made]
        if mode.step is not None and len(sources) == 1:
            steps[number] = sources[0], mode.step
        for source in sources:
            users.setdefault(source, []).append((number, name, args, sources))
        made[id(result)] = number
        alive.append((result, args))

    outputs: dict[str, list[int]] = {name: [] for name in layers}

    def emitted(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs[name].append(made.get(id(output), -1))

    begun: dict[str, int] = {}

    def starts(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            begun.setdefault(name, mode.count)

        return hook

    mode = Operations(seen)
    handles = [layer.register_forward_hook(emitted(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_pre_hook(starts(name)) for name, layer in layers.items()]
    try:
        with mode:
            returned = run()
    finally:
        for handle in handles:
            handle.remove()
    for value in tree_leaves(returned):
        if id(value) in made:
            users.setdefault(made[id(value)], []).append((mode.count, RETURNED, (), [made[id(value)]]))
    found = {}
    for name in sorted(begun, key=lambda name: begun[name]):
        if len(outputs[name]) == 1 and outputs[name][0] >= 0:
            found[name] = _follow(outputs[name][0], begun[name], users, owners, parameters, fixed, steps)
    return found


def operations(run: Callable[[], Any]) -> int:
    """How many tensor operations a pass takes, those of hooks included.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)
        >>> operations(lambda: model(x))
        2
    """
    mode = Operations(lambda *_: None)
    with mode:
        run()
    return mode.count


Steps = dict[int, tuple[int, Callable[[Tensor], Tensor]]]


def _follow(at: int, begun: int, users: dict[int, Any], owners: dict[int, str], parameters: dict[int, str], fixed: set[int], steps: Steps) -> Tail:
    norm = scale = None
    plain = True  # False: past a step that the output's rows cannot be taken through, so that only the sum's being there is told
    while len(users.get(at, [])) == 1:
        number, name, args, sources = users[at][0]
        others = [value for value in args if isinstance(value, Tensor)]
        if name == F.batch_norm.__name__ and plain and norm is None and scale is None:
            norm = next((owners[id(value)] for value in others if id(value) in owners), None)
            if norm is None:
                break
        elif name in PRODUCTS and len(sources) == 1 and len(others) == 2 and any(id(value) in fixed for value in others):
            factor = next(value for value in others if id(value) in fixed)
            if plain and norm is None and scale is None and factor.ndim == 1 and id(factor) in parameters:
                scale = parameters[id(factor)]
            else:
                plain = False
        elif name in SUMS and len(sources) == 2 and sources[0] != sources[1] and others[0].shape == others[1].shape:
            other = sources[1] if sources[0] == at else sources[0]
            if not plain:
                return Tail(total=number)
            source, taken = _known(other, begun, steps)
            return Tail(norm, scale, number, source, taken, None if source is None else _limits(users.get(number, [])))
        elif name == "permute":
            plain = False
        elif name not in SAME:
            break
        at = number
    return Tail(norm, scale, limits=_limits(users.get(at, []))) if plain else Tail()


def _limits(readers: list[tuple[int, str, tuple[Any, ...], list[int]]]) -> tuple[float, float] | None:
    """Of the rectifier that is the only reader."""
    if len(readers) != 1:
        return None
    _, name, args, _ = readers[0]
    if name in ("relu", "relu_"):
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    ends = [float(value) for value in args[1:3] if isinstance(value, (int, float))]
    return (ends[0], ends[1]) if name in ("hardtanh", "hardtanh_") and len(ends) == 2 and ends[0] < ends[1] else None


def _known(number: int, begun: int, steps: Steps) -> tuple[int | None, tuple[Callable[[Tensor], Tensor], ...]]:
    """What is there before operation `begun`, and the steps from it to operation `number`; None where there are none."""
    taken: list[Callable[[Tensor], Tensor]] = []
    while number >= begun:
        if number not in steps:
            return None, ()
        number, step = steps[number]
        taken.insert(0, step)
    return number, tuple(taken)
