"""Tensors of inner layers, taken with forward hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knowiso_train.errors import CaptureError, LayerNameError, OptionError
from knowiso_train.features.capture import LayerHook, Slot, Step, StepHook
from knowiso_train.features.names import bare, named_layers, resolve, wrapped_attribute
from knowiso_train.features.stand_in import stand_in

Side = Literal["input", "output"]
Captured = TypeVar("Captured", Tensor, list[Tensor])
_REPEATED = ("error", "first", "last", "all")


class FeatureTaps(Generic[Captured]):
    """Context manager that captures the outputs (or inputs) of layers during forward passes.

    A capture is what the layer emitted, with its autograd graph and dtype, also where a later in-place operation overwrites the tensor.
    A new forward of the network drops what an earlier one left; where only a part of the network is called (`model.forward_features(x)`),
    captures gather until `collect()`. The repeated forward of gradient checkpointing is ignored, and a
    `Sequential` is seen also where only its children are called, as checkpointing does. Hooks are gone after the context, also after an
    error, and never travel with a copied or saved network.

    Works under `torch.compile` (also `fullgraph=True`) when the taps are attached before the first compiled call.

    Args:
        model: the network, wrapped (DDP, compiled, ...) or not.
        layers: names or globs, see `resolve`.
        at: "output", "input" (the first positional tensor that the layer receives), or a dict {name or glob: side}; "output" where it says nothing.
        repeated: for a layer that fires more than once before `collect()`: "error", "first", "last", or "all" (a list of tensors per layer).
        clone: "auto" clones on the first forward, watches which tensors are overwritten, and from then on clones only those; True clones always;
            False never, and an overwritten capture is an error. Under `torch.inference_mode` and `torch.compile` overwriting cannot be watched:
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
        self.names: tuple[str, ...] = tuple(resolve(model, layers))
        self._sides = _sides(model, self.names, at)
        self._model = model
        self.repeated = repeated
        self._step = Step(bare(model))
        self._slots = {name: Slot(repeated, clone) for name in self.names}
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
        self._handles.append(self._step.root.register_forward_pre_hook(StepHook(self._step, self._slots.values()), prepend=True))
        for name, slot in self._slots.items():
            hook, side = LayerHook(slot, self._step), self._sides[name]
            place = stand_in(modules[name], side, self._step.root)
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
            CaptureError: a layer that did not fire, fired more than once with `repeated="error"`, emitted no single tensor, was overwritten without
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
        fresh = {name: Slot(slot.repeated, slot.clone) for name, slot in self._slots.items()}
        return vars(self) | {"_handles": [], "_step": Step(self._step.root), "_slots": fresh}

    def __enter__(self) -> FeatureTaps[Captured]:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _read(self, name: str) -> Captured:
        slot = self._slots[name]
        if slot.problem is not None:
            side = self._sides[name]
            raise CaptureError(f"the {side} of layer {name!r} must hold exactly one tensor, got {slot.problem}; tap a layer inside or around it")
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
        for name in resolve(model, pattern):
            if name not in sides:
                raise LayerNameError(f"at= names layer {name!r}, which is not tapped; tapped are {list(names)}")
            sides[name] = side
    return sides


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or wrapped_attribute(module) == "_orig_mod"
