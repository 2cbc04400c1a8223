"""Outputs of the original network at sampled positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.ops.im2col import SampledPositions, grouped_weight
from knowiso_train.pruning.calibration import Calibration, InputMoments
from knowiso_train.pruning.tracing import Epilogue, OpRecorder
from knowiso_train.utils.batch import batch_size

MIN_LAYER_SAMPLES, MAX_LAYER_SAMPLES = 1024, 32_768  # rows of any layer
REFERENCE_SAMPLES_PER_FEATURE = 20  # rows per regressor, also where that is more
# Regressors above which a layer gets no more than so many rows, and is solved by their products
WIDE_LAYER_FEATURES, WIDE_LAYER_SAMPLES = 6000, 4096


@dataclass
class ReferenceOutputs:
    """Per layer the positions and the original's outputs there.

    Attributes:
        positions: of every image.
        outputs: (R, C) of the layer; where its output is added to a residual stream that it knows, the sum.
        places: positions at which the layer works for one image.
    """

    positions: dict[str, SampledPositions] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)


def targets_residual_sum(tail: Epilogue) -> bool:
    """Whether a layer aims at the residual sum: it can where the other term is there when it runs."""
    return tail.total is not None and tail.other is not None


def num_samples(regressors: int, rows: int) -> int:
    """Rows of one layer's regression.

    Example:
        >>> num_samples(9, 20), num_samples(576, 20), num_samples(25088, 20)
        (1024, 11520, 4096)
    """
    return (
        WIDE_LAYER_SAMPLES
        if regressors > WIDE_LAYER_FEATURES
        else max(
            MIN_LAYER_SAMPLES,
            min(rows * regressors, max(MAX_LAYER_SAMPLES, REFERENCE_SAMPLES_PER_FEATURE * regressors)),
        )
    )


def record_reference_outputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    tails: Mapping[str, Epilogue],
    images: Calibration,
    rows: int,
    seed: int,
    progress: bool,
    also: InputMoments | None = None,
) -> ReferenceOutputs:
    """One pass of the original network.

    Args:
        model: in eval mode.
        layers: by name.
        tails: of `trace.tails`, in forward order; layers without one are left out.
        images: all of them are read.
        rows: per regressor.
        seed: of the positions.
        progress: whether to show a bar.
        also: gathers what the layers read in the same pass.

    Raises:
        NonFiniteError: a layer gives NaN or Inf.
        OptionError: a network that does other things in another pass.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
        >>> found = record_reference_outputs(model, {"0": model[0]}, {"0": Epilogue()}, Calibration([torch.randn(2, 3, 8, 8)]), rows=2, seed=0, progress=False)
        >>> found.outputs["0"].shape, found.places["0"]
        (torch.Size([128, 4]), 64)
    """
    found, generator = ReferenceOutputs(), torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {name: [] for name in tails}
    sums = {tail.total: name for name, tail in tails.items() if targets_residual_sum(tail)}
    convolutions = {name: isinstance(layers[name], nn.Conv2d) for name in tails}
    start = 0

    def keep(name: str, output: Tensor) -> None:
        rows_of = found.positions[name].part(start, start + size).outputs(output, conv=convolutions[name])
        if not bool(rows_of.isfinite().all()):
            raise NonFiniteError(
                f"layer {name!r} of the original network gives NaN or Inf within the first {start + size} images"
            )
        kept[name].append(rows_of.float())

    def seen(number: int, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        if number in sums:
            keep(sums[number], result)

    mode = OpRecorder(seen)

    def emitted(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            with mode.silent():
                if name not in found.positions:
                    groups, d, width = grouped_weight(layer).shape
                    found.places[name] = output.numel() // (size * groups * width)
                    found.positions[name] = SampledPositions.draw(
                        images.count, found.places[name], num_samples(d, rows), generator
                    )
                if not targets_residual_sum(tails[name]):
                    keep(name, output)

        return hook

    handles = [layers[name].register_forward_hook(emitted(name)) for name in tails]
    try:
        for batch in tqdm(images, desc="original", unit="batch", disable=not progress):
            size, mode.count = batch_size(batch), 0
            with nullcontext() if also is None else also.batch(size, mode.silent), mode:
                images.forward(model, batch)
            start += size
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, parts in kept.items() if not parts]
    if missing:
        raise OptionError(
            f"{type(model).__name__} cannot be pruned or refitted: it does not do the same in every pass, so that the sums that layers {missing} are "
            "added to are not found again (does it keep results in eval mode?). It is as it was"
        )
    found.outputs = {name: torch.cat(parts) for name, parts in kept.items()}
    return found
