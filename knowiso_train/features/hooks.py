"""Forward hooks that capture the inputs or outputs of layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from knowiso_train.errors import CaptureError, InputTypeError, LayerNameError, OptionError
from knowiso_train.features.modules import named_layers, resolve_layers, unwrap_model, wrapped_attribute

Side = Literal["input", "output"]
Captured = TypeVar("Captured", Tensor, list[Tensor])
_REPEATED = ("error", "first", "last", "all")

_CHECKPOINT_CODE = CheckpointFunction.forward.__code__


class FeatureTaps(Generic[Captured]):
    """Context manager that captures the outputs (or inputs) of layers during forward passes.

    A capture is what the layer emitted, with its autograd graph and dtype, also where a later in-place operation
    overwrites the tensor.
    A new forward of the network drops what an earlier one left; where only a part of the network is called
    (`model.forward_features(x)`),
    captures gather until `collect()`. The repeated forward of gradient checkpointing is ignored, and a
    `Sequential` is seen also where only its children are called, as checkpointing does. Hooks are gone after the
    context, also after an
    error, and never travel with a copied or saved network.

    Works under `torch.compile` (also `fullgraph=True`) when the taps are attached before the first compiled call.

    Args:
        model: the network, wrapped (DDP, compiled, ...) or not.
        layers: names or globs, see `resolve_layers`.
        at: "output", "input" (the first positional tensor that the layer receives), or a dict {name or glob: side};
            "output" where it says nothing.
        repeated: for a layer that fires more than once before `collect()`: "error", "first", "last", or "all" (a list
            of tensors per layer).
        clone: "auto" clones on the first forward, watches which tensors are overwritten, and from then on clones only
            those; True clones always;
            False never, and an overwritten capture is an error. Under `torch.inference_mode` and `torch.compile`
            overwriting cannot be watched:
            there every capture is a clone.

    Raises:
        LayerNameError: a layer that does not exist.
        OptionError: an option without meaning.
        InputTypeError: not a module, or names that are not strings.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        >>> with FeatureTaps(model, "0") as taps:
        ...     out = model(torch.randn(2, 3, 8, 8))
        ...     feature = taps.collect()["0"]
        >>> feature.shape, bool(feature.min() < 0)
        (torch.Size([2, 8, 6, 6]), True)
    """

    @overload
    def __init__(
        self: FeatureTaps[Tensor],
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        at: Side | Mapping[str, Side] = ...,
        repeated: Literal["error", "first", "last"] = ...,
        clone: bool | Literal["auto"] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: FeatureTaps[list[Tensor]],
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        at: Side | Mapping[str, Side] = ...,
        repeated: Literal["all"],
        clone: bool | Literal["auto"] = ...,
    ) -> None: ...
    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        at: Side | Mapping[str, Side] = "output",
        repeated: str = "error",
        clone: bool | Literal["auto"] = "auto",
    ) -> None:
        if repeated not in _REPEATED:
            raise OptionError(f"repeated must be one of {_REPEATED}, got {repeated!r}")
        if not isinstance(clone, bool) and clone != "auto":
            raise OptionError(f"clone must be True, False or 'auto', got {clone!r}")
        self.names: tuple[str, ...] = tuple(resolve_layers(model, layers))
        self._sides = _sides(model, self.names, at)
        self._model = model
        self.repeated = repeated
        self._step = ForwardState(unwrap_model(model))
        self._slots = {name: CaptureBuffer(repeated, clone) for name in self.names}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    @property
    def features(self) -> dict[str, Captured]:
        """What `collect()` would return now, without forgetting it; raises as `collect()` does."""
        return {name: self._read(name) for name in self.names}

    def side(self, name: str) -> Side:
        """Whether this layer's input or output is tapped."""
        return self._sides[name]

    def attach(self) -> FeatureTaps[Captured]:
        """Put the hooks on; needed only outside a `with` block.

        Raises:
            CaptureError: already attached.
        """
        if self.attached:
            raise CaptureError("these taps are attached already; use one FeatureTaps per context, or detach() first")
        modules = named_layers(self._model)
        for slot in self._slots.values():
            slot.learned.clear()
        self.clear()
        self._handles.append(
            self._step.root.register_forward_pre_hook(ForwardStartHook(self._step, self._slots.values()), prepend=True)
        )
        for name, slot in self._slots.items():
            hook, side = LayerHook(slot, self._step), self._sides[name]
            place = hook_target(modules[name], side, self._step.root)
            if side == "input":
                self._handles.append(place.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(place.register_forward_hook(hook, with_kwargs=True))
        return self

    def detach(self) -> None:
        """Take every hook off and forget every capture. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was captured."""
        self._step.grad = None
        for slot in self._slots.values():
            slot.clear()

    def collect(self) -> dict[str, Captured]:
        """Captures since the last forward of the whole network began, by layer name in resolved order; they are forgotten here.

        Raises:
            CaptureError: a layer that did not fire, fired more than once with `repeated="error"`, emitted no single
                tensor, was overwritten without
                a clone, or ran in a re-entrant checkpoint; also then the captures are forgotten.
        """
        try:
            return self.features
        finally:
            for slot in self._slots.values():
                slot.learn()
            self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is detached and holds no captures, as the copied network holds no hooks."""
        fresh = {name: CaptureBuffer(slot.repeated, slot.clone) for name, slot in self._slots.items()}
        return vars(self) | {"_handles": [], "_step": ForwardState(self._step.root), "_slots": fresh}

    def __enter__(self) -> FeatureTaps[Captured]:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _read(self, name: str) -> Captured:
        slot = self._slots[name]
        if slot.problem is not None:
            side = self._sides[name]
            raise CaptureError(
                f"the {side} of layer {name!r} must hold exactly one tensor, got {slot.problem}; tap a layer inside or around it"
            )
        if not slot.captures:
            raise CaptureError(self._never_fired(name))
        if self.repeated == "error" and len(slot.captures) > 1:
            times = len(slot.captures) + slot.more
            raise CaptureError(
                f"layer {name!r} fired {times} times before collect(), expected once. It is called repeatedly in one forward, or only a "
                "part of the network was called several times. Choose with repeated='first', 'last' or 'all', or collect() after each call."
            )
        if slot.checkpointed and (self._step.grad or torch.is_grad_enabled()):
            raise CaptureError(
                f"layer {name!r} ran inside a re-entrant gradient checkpoint, so its capture carries no gradient. "
                "Checkpoint with use_reentrant=False, or tap a layer outside the checkpointed part."
            )
        if any(capture.overwritten and not capture.cloned for capture in slot.captures):
            raise CaptureError(
                f"layer {name!r} was overwritten by a later in-place operation, and its capture was not cloned"
                f"{' because no forward before this one overwrote it' if slot.clone == 'auto' else ''}. Use clone=True."
            )
        tensors = [capture.tensor for capture in slot.captures]
        return cast(Captured, tensors if self.repeated == "all" else tensors[0])

    def _never_fired(self, name: str) -> str:
        if not self.attached:
            return f"layer {name!r} was not captured: the taps are not attached. Use `with taps:` around the forward and collect() inside."
        cure = "attach the taps before the first compiled call, or call torch.compiler.reset() after attaching them"
        if any(_is_compiled(module) for module in (self._model, *self._model.modules())):
            return f"layer {name!r} never fired. The network is compiled, and hooks attached after the first compiled call never fire: {cure}."
        return (
            f"layer {name!r} never fired since the last collect(). Either no forward ran, or this forward does not call the layer as a module "
            f"(skipped, fused, or only its weights are used), or it runs compiled code that is older than the taps; then {cure}."
        )


def _sides(model: nn.Module, names: Sequence[str], at: Side | Mapping[str, Side]) -> dict[str, Side]:
    given: Mapping[Any, Any] = at if isinstance(at, Mapping) else dict.fromkeys(names, at)
    sides: dict[str, Side] = dict.fromkeys(names, "output")
    for pattern, side in given.items():
        if side not in ("input", "output"):
            raise OptionError(f"at must be 'input' or 'output', or a dict from layer names to these; got {side!r}")
        for name in resolve_layers(model, pattern):
            if name not in sides:
                raise LayerNameError(f"at= names layer {name!r}, which is not tapped; tapped are {list(names)}")
            sides[name] = side
    return sides


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or wrapped_attribute(module) == "_orig_mod"


class CapturedTensor(NamedTuple):
    """One firing of a layer. `original` is None where overwriting cannot be watched."""

    tensor: Tensor
    original: Tensor | None
    version: int
    training: bool
    cloned: bool

    @property
    def overwritten(self) -> bool:
        """Whether the layer's tensor was written to after it was emitted."""
        return self.original is not None and self.original._version != self.version


class ForwardState:
    """The running step of one network. `grad` is grad mode when the root's forward began, None where it was not seen to begin."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.grad: bool | None = None


class CaptureBuffer:
    """Captures of one layer. Written by its hook; dynamo traces that code, so it only appends, assigns and never reads earlier captures."""

    def __init__(self, repeated: str, clone: bool | str) -> None:
        self.repeated = repeated
        self.clone = clone
        self.captures: list[CapturedTensor] = []
        self.more = 0  # firings that were not kept, where a second one is an error already
        self.problem: str | None = None
        self.checkpointed = False
        self.learned: dict[bool, bool] = {}  # layer in training mode? → overwritten later in the same forward?

    def clear(self) -> None:
        """Forget what was captured; what was learned about overwriting stays."""
        self.captures = []
        self.more = 0
        self.problem = None
        self.checkpointed = False

    def learn(self) -> None:
        """Take from a completed forward whether this layer's tensor is overwritten."""
        for capture in self.captures:
            if capture.original is not None:
                self.learned[capture.training] = self.learned.get(capture.training, False) or capture.overwritten

    def keep(self, tensor: Tensor, training: bool) -> None:
        """Add one firing."""
        if self.repeated == "first" and self.captures:
            return
        if self.repeated == "error" and not torch.compiler.is_compiling() and len(self.captures) > 1:
            self.more += 1
            return
        if torch.compiler.is_compiling() or tensor.is_inference():  # no version counter to watch
            capture = CapturedTensor(tensor.clone(), None, 0, training, True)
        else:
            copy = self.learned.get(training, True) if self.clone == "auto" else bool(self.clone)
            # clone and view are nodes of the graph at the same place, so gradients are added in the same order, to the
            # bit, with either
            capture = CapturedTensor(
                tensor.clone() if copy else tensor.view_as(tensor), tensor, tensor._version, training, copy
            )
        if self.repeated == "last":
            self.captures = [capture]
        else:
            self.captures.append(capture)


class DetachedOnCopyHook:
    """A hook that stays behind when the network is copied or pickled: the copy holds a function of the standard library that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class ForwardStartHook(DetachedOnCopyHook):
    """Forward pre-hook of the root: a new forward drops whatever an earlier one left."""

    def __init__(self, step: ForwardState, slots: Iterable[CaptureBuffer]) -> None:
        self.step = step
        self.slots = tuple(slots)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if is_recomputing():
            return
        self.step.grad = torch.is_grad_enabled()
        for slot in self.slots:
            slot.clear()


class LayerHook(DetachedOnCopyHook):
    """Forward hook (output) or forward pre-hook (input) of a tapped layer, registered with keyword arguments."""

    def __init__(self, slot: CaptureBuffer, step: ForwardState) -> None:
        self.slot = slot
        self.step = step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        if is_recomputing():
            return
        tensor = _only_tensor(output[0]) if output else _first_tensor(args, kwargs)
        if tensor is None:
            self.slot.problem = _kinds(output[0] if output else (*args, kwargs))
            return
        if not torch.compiler.is_compiling() and self._lost_its_gradient():
            self.slot.checkpointed = True
        self.slot.keep(tensor, module.training)

    def _lost_its_gradient(self) -> bool:
        """Whether grad mode is off because a re-entrant checkpoint switched it off, and not because the caller wanted it so."""
        if torch.is_grad_enabled() or self.step.grad is False or torch.is_inference_mode_enabled():
            return False
        return _in_reentrant_checkpoint() and any(parameter.requires_grad for parameter in self.step.root.parameters())


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass: gradient checkpointing, which repeats what was captured already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT_CODE:
            return True
        frame = frame.f_back
    return False


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first positional tensor; without positional tensors the only one passed by keyword."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    return _only_tensor(kwargs)


def _only_tensor(value: Any) -> Tensor | None:
    tensors = _tensors(value)
    return tensors[0] if len(tensors) == 1 else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _kinds(value: Any) -> str:
    """The types in a layer's output, for an error message."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {{{', '.join(f'{key}: {_kinds(item)}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(map(_kinds, value))})"
    return type(value).__name__


