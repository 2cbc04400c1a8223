"""Sensitivity of the output of a network to the removal of channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import InputTypeError
from knowiso_train.ops.im2col import regression_weight, ungrouped_weight
from knowiso_train.pruning.allocation import affordable
from knowiso_train.pruning.calibration import Calibration, LayerInput
from knowiso_train.pruning.channel_groups import ChannelGroup, unit_columns
from knowiso_train.pruning.elimination import BackwardElimination, Consumer
from knowiso_train.pruning.reconstruction import batch_norm_affine
from knowiso_train.pruning.tracing import ActivationCache, Epilogue

PROBE_WIDTH_FRACTION = 0.25  # share of a group's units that is left when the network's output is looked at
MAX_FEATURES_PER_SAMPLE = 0.05  # regressors per row, from which on what channels have in common is trusted less
SENSITIVITY_IMAGES = 16, 256  # at least and at most
MAX_SENSITIVITY_MACS = 2e12  # multiply-adds that all groups together may take, within these
SENSITIVITY_BATCH_SIZE = 32  # images, whose features at every layer are held


@dataclass(frozen=True)
class GroupElimination:
    """One group, eliminated backwards.

    Attributes:
        order: units in the order in which they go; the last one stays.
        harms: (J + 1,), unexplained share of the readers with w units left, summed; entry 0 is infinite.
        probed: units left at the probe.
        weights: for each reader its refitted weight at the probe, and what to add to its bias.
    """

    order: list[int]
    harms: Tensor
    probed: int
    weights: dict[str, tuple[Tensor, Tensor]]


def eliminate_channels(
    model: nn.Module,
    group: ChannelGroup,
    inputs: Mapping[str, LayerInput],
    tails: Mapping[str, Epilogue],
    ridge: float = 1e-4,
) -> GroupElimination:
    """Eliminate a group's units on the original's own inputs; outputs count by what the norm behind them makes of them.

    Args:
        model: the original.
        group: with at least one reader among `inputs`.
        inputs: moments of what readers of one group read.
        tails: what follows the readers.
        ridge: relative ρ.
    """
    modules = dict(model.named_modules())
    consumers: list[Consumer] = []
    units: dict[str, tuple[Tensor | None, Tensor]] = {}
    for name, channels in group.readers.items():
        if name not in inputs:
            continue
        layer: Any = modules[name]
        tail, moments = tails.get(name, Epilogue()), inputs[name].moments
        weight = regression_weight(layer.weight.detach()).double()
        columns = unit_columns(layer, channels).to(weight.device)
        scale, _ = batch_norm_affine(
            modules[tail.norm] if tail.norm is not None else None, weight.shape[1], weight.device
        )
        scale = scale.abs().clamp_min(1e-6 * float(scale.abs().max().clamp_min(1e-30)))
        if len(moments.mean_x) != len(weight):  # merged: taps count as if they saw different images
            units[name] = columns, scale
            weight, columns = (
                (weight * scale)[columns].flatten(1),
                torch.arange(len(columns), device=columns.device)[:, None],
            )
        else:
            units[name] = None, scale
            weight = weight * scale
        xx = moments.xx.double() / moments.count
        # With few rows everything looks like a mixture of the rest
        alone = min(
            1.0, max(0.0, (len(xx) / float(moments.count) - MAX_FEATURES_PER_SAMPLE) / (1 - MAX_FEATURES_PER_SAMPLE))
        )
        xx = (1 - alone) * xx + alone * xx.diagonal().diag()
        consumers.append(Consumer(name, xx, weight, columns, float((weight * (xx @ weight)).sum())))
    elimination = BackwardElimination(consumers, ridge)
    probed = max(1, round(PROBE_WIDTH_FRACTION * group.size))
    order, costs = elimination.run(keep=probed)
    weights = {}
    for consumer, refitted in zip(consumers, elimination.weights(), strict=True):
        layer, (spread_over, scale) = modules[consumer.name], units[consumer.name]
        mean = inputs[consumer.name].moments.mean_x.double()
        original = regression_weight(layer.weight.detach()).double()
        if spread_over is not None:
            spread = torch.zeros_like(original)
            spread[spread_over] = refitted.view(*spread_over.shape, -1)
            refitted, mean = (
                spread,
                torch.zeros_like(original[:, 0]).index_put((spread_over,), mean[:, None].expand(spread_over.shape)),
            )
        refitted = refitted / scale
        weights[consumer.name] = ungrouped_weight(layer, refitted[None]), (original - refitted).T @ mean
    if probed > 1:
        more_order, more_costs = elimination.run(keep=1)
        order, costs = order + more_order, costs + more_costs
    harms = torch.zeros(group.size + 1, dtype=torch.float64)
    harms[0] = math.inf
    if costs:
        harms[1 : group.size] = torch.tensor(costs, dtype=torch.float64).clamp_min(0).cumsum(0).flip(0)
    last = int(elimination.kept.nonzero()[0])
    return GroupElimination([*order, last], harms, probed, weights)


def max_sensitivity_images(model: nn.Module, groups: Sequence[ChannelGroup], images: Calibration) -> int:
    """Images that `output_sensitivities` needs: at most 256, fewer where the network is large."""
    return affordable(model, images, MAX_SENSITIVITY_MACS, SENSITIVITY_IMAGES, len(groups))


def output_sensitivities(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    found: Mapping[str, GroupElimination],
    images: Calibration,
    progress: bool = True,
    order: Sequence[str] = (),
) -> dict[str, float]:
    """How much the network's output minds what the readers of each group lose.

    Each group alone is narrowed to a quarter, its readers refitted, and the network's output compared with the
    original's: the ratio of the change
    to what the readers lost. Multiplied by it, harms of all groups have one currency.

    Args:
        model: the original, in eval mode.
        groups: to compare.
        found: their eliminations.
        images: all of them are used, see `max_sensitivity_images`.
        progress: whether to show a bar.
        order: layers that run once, in the order in which they run: those ahead of what is narrowed are computed once
            for all groups.

    Returns:
        One number for each group.

    Raises:
        InputTypeError: a network whose output is no tensor.
    """
    replay, changes = ActivationCache({name: model.get_submodule(name) for name in order}), dict.fromkeys(found, 0.0)
    plain: list[Tensor] = []
    parts = list(images.batches(SENSITIVITY_BATCH_SIZE))
    with (
        torch.no_grad(),
        tqdm(total=len(parts) * len(groups), desc="sensitivity", unit="pass", disable=not progress) as bar,
    ):
        for part in parts:
            with replay.recording():
                plain.append(output_of(images.forward(model, part)))
            for group in groups:
                weights = found[group.name].weights
                with _replaced(model, weights), replay.ahead_of(list(weights)):
                    changes[group.name] += float((output_of(images.forward(model, part)) - plain[-1]).square().sum())
                bar.update()
        outputs = torch.cat(plain)
        spread = float((outputs - outputs.mean(0)).square().sum().clamp_min(1e-30))
    factors = {}
    for group in groups:
        elimination = found[group.name]
        lost = float(elimination.harms[elimination.probed])
        factors[group.name] = max(changes[group.name] / spread / lost, 1e-24) if lost > 0 else 1.0
    return factors


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    handles, before = [], {}
    try:
        for name, (weight, shift) in weights.items():
            layer: Any = model.get_submodule(name)
            before[name] = layer.weight.data
            layer.weight.data = weight.to(before[name])
            shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
            added = shift.to(before[name]).view(shape)
            handles.append(layer.register_forward_hook(lambda module, inputs, output, added=added: output + added))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in before.items():
            layer = model.get_submodule(name)
            layer.weight.data = weight


def output_of(value: Any) -> Tensor:
    """The tensor that a network gives, or the first one, or its logits.

    Raises:
        InputTypeError: no tensor.

    Example:
        >>> output_of((torch.ones(2), None))
        tensor([1., 1.])
    """
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, dict) or hasattr(value, "logits"):
        value = value.get("logits") if isinstance(value, dict) else value.logits
    if not isinstance(value, Tensor):
        raise InputTypeError(
            f"expected a network whose output is a tensor (or begins with one, or has .logits), got {type(value).__name__}"
        )
    return value.float()
