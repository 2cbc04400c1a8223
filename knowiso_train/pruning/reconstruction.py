"""Layer-by-layer reconstruction of the outputs of the original network."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import KnowisoWarning, NonFiniteError, OptionError
from knowiso_train.features.hooks import call_input
from knowiso_train.ops.im2col import grouped_weight, num_groups, ungrouped_weight
from knowiso_train.pruning._blocks import BlockFinetuner
from knowiso_train.pruning._layer_regression import (
    ActivationRange,
    AnyMoments,
    LayerRegression,
    ReLURegression,
    Solution,
    fold_bias,
)
from knowiso_train.pruning._report import LayerFit
from knowiso_train.pruning._tracing import MIN_OUTPUT_SCALE, Epilogue, OpRecorder, batch_norm_affine
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.layer_samples import ReferenceOutputs
from knowiso_train.regression.ridge import PrimalMoments

# Infinity leaves the surviving weights, for layers that a fit makes worse on new images
RECONSTRUCTION_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)
UNCONSTRAINED_RIDGE = 1e-2  # ridge of the weights on all input channels, from which channels are ranked
UNCHANGED_FRACTION = 1e-10  # unexplained variance, below which nothing upstream has changed and the layer is left as is

REFIT_SAMPLES_PER_FEATURE = 100  # samples of a layer's regression

# Moments of the inputs, weights (d, o) on all input channels, scale (o,) -> mask (C,) of channels to keep
Ranking = Callable[[AnyMoments, Tensor, Tensor], Tensor]


class LayerReconstruction:
    """Regression of one layer on the original outputs, from its input in the pruned network.

    Args:
        name: Name of the layer.
        layer: Layer of the pruned network.
        x: Its input for all images.
        network: Reconstruction that the layer is part of.
    """

    def __init__(self, name: str, layer: nn.Module, x: Tensor, network: NetworkReconstruction) -> None:
        self.name, self.layer, self.x, self.network = name, layer, x, network
        self.epilogue, self.groups = network.epilogues[name], num_groups(layer)
        self.positions = network.reference.sampled_positions[name]
        if name in network.masks:
            network.masks[name] = network.masks[name].to(x.device)
        norm = self.epilogue.norm
        self.norm = network.modules[norm] if norm is not None else None

    def targets(self) -> tuple[Tensor, Tensor, ActivationRange | None]:
        """Return targets (R, c) of the layer's output z, its scale (c,), and the limits of z, if a rectifier follows.

        With the scale s and shift t of the epilogue and the residual stream r, the original's sum is y = s·z + t + r,
        so that the target is z = (y - t - r) / s. The stream of the pruned network is used for r: the layer also
        corrects errors made upstream.
        """
        y = self.network.reference.outputs[self.name].double()
        outputs = self.network.outputs.get(self.name)
        y = y if outputs is None else y[:, outputs.to(y.device)]
        scale, shift = batch_norm_affine(self.norm, y.shape[1], y.device)
        if self.epilogue.layer_scale is not None:
            factor = self.network.parameters[self.epilogue.layer_scale].detach().double()
            scale, shift = scale * factor, shift * factor
        offset, limit_scale = shift[None], scale
        if self.epilogue.targets_residual_sum:
            stream = self.network.streams.results[self.epilogue.residual_source]  # type: ignore[index]
            for operation in self.epilogue.shortcut_ops:
                stream = operation(stream)
            offset = shift + self.positions.outputs(stream, conv=isinstance(self.layer, nn.Conv2d)).double()
            # An output channel of scale 0 has no effect on the sum: its target is 0
            zero = torch.zeros((), dtype=y.dtype, device=y.device)
            ineffective = scale.abs() < MIN_OUTPUT_SCALE * scale.abs().max().clamp_min(1e-30)
            y = torch.where(ineffective, zero, (y - offset) / torch.where(ineffective, torch.ones_like(scale), scale))
            limit_scale = torch.where(ineffective, zero, scale)
        limits = self.epilogue.activation_range
        return y, scale, None if limits is None else ActivationRange.of(limits, limit_scale, offset)

    def regress(self) -> None:
        """Solve the regression of the layer, and rank its input channels first where that was deferred."""
        y, scale, limits = self.targets()
        y = y.view(len(y), self.groups, -1)
        weight = grouped_weight(self.layer).detach().double()
        ranking = self.network.rankings.get(self.name)
        mask = None if ranking is not None else self.network.masks.get(self.name)
        x = self.positions.inputs(self.layer, self.x if mask is None or self.groups > 1 else self._select(mask))
        try:
            regression = LayerRegression.of(x, y, len(self.positions.index))
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {self.name!r}: {error}") from error
        if ranking is not None:
            moments = regression.fit_moments
            self.network.masks[self.name] = ranking(
                moments, moments.weight(weight, None, UNCONSTRAINED_RIDGE)[0], scale
            )
        keep = self._feature_mask()
        # A single regression leaves removed features out. Of several groups each loses other features: their weights
        # become 0
        self.columns: Tensor | None = None
        self.keep: Tensor | None = keep
        if keep is not None and self.groups == 1:
            self.columns, self.keep = keep[0].nonzero().flatten(), None
        restricted_columns = None
        if self.columns is not None:
            weight = weight[:, self.columns]
            if mask is None:
                regression, restricted_columns = regression.restrict(self.columns), self.columns
        self.num_samples, self.regression = len(x), regression
        limits = limits.grouped(self.groups) if limits is not None else None
        relu = None
        if limits is not None and isinstance(regression.fit_moments, PrimalMoments):
            relu = ReLURegression(regression, x, y, limits, restricted_columns)
        self._solve(weight, y, relu)

    def _solve(self, weight: Tensor, y: Tensor, relu: ReLURegression | None) -> None:
        """Search the ridge, unless the surviving weights with their bias already reproduce the targets."""
        regression, network = self.regression, self.network
        start = weight if self.keep is None else weight * self.keep.to(weight)[..., None]
        bias, layer_bias = regression.fit_moments.bias(start), self._layer_bias(weight)
        self.before = regression.unexplained(start)
        self.solution = Solution(self.before, math.inf, start, layer_bias)
        bias_change = (bias - layer_bias).square().sum()
        self.changed = self.before > UNCHANGED_FRACTION or bool(
            bias_change > UNCHANGED_FRACTION * y.var(0, correction=0).sum()
        )
        if not self.changed:
            return
        num_features = weight.shape[1] if self.keep is None else int(self.keep.sum(1).max())
        if regression.num_samples < num_features:
            network.short.append(f"{self.name!r} ({regression.num_samples} samples for {num_features} features)")
        if relu is None:
            self.solution = regression.search_ridge(weight, self.keep, network.ridges, network.last_ridge)
        else:
            self.before = relu.unexplained(start, bias)
            self.solution = relu.solve(weight, self.keep, network.ridges, network.last_ridge)
        network.last_ridge = self.solution.ridge

    @torch.no_grad()
    def write_back(self) -> LayerFit:
        """Write the solution into the layer and its batch norm."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        solution = self.solution
        if self.columns is not None:
            full = torch.zeros_like(grouped_weight(self.layer), dtype=torch.float64)
            weight.copy_(ungrouped_weight(self.layer, full.index_copy(1, self.columns, solution.weight)))
        elif self.changed or self.keep is not None:
            weight.copy_(ungrouped_weight(self.layer, solution.weight))
        if self.changed:
            fold_bias(self.layer, self.norm, solution.bias.flatten(), self.regression.fit_moments, solution.weight)
        channels = self.x.shape[1] if isinstance(self.layer, nn.Conv2d) else self.x.shape[-1]
        mask = self.network.masks.get(self.name)
        return LayerFit(
            self.name,
            channels if mask is None else int(mask.sum()),
            self.num_samples,
            self.before,
            solution.unexplained,
        )

    def _layer_bias(self, weight: Tensor) -> Tensor:
        bias: Any = self.layer.bias
        return torch.zeros_like(weight[:, 0]) if bias is None else bias.detach().double().view(self.groups, -1)

    def _select(self, mask: Tensor) -> Tensor:
        """Return the input channels of a mask."""
        return self.x.index_select(1 if isinstance(self.layer, nn.Conv2d) else -1, mask.nonzero().flatten())

    def _feature_mask(self) -> Tensor | None:
        """Return the mask (G, d) of remaining features; None where all remain."""
        mask = self.network.masks.get(self.name)
        if mask is None or bool(mask.all()):
            return None
        if isinstance(self.layer, nn.Linear):
            return mask[None]
        taps = self.layer.weight[0, 0].numel()  # type: ignore[index]
        return mask.view(self.groups, 1, -1).expand(-1, taps, -1).flatten(1)