def hook_target(layer: nn.Module, side: Literal["input", "output"], root: nn.Module) -> nn.Module:
    """The last child of a plain `nn.Sequential` (the first for its input), which emits the same tensor; other layers stand for themselves.

    Networks call the children one by one where they checkpoint gradients, so that the container's own hooks never fire.
    A child that is used in
    several places, or a container with hooks of its own, which may change the tensor, is left as it is.

    Args:
        layer: the layer that is tapped.
        side: what is tapped of it.
        root: the network, bare.
    """
    used = (
        [id(module) for _, module in root.named_modules(remove_duplicate=False)] if type(layer) is nn.Sequential else []
    )
    while type(layer) is nn.Sequential and len(layer) and not layer._forward_hooks and not layer._forward_pre_hooks:
        child = layer[-1 if side == "output" else 0]
        if used.count(id(child)) != 1:
            break
        layer = child
    return layer


@contextmanager
def record_outputs(
    modules: Mapping[str, nn.Module], convert: Callable[[Any], Any] | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Record the outputs of modules during the block; the hooks are removed at its end, also after an error.

    Args:
        modules: Modules to hook, by name.
        convert: Function of an output that returns the value to record. None: the output itself, not a copy.

    Yields:
        Recorded values of each module, one per call. Modules are in the order of their first completed call; those that
        were not called are absent.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with record_outputs(dict(model.named_children()), lambda output: tuple(output.shape)) as shapes:
        ...     _ = model(torch.zeros(4, 2))
        >>> shapes
        {'0': [(4, 3)], '1': [(4, 3)]}
    """
    values: dict[str, list[Any]] = {}

    def record(name: str, output: Any) -> None:
        values.setdefault(name, []).append(output if convert is None else convert(output))

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name, module in modules.items()
    ]
    with remove_afterwards(handles):
        yield values


@contextmanager
def remove_afterwards(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, also after an error.

    Example:
        >>> layer = nn.ReLU()
        >>> with remove_afterwards([layer.register_forward_hook(lambda module, args, output: output + 1)]):
        ...     layer(torch.zeros(1)), len(layer._forward_hooks)
        (tensor([1.]), 1)
        >>> len(layer._forward_hooks)
        0
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor of `layer(x)` and of `layer(input=x)`, as a hook with `with_kwargs=True` sees the call.

    Raises:
        InputTypeError: neither.

    Example:
        >>> import torch
        >>> call_input((), {"input": torch.ones(2)})
        tensor([1., 1.])
    """
    found = args[0] if args else kwargs.get("input")
    if not isinstance(found, Tensor):
        kinds = [type(arg).__name__ for arg in args]
        raise InputTypeError(
            f"expected a layer that is called on one tensor, layer(x) or layer(input=x); got a call with {kinds} and {list(kwargs)}"
        )
    return found
