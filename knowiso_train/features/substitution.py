"""Forward passes of a network with another feature in the place of a layer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, LayerNameError, OptionError
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.hooks import hook_target
from knowiso_train.features.modules import named_layers
from knowiso_train.features.recording import remove_afterwards
from knowiso_train.features.wrappers import unwrap_model, wrapped_attribute
from knowiso_train.utils.batch import map_tensors, tensor_leaves

# Wrappers that hold only a part of the weights: the network inside cannot run alone
SHARDING_WRAPPERS = ("FullyShardedDataParallel", "DeepSpeedEngine")


class Substitution:
    """Replacement of a layer's feature in a network, with the output that follows from it.

    `run` records the outputs of the modules that complete before a layer. `replace` returns these recorded outputs, so
    that only the part of the network after the layer is computed. In the first batch the layer's own feature is put
    back. If the output then differs, because the recorded outputs do not determine it, every later `replace` of that
    layer computes the whole network. Networks run without DDP and DataParallel and without compiled code. A layer's
    input (`at="input"` of the extractor) is replaced for the layer alone, not for others that take it.

    Args:
        extractor: Entered extractor with the layers to replace; gives transform, `forward=`, layout and autocast. With
            `repeated="first"` or `"last"` the first or last call of the layer is replaced. Use it in `preserve_state`.

    Attributes:
        output: The network's own output for the batch of the last `run`.

    Raises:
        OptionError: A network that FSDP or DeepSpeed divides between processes.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> with Extractor(network, "0") as extractor:
        ...     substitution = Substitution(extractor)
        ...     features = substitution.run(torch.randn(2, 3, 8, 8))
        ...     output = substitution.replace("0", features["0"] - 100)
        >>> bool(substitution.output.any()), bool(output.any())
        (True, False)
    """

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.output: Any = None
        self._model = _single_process_model(extractor.model, extractor.name)
        layers = named_layers(self._model)
        self._targets = {name: hook_target(layers[name], extractor.side(name), self._model) for name in extractor.names}
        self._recorder = _Recorder(self._model, self._targets, extractor.repeated)
        self._batch: Any = None
        self._features: dict[str, Tensor] = {}
        # By layer: True if the recorded outputs suffice, False if the whole network must be computed
        self._replayable: dict[str, bool] = {}

    def run(self, batch: Any) -> dict[str, Tensor]:
        """Run the network on a batch and return its features by layer name, as `Extractor.run`; sets `output`."""
        self.clear()
        self._batch = self.extractor.prepare(batch)
        with self._recorder.recording():
            self._features, self.output = self.extractor.run_prepared(self._batch, self._model)
        return self._features

    def replace(self, layer: str, feature: Tensor) -> Any:
        """Return the network's output for the last batch with another feature in the place of a layer's own.

        Args:
            layer: Name of a layer of the extractor.
            feature: (N, C, H, W), on the layer's grid. Class and register tokens stay the network's own.

        Raises:
            CaptureError: No `run` before, or a network whose output changes although the own feature is put back.
            LayerNameError: A layer that the extractor does not have.
            ShapeError: A feature of another shape than the layer's own.
        """
        if self._batch is None:
            raise CaptureError("expected run(batch) before replace(), got no batch; call run() first")
        return self._rerun(layer, feature, replay=self.verify(layer))

    def verify(self, layer: str) -> bool:
        """Put a layer's own feature back, once; return whether recorded outputs then reproduce the network's output.

        Raises:
            CaptureError: An output that changes although the whole network is computed again.
            LayerNameError: A layer that the extractor does not have.
        """
        if layer not in self._targets:
            raise LayerNameError(f"layer {layer!r} is not hooked; the extractor has {list(self._targets)}")
        if layer not in self._replayable:
            self._replayable[layer] = self._reproduces_output(layer)
        return self._replayable[layer]

    def clear(self) -> None:
        """Discard the batch, its output and the recorded outputs."""
        self._batch, self.output, self._features = None, None, {}
        self._recorder.clear()

    def _reproduces_output(self, layer: str) -> bool:
        """Return whether recorded outputs reproduce the network's output when the own feature is put back."""
        feature = self._features[layer]
        if _equal_outputs(self._rerun(layer, feature, replay=True), self.output):
            return True
        if _equal_outputs(self._rerun(layer, feature, replay=False), self.output):
            return False
        raise CaptureError(
            f"{self.extractor.name}: the output changes although the feature of layer {layer!r} is put back. Expected "
            "a network that is deterministic in eval mode and uses the layer's output by itself; choose another layer."
        )

    def _rerun(self, layer: str, feature: Tensor, *, replay: bool) -> Any:
        spec, call = self.extractor.specs[layer], self._recorder.calls[layer]
        feature = feature.detach()
        replacement = _Replacement(lambda tensor: spec.from_nchw(feature, tensor), call.number)
        side = self.extractor.side(layer)
        target = self._targets[layer]
        with ExitStack() as stack:
            if replay and self._recorder.intact:
                self._recorder.replay(call, target, side, stack)
            # Registered last: hooks of the user on this layer run before, as in the network's own forward pass
            if side == "input":
                handle = target.register_forward_pre_hook(replacement.replace_input, with_kwargs=True)
            else:
                handle = target.register_forward_hook(replacement.replace_output)
            stack.callback(handle.remove)
            try:
                output = self.extractor.call(self._batch, self._model)
            finally:
                self.extractor.discard()
        if not replacement.applied:
            raise CaptureError(f"{self.extractor.name}: layer {layer!r} did not run when its feature was replaced")
        return output


