"""Channel groups of a network by torch-pruning's dependency graph, heads of its attention, and the cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, LayerNameError, OptionError
from knowiso_train.features import resolve
from knowiso_train.integrations.heads import cut_heads, head_groups
from knowiso_train.pruning.channel_group import ChannelGroup, inputs_of_layer
from knowiso_train.pruning.rows import readable
from knowiso_train.pruning.trace import Tail

READERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
WRITERS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_depthwise_conv_out_channels)
MIXING = (nn.LayerNorm, nn.GroupNorm)  # what is left of them changes when a channel goes

Call = Callable[[nn.Module], Any]


def channel_groups(
    model: nn.Module, example: Any, tails: Mapping[str, Tail], ignored: Collection[str] = (), forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[ChannelGroup]:
    """The groups that can go without touching a residual stream: inner widths of blocks, plain chains, concatenated channels, heads.

    Left out are inner channels of attention other than whole heads, residual streams and what a layer norm or group norm runs over, the network's
    outputs, channels that only grouped convolutions read, and layers that run more than once or share their weights.

    Args:
        model: in eval mode.
        example: a small batch for `forward`, or a tensor of images.
        tails: of `pruning.trace`.
        ignored: names or globs of layers that keep their width, or of modules all of whose layers do.
        forward: see `ki.prune`.

    Raises:
        OptionError: torch-pruning cannot trace the network, or a name that is no module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> [(group.name, group.size, list(group.readers)) for group in channel_groups(model, torch.zeros(1, 3, 8, 8), {})]
        [('0', 8, ['2'])]
    """
    names = {module: name for name, module in model.named_modules()}
    ignored = ignored_layers(model, ignored)
    unsteady = {name for name, layer in model.named_modules() if tails and readable(layer) and name not in tails}
    heads = head_groups(model)
    graph = dependency_graph(model, example, forward)
    attention = [name for name, module in model.named_modules() if isinstance(getattr(module, "num_heads", None), int) and hasattr(module, "proj")]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = list(graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]))
    for item in items:
        group = _group(item, names)
        if (
            group is None
            or any(_within(name, attention) for name in group.writers)
            or any(tails.get(name, Tail()).total is not None for name in group.writers)
            or unsteady.intersection((*group.writers, *group.readers))
        ):
            continue
        found.append(group)
    return [group for group in [*found, *heads] if not any(_within(name, ignored) for name in group.writers)]


def cut(
    model: nn.Module,
    example: Any,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Take units out of a network, in place.

    Args:
        model: of the widths that the groups have.
        example: as for `channel_groups`.
        groups: from there.
        removed: units that go, for each group.
        forward: as there.
    """
    graph = None
    for group in groups:
        gone = sorted(removed.get(group.name, ()))
        if not gone:
            continue
        if group.kind == "heads":
            cut_heads(model, group, gone)
            continue
        graph = graph or dependency_graph(model, example, forward)
        root = model.get_submodule(group.name)
        handler = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
        if isinstance(root, nn.Conv2d) and root.groups > 1 and root.weight.shape[1] == 1:
            handler = tp.prune_depthwise_conv_out_channels
        graph.get_pruning_group(root, handler, sorted(group.writers[group.name][gone].flatten().tolist())).prune(record_history=False)


def dependency_graph(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """torch-pruning's, or a clear refusal.

    Raises:
        OptionError: it cannot trace the network.
    """
    needs = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            return tp.DependencyGraph().build_dependency(model, example, forward_fn=forward, verbose=False)
    except Exception as error:  # whatever a network does under its tracer
        raise OptionError(
            f"{type(model).__name__} cannot be pruned: torch-pruning {tp.__version__ if hasattr(tp, '__version__') else ''} cannot trace it "
            f"({type(error).__name__}: {error}). The network is as it was"
        ) from error
    finally:
        for parameter, before in zip(model.parameters(), needs, strict=True):
            parameter.requires_grad_(before)


def _group(items: Any, names: Mapping[Any, str]) -> ChannelGroup | None:
    """None where the group has no readers that can be refitted, or something that mixes its channels."""
    readers: dict[str, list[tuple[int, int]]] = {}
    writers: dict[str, list[tuple[int, int]]] = {}
    layers: dict[str, Any] = {}
    convs = 1
    for item in items:
        layer, handler = item.dep.target.module, item.dep.handler
        if isinstance(layer, (nn.Parameter, *MIXING)):
            return None
        if handler not in READERS and handler not in WRITERS:
            continue
        if layer not in names:
            return None
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] > 1
        convs = max(convs, layer.groups if grouped else 1)
        layers[names[layer]] = layer
        side = writers if handler in WRITERS else readers
        side.setdefault(names[layer], []).extend(zip(map(int, item.idxs), map(int, item.root_idxs), strict=True))
    wrong = [name for name, pairs in readers.items() if max(index for index, _ in pairs) >= inputs_of_layer(layers[name])]
    if wrong:  # the tracer has lost its way between the writer and these
        return None
    root = names[items[0].dep.target.module]
    channels = len(items[0].idxs)
    refittable = any(readable(layers[name]) and getattr(layers[name], "groups", 1) == 1 for name in readers)
    if not refittable or root not in writers or channels % convs:
        return None
    size = channels // convs
    try:
        return ChannelGroup(
            root, size, {n: _units(pairs, size) for n, pairs in readers.items()}, {n: _units(pairs, size) for n, pairs in writers.items()}
        )
    except InputTypeError:
        return None


def _units(pairs: Sequence[tuple[int, int]], size: int) -> Tensor:
    """(J, m): the channels of each unit; channels of the root that lie `size` apart are of one unit."""
    of_unit: dict[int, list[int]] = {}
    for channel, root in pairs:
        of_unit.setdefault(root % size, []).append(channel)
    if len(of_unit) != size or len({len(channels) for channels in of_unit.values()}) != 1:
        raise InputTypeError("units of different sizes")
    return torch.tensor([of_unit[unit] for unit in range(size)])


def ignored_layers(model: nn.Module, patterns: str | Collection[str]) -> list[str]:
    """Names of the modules that these names or globs mean.

    Raises:
        OptionError: one that means none.

    Example:
        >>> ignored_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["?"])
        ['0', '1']
    """
    try:
        found = [[pattern] if pattern == "" else resolve(model, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    except LayerNameError as error:
        raise OptionError(f"ignored: no modules of such names in {type(model).__name__}: {error}") from error
    return [name for names in found for name in names]


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") or module == "" for module in modules)
