"""Groups of channels that must be removed together, from the dependency graph of torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, KnowisoWarning, LayerNameError, OptionError
from knowiso_train.features.modules import resolve_layers
from knowiso_train.ops.im2col import is_plain_linear_op
from knowiso_train.pruning._attention_heads import head_groups, remove_heads
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._dependencies import (
    CONSUMER_PRUNERS,
    CONV_PRUNER,
    DEPTHWISE_PRUNER,
    LINEAR_PRUNER,
    PRODUCER_PRUNERS,
    PruningGraph,
)
from knowiso_train.pruning._tracing import Epilogue, Forward

CROSS_CHANNEL_NORMS = (nn.LayerNorm, nn.GroupNorm)  # removing a channel changes the other channels of their output


def unit_columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the regression features (J, m · taps) of each unit, in the order of `ops.patch_rows`.

    Args:
        layer: Linear layer, or ungrouped convolution, which takes a channel as input at every tap.
        inputs: Input channels (J, m) of each unit.

    Examples:
        >>> unit_columns(nn.Conv2d(2, 8, 3), torch.tensor([[0], [1]]))[1].tolist()
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    if isinstance(layer, nn.Linear):
        return inputs
    weight: Tensor = layer.weight  # type: ignore[assignment]
    channels, taps = weight.shape[1], weight[0, 0].numel()
    columns: Tensor = inputs[:, None, :] + channels * torch.arange(taps)[None, :, None]
    return columns.flatten(1)


def num_input_channels(layer: Any) -> int:
    """Return the number of input channels of a convolution or linear layer.

    Examples:
        >>> num_input_channels(nn.Linear(3, 2)), num_input_channels(nn.Conv2d(4, 2, 1))
        (3, 4)
    """
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def is_single_regression(layer: nn.Module) -> bool:
    """Return whether a layer is one regression: a linear layer, or a convolution of one group.

    Examples:
        >>> is_single_regression(nn.Conv2d(4, 4, 1)), is_single_regression(nn.Conv2d(4, 4, 1, groups=2))
        (True, False)
    """
    return is_plain_linear_op(layer) and getattr(layer, "groups", 1) == 1


def channel_groups(
    model: nn.Module,
    example: Any,
    epilogues: Mapping[str, Epilogue],
    ignored: Collection[str] = (),
    forward: Forward | None = None,
) -> list[ChannelGroup]:
    """Find the groups that can be removed without a change of any residual stream.

    These are inner widths of blocks, plain chains, concatenated channels and attention heads. Excluded are:

    * residual streams, inputs of layer norms and group norms, and outputs of the network;
    * inner channels of attention other than whole heads;
    * channels that only grouped convolutions consume;
    * layers that run more than once or share weights.

    Args:
        model: Network in eval mode.
        example: Small batch for `forward`, or a tensor of images.
        epilogues: Result of `tracing.trace_model`.
        ignored: Names or globs of layers that keep their width, or of modules whose layers all do.
        forward: See `ki.prune`.

    Raises:
        OptionError: A network that torch-pruning cannot trace, groups of which it finds none, or a name without a
            module.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> [group] = channel_groups(model, torch.zeros(1, 3, 8, 8), {})
        >>> group.name, group.size, list(group.consumers)
        ('0', 8, ['2'])
    """
    names = {module: name for name, module in model.named_modules()}
    ignored = ignored_layers(model, ignored)
    untraced = {
        name
        for name, layer in model.named_modules()
        if epilogues and is_plain_linear_op(layer) and name not in epilogues
    }
    heads = head_groups(model)
    attentions = [group.name for group in heads]
    attentions += [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int) and hasattr(module, "proj")
    ]
    dependencies, failures = PruningGraph(model, example, forward).groups()

    def removable(group: ChannelGroup) -> bool:
        in_attention = any(_within(name, attentions) for name in group.producers)
        in_residual_stream = any(
            name in epilogues and epilogues[name].residual_add is not None for name in group.producers
        )
        return not (in_attention or in_residual_stream or untraced.intersection((*group.producers, *group.consumers)))

    groups = [group for items in dependencies if (group := _to_group(items, names)) is not None and removable(group)]
    heads = [group for group in heads if not untraced.intersection((*group.producers, *group.consumers))]
    groups = [group for group in [*groups, *heads] if not any(_within(name, ignored) for name in group.producers)]
    failures = {name: error for name, error in failures.items() if not _within(name, ignored)}
    if failures:
        layers, reason = ", ".join(map(repr, failures)), next(iter(failures.values()))
        if not groups:
            raise OptionError(
                f"{type(model).__name__} cannot be pruned: {reason}. The model was not modified; layers {layers} keep "
                "their widths, and no others can be cut"
            )
        warnings.warn(f"layers {layers} keep their widths: {reason}", KnowisoWarning, stacklevel=4)
    return groups


def remove_channels(
    model: nn.Module,
    example: Any,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    forward: Forward | None = None,
    graph: PruningGraph | None = None,
) -> None:
    """Remove units from a network, in place.

    Args:
        model: Network with the widths of the groups.
        example: Small batch, as for `channel_groups`.
        groups: Result of `channel_groups`.
        removed: Units to remove, by group.
        forward: See `ki.prune`.
        graph: Graph of the network. Default: traced where needed.

    Raises:
        OptionError: A group that torch-pruning cannot find.
    """
    for group in groups:
        units = sorted(removed.get(group.name, ()))
        if not units:
            continue
        if group.kind == "heads":
            remove_heads(model, group, units)
            continue
        graph = graph or PruningGraph(model, example, forward)
        channels = group.producers[group.name][units].flatten().tolist()
        graph.group(*pruning_root(model, group.name), sorted(channels)).prune(record_history=False)


def pruning_root(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    """Return a layer and the function of torch-pruning that removes its output channels."""
    root = model.get_submodule(name)
    if isinstance(root, nn.Linear):
        return root, LINEAR_PRUNER
    depthwise = root.groups > 1 and root.weight.shape[1] == 1  # type: ignore[operator, index]
    return root, DEPTHWISE_PRUNER if depthwise else CONV_PRUNER


def _to_group(items: Any, names: Mapping[Any, str]) -> ChannelGroup | None:
    """Convert a group of torch-pruning; None if no consumer can be refitted, or a layer mixes its channels."""
    pairs: dict[str, dict[str, list[tuple[int, int]]]] = {"consumers": {}, "producers": {}}
    layers: dict[str, Any] = {}
    convs = 1
    for item in items:
        layer, pruner = item.dep.target.module, item.dep.handler
        if isinstance(layer, (nn.Parameter, *CROSS_CHANNEL_NORMS)):
            return None
        if pruner not in CONSUMER_PRUNERS and pruner not in PRODUCER_PRUNERS:
            continue
        if layer not in names:
            return None
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] > 1
        convs = max(convs, layer.groups if grouped else 1)
        layers[names[layer]] = layer
        side = pairs["producers" if pruner in PRODUCER_PRUNERS else "consumers"]
        side.setdefault(names[layer], []).extend(zip(map(int, item.idxs), map(int, item.root_idxs), strict=True))
    consumers, producers = pairs["consumers"], pairs["producers"]
    # Indices beyond a consumer's inputs: the tracer lost track of the channels on the way to it
    if any(max(i for i, _ in pairs) >= num_input_channels(layers[name]) for name, pairs in consumers.items()):
        return None
    root = names[items[0].dep.target.module]
    channels = len(items[0].idxs)
    refittable = any(is_single_regression(layers[name]) for name in consumers)
    if not refittable or root not in producers or channels % convs:
        return None
    size = channels // convs
    try:
        return ChannelGroup(
            root,
            size,
            {name: _unit_channels(pairs, size) for name, pairs in consumers.items()},
            {name: _unit_channels(pairs, size) for name, pairs in producers.items()},
        )
    except InputTypeError:
        return None


def _unit_channels(pairs: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Return the channels (J, m) of each unit; channels of the root that lie `size` apart form one unit."""
    channels: dict[int, list[int]] = {}
    for channel, root in pairs:
        channels.setdefault(root % size, []).append(channel)
    if len(channels) != size or len({len(of_unit) for of_unit in channels.values()}) != 1:
        raise InputTypeError("units of different sizes")
    return torch.tensor([channels[unit] for unit in range(size)])


def ignored_layers(model: nn.Module, patterns: str | Collection[str]) -> list[str]:
    """Return the names of the modules that names or globs match.

    Raises:
        OptionError: A pattern without a match, or without a layer that has a width of its own.

    Examples:
        >>> ignored_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["?"])
        ['0', '1']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    try:
        matches = [[pattern] if pattern == "" else resolve_layers(model, pattern) for pattern in patterns]
    except LayerNameError as error:
        raise OptionError(f"ignored: no modules of such names in {type(model).__name__}: {error}") from error
    for pattern, names in zip(patterns, matches, strict=True):
        if not any(_has_width(module) for name in names for module in model.get_submodule(name).modules()):
            kinds = sorted({type(model.get_submodule(name)).__name__ for name in names})
            raise OptionError(
                f"ignored: {pattern!r} has no effect, since {', '.join(kinds)} has the width of the layer before. Name "
                "that convolution or linear layer"
            )
    return [name for names in matches for name in names]


def _has_width(module: nn.Module) -> bool:
    """Return whether a module has a weight matrix, whose rows are its width."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") or module == "" for module in modules)