class TargetCall(NamedTuple):
    """Call of a layer whose feature is replaced: its number from 0, and the calls of other modules before it."""

    number: int
    completed: dict[nn.Module, int]


class _RecordedOutput:
    """Output of one module call, a copy where later operations overwrite it."""

    def __init__(self, output: Any, *, copy: bool) -> None:
        tensors = tensor_leaves(output)
        self._emitted = [(tensor, _version(tensor)) for tensor in tensors]
        self.is_copy = copy
        self.overwritten = False
        self._value = map_tensors(output, torch.clone) if copy else output
        self._held = [(tensor, _version(tensor)) for tensor in tensor_leaves(self._value)]

    def observe_overwriting(self) -> None:
        """Record whether the emitted tensors were overwritten since, and release them."""
        # Inference tensors do not count writes
        self.overwritten = any(tensor.is_inference() or _version(tensor) != before for tensor, before in self._emitted)
        self._emitted = []

    @property
    def intact(self) -> bool:
        """True if the output is as the module emitted it."""
        unchanged = all(_version(tensor) == before for tensor, before in self._held)
        return unchanged and (self.is_copy or not self.overwritten)

    def value(self) -> Any:
        """Return the output; a copy if the network overwrites it."""
        return map_tensors(self._value, torch.clone) if self.overwritten else self._value


class _Recorder:
    """Outputs of the modules beside the path from the network to the replaced layers.

    These are the children of all modules that contain a replaced layer. Outputs of modules further inside are not
    needed: a child either completed before the layer, or runs after it.
    """

    def __init__(self, model: nn.Module, targets: dict[str, nn.Module], repeated: str) -> None:
        self.targets, self.repeated = targets, repeated
        inner = set(targets.values())
        containers = [
            module for module in model.modules() if any(m in inner for m in module.modules() if m is not module)
        ]
        children = {unwrap_model(child): None for module in containers for child in module.children()}
        # TorchScript does not allow another forward
        self.modules = [module for module in children if not isinstance(module, torch.jit.ScriptModule)]
        self.outputs: dict[nn.Module, list[_RecordedOutput]] = {}
        self.calls: dict[str, TargetCall] = {}
        # (module, index of its call) of outputs that are overwritten later; None before the first batch
        self._overwritten: set[tuple[nn.Module, int]] | None = None

    def clear(self) -> None:
        """Discard the recorded outputs."""
        self.outputs, self.calls = {}, {}

    @property
    def intact(self) -> bool:
        """True if no recorded output was overwritten."""
        return all(output.intact for outputs in self.outputs.values() for output in outputs)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the outputs of a forward pass."""
        counts = dict.fromkeys(self.targets, 0)

        def enter(name: str) -> None:
            if self.repeated != "first" or not counts[name]:
                completed = {module: len(outputs) for module, outputs in self.outputs.items()}
                self.calls[name] = TargetCall(counts[name], completed)
            counts[name] += 1

        def leave(module: nn.Module, output: Any) -> None:
            outputs = self.outputs.setdefault(module, [])
            copy = self._overwritten is None or (module, len(outputs)) in self._overwritten
            outputs.append(_RecordedOutput(output, copy=copy))

        handles = [
            target.register_forward_pre_hook(lambda module, args, name=name: enter(name))
            for name, target in self.targets.items()
        ]
        handles += [
            module.register_forward_hook(lambda module, args, output: leave(module, output)) for module in self.modules
        ]
        with remove_afterwards(handles):
            yield
        self._release()

    def replay(self, call: TargetCall, target: nn.Module, side: str, stack: ExitStack) -> None:
        """Let modules return the outputs that they had before a layer's call, until the stack is closed."""
        counts = dict(call.completed)
        # The replaced output need not be computed either
        counts[target] = call.number + (side == "output")
        for module, count in counts.items():
            if outputs := self.outputs.get(module, [])[:count]:
                _RecordedCalls(module, outputs).install(stack)

    def _release(self) -> None:
        """Note which outputs were overwritten, and discard those that no layer needs."""
        overwritten = self._overwritten or set()
        for module, outputs in self.outputs.items():
            for index, output in enumerate(outputs):
                output.observe_overwriting()
                if output.overwritten:
                    overwritten.add((module, index))
        self._overwritten = overwritten
        inner = {target: self.calls[name].number + 1 for name, target in self.targets.items() if name in self.calls}
        for module, outputs in self.outputs.items():
            counts = [call.completed.get(module, 0) for call in self.calls.values()]
            del outputs[max([inner.get(module, 0), *counts]) :]


