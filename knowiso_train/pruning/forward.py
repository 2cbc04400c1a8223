"""Refit a network in one forward pass: every layer is solved when the pass reaches it, on what the layers before it now give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import KnowisoWarning, NonFiniteError
from knowiso_train.features import called_on
from knowiso_train.pruning.absorb import absorb, affine_of
from knowiso_train.pruning.blocks import Blocks
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.originals import Originals, aimed_at_sum
from knowiso_train.pruning.positions import Positions, grouped_weight, groups_of, ungrouped_weight
from knowiso_train.pruning.rectified import Limits, Rectified
from knowiso_train.pruning.refit import RowMoments
from knowiso_train.pruning.regression import AnyMoments, Regression
from knowiso_train.pruning.trace import Operations, Tail

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)  # the last leaves the surviving weights, for layers that the rows only mislead
FREE = 1e-2  # ridge of the weights from which a choice of channels starts
SAME = 1e-10  # unexplained: nothing upstream has changed, and the layer stays to the bit


@dataclass(frozen=True)
class LayerFit:
    """One refitted layer.

    Attributes:
        name: of the layer.
        inputs: channels that it reads.
        rows: of its regression.
        before: unexplained share of what it should give, with the surviving original weights, on images that were not fitted; where a rectifier reads
            it, of what passes that.
        after: the same with refitted ones.
    """

    name: str
    inputs: int
    rows: int
    before: float
    after: float


Choose = Callable[[AnyMoments, Tensor, Tensor], Tensor]  # moments, weights (d, o) free of any choice, scale (o,) -> (C,) channels to keep


def refit_forward(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    tails: Mapping[str, Tail],
    target: Originals,
    images: Calibration,
    *,
    outputs: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    choose: Mapping[str, Choose] | None = None,
    ridge: Sequence[float] = RIDGES,
    blocks: Blocks | None = None,
    quiet: bool = False,
    progress: bool = True,
) -> list[LayerFit]:
    """Solve the layers of a network, in place, in the order in which they run.

    A layer's target is what the original gives; where its output is added to a residual stream that is there when it runs, what the stream lacks of
    the original's sum, so that errors made upstream are mended. In front of a rectifier only what passes it is aimed at.

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
    wanted = {tail.other for tail in tails.values() if aimed_at_sum(tail)}
    fits: list[LayerFit] = []
    solved: set[str] = set()
    short: list[str] = []
    last: float | None = None

    def seen(number: int, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        if number in wanted:
            streams[number] = result

    mode = Operations(seen)

    def solve(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal last
        tail, at, groups = tails[name], target.positions[name], groups_of(layer)
        if name in masks:
            masks[name] = masks[name].to(x.device)
        whole = original = grouped_weight(layer).detach().double()
        bias = torch.zeros_like(original[:, 0]) if layer.bias is None else layer.bias.detach().double().view(groups, -1)  # type: ignore[operator]
        y, scale, limits = _aims(name, layer, tail, target, at, streams, outputs.get(name), modules, parameters)
        y = y.view(len(y), groups, -1)
        known = None if name in choose else masks.get(name)
        rows = at.inputs(layer, x if known is None or groups > 1 else _channels(layer, x, known))
        try:
            regression = Regression.of(rows, y, len(at.index))
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r}: {error}") from error
        if name in choose:
            masks[name] = choose[name](regression.fitted, regression.fitted.weight(original, None, FREE)[0], scale)
        keep, columns = _columns(layer, masks.get(name)), None
        if keep is not None and groups == 1:  # what is gone is left out; else it becomes 0, in each group other columns
            columns, keep = keep[0].nonzero().flatten(), None
            original = original[:, columns]
            regression = regression if known is not None else regression.restricted(columns)
        before = original if keep is None else original * keep.to(original)[..., None]
        read = original.shape[1] if keep is None else int(keep.sum(1).max())
        shares, new, now = [regression.unexplained(before)], before, regression.fitted.bias(before)
        changed = shares[0] > SAME or bool((now - bias).square().sum() > SAME * y.var(0, correction=0).sum())
        if changed:
            if regression.count < read:
                short.append(f"{name!r} ({regression.count} rows for {read} regressors)")
            if limits is None or not isinstance(regression.fitted, RowMoments):
                share, last, new = regression.best(original, keep, ridge, last)
                bias = regression.fitted.bias(new)
            else:
                rectified = Rectified(regression, rows, y, limits.grouped(groups), columns if known is None else None)
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
            absorb(layer, norm, bias.flatten(), regression.fitted, new)
        inputs = x.shape[1] if isinstance(layer, nn.Conv2d) else x.shape[-1]
        inputs = inputs if name not in masks else int(masks[name].sum())
        fits.append(LayerFit(name, inputs, len(rows), shares[0], shares[-1]))

    def reached(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in solved:  # else its block is being tuned
                solved.add(name)
                with mode.silent():
                    solve(name, layer, called_on(args, kwargs))
                bar.update()

        return hook

    def finished(name: str) -> Callable[..., Tensor]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with mode.silent():
                made = blocks.rebuild(name, block, args, kwargs, output)  # type: ignore[union-attr]
            for number, value in streams.items():
                if value is output:
                    streams[number] = made
            return made

        return hook

    every = images.all()
    handles = [layers[name].register_forward_pre_hook(reached(name), with_kwargs=True) for name in tails]
    handles += [modules[name].register_forward_hook(finished(name), with_kwargs=True) for name in (blocks.targets if blocks is not None else ())]
    try:
        with tqdm(total=len(tails), desc="refit", unit="layer", disable=not progress) as bar, mode:
            images.run(network, every)
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
    tail: Tail,
    target: Originals,
    at: Positions,
    streams: Mapping[int, Tensor],
    outputs: Tensor | None,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Limits | None]:
    """(R, c): what the layer itself should give; (c,): what its output is multiplied by until it is added or read; and between what limits."""
    y = target.outputs[name].double()
    y = y if outputs is None else y[:, outputs.to(y.device)]
    scale, shift = affine_of(modules[tail.norm] if tail.norm is not None else None, y.shape[1], y.device)
    if tail.scale is not None:
        factor = parameters[tail.scale].detach().double()
        scale, shift = scale * factor, shift * factor
    offset, heard = shift[None], scale
    if aimed_at_sum(tail):
        stream = streams[tail.other]  # type: ignore[index]
        for step in tail.steps:
            stream = step(stream)
        offset = shift + at.outputs(stream, conv=isinstance(layer, nn.Conv2d)).double()
        silent = scale.abs() < 1e-6 * scale.abs().max().clamp_min(1e-30)  # nothing of such a channel arrives
        y = torch.where(silent, y.new_zeros(()), (y - offset) / torch.where(silent, torch.ones_like(scale), scale))
        heard = torch.where(silent, scale.new_zeros(()), scale)
    return y, scale, None if tail.limits is None else Limits.of(tail.limits, heard, offset)


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
    return mask.view(groups_of(layer), 1, -1).expand(-1, taps, -1).flatten(1)
