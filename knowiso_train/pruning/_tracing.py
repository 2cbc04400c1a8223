"""Tracing of the operations after each layer, comparable blocks and cached activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from knowiso_train.features.modules import named_layers
from knowiso_train.features.recording import record_outputs
from knowiso_train.features.state import preserve_state
from knowiso_train.ops.im2col import is_plain_linear_op
from knowiso_train.utils.batch import batch_size

Forward = Callable[[nn.Module, Any], Any]

ADD_OPS = {"add", "__add__", "__iadd__", "add_", "__radd__"}
MUL_OPS = {"mul", "__mul__", "__imul__", "mul_", "__rmul__"}
# Operations of a shortcut without weights: they can be computed before the shortcut itself runs
WEIGHT_FREE_SHORTCUT_OPS = {"pad", "__getitem__", "avg_pool2d", "max_pool2d"}
EVAL_IDENTITY_OPS = {"dropout", "dropout2d", "contiguous"}  # in eval mode
RETURN_OP = "return"  # pseudo-operation: the caller of the model reads a returned tensor

# Norm layers of timm contain an activation, which would make them blocks
NON_BLOCK_TYPES = (nn.Sequential, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
MIN_FEATURE_AXES = 3  # (N, L, C) or more; one vector an image is an output and no feature map

MIN_OUTPUT_SCALE = 1e-6  # fraction of the largest scale of a layer; output channels below it have no effect
TRACE_IMAGES = 2  # images


@dataclass(frozen=True)
class Epilogue:
    """Operations between a layer's output and the next non-linearity or residual sum.

    Attributes:
        norm: Name of the batch norm that is the output's only consumer, or None.
        layer_scale: Name of the parameter that multiplies the output's channels, or None.
        residual_add: Number of the operation that adds the output to a residual stream, or None.
        residual_source: Number of an operation that precedes the layer and yields the other term of that sum, after
            `shortcut_ops`. None where the other term is computed later.
        shortcut_ops: Operations from the result of `residual_source` to the other term.
        activation_range: Limits of the rectifier that is the only consumer of the result. None without such a
            rectifier, or where the other term is computed later.
    """

    norm: str | None = None
    layer_scale: str | None = None
    residual_add: int | None = None
    residual_source: int | None = None
    shortcut_ops: tuple[Callable[[Tensor], Tensor], ...] = ()
    activation_range: tuple[float, float] | None = None

    @property
    def targets_residual_sum(self) -> bool:
        """True where the residual sum is the layer's regression target, as its other term precedes the layer."""
        return self.residual_add is not None and self.residual_source is not None


def batch_norm_affine(norm: nn.Module | None, channels: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) of a batch norm in eval mode, float64; 1 and 0 for None.

    Examples:
        >>> norm = nn.BatchNorm2d(2, eps=0.0)
        >>> norm.running_var[1] = 4
        >>> batch_norm_affine(norm, 2)[0].tolist()
        [1.0, 0.5]
    """
    if norm is None:
        return torch.ones(channels, dtype=torch.float64, device=device), torch.zeros(
            channels, dtype=torch.float64, device=device
        )
    n: Any = norm
    # (z - mean) / sqrt(var + eps) · γ + β = scale · z + shift
    scale = n.weight.detach().double() * (n.running_var.double() + n.eps).rsqrt()
    return scale, n.bias.detach().double() - scale * n.running_mean.double()


class OpRecorder(TorchFunctionMode):
    """Number the tensor operations of a forward pass and record the results of some of them.

    Args:
        samplers: For each operation number to record, the reduction of its result; None keeps the result itself.

    Attributes:
        count: Number of operations so far.
        results: Recorded results by operation number.

    Examples:
        >>> x = torch.ones(2)
        >>> with OpRecorder({1: None}) as recorder:
        ...     _ = (x + 1) * 3
        >>> recorder.count, recorder.results[1].tolist()
        (2, [6.0, 6.0])
    """

    def __init__(self, samplers: Mapping[int, Callable[[Tensor], Tensor] | None] | None = None) -> None:
        super().__init__()
        self.samplers = dict(samplers or {})
        self.count = 0
        self.results: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.record(func, args, kwargs or {}, result)
            self.count += 1
        return result

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Record the result of operation number `count`."""
        if self.count in self.samplers:
            # At once: activations may overwrite the result in place
            sampler = self.samplers[self.count]
            self.results[self.count] = result if sampler is None else sampler(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the operations within from count and results."""
        # The network may have entered modes of its own above this one; they stay
        inner: list[TorchFunctionMode] = []
        while (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
            inner.append(mode)
        for mode in reversed(inner):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for _ in inner:
                _pop_mode()  # type: ignore[no-untyped-call]
            for mode in (self, *reversed(inner)):
                _push_mode(mode)  # type: ignore[no-untyped-call]


def count_operations(model: nn.Module, batch: Any, forward: Forward = operator.call) -> int:
    """Count the tensor operations of a forward pass, including those of hooks.

    Examples:
        >>> count_operations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2))
        2
    """
    recorder = OpRecorder()
    with recorder:
        forward(model, batch)
    return recorder.count


@dataclass(frozen=True)
class _Operation:
    """Operation that consumes the result of another one."""

    number: int
    name: str
    args: tuple[Any, ...]
    sources: list[int]


class _State(Enum):
    """Relation of a traced tensor to the layer's output."""

    OUTPUT = auto()  # the output itself
    AFFINE = auto()  # behind the batch norm or the layer scale: known scale and shift per channel
    OPAQUE = auto()  # behind an operation without a known inverse: samples cannot be mapped back