class _RecordedCalls:
    """Forward function of a module whose first calls return recorded outputs."""

    def __init__(self, module: nn.Module, outputs: list[_RecordedOutput]) -> None:
        self.module, self.outputs = module, outputs
        self.forward = module.forward
        self.num_calls = 0
        self.value: Any = None

    def install(self, stack: ExitStack) -> None:
        """Replace the module's forward until the stack is closed."""
        previous = vars(self.module).get("forward")

        def restore() -> None:
            del self.module.forward
            if previous is not None:
                self.module.forward = previous

        self.module.forward = self.call
        stack.callback(restore)
        # Recorded is what the user's hooks on the module returned
        stack.callback(self.module.register_forward_hook(self.keep_output).remove)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the recorded output, or compute it after the recorded calls."""
        self.num_calls += 1
        if self.num_calls > len(self.outputs):
            return self.forward(*args, **kwargs)
        self.value = self.outputs[self.num_calls - 1].value()
        return self.value

    def keep_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the recorded output, whatever the user's hooks made of it."""
        return self.value if self.num_calls <= len(self.outputs) else output


class _Replacement:
    """Hook that replaces the tensor of one call of a layer."""

    def __init__(self, convert: Callable[[Tensor], Tensor], index: int) -> None:
        self.convert, self.index = convert, index
        self.num_calls = 0
        self.applied = False

    def replace_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with its only tensor replaced."""
        return map_tensors(output, self.convert) if self._is_due() else output

    def replace_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the first positional tensor replaced, else the only tensor of the keywords."""
        if not self._is_due():
            return args, kwargs
        position = next((i for i, value in enumerate(args) if isinstance(value, Tensor)), None)
        if position is None:
            return args, map_tensors(kwargs, self.convert)
        return (*args[:position], self.convert(args[position]), *args[position + 1 :]), kwargs

    def _is_due(self) -> bool:
        self.num_calls += 1
        due = self.num_calls == self.index + 1
        self.applied |= due
        return due


def _single_process_model(model: nn.Module, role: str) -> nn.Module:
    """Return the network without its wrappers, or raise an error if it cannot run without them."""
    for module in model.modules():
        if wrapped_attribute(module) and type(module).__name__ in SHARDING_WRAPPERS:
            raise OptionError(
                f"{role}: features cannot be replaced in a {type(module).__name__}, whose weights are divided between "
                "processes; pass the network itself"
            )
    return unwrap_model(model)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal_outputs(output: Any, expected: Any) -> bool:
    """Return whether two outputs have equal tensors up to rounding; False for outputs without tensors."""
    tensors, references = tensor_leaves(output), tensor_leaves(expected)
    if not references or [t.shape for t in tensors] != [t.shape for t in references]:
        return False
    return all(_close(tensor, reference) for tensor, reference in zip(tensors, references, strict=True))


def _close(tensor: Tensor, reference: Tensor) -> bool:
    if not reference.is_floating_point():
        return torch.equal(tensor, reference)
    # Relative to the largest value: kernels may sum in another order
    scale = reference.abs().max().item() if reference.numel() else 0.0
    tolerance = torch.finfo(reference.dtype).eps ** 0.5 * scale
    return torch.allclose(tensor, reference, rtol=0, atol=tolerance, equal_nan=True)