class NetworkReconstruction:
    """Forward pass in which every layer is solved, in place, before it runs; arguments are those of `reconstruct`.

    All images pass at once, as a layer needs the inputs of all images before the next one runs.
    """

    def __init__(
        self,
        network: nn.Module,
        epilogues: Mapping[str, Epilogue],
        reference: ReferenceOutputs,
        *,
        outputs: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        rankings: Mapping[str, Ranking] | None = None,
        ridges: Sequence[float] = RECONSTRUCTION_RIDGES,
        blocks: BlockFinetuner | None = None,
    ) -> None:
        self.network, self.epilogues, self.reference, self.blocks = network, epilogues, reference, blocks
        self.outputs, self.masks, self.rankings, self.ridges = outputs or {}, dict(masks or {}), rankings or {}, ridges
        self.modules, self.parameters = dict(network.named_modules()), dict(network.named_parameters())
        sources = [item.residual_source for item in epilogues.values() if item.targets_residual_sum]
        # Number of layers that still need a residual stream; it is dropped after the last one
        self.stream_uses = Counter(number for number in sources if number is not None)
        self.streams = OpRecorder(dict.fromkeys(self.stream_uses))
        self.fits: dict[str, LayerFit] = {}
        self.short: list[str] = []  # layers with fewer samples than features
        self.last_ridge: float | None = None

    def run(self, images: Calibration, progress: bool = True) -> list[LayerFit]:
        """Solve all layers, in forward order."""
        with (
            ExitStack() as hooks,
            tqdm(total=len(self.epilogues), desc="refit", unit="layer", disable=not progress) as bar,
        ):
            for name in self.epilogues:
                hook = partial(self._before_layer, name, bar)
                hooks.callback(self.modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            for name in self.blocks.targets if self.blocks is not None else ():
                after = partial(self._after_block, name)
                hooks.callback(self.modules[name].register_forward_hook(after, with_kwargs=True).remove)
            batch = images.concatenate()
            with self.streams:
                images.forward(self.network, batch)
        return list(self.fits.values())

    def _before_layer(
        self, name: str, bar: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if name in self.fits:  # solved already: its block is being fine-tuned
            return
        with self.streams.paused():
            reconstruction = LayerReconstruction(name, layer, call_input(args, kwargs), self)
            reconstruction.regress()
            self.fits[name] = reconstruction.write_back()
        epilogue = self.epilogues[name]
        if epilogue.targets_residual_sum and epilogue.residual_source is not None:
            self.stream_uses[epilogue.residual_source] -= 1
            if self.stream_uses[epilogue.residual_source] == 0:
                self.streams.results.pop(epilogue.residual_source, None)
        bar.update()

    def _after_block(
        self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        with self.streams.paused():
            finetuned = self.blocks.finetune(name, block, args, kwargs, output)  # type: ignore[union-attr]
        for number, stream in self.streams.results.items():
            if stream is output:
                self.streams.results[number] = finetuned
        return finetuned


def reconstruct(
    network: nn.Module,
    epilogues: Mapping[str, Epilogue],
    reference: ReferenceOutputs,
    images: Calibration,
    *,
    outputs: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rankings: Mapping[str, Ranking] | None = None,
    ridges: Sequence[float] = RECONSTRUCTION_RIDGES,
    blocks: BlockFinetuner | None = None,
    warn: bool = True,
    progress: bool = True,
) -> list[LayerFit]:
    """Solve the layers of a network, in place, in forward order.

    Args:
        network: Pruned network, or one of the original's widths with `masks`; in eval mode.
        epilogues: Epilogues of the original's layers, in forward order.
        reference: Outputs of the original on the same images.
        images: Calibration images.
        outputs: Indices (c,) of the original's output channels of a layer. Default: all.
        masks: Masks (C,) of input channels that layers may use. Default: all.
        rankings: Rankings of the input channels of layers, applied when the pass reaches them.
        ridges: Relative ridges to choose from by the selection samples.
        blocks: Fine-tuning of whole blocks, each after its layers are solved.
        warn: Warn of layers with fewer samples than features.
        progress: Show a progress bar.

    Returns:
        One entry for each layer.

    Raises:
        NonFiniteError: NaN or Inf in the input of a layer.
    """
    reconstruction = NetworkReconstruction(
        network,
        epilogues,
        reference,
        outputs=outputs,
        masks=masks,
        rankings=rankings,
        ridges=ridges,
        blocks=blocks,
    )
    fits = reconstruction.run(images, progress)
    if reconstruction.short and warn:
        warnings.warn(
            "fewer samples than features, so that the result depends on the ridge: layers "
            f"{', '.join(reconstruction.short)}. Give more images",
            KnowisoWarning,
            stacklevel=3,
        )
    return fits


def validate_ridges(ridge: float | Sequence[float]) -> tuple[float, ...]:
    """Return one ridge or several as a tuple.

    Raises:
        OptionError: No ridge, or a negative one.

    Examples:
        >>> validate_ridges(0.1)
        (0.1,)
    """
    ridges = tuple(ridge) if isinstance(ridge, Sequence) else (ridge,)
    if not ridges or not all(isinstance(value, (int, float)) and value >= 0 for value in ridges):
        raise OptionError(
            f"ridge must be a number >= 0 (relative to the mean variance of a layer's input) or several, got {ridge!r}"
        )
    return ridges
