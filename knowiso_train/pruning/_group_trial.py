"""Trial removals of channel groups from a copy of a network, and comparison of the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from knowiso_train.errors import KnowisoWarning, OptionError
from knowiso_train.features.state import preserve_state
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._channel_groups import num_input_channels, remove_channels
from knowiso_train.pruning._dependencies import PruningGraph, restored_attributes
from knowiso_train.pruning._tracing import Forward

# Between the outputs of the pruned model and of the original with masked channels, and at least 4 ε of their dtype
MAX_RELATIVE_ERROR, ROUNDING_STEPS = 1e-3, 4


def input_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return the mask of remaining input channels of each consumer.

    Args:
        model: Network with the widths of the groups.
        groups: Its channel groups.
        removed: Units to remove, by group.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        if removed.get(group.name):
            inputs = {name: num_input_channels(model.get_submodule(name)) for name in group.consumers}
            for name, mask in group.input_masks(inputs, removed[group.name]).items():
                masks[name] = masks.get(name, torch.ones_like(mask)) & mask
    return masks


def mask_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights of removed input channels to 0, in place."""
    for name, mask in masks.items():
        layer: Any = model.get_submodule(name)
        convs = getattr(layer, "groups", 1)
        # (C_out, input channels of its group)
        remaining = mask.view(convs, 1, -1).expand(-1, len(layer.weight) // convs, -1).flatten(0, 1)
        layer.weight.mul_(remaining.view(*remaining.shape, *[1] * (layer.weight.ndim - 2)).to(layer.weight))


def output_failure(before: Any, after: Any) -> str | None:
    """Return why the output of a pruned model is not that of the model with masked channels; None if it is.

    Args:
        before: Output of the model with masked channels.
        after: Output of the pruned model.

    Examples:
        >>> output_failure(torch.ones(2, 3), torch.ones(2, 3)) is None
        True
        >>> output_failure(torch.ones(2, 3), torch.ones(2, 1))
        'a width reaches its output, of which a part would be (2, 1) and not (2, 3)'
        >>> half = torch.ones(2, 3).bfloat16()
        >>> output_failure(half, half + 2**-7) is None, output_failure(half.float(), half.float() + 2**-7) is None
        (True, False)
    """
    old, new = (list(filter(torch.is_tensor, tree_leaves(value))) for value in (before, after))
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (old, new)]
    if shapes[0] != shapes[1]:
        expected, got = next((a, b) for a, b in zip_longest(*shapes) if a != b)
        return f"a width reaches its output, of which a part would be {got} and not {expected}"
    pairs = [(a.double(), b.double()) for a, b in zip(old, new, strict=True) if a.numel()]
    errors = [float((b - a).abs().max()) / float(a.abs().max().clamp_min(1e-12)) for a, b in pairs]
    epsilon = max((torch.finfo(a.dtype).eps for a in old if a.is_floating_point()), default=0.0)
    largest = max(errors, default=0.0)
    if largest <= max(MAX_RELATIVE_ERROR, ROUNDING_STEPS * epsilon):
        return None
    return f"removing channels differs there from masking them (outputs differ by {largest:.1e})"


@torch.no_grad()
def usable_groups(
    model: nn.Module, batch: Any, groups: Sequence[ChannelGroup], forward: Forward, round_to: int = 1
) -> list[ChannelGroup]:
    """Return the groups of which units can be removed, and warn of the others.

    Units of all groups are removed at once. Where the network does not run after it, or computes something else, the
    groups at fault are found by bisection.

    Args:
        model: Copy of the network in eval mode, of which hooks and random state are preserved.
        batch: Small batch.
        groups: Channel groups.
        forward: Function that runs a model on a batch.
        round_to: Divisor of the new widths.

    Raises:
        OptionError: Groups of which none can be removed, or a network that torch-pruning cannot trace.
    """
    if not groups:
        return []
    trial = _Trial(model, batch, forward, round_to)
    usable, failures = trial.search(groups)
    if not failures:
        return usable
    name = type(model).__name__
    layers = ", ".join(sorted({repr(layer) for group, _ in failures for layer in group.producers}))
    reason = failures[0][1]
    if not usable:
        raise OptionError(
            f"{name} cannot be pruned: {reason}. The model was not modified; no channels of {layers} can be removed"
        )
    warnings.warn(f"layers {layers} of {name} keep their widths: {reason}", KnowisoWarning, stacklevel=4)
    return usable


Failures = list[tuple[ChannelGroup, str]]


class _Trial:
    """Removals from one network, each undone after it."""

    def __init__(self, model: nn.Module, batch: Any, forward: Forward, round_to: int) -> None:
        self.model, self.batch, self.forward, self.round_to = model, batch, forward, round_to
        self.graph = PruningGraph(model, batch, forward)
        # Operations of the graph count the channels of concatenations and splits
        nodes = [module for module in self.graph.graph.module2node if isinstance(module, nn.Module)]
        self.modules = list({id(module): module for module in (*model.modules(), *nodes)}.values())

    def search(self, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], Failures]:
        """Return the groups that can be removed together, and the others with their reasons."""
        reason = self.failure(groups)
        if reason is None:
            return list(groups), []
        if len(groups) == 1:
            return [], [(groups[0], reason)]
        middle = len(groups) // 2
        (usable, failures), (others, more) = self.search(groups[:middle]), self.search(groups[middle:])
        failures += more
        if not usable or not others or self.failure([*usable, *others]) is None:
            return [*usable, *others], failures
        # Each half works, but not both together
        for group in others:
            if (reason := self.failure([*usable, group])) is None:
                usable.append(group)
            else:
                failures.append((group, reason))
        return usable, failures

    def failure(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Return why units of these groups cannot be removed together; None if they can."""
        removed = {group.name: self._units(group) for group in groups}
        with restored_attributes(self.modules):
            masks = input_masks(self.model, groups, removed)
            for name in masks:
                layer: Any = self.model.get_submodule(name)
                layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            mask_weights(self.model, masks)
            expected = self._output()
        with restored_attributes(self.modules):
            try:
                remove_channels(self.model, self.batch, groups, removed, self.forward, self.graph)
            except OptionError as error:
                return str(error)
            except Exception as error:  # torch-pruning cuts what its graph lists, whether a layer has it or not
                return f"torch-pruning cannot remove channels ({type(error).__name__}: {error})"
            try:
                output = self._output()
            except Exception as error:  # any exception that the network raises at widths that it does not expect
                return f"its forward pass does not fit its new widths ({error})"
        finite = all(bool(value.isfinite().all()) for value in tree_leaves(expected) if torch.is_tensor(value))
        # NaN and Inf of the network or its images are found later, with the layer's name
        return output_failure(expected, output) if finite else None

    def _output(self) -> Any:
        with preserve_state(self.model):
            return self.forward(self.model, self.batch)

    def _units(self, group: ChannelGroup) -> list[int]:
        """Return random units, after whose removal an odd multiple of the divisor is left, about half of all.

        An even width, or equally many units of each half, could fit by chance: most units are of the first half.
        """
        divisor = 1 if group.kind == "heads" else self.round_to
        width = divisor * (group.size // (2 * divisor) | 1)
        keys = torch.rand(group.size, generator=torch.Generator().manual_seed(0))
        keys[: group.size // 2] += 0.5
        return sorted(keys.argsort(descending=True)[: max(0, group.size - width)].tolist())
