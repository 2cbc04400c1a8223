"""Layer-by-layer reconstruction of the outputs of the original network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import InputTypeError, KnowisoWarning, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.hooks import call_input
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.ops.im2col import SampledPositions, grouped_weight, num_groups, ungrouped_weight
from knowiso_train.pruning.blocks import BlockFinetuner
from knowiso_train.pruning.calibration import Calibration, Forward, check_counts
from knowiso_train.pruning.kept_indices import KeptIndices, infer_kept_outputs
from knowiso_train.pruning.layer_regression import ActivationRange, AnyMoments, LayerRegression, ReLURegression
from knowiso_train.pruning.reference_outputs import ReferenceOutputs, record_reference_outputs, targets_residual_sum
from knowiso_train.pruning.report import LayerFit, RefitReport
from knowiso_train.pruning.tracing import (
    TRACE_IMAGES,
    Epilogue,
    OpRecorder,
    check_network,
    record_operations,
    trace_model,
)
from knowiso_train.regression.ridge import KernelMoments, PrimalMoments

# Of the variance that a norm expects: below it a channel is silent, and the norm's statistics stay
MIN_RELATIVE_VARIANCE = 1e-6

# The last leaves the surviving weights, for layers that the rows only mislead
RECONSTRUCTION_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)
UNCONSTRAINED_RIDGE = 1e-2  # ridge of the weights from which a choice of channels starts
UNCHANGED_SHARE = 1e-10  # unexplained: nothing upstream has changed, and the layer stays to the bit
# Moments, weights (d, o) free of any choice, scale (o,) -> (C,) channels to keep
Choose = Callable[[AnyMoments, Tensor, Tensor], Tensor]

REFIT_SAMPLES_PER_FEATURE = 100  # per regressor; more than the criterion needs


def batch_norm_affine(norm: nn.Module | None, channels: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """(C,) scale and shift of a batch norm in eval mode, float64; 1 and 0 for None.

    Example:
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
    scale = n.weight.detach().double() * (n.running_var.double() + n.eps).rsqrt()
    return scale, n.bias.detach().double() - scale * n.running_mean.double()


@torch.no_grad()
def fold_bias(
    layer: nn.Module, norm: nn.Module | None, bias: Tensor, moments: PrimalMoments | KernelMoments, weight: Tensor
) -> None:
    """Give a layer whose weight was refitted its intercept.

    With a batch norm behind it, the norm takes the intercept, and its statistics become those of the layer's new output
    while its scale and shift
    make up for that: the same function in eval mode, and a training step starts from the same one. Otherwise the
        layer's bias takes it, which is
    added where there is none.

    Args:
        layer: convolution or linear layer.
        norm: the batch norm that alone reads it, or None.
        bias: (C,) float64, the whole intercept.
        moments: of what the layer reads.
        weight: (G, d, o), the new one.
    """
    owner: Any = layer
    if norm is None:
        if owner.bias is None:
            owner.bias = nn.Parameter(bias.to(owner.weight))
        else:
            owner.bias.copy_(bias)
        return
    own = torch.zeros_like(bias) if owner.bias is None else owner.bias.double()
    n: Any = norm
    scale, shift = batch_norm_affine(norm, len(bias))
    mean = (weight.mT @ moments.mean_x[..., None])[..., 0].flatten() + own
    variance = moments.variance(weight).flatten()
    loud = variance > MIN_RELATIVE_VARIANCE * n.running_var.double()
    new_scale = scale * (variance + n.eps).sqrt()
    offset = shift + scale * (bias - own)  # norm(z) = scale · z + offset
    n.weight.copy_(torch.where(loud, new_scale, n.weight.double()))
    n.bias.copy_(torch.where(loud, offset + scale * mean, n.bias.double()))
    n.running_mean.copy_(torch.where(loud, mean, n.running_mean.double() - (bias - own)))
    n.running_var.copy_(torch.where(loud, variance, n.running_var.double()))


