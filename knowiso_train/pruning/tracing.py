"""Operations after each layer, comparable blocks and cached activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from knowiso_train.errors import OptionError
from knowiso_train.features.hooks import record_outputs
from knowiso_train.features.modules import named_layers
from knowiso_train.features.state import preserve_state
from knowiso_train.ops.im2col import is_plain_linear_op
from knowiso_train.pruning.calibration import Calibration

ADD_OPS = {"add", "__add__", "__iadd__", "add_", "__radd__"}
MUL_OPS = {"mul", "__mul__", "__imul__", "mul_", "__rmul__"}
# Steps of a shortcut that need no weights, and can be taken ahead of time
WEIGHT_FREE_SHORTCUT_OPS = {"pad", "__getitem__", "avg_pool2d", "max_pool2d"}
EVAL_IDENTITY_OPS = {"dropout", "dropout2d", "contiguous"}  # in eval mode
RETURN_OP = "return"  # what a network gives is read by whoever called it
Steps = dict[int, tuple[int, Callable[[Tensor], Tensor]]]

# Timm's norms hold an activation
NON_BLOCK_TYPES = (nn.Sequential, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
MIN_FEATURE_AXES = 3  # (N, L, C) or more: a vector for each image is the output's business

TRACE_IMAGES = 2  # images


@dataclass(frozen=True)
class Epilogue:
    """What follows one layer.

    Attributes:
        norm: name of the batch norm that reads the layer's output alone, or None.
        scale: name of the parameter that multiplies its channels (layer scale), or None.
        total: number of the operation that adds the output to a residual stream, or None.
        other: number of the operation that made the other term, or what leads to it by `steps`; None where it is not
            there when the layer runs.
        steps: of the shortcut from there to the other term.
        limits: of the rectifier that alone reads what comes of all that; None where there is no such one, or where the
            other term is not known.
    """

    norm: str | None = None
    scale: str | None = None
    total: int | None = None
    other: int | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    limits: tuple[float, float] | None = None


class OpRecorder(TorchFunctionMode):
    """Numbers the tensor operations of a forward pass and shows each result to `seen(number, name, arguments, result)`."""

    def __init__(self, seen: Callable[[int, str, tuple[Any, ...], Tensor], None]) -> None:
        super().__init__()
        self.seen, self.count, self.paused = seen, 0, False
        # The present operation, where it reads one tensor and nothing else that could differ
        self.step: Callable[[Tensor], Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and isinstance(result, Tensor):
            self.paused = True
            name, rest = getattr(func, "__name__", ""), args[1:]
            single = name in WEIGHT_FREE_SHORTCUT_OPS and not any(
                isinstance(value, Tensor) for value in (*rest, *(kwargs or {}).values())
            )
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


def trace_epilogues(model: nn.Module, layers: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Epilogue]:
    """What follows each layer that runs exactly once, in the order in which they run.

    Args:
        model: in eval mode.
        layers: by name.
        run: calls the model on a small batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     trace_epilogues(model, {"0": model[0]}, lambda: model(torch.zeros(1, 3, 2, 2)))
        {'0': Epilogue(norm='1', scale=None, total=None, other=None, steps=(), limits=(0.0, inf))}
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

    mode = OpRecorder(seen)
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
            users.setdefault(made[id(value)], []).append((mode.count, RETURN_OP, (), [made[id(value)]]))
    found = {}
    for name in sorted(begun, key=lambda name: begun[name]):
        if len(outputs[name]) == 1 and outputs[name][0] >= 0:
            found[name] = _follow(outputs[name][0], begun[name], users, owners, parameters, fixed, steps)
    return found


def record_operations(run: Callable[[], Any]) -> int:
    """How many tensor operations a pass takes, those of hooks included.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)
        >>> record_operations(lambda: model(x))
        2
    """
    mode = OpRecorder(lambda *_: None)
    with mode:
        run()
    return mode.count


def _follow(
    at: int,
    begun: int,
    users: dict[int, Any],
    owners: dict[int, str],
    parameters: dict[int, str],
    fixed: set[int],
    steps: Steps,
) -> Epilogue:
    norm = scale = None
    # False: past a step that the output's rows cannot be taken through, so that only the sum's being there is told
    plain = True
    while len(users.get(at, [])) == 1:
        number, name, args, sources = users[at][0]
        others = [value for value in args if isinstance(value, Tensor)]
        if name == F.batch_norm.__name__ and plain and norm is None and scale is None:
            norm = next((owners[id(value)] for value in others if id(value) in owners), None)
            if norm is None:
                break
        elif name in MUL_OPS and len(sources) == 1 and len(others) == 2 and any(id(value) in fixed for value in others):
            factor = next(value for value in others if id(value) in fixed)
            if plain and norm is None and scale is None and factor.ndim == 1 and id(factor) in parameters:
                scale = parameters[id(factor)]
            else:
                plain = False
        elif name in ADD_OPS and len(sources) == 2 and sources[0] != sources[1] and others[0].shape == others[1].shape:
            other = sources[1] if sources[0] == at else sources[0]
            if not plain:
                return Epilogue(total=number)
            source, taken = _known(other, begun, steps)
            return Epilogue(
                norm, scale, number, source, taken, None if source is None else _limits(users.get(number, []))
            )
        elif name == "permute":
            plain = False
        elif name not in EVAL_IDENTITY_OPS:
            break
        at = number
    return Epilogue(norm, scale, limits=_limits(users.get(at, []))) if plain else Epilogue()


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


