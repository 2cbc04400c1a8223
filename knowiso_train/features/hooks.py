"""Forward hooks that capture the inputs or outputs of layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Any, Generic, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from knowiso_train.errors import CaptureError, InputTypeError, LayerNameError, OptionError, ScriptError
from knowiso_train.features._captures import CaptureBuffer, ForwardState
from knowiso_train.features.modules import named_layers, resolve_layers
from knowiso_train.features.wrappers import unwrap_model, wrapped_attribute
from knowiso_train.utils.batch import tensor_leaves
from knowiso_train.utils.validation import validate_arguments

Side = Literal["input", "output"]
Captured = TypeVar("Captured", Tensor, list[Tensor])

_CHECKPOINT_CODE = CheckpointFunction.forward.__code__


class FeatureTaps(Generic[Captured]):
    """Context manager that captures the outputs (or inputs) of layers during forward passes.

    A capture keeps the autograd graph and dtype of the layer's output, also if a later in-place operation overwrites
    the tensor. A new forward pass of the network discards earlier captures. Calls of a part of the network, such as
    `model.forward_features(x)`, accumulate until `collect()`. The recomputation of gradient checkpointing is ignored. A
    `Sequential` is captured also if only its children are called, as with checkpointing. Hooks are removed after the
    context, also after an error, and are not part of a copied or saved network.

    Works under `torch.compile` (also `fullgraph=True`) when the taps are attached before the first compiled call.

    Args:
        model: Network, wrapped (DDP, compiled, ...) or not.
        layers: Names or globs, see `resolve_layers`.
        at: "output", "input" (the first positional tensor of the call), or a mapping from name or glob to side.
            Layers missing in the mapping: "output".
        repeated: Choice for a layer that runs more than once before `collect()`: "error", "first", "last", or "all" (a
            list of tensors per layer).
        clone: True clones every capture. False clones none, and an overwritten capture raises. "auto" clones in the
            first forward pass, and later only the tensors that were overwritten in it. Under `torch.inference_mode` and
            `torch.compile` overwriting cannot be detected, so every capture is a clone.

    Raises:
        LayerNameError: A layer that does not exist.
        OptionError: An invalid option.
        InputTypeError: Not a module, or names that are not strings.

    Examples:
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
    @validate_arguments
    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        at: Side | Mapping[str, Side] = "output",
        repeated: Literal["error", "first", "last", "all"] = "error",
        clone: bool | Literal["auto"] = "auto",
    ) -> None:
        self.names: tuple[str, ...] = tuple(resolve_layers(model, layers))
        self._sides = _sides(model, self.names, at)
        self._model = model
        self.repeated = repeated
        self._step = ForwardState(unwrap_model(model))
        self._slots = {name: CaptureBuffer(repeated, clone) for name in self.names}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """True while the hooks are registered."""
        return bool(self._handles)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Half precision of autocast at a captured layer; None without autocast, and in compiled code."""
        return self._step.autocast_dtype

    @property
    def features(self) -> dict[str, Captured]:
        """Current captures as `collect()` returns them, without discarding them."""
        return {name: self._read(name) for name in self.names}

    def side(self, name: str) -> Side:
        """Return the captured side of a layer, "input" or "output"."""
        return self._sides[name]

    def attach(self) -> FeatureTaps[Captured]:
        """Register the hooks; needed only outside a `with` block.

        Raises:
            CaptureError: The hooks are registered already, or a layer is compiled by `torch.jit`.
        """
        if self.attached:
            raise CaptureError("these taps are attached already; use one FeatureTaps per context, or detach() first")
        modules = named_layers(self._model)
        places = {name: hook_target(modules[name], self._sides[name], self._step.root) for name in self._slots}
        for name, place in places.items():
            if isinstance(place, torch.jit.ScriptModule):
                raise CaptureError(
                    f"layer {name!r} is compiled by torch.jit and has no hooks; use the network as it was before "
                    "torch.jit.script or torch.jit.trace"
                )
        for slot in self._slots.values():
            slot.overwritten_in.clear()
        self.clear()
        self._handles.append(
            self._step.root.register_forward_pre_hook(ForwardStartHook(self._step, self._slots.values()), prepend=True)
        )
        for name, slot in self._slots.items():
            hook, side = LayerHook(slot, self._step), self._sides[name]
            if side == "input":
                self._handles.append(places[name].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(places[name].register_forward_hook(hook, with_kwargs=True))
        return self

    def detach(self) -> None:
        """Remove all hooks and discard all captures; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Discard all captures."""
        self._step.grad = self._step.autocast_dtype = None
        for slot in self._slots.values():
            slot.clear()

    def collect(self) -> dict[str, Captured]:
        """Return and discard the captures of the last forward pass, by layer name.

        Raises:
            CaptureError: A layer that did not run, ran more than once with `repeated="error"`, has no one tensor,
                was overwritten without a clone, or ran in a re-entrant checkpoint. The captures are then discarded too.
        """
        try:
            return self.features
        finally:
            for slot in self._slots.values():
                slot.observe_overwriting()
            self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without hooks and captures, which a copied network does not have either."""
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
                f"the {side} of layer {name!r} must hold exactly one tensor, got {slot.problem}; "
                "tap a layer inside or around it"
            )
        if not slot.captures:
            raise CaptureError(self._never_fired(name))
        if self.repeated == "error" and len(slot.captures) > 1:
            times = len(slot.captures) + slot.num_dropped
            raise CaptureError(
                f"layer {name!r} fired {times} times before collect(), expected once. "
                "Pass repeated='first' or 'last'; after several forward passes read the features of each, with "
                "collect() or the call of the loss."
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
            return (
                f"layer {name!r} was not captured: the taps are not attached. "
                "Use `with taps:` around the forward pass and call collect() inside."
            )
        cure = "attach the taps before the first compiled call, or call torch.compiler.reset() after attaching them"
        if any(_is_compiled(module) for module in (self._model, *self._model.modules())):
            return (
                f"layer {name!r} never fired. The network is compiled, and hooks attached after its first call "
                f"never fire: {cure}."
            )
        return (
            f"layer {name!r} never fired since the last collect(): no forward pass ran, or it does not call the layer "
            f"as a module, or it runs code that was compiled before the taps were attached; then {cure}."
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


class DetachedOnCopyHook:
    """Hook that a copied or pickled network replaces by one that does nothing."""

    # `torch.jit.script` reads the names of all hooks
    @property
    def __name__(self) -> str:
        raise ScriptError(
            "torch.jit.script cannot compile a network with hooks of this library, or a copy of one. "
            "Leave the `with` block, or call detach(), before torch.jit.script and before copy.deepcopy"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedHook:
        return CopiedHook()

    # A bound method of the standard library: loading a pickled network must not need this library.
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class CopiedHook(DetachedOnCopyHook):
    """Hook of a copied network, without effect."""

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""


class ForwardStartHook(DetachedOnCopyHook):
    """Forward pre-hook of the root module that discards captures of earlier passes."""

    def __init__(self, step: ForwardState, slots: Iterable[CaptureBuffer]) -> None:
        self.step = step
        self.slots = tuple(slots)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Discard captures and record the grad mode.

        Raises:
            CaptureError: A replica of `nn.DataParallel`. All replicas would write to the same captures.
        """
        if is_recomputing():
            return
        if getattr(module, "_is_replica", False):
            raise CaptureError(
                "the features of a network in nn.DataParallel on several devices cannot be captured. Use "
                "DistributedDataParallel (torchrun or accelerate launch), or one device: CUDA_VISIBLE_DEVICES=0"
            )
        self.step.grad, self.step.autocast_dtype = torch.is_grad_enabled(), None
        for slot in self.slots:
            slot.clear()


class LayerHook(DetachedOnCopyHook):
    """Forward hook (output) or forward pre-hook (input) that captures a layer's tensor."""

    def __init__(self, slot: CaptureBuffer, step: ForwardState) -> None:
        self.slot = slot
        self.step = step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Capture the tensor of one call."""
        if is_recomputing():
            return
        tensor = _only_tensor(output[0]) if output else _first_tensor(args, kwargs)
        if tensor is None:
            self.slot.problem = _kinds(output[0] if output else (*args, kwargs))
            return
        self.slot.append(tensor, module.training)
        if not torch.compiler.is_compiling():
            kind = tensor.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                self.step.autocast_dtype = torch.get_autocast_dtype(kind)
            if self._in_checkpoint_without_gradient():
                self.slot.checkpointed = True

    def _in_checkpoint_without_gradient(self) -> bool:
        """Return True if a re-entrant checkpoint, and not the caller, disabled gradients."""
        if torch.is_grad_enabled() or self.step.grad is False or torch.is_inference_mode_enabled():
            return False
        return _in_reentrant_checkpoint() and any(parameter.requires_grad for parameter in self.step.root.parameters())


def is_recomputing() -> bool:
    """Return True inside a backward pass, where gradient checkpointing repeats the forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT_CODE:
            return True
        frame = frame.f_back
    return False


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first positional tensor, else the only keyword tensor."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    return _only_tensor(kwargs)


def _only_tensor(value: Any) -> Tensor | None:
    tensors = tensor_leaves(value)
    return tensors[0] if len(tensors) == 1 else None


def _kinds(value: Any) -> str:
    """Describe the types in a layer's output for an error message."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {{{', '.join(f'{key}: {_kinds(item)}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(map(_kinds, value))})"
    return type(value).__name__


def hook_target(layer: nn.Module, side: Literal["input", "output"], root: nn.Module) -> nn.Module:
    """Return the module to hook for a layer: the last child of an `nn.Sequential` (the first for its input).

    With gradient checkpointing networks call the children one by one, so that hooks of the container never run. A
    container with hooks of its own is not replaced, as these may change the tensor; nor is a child that is used in
    several places.

    Args:
        layer: Layer to capture.
        side: Captured side.
        root: Network without wrappers.
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


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input tensor of a hooked module call, `layer(x)` or `layer(input=x)`.

    Raises:
        InputTypeError: A call of another form.

    Examples:
        >>> import torch
        >>> call_input((), {"input": torch.ones(2)})
        tensor([1., 1.])
    """
    found = args[0] if args else kwargs.get("input")
    if not isinstance(found, Tensor):
        kinds = [type(arg).__name__ for arg in args]
        raise InputTypeError(
            f"expected a call with one tensor, layer(x) or layer(input=x); got {kinds} and {list(kwargs)}"
        )
    return found
