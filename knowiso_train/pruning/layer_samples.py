"""Samples of layers on the calibration images: moments of their inputs, and the original network's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import DataError, NonFiniteError, OptionError
from knowiso_train.features.calls import call_model
from knowiso_train.features.hooks import call_input
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.ops.im2col import SampledPositions, grouped_weight, input_rows, num_input_features
from knowiso_train.pruning._tracing import Epilogue, Forward, OpRecorder
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.regression.moments import Moments, RowSums
from knowiso_train.utils.batch import batch_size, get_inputs, index_batch, to_device

SAMPLES_PER_FEATURE = 20  # samples of a ranking; more samples of the same images change no ranking
MIN_LAYER_SAMPLES, MAX_LAYER_SAMPLES = 1024, 32_768  # samples of a layer's reconstruction
REFERENCE_SAMPLES_PER_FEATURE = 20  # samples, also where that exceeds MAX_LAYER_SAMPLES
# Layers of more features get this number of samples, and are solved in the kernel form
WIDE_LAYER_FEATURES, WIDE_LAYER_SAMPLES = 6000, 4096


@dataclass(frozen=True)
class LayerInput:
    """Statistics of the input of one layer.

    Attributes:
        moments: Moments of its input samples, as the source. The matrix `xx / count` is the Hessian H of
            SparseGPT and GPTQ.
        positions: Output positions for one image: H' · W' of a convolution, tokens of a linear layer.
    """

    moments: Moments
    positions: float


def input_moments(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    max_images: int = 512,
    rows: int = SAMPLES_PER_FEATURE,
    forward: Forward | None = None,
    merged: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, LayerInput]:
    """Compute moments of the inputs of linear layers and convolutions at random positions. Labels are never read.

    Args:
        model: Network; its mode and random state are restored, also after an error.
        loader: Batches of images, see `knowiso_train.features.inputs_of`.
        layers: Linear layers and ungrouped convolutions by name.
        max_images: Maximum number of images.
        rows: Samples per input feature of a layer, over all images.
        forward: `forward(model, batch)` for models that need more than images.
        merged: For layers of too many features, (J, m) features of each of J units. The moments are then those of J
            features, over m times as many samples.
        seed: Seed of the positions.
        progress: Show a progress bar.

    Raises:
        DataError: No images, or a layer that never ran.
        NonFiniteError: NaN or Inf in the input of a layer.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        >>> inputs = input_moments(model, [torch.randn(8, 3, 6, 6)], {"2": model[2]}, progress=False)
        >>> inputs["2"].moments.xx.shape
        torch.Size([4, 4])
        >>> inputs["2"].positions
        16.0
    """
    device, call = device_of(model), call_model if forward is None else forward
    inputs = InputMoments(layers, max_images, rows, merged, seed)
    with (
        inputs,
        preserve_state(model),
        torch.no_grad(),
        tqdm(total=max_images, desc="moments", unit="image", disable=not progress) as bar,
    ):
        for batch in loader:
            available = len(get_inputs(batch)) if forward is None else batch_size(batch)
            size = min(available, max_images - inputs.count)
            batch = batch if size == available else index_batch(batch, torch.arange(size))
            if device is not None:
                batch = to_device(batch, device)
            with inputs.batch(size):
                call(model, batch if forward is not None else get_inputs(batch))
            bar.update(size)
            if inputs.count >= max_images:
                break
    return inputs.moments()


class InputMoments:
    """Hooks that accumulate `input_moments` during any pass: enter the object, and `batch` for each batch.

    Args:
        layers: Layers by name.
        images: Number of images, the first ones of the pass, to take samples from.
        rows: Samples per input feature.
        merged: Features of each unit, as for `input_moments`.
        seed: Seed of the positions.

    Attributes:
        count: Number of images so far.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        >>> with InputMoments({"2": model[2]}, images=6, rows=100) as inputs, inputs.batch(8):
        ...     _ = model(torch.randn(8, 3, 6, 6))
        >>> int(inputs.moments()["2"].moments.count)  # 16 positions of six images
        96
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        images: int,
        rows: int = SAMPLES_PER_FEATURE,
        merged: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.layers, self.images, self.rows, self.merged = layers, images, rows, merged or {}
        self.count = 0
        self._num_features = {
            name: len(self.merged[name]) if name in self.merged else num_input_features(layer)
            for name, layer in layers.items()
        }
        self._sums: dict[str, RowSums] = {}
        self._positions: dict[str, float] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._size = 0
        self._pause: Callable[[], AbstractContextManager[None]] = nullcontext

    def __enter__(self) -> InputMoments:
        self._handles = [
            layer.register_forward_hook(partial(self._hook, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch(self, size: int, pause: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Accumulate the pass of a batch of `size` images within, and enter `pause()` around each computation."""
        self._size, self._pause = size, pause
        yield
        self.count += size

    def moments(self) -> dict[str, LayerInput]:
        """Return the moments of every layer.

        Raises:
            DataError: No images, or a layer that never ran.
        """
        missing = [name for name in self.layers if name not in self._sums]
        if not self.count or missing:
            raise DataError(
                f"{self.count} images passed, and these layers never ran: {missing}. Give a loader with images, and "
                "layers that they reach."
            )
        return {name: LayerInput(sums.moments(), self._positions[name]) for name, sums in self._sums.items()}

    def _hook(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        images = min(self._size, self.images - self.count)
        if images > 0:
            with self._pause():
                self._positions[name] = output.numel() / (self._size * len(layer.weight))  # type: ignore[arg-type]
                x = call_input(args, kwargs).detach()
                self._add(name, layer, x[: len(x) * images // self._size], images)

    def _add(self, name: str, layer: nn.Module, x: Tensor, images: int) -> None:
        rows = math.ceil(self.rows * self._num_features[name] * images / self.images)
        samples = input_rows(layer, x, rows, self._generator)
        if name in self.merged:
            # (R, J, m) -> (R · m, J): the m features of a unit count as m samples
            samples = samples[:, self.merged[name].to(samples.device)].transpose(1, 2).flatten(0, 1)
        try:
            # MPS has no float64
            self._sums.setdefault(name, RowSums()).add(samples.cpu() if samples.device.type == "mps" else samples)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r}: NaN or Inf in its input after {self.count} images") from error


@dataclass
class ReferenceOutputs:
    """Outputs of the original network's layers at sampled positions: the targets of the reconstruction.

    Attributes:
        sampled_positions: Positions of every image, by layer.
        outputs: Output (R, C) of each layer, or the residual sum where `Epilogue.targets_residual_sum`.
        num_positions: Output positions of each layer for one image.
    """

    sampled_positions: dict[str, SampledPositions]
    outputs: dict[str, Tensor]
    num_positions: dict[str, int]


def num_samples(num_features: int, rows: int) -> int:
    """Return the number of samples of one layer's regression, for `rows` samples per feature within the limits.

    Examples:
        >>> num_samples(9, 20), num_samples(576, 20), num_samples(25088, 20)
        (1024, 11520, 4096)
    """
    if num_features > WIDE_LAYER_FEATURES:
        return WIDE_LAYER_SAMPLES
    maximum = max(MAX_LAYER_SAMPLES, REFERENCE_SAMPLES_PER_FEATURE * num_features)
    return max(MIN_LAYER_SAMPLES, min(rows * num_features, maximum))


def record_reference_outputs(
    model: nn.Module,
    epilogues: Mapping[str, Epilogue],
    images: Calibration,
    rows: int,
    seed: int,
    progress: bool,
    inputs: InputMoments | None = None,
) -> ReferenceOutputs:
    """Record the outputs of the original network's layers in one pass over all images.

    Args:
        model: Original network, in eval mode.
        epilogues: Epilogues of the layers to record, in forward order.
        images: Calibration images.
        rows: Samples per input feature of a layer.
        seed: Seed of the positions.
        progress: Show a progress bar.
        inputs: Accumulator of input moments, for the same pass.

    Raises:
        NonFiniteError: NaN or Inf in the output of a layer.
        OptionError: A network that runs other operations in another pass.

    Examples:
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), Calibration([torch.randn(2, 3, 8, 8)])
        >>> reference = record_reference_outputs(model, {"0": Epilogue()}, images, rows=2, seed=0, progress=False)
        >>> reference.outputs["0"].shape, reference.num_positions["0"]
        (torch.Size([128, 4]), 64)
    """
    sampler = _OutputSampler(model, epilogues, images.count, rows, seed)
    with sampler:
        for batch in tqdm(images, desc="original", unit="batch", disable=not progress):
            size = batch_size(batch)
            with nullcontext() if inputs is None else inputs.batch(size, sampler.recorder.paused), sampler.batch(size):
                images.forward(model, batch)
    return sampler.reference()


class _OutputSampler:
    """Hooks that sample the outputs of layers, and the residual sums that they are added to."""

    def __init__(self, model: nn.Module, epilogues: Mapping[str, Epilogue], images: int, rows: int, seed: int) -> None:
        self.model, self.epilogues, self.images, self.rows = model, epilogues, images, rows
        self.recorder = OpRecorder()
        self._sums = {item.residual_add: name for name, item in epilogues.items() if item.targets_residual_sum}
        self._positions: dict[str, SampledPositions] = {}
        self._num_positions: dict[str, int] = {}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in epilogues}
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._start, self._size, self._num_batches = 0, 0, 0

    def __enter__(self) -> _OutputSampler:
        self._handles = [
            self.model.get_submodule(name).register_forward_hook(partial(self._hook, name)) for name in self.epilogues
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Sample the pass of a batch of `size` images within."""
        self._size, self.recorder.count = size, 0
        self.recorder.samplers.clear()
        with self.recorder:
            yield
        self._add_sums()
        self._start += size
        self._num_batches += 1

    def _hook(self, name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        with self.recorder.paused():
            self._add_sums()
            if name not in self._positions:
                groups, d, width = grouped_weight(layer).shape
                self._num_positions[name] = output.numel() // (self._size * groups * width)
                self._positions[name] = SampledPositions.draw(
                    self.images, self._num_positions[name], num_samples(d, self.rows), self._generator
                )
            positions = self._positions[name].part(self._start, self._start + self._size)
            sample = partial(positions.outputs, conv=isinstance(layer, nn.Conv2d))
            if self.epilogues[name].targets_residual_sum:
                # The sum is computed later in this pass, and possibly overwritten by the activation after it
                self.recorder.samplers[self.epilogues[name].residual_add] = sample  # type: ignore[index]
            else:
                self._add(name, sample(output))

    def _add_sums(self) -> None:
        for number in list(self.recorder.results):
            self._add(self._sums[number], self.recorder.results.pop(number))

    def _add(self, name: str, samples: Tensor) -> None:
        if not bool(samples.isfinite().all()):
            raise NonFiniteError(
                f"layer {name!r} of the original network returns NaN or Inf within the first "
                f"{self._start + self._size} images"
            )
        self._outputs[name].append(samples.float())

    def reference(self) -> ReferenceOutputs:
        """Return the outputs of all batches.

        Raises:
            OptionError: Residual sums that a later pass did not compute at the same place.
        """
        missing = [name for name, samples in self._outputs.items() if len(samples) != self._num_batches]
        if missing:
            raise OptionError(
                f"{type(self.model).__name__} cannot be pruned or refitted: its operations differ between passes, so "
                f"that the residual sums of layers {missing} are missing. Turn off caches of its results in eval mode"
            )
        outputs = {name: torch.cat(samples) for name, samples in self._outputs.items()}
        return ReferenceOutputs(self._positions, outputs, self._num_positions)