def comparable_blocks(pruned: nn.Module, original: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    """Names of the blocks whose outputs can be compared entry by entry, in forward order.

    A block is a module with modules inside, no norm and no `Sequential`, that emits one map or sequence of one shape in
    both networks. A stage gives
    its blocks, and a transformer block stands for its attention: of nested ones the outermost is taken whose inner ones
    share a grid. Where there are
    none, as in a plain sequence of layers, the layers themselves.

    Args:
        pruned: the pruned network.
        original: the network before pruning.
        run: runs a network on a small batch.

    Returns:
        Names; empty where every width was cut, as in networks without residual streams.

    Example:
        >>> make = lambda width: nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.ReLU())
        >>> comparable_blocks(make(2), make(8), lambda network: network(torch.zeros(1, 3, 5, 5)))
        ['2', '3']
    """
    of_pruned, of_original = _emitted(pruned, run), _emitted(original, run)
    shapes = {
        name: shape for name, (shape, _) in of_original.items() if name in of_pruned and of_pruned[name][0] == shape
    }
    layers = named_layers(original)
    blocks = [name for name in shapes if any(True for _ in layers[name].children())]
    # A stage emits the tensor of its last block: the innermost module stands for it
    distinct: dict[int, str] = {}
    for name in sorted(blocks, key=lambda name: name.count("."), reverse=True):
        if not isinstance(layers[name], NON_BLOCK_TYPES):
            distinct.setdefault(of_original[name][1], name)
    found = set(distinct.values())
    for name in list(found):
        if len({shapes[inner][2:] for inner in found if inner.startswith(f"{name}.")}) > 1:
            found.discard(name)  # a backbone within a wrapper
    outermost = [name for name in shapes if name in found and not any(name.startswith(f"{other}.") for other in found)]
    return outermost or [name for name in shapes if name not in blocks]


def _emitted(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, tuple[torch.Size, int]]:
    """By layer, in forward order: shape and identity of the output, of layers that run once and emit one tensor."""
    with preserve_state(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with record_outputs(named_layers(model)) as outputs_by_layer:
            run(model)
    once = {name: outputs[0] for name, outputs in outputs_by_layer.items() if len(outputs) == 1}
    return {
        name: (output.shape, id(output))
        for name, output in once.items()
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= MIN_FEATURE_AXES
    }


class ActivationCache:
    """Outputs of layers that run once, for one batch.

    Args:
        layers: by name, in the order in which they run.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> replay, x = ActivationCache({"0": model[0], "2": model[2]}), torch.randn(3, 4)
        >>> with replay.recording():
        ...     before = model(x)
        >>> with replay.ahead_of(["2"]):  # the first layer is not asked
        ...     torch.equal(model(torch.zeros(3, 4)), before)
        True
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers give within, in place of what was kept before."""
        self.outputs.clear()

        def hook(name: str) -> Callable[..., None]:
            def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                self.outputs[name] = output.clone()  # which activations may overwrite

            return keep

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(hook(name)).remove)
            yield

    @contextmanager
    def ahead_of(self, names: Sequence[str]) -> Iterator[None]:
        """Within, layers that run before the first of these give what they gave; none do where one of these is unknown."""
        order = list(self.layers)
        first = min(map(order.index, names)) if names and set(names) <= set(order) else 0
        with ExitStack() as stack:
            for name in order[:first]:
                stack.callback(_giving(self.layers[name], self.outputs[name]))
            yield


def _giving(layer: nn.Module, output: Tensor) -> Callable[[], None]:
    """Has a layer give this; returns what undoes it."""
    before = layer.__dict__.get("forward")

    def undo() -> None:
        del layer.forward
        if before is not None:
            layer.forward = before

    layer.forward = lambda *inputs, **more: output.clone()
    return undo


def trace_model(model: nn.Module, images: Calibration) -> dict[str, Epilogue]:
    """What follows every convolution and linear layer that runs once and has its weight for itself, in forward order."""
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules()
        if is_plain_linear_op(layer) and owners.count(id(layer.weight)) == 1
    }
    count = min(TRACE_IMAGES, images.count)
    few = images.first(count)
    with record_outputs(layers, lambda output: isinstance(output, Tensor) and len(output) % count == 0) as batched:
        epilogues = trace_epilogues(model, layers, lambda: images.forward(model, few))
    # Layers without a batch axis are left out, such as one that computes a position code.
    return {name: epilogue for name, epilogue in epilogues.items() if all(batched[name])}


def check_network(*networks: nn.Module) -> None:
    """Raises:
    OptionError: weights that inference mode made; or a network that this library's hooks watch: what they hold would
        change with its widths, and
        copies would carry them.
    """
    for network in networks:
        if any(parameter.is_inference() for parameter in network.parameters()):
            raise OptionError(
                f"the weights of this {type(network).__name__} were made under torch.inference_mode(), which makes them unfit for pruning; make or "
                "load the network outside of it"
            )
        for name, module in network.named_modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if type(hook).__module__.startswith("knowiso_train."):
                    raise OptionError(
                        f"FeatureTaps or a loss watches {name or 'the network'!r}: leave its `with` block, or call its detach(), before you prune "
                        "or refit, and make a new one for the new widths"
                    )