def reconstruct(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    tails: Mapping[str, Epilogue],
    target: ReferenceOutputs,
    images: Calibration,
    *,
    outputs: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    choose: Mapping[str, Choose] | None = None,
    ridge: Sequence[float] = RECONSTRUCTION_RIDGES,
    blocks: BlockFinetuner | None = None,
    quiet: bool = False,
    progress: bool = True,
) -> list[LayerFit]:
    """Solve the layers of a network, in place, in the order in which they run.

    A layer's target is what the original gives; where its output is added to a residual stream that is there when it
    runs, what the stream lacks of
    the original's sum, so that errors made upstream are mended. In front of a rectifier only what passes it is aimed
    at.

    All images pass at once: a layer must have seen all before the next one runs.

    Args:
        network: pruned, or of the original's width with `masks`; in eval mode.
        layers: of the network, by name.
        tails: of the original, in forward order.
        target: of the original, on the same images.
        images: all of them are read.
        outputs: (c,) indices of the original's output channels that a layer still has; all where it is not named.
        masks: (C,) the input channels that a layer may read.
        choose: for layers whose input channels are chosen when the pass reaches them.
        ridge: relative ρ, several to choose from by images that are not fitted.
        blocks: to be tuned as a whole, each when its layers are solved.
        quiet: no warning of few rows.
        progress: whether to show a bar.

    Returns:
        One entry for each layer.

    Raises:
        NonFiniteError: a layer reads NaN or Inf.
    """
    masks, outputs, choose = dict(masks or {}), outputs or {}, choose or {}
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    streams: dict[int, Tensor] = {}
    wanted = {tail.other for tail in tails.values() if targets_residual_sum(tail)}
    fits: list[LayerFit] = []
    solved: set[str] = set()
    short: list[str] = []
    last: float | None = None

    def seen(number: int, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        if number in wanted:
            streams[number] = result

    mode = OpRecorder(seen)

    def solve(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal last
        tail, at, groups = tails[name], target.positions[name], num_groups(layer)
        if name in masks:
            masks[name] = masks[name].to(x.device)
        whole = original = grouped_weight(layer).detach().double()
        bias = torch.zeros_like(original[:, 0]) if layer.bias is None else layer.bias.detach().double().view(groups, -1)  # type: ignore[operator]
        y, scale, limits = _aims(name, layer, tail, target, at, streams, outputs.get(name), modules, parameters)
        y = y.view(len(y), groups, -1)
        known = None if name in choose else masks.get(name)
        rows = at.inputs(layer, x if known is None or groups > 1 else _channels(layer, x, known))
        try:
            regression = LayerRegression.of(rows, y, len(at.index))
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r}: {error}") from error
        if name in choose:
            masks[name] = choose[name](
                regression.fitted, regression.fitted.weight(original, None, UNCONSTRAINED_RIDGE)[0], scale
            )
        keep, columns = _columns(layer, masks.get(name)), None
        # What is gone is left out; else it becomes 0, in each group other columns
        if keep is not None and groups == 1:
            columns, keep = keep[0].nonzero().flatten(), None
            original = original[:, columns]
            regression = regression if known is not None else regression.restricted(columns)
        before = original if keep is None else original * keep.to(original)[..., None]
        read = original.shape[1] if keep is None else int(keep.sum(1).max())
        shares, new, now = [regression.unexplained(before)], before, regression.fitted.bias(before)
        changed = shares[0] > UNCHANGED_SHARE or bool(
            (now - bias).square().sum() > UNCHANGED_SHARE * y.var(0, correction=0).sum()
        )
        if changed:
            if regression.count < read:
                short.append(f"{name!r} ({regression.count} rows for {read} regressors)")
            if limits is None or not isinstance(regression.fitted, PrimalMoments):
                share, last, new = regression.best(original, keep, ridge, last)
                bias = regression.fitted.bias(new)
            else:
                rectified = ReLURegression(
                    regression, rows, y, limits.grouped(groups), columns if known is None else None
                )
                shares = [rectified.unexplained(before, now)]
                share, last, new, bias = rectified.best(original, keep, ridge, last)
            shares.append(share)
        with torch.no_grad():
            if columns is not None:
                layer.weight.copy_(ungrouped_weight(layer, torch.zeros_like(whole).index_copy(1, columns, new)))  # type: ignore[operator]
            elif changed or keep is not None:
                layer.weight.copy_(ungrouped_weight(layer, new))  # type: ignore[operator]
        if changed:
            norm = modules[tail.norm] if tail.norm is not None else None
            fold_bias(layer, norm, bias.flatten(), regression.fitted, new)
        inputs = x.shape[1] if isinstance(layer, nn.Conv2d) else x.shape[-1]
        inputs = inputs if name not in masks else int(masks[name].sum())
        fits.append(LayerFit(name, inputs, len(rows), shares[0], shares[-1]))

    def reached(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in solved:  # else its block is being tuned
                solved.add(name)
                with mode.silent():
                    solve(name, layer, call_input(args, kwargs))
                bar.update()

        return hook

    def finished(name: str) -> Callable[..., Tensor]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with mode.silent():
                made = blocks.finetune(name, block, args, kwargs, output)  # type: ignore[union-attr]
            for number, value in streams.items():
                if value is output:
                    streams[number] = made
            return made

        return hook

    every = images.concatenate()
    handles = [layers[name].register_forward_pre_hook(reached(name), with_kwargs=True) for name in tails]
    handles += [
        modules[name].register_forward_hook(finished(name), with_kwargs=True)
        for name in (blocks.targets if blocks is not None else ())
    ]
    try:
        with tqdm(total=len(tails), desc="refit", unit="layer", disable=not progress) as bar, mode:
            images.forward(network, every)
    finally:
        for handle in handles:
            handle.remove()
    if short and not quiet:
        warnings.warn(
            f"fewer rows than regressors, so that the ridge decides what the rows do not: layers {', '.join(short)}. Give more images",
            KnowisoWarning,
            stacklevel=3,
        )
    return fits


def _aims(
    name: str,
    layer: nn.Module,
    tail: Epilogue,
    target: ReferenceOutputs,
    at: SampledPositions,
    streams: Mapping[int, Tensor],
    outputs: Tensor | None,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, ActivationRange | None]:
    """(R, c): what the layer itself should give; (c,): what its output is multiplied by until it is added or read; and between what limits."""
    y = target.outputs[name].double()
    y = y if outputs is None else y[:, outputs.to(y.device)]
    scale, shift = batch_norm_affine(modules[tail.norm] if tail.norm is not None else None, y.shape[1], y.device)
    if tail.scale is not None:
        factor = parameters[tail.scale].detach().double()
        scale, shift = scale * factor, shift * factor
    offset, heard = shift[None], scale
    if targets_residual_sum(tail):
        stream = streams[tail.other]  # type: ignore[index]
        for step in tail.steps:
            stream = step(stream)
        offset = shift + at.outputs(stream, conv=isinstance(layer, nn.Conv2d)).double()
        silent = scale.abs() < 1e-6 * scale.abs().max().clamp_min(1e-30)  # nothing of such a channel arrives
        y = torch.where(silent, y.new_zeros(()), (y - offset) / torch.where(silent, torch.ones_like(scale), scale))
        heard = torch.where(silent, scale.new_zeros(()), scale)
    return y, scale, None if tail.limits is None else ActivationRange.of(tail.limits, heard, offset)


def _channels(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """What a layer of one group reads, of these channels alone."""
    return x.index_select(1 if isinstance(layer, nn.Conv2d) else -1, mask.nonzero().flatten())


def _columns(layer: nn.Module, mask: Tensor | None) -> Tensor | None:
    """(G, d) of a mask over input channels."""
    if mask is None or bool(mask.all()):
        return None
    if isinstance(layer, nn.Linear):
        return mask[None]
    taps = layer.weight[0, 0].numel()  # type: ignore[index]
    return mask.view(num_groups(layer), 1, -1).expand(-1, taps, -1).flatten(1)


def refit(
    pruned: nn.Module,
    original: nn.Module,
    loader: Iterable[Any],
    *,
    kept: Mapping[str, KeptIndices] | None = None,
    max_images: int = 1024,
    rows: int = REFIT_SAMPLES_PER_FEATURE,
    ridge: float | Sequence[float] = RECONSTRUCTION_RIDGES,
    block_steps: int = 0,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RefitReport:
    """Give a pruned network, in place, weights that reproduce the original's outputs from what is left (DESIGN §1.4). No labels, no training.

    Layer after layer in the order in which they run, each one's weight and intercept are solved in closed form from
    what the layer now reads, errors
    made upstream included, to what the original's layer gives; where its output joins a residual stream, to what the
    stream lacks of the original's.
    Where a rectifier (ReLU, ReLU6, Hardtanh) is all that reads the result, what lies beyond its limits may be anything
    beyond them: targets and
    weights are found by turns, see `pruning.rectified`.

    The ridge pulls towards the surviving original weights. A tenth of the images, the last ones, is never fitted: it
    chooses each layer's ridge, and
    says what is left unexplained.

    Refitted are convolutions of any kernel, stride and number of groups (depthwise: each channel by itself) and linear
    layers that run once. The
    intercept goes into the following batch norm, whose statistics then are those of the new output, or into the layer's
    bias, which is added where
    there is none. Batch norms, layer norms and all other parameters stay as pruning left them.

    Args:
        pruned: pruned from `original` by any library, with the same layer names. Wrapped or not.
        original: the network before pruning.
        loader: batches of images, see `knowiso_train.features.inputs_of`; shuffled, as the first ones are taken; labels
            are never read.
        kept: what pruning kept, from `recording`; None reads it off the weights, which works until the pruned network
            is trained.
        max_images: to look at. All of them pass through the pruned network at once, so memory grows with them.
        rows: of each regression, per regressor, at most all positions of all images.
        ridge: relative ρ ≥ 0, one or several to choose from; `math.inf` leaves the surviving weights and corrects the
            intercept.
        block_steps: where more than 0, every block is tuned as a whole once its layers are solved, by so many updates
            towards what the original's
            block gives: gradients within one block, still no labels. 60 take as long again as the rest; what is not
                better on other images is undone.
            What the original's blocks give for all images is held in memory.
        forward: `forward(model, batch)` for networks that need more than images.
        seed: of the positions.
        progress: whether to show a bar.

    Returns:
        Per layer the unexplained share before and after, on images that were not fitted.

    Raises:
        ShapeError: not a pruned version of the original.
        InputTypeError, OptionError, DataError: arguments without meaning.
        NonFiniteError: NaN or Inf, with the layer's name.

    Example:
        >>> original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with torch.no_grad():
        ...     original[0].weight[7], original[0].bias[7] = original[0].weight[6], original[0].bias[6]  # a channel that is there twice
        >>> pruned = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3))
        >>> cut = {"0.weight": original[0].weight[:7], "0.bias": original[0].bias[:7]}
        >>> _ = pruned.load_state_dict({**cut, "2.weight": original[2].weight[:, :7], "2.bias": original[2].bias})
        >>> images = torch.randn(64, 3, 8, 8)
        >>> report = refit(pruned, original, [images], ridge=1e-9, progress=False)
        >>> torch.allclose(pruned(images), original(images), atol=1e-4)
        True
    """
    for role, model in (("pruned", pruned), ("original", original)):
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role}: expected a torch.nn.Module, got {type(model).__name__}")
    small, whole = unwrap_model(pruned), unwrap_model(original)
    if small is whole:
        raise OptionError("pruned and original are the same network; keep a copy.deepcopy of it before pruning")
    ridges = validate_ridges(ridge)
    check_network(small, whole)
    check_counts(rows=rows)
    images = Calibration(loader, max_images, device_of(whole), forward)
    with preserve_state(small, whole), torch.no_grad():
        found = trace_model(whole, images)
        outputs = infer_kept_outputs(whole, small, found, kept)
        few = images.first(min(TRACE_IMAGES, images.count))
        counts = [record_operations(partial(images.forward, network, few)) for network in (small, whole)]
        if counts[0] != counts[1]:
            raise ShapeError(
                f"the pruned network runs {counts[0]} operations and the original {counts[1]}, so that they cannot be told to be the same ones. "
                "Close FeatureTaps and take hooks off both first"
            )
        layers = dict(small.named_modules())
        strange = [name for name in found if type(layers[name]) is not type(whole.get_submodule(name))]
        if strange:
            raise ShapeError(f"layers {strange} of the pruned network are of another kind than the original's")
        target = record_reference_outputs(whole, dict(whole.named_modules()), found, images, rows, seed, progress)
        blocks = (
            BlockFinetuner.from_original(whole, small, list(found), images, block_steps, seed) if block_steps else None
        )
        fits = reconstruct(
            small, layers, found, target, images, outputs=outputs, ridge=ridges, blocks=blocks, progress=progress
        )
    return RefitReport(tuple(fits), tuple(blocks.results) if blocks is not None else ())


def validate_ridges(ridge: float | Sequence[float]) -> tuple[float, ...]:
    """One ridge or several as a tuple.

    Raises:
        OptionError: none, or a negative one.

    Example:
        >>> validate_ridges(0.1)
        (0.1,)
    """
    found = tuple(ridge) if isinstance(ridge, Sequence) else (ridge,)
    if not found or not all(isinstance(value, (int, float)) and value >= 0 for value in found):
        raise OptionError(
            f"ridge must be a number >= 0 (relative to the mean variance of what a layer reads) or several, got {ridge!r}"
        )
    return found