@dataclass(eq=False)
class _OpGraph(OpRecorder):
    """Data flow of one forward pass."""

    parameters: dict[int, str]
    norms: dict[int, str]
    # Identities of parameters and of tensors computed from parameters alone
    constants: set[int] = field(default_factory=set)
    producers: dict[int, int] = field(default_factory=dict)
    consumers: dict[int, list[_Operation]] = field(default_factory=dict)
    shortcuts: dict[int, tuple[int, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    # Tensors stay alive, so that no identity is given twice
    references: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Add an operation to the graph."""
        name, values = getattr(func, "__name__", ""), (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        self.references.append((result, values))
        if tensors and all(id(value) in self.constants for value in tensors):
            self.constants.add(id(result))
            return
        sources = [self.producers[id(value)] for value in tensors if id(value) in self.producers]
        if name in WEIGHT_FREE_SHORTCUT_OPS and len(sources) == len(tensors) == 1 and args and tensors[0] is args[0]:
            self.shortcuts[self.count] = sources[0], lambda value: func(value, *args[1:], **kwargs)
        for source in sources:
            self.consumers.setdefault(source, []).append(_Operation(self.count, name, values, sources))
        self.producers[id(result)] = self.count

    def add_outputs(self, outputs: Any) -> None:
        """Enter the caller as a consumer of the returned tensors."""
        for value in tree_leaves(outputs):
            if id(value) in self.producers:
                source = self.producers[id(value)]
                self.consumers.setdefault(source, []).append(_Operation(self.count, RETURN_OP, (), [source]))

    def epilogue(self, output: int, start: int) -> Epilogue:
        """Follow a layer's output through its only consumers.

        Args:
            output: Number of the operation that yields the layer's output.
            start: Number of the first operation of the layer.
        """
        state, norm, layer_scale = _State.OUTPUT, None, None
        while len(self.consumers.get(output, [])) == 1:
            [op] = self.consumers[output]
            tensors = [value for value in op.args if isinstance(value, Tensor)]
            if op.name == F.batch_norm.__name__ and state is _State.OUTPUT:
                norm = next((self.norms[id(value)] for value in tensors if id(value) in self.norms), None)
                if norm is None:
                    break
                state = _State.AFFINE
            elif op.name in MUL_OPS and (factor := self._constant_factor(op, tensors)) is not None:
                if state is _State.OUTPUT and factor.ndim == 1 and id(factor) in self.parameters:
                    layer_scale, state = self.parameters[id(factor)], _State.AFFINE
                else:
                    state = _State.OPAQUE
            elif op.name in ADD_OPS and self._adds_two_results(op, tensors):
                if state is _State.OPAQUE:
                    return Epilogue(residual_add=op.number)
                other = op.sources[1] if op.sources[0] == output else op.sources[0]
                source, shortcut_ops = self._precursor(other, start)
                limits = None if source is None else self._activation_range(op.number)
                return Epilogue(norm, layer_scale, op.number, source, shortcut_ops, limits)
            elif op.name == "permute":
                state = _State.OPAQUE
            elif op.name not in EVAL_IDENTITY_OPS:
                break
            output = op.number
        if state is _State.OPAQUE:
            return Epilogue()
        return Epilogue(norm, layer_scale, activation_range=self._activation_range(output))

    def _constant_factor(self, op: _Operation, tensors: Sequence[Tensor]) -> Tensor | None:
        if len(op.sources) != 1 or len(tensors) != 2:
            return None
        return next((value for value in tensors if id(value) in self.constants), None)

    def _adds_two_results(self, op: _Operation, tensors: Sequence[Tensor]) -> bool:
        return len(op.sources) == 2 and op.sources[0] != op.sources[1] and tensors[0].shape == tensors[1].shape

    def _activation_range(self, number: int) -> tuple[float, float] | None:
        """Return the limits of the rectifier that is the only consumer of an operation."""
        consumers = self.consumers.get(number, [])
        if len(consumers) != 1:
            return None
        [op] = consumers
        if op.name in ("relu", "relu_"):
            return 0.0, math.inf
        if op.name == "relu6":
            return 0.0, 6.0
        limits = [float(value) for value in op.args[1:3] if isinstance(value, (int, float))]
        hardtanh = op.name in ("hardtanh", "hardtanh_") and len(limits) == 2 and limits[0] < limits[1]
        return (limits[0], limits[1]) if hardtanh else None

    def _precursor(self, number: int, start: int) -> tuple[int | None, tuple[Callable[[Tensor], Tensor], ...]]:
        """Return an operation before `start` and the shortcut operations from it to operation `number`, if any."""
        shortcut_ops: list[Callable[[Tensor], Tensor]] = []
        while number >= start:
            if number not in self.shortcuts:
                return None, ()
            number, operation = self.shortcuts[number]
            shortcut_ops.insert(0, operation)
        return number, tuple(shortcut_ops)


def trace_epilogues(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward = operator.call
) -> dict[str, Epilogue]:
    """Trace the epilogue of each layer that runs exactly once, in forward order.

    Layers whose output has no row per image, such as one that computes a position code, are left out.

    Args:
        model: Network in eval mode.
        layers: Layers by name.
        batch: Small batch.
        forward: Function that runs a model on a batch.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     epilogue = trace_epilogues(model, {"0": model[0]}, torch.zeros(1, 3, 2, 2))["0"]
        >>> epilogue.norm, epilogue.activation_range
        ('1', (0.0, inf))
    """
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None
    }
    graph = _OpGraph(parameters, norms, constants=set(parameters))
    outputs: dict[str, list[int]] = {name: [] for name in layers}
    starts: dict[str, int] = {}
    per_image: dict[str, bool] = {}
    images = batch_size(batch)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            starts.setdefault(name, graph.count)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name].append(graph.producers.get(id(output), -1))
            per_image[name] = isinstance(output, Tensor) and len(output) % images == 0

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(after(name)).remove)
            hooks.callback(layer.register_forward_pre_hook(before(name)).remove)
        with graph:
            returned = forward(model, batch)
    graph.add_outputs(returned)
    return {
        name: graph.epilogue(outputs[name][0], starts[name])
        for name in sorted(starts, key=lambda name: starts[name])
        if len(outputs[name]) == 1 and outputs[name][0] >= 0 and per_image[name]
    }


def trace_model(model: nn.Module, batch: Any, forward: Forward = operator.call) -> dict[str, Epilogue]:
    """Trace every convolution and linear layer that runs once and shares no weight, in forward order.

    Args:
        model: Network in eval mode.
        batch: Small batch.
        forward: Function that runs a model on a batch.
    """
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if is_plain_linear_op(layer) and owners.count(id(layer.weight)) == 1
    }
    # The first pass may compute and cache results; the operations of all later passes are the same
    forward(model, batch)
    return trace_epilogues(model, layers, batch, forward)


def comparable_blocks(
    pruned: nn.Module, original: nn.Module, batch: Any, forward: Forward = operator.call
) -> list[str]:
    """Return the names of the blocks whose outputs have the same shape in both networks, in forward order.

    A block is a module with children, no norm and no `Sequential`, whose output is one map or token sequence. A stage
    is represented by its last block, and an attention by its transformer block. Of nested blocks the outermost one is
    taken whose inner blocks share a grid. Without such blocks, as in a plain sequence, the layers themselves are taken.

    Args:
        pruned: Pruned network.
        original: Network before pruning.
        batch: Small batch.
        forward: Function that runs a model on a batch.

    Returns:
        Names; empty where every width was cut, as in networks without residual streams.

    Examples:
        >>> make = lambda width: nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.ReLU())
        >>> comparable_blocks(make(2), make(8), torch.zeros(1, 3, 5, 5))
        ['2', '3']
    """
    of_pruned, of_original = (_output_shapes(model, batch, forward) for model in (pruned, original))
    shapes = {
        name: shape for name, (shape, _) in of_original.items() if name in of_pruned and of_pruned[name][0] == shape
    }
    layers = named_layers(original)
    with_children = [name for name in shapes if any(True for _ in layers[name].children())]
    # A stage returns the tensor of its last block: of several modules the innermost one is the block
    block_of_tensor: dict[int, str] = {}
    for name in sorted(with_children, key=lambda name: name.count("."), reverse=True):
        if not isinstance(layers[name], NON_BLOCK_TYPES):
            block_of_tensor.setdefault(of_original[name][1], name)
    # A module whose inner outputs differ in grid is a backbone in a wrapper
    blocks = {
        name
        for name in block_of_tensor.values()
        if len({shapes[inner][2:] for inner in block_of_tensor.values() if inner.startswith(f"{name}.")}) <= 1
    }
    outermost = [
        name for name in shapes if name in blocks and not any(name.startswith(f"{other}.") for other in blocks)
    ]
    return outermost or [name for name in shapes if name not in with_children]


def _output_shapes(model: nn.Module, batch: Any, forward: Forward) -> dict[str, tuple[torch.Size, int]]:
    """Return shape and identity of the output of each layer that runs once and returns one tensor, in forward order."""
    with (
        preserve_state(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        record_outputs(named_layers(model)) as outputs,
    ):
        forward(model, batch)
    once = {name: values[0] for name, values in outputs.items() if len(values) == 1}
    return {
        name: (output.shape, id(output))
        for name, output in once.items()
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= MIN_FEATURE_AXES
    }


class ActivationCache:
    """Cached outputs of layers that run once, for one batch.

    Args:
        layers: Layers by name, in forward order.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> cache, x = ActivationCache({"0": model[0], "2": model[2]}), torch.randn(3, 4)
        >>> with cache.recording():
        ...     before = model(x)
        >>> with cache.skip_prefix(["2"]):  # the first layer is not computed
        ...     torch.equal(model(torch.zeros(3, 4)), before)
        True
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Cache the outputs of the pass within, in place of earlier ones."""
        self.outputs.clear()

        def hook(name: str) -> Callable[..., None]:
            def record(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                self.outputs[name] = output.clone()  # in-place activations overwrite the output

            return record

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(hook(name)).remove)
            yield

    @contextmanager
    def skip_prefix(self, changed: Sequence[str]) -> Iterator[None]:
        """Return cached outputs for all layers before the first changed one; for none if a changed layer is unknown."""
        order = list(self.layers)
        first = min(map(order.index, changed)) if changed and set(changed) <= set(order) else 0
        with ExitStack() as stack:
            for name in order[:first]:
                stack.callback(_override_output(self.layers[name], self.outputs[name]))
            yield


def _override_output(layer: nn.Module, output: Tensor) -> Callable[[], None]:
    """Make a layer return this output, and return a function that undoes it."""
    before = layer.__dict__.get("forward")

    def undo() -> None:
        del layer.forward
        if before is not None:
            layer.forward = before

    layer.forward = lambda *inputs, **more: output.clone()
    return undo
