"""Groups of channels that must be removed together, from the dependency graph of torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, KnowisoWarning, LayerNameError, OptionError
from knowiso_train.features.modules import resolve_layers
from knowiso_train.ops.im2col import is_plain_linear_op
from knowiso_train.pruning._dependencies import (
    CONSUMER_PRUNERS,
    CONV_PRUNER,
    DEPTHWISE_PRUNER,
    LINEAR_PRUNER,
    PRODUCER_PRUNERS,
    PruningGraph,
)
from knowiso_train.pruning._tracing import Epilogue, Forward

# Functions of torch-pruning that remove input and output channels
CROSS_CHANNEL_NORMS = (nn.LayerNorm, nn.GroupNorm)  # removing a channel changes the other channels of their output

# Children of an attention with parameters whose shapes do not depend on the number of heads
HEAD_AGNOSTIC_CHILDREN = {"qkv", "proj", "q_norm", "k_norm"}
# Names in attentions of transformers: projections of the input, of the heads, and attributes
SEPARATE_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUTPUT_PROJECTIONS = ("o_proj", "out_proj")
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads")
HEAD_WIDTH_ATTRIBUTES = ("head_dim", "attention_head_size")
TOTAL_WIDTH_ATTRIBUTES = ("attn_dim", "all_head_size", "embed_dim", "inner_dim")


@dataclass(frozen=True)
class ChannelGroup:
    """Group of J units: channels, channels at the same place of every convolution group, or attention heads.

    Attributes:
        name: Name of the layer that produces the group.
        size: J.
        consumers: For each layer that consumes the group (J, m), the input channels of each unit. A flatten repeats
            a channel.
        producers: For each layer that produces the group (J, m), the output channels of each unit.
        kind: "channels" or "heads".

    Examples:
        >>> units = torch.tensor([[0], [1], [2]])
        >>> ChannelGroup("0", 3, {"2": units}, {"0": units}).input_masks({"2": 4}, [1])["2"].tolist()
        [True, False, True, True]
    """

    name: str
    size: int
    consumers: Mapping[str, Tensor]
    producers: Mapping[str, Tensor] = field(default_factory=dict)
    kind: Literal["channels", "heads"] = "channels"

    def input_masks(self, num_inputs: Mapping[str, int], removed: Sequence[int]) -> dict[str, Tensor]:
        """Return the mask of remaining input channels of each consumer, for its number of input channels."""
        masks = {}
        for name, channels in self.consumers.items():
            masks[name] = torch.ones(num_inputs[name], dtype=torch.bool)
            masks[name][channels[list(removed)].flatten()] = False
        return masks


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


def head_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return one group for every attention of timm or transformers: units are heads, the consumer is the projection.

    The query, key and value come from one layer `qkv`, or from three layers, as in transformers. Attention with other
    tensors per head (position tables, gates, norms over all heads) is excluded.

    Examples:
        >>> from timm.layers import Attention
        >>> [group] = head_groups(nn.ModuleDict({"attn": Attention(8, num_heads=2)}))
        >>> group.name, group.size, group.consumers["attn.proj"].shape, group.producers["attn.qkv"].shape
        ('attn', 2, torch.Size([2, 4]), torch.Size([2, 12]))
    """
    groups = []
    for name, module in model.named_modules():
        if _has_joint_heads(module):
            heads, width = int(module.num_heads), int(module.head_dim)
            columns = torch.arange(heads * width).view(heads, width)
            # Outputs of the qkv layer are ordered (query, key, value), then head, then channel
            rows = torch.cat([columns + part * heads * width for part in range(3)], 1)
            groups.append(ChannelGroup(name, heads, {f"{name}.proj": columns}, {f"{name}.qkv": rows}, kind="heads"))
        elif (projections := _separate_heads(model, name, module)) is not None:
            heads, width = _integer(module, NUM_HEADS_ATTRIBUTES), _integer(module, HEAD_WIDTH_ATTRIBUTES)
            columns = torch.arange(heads * width).view(heads, width)
            *inputs, output = projections
            groups.append(ChannelGroup(name, heads, {output: columns}, dict.fromkeys(inputs, columns), kind="heads"))
    return groups


def _has_joint_heads(module: nn.Module) -> bool:
    heads, width = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not (isinstance(heads, int) and isinstance(width, int)):
        return False
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)):
        return False
    children = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return (
        children <= HEAD_AGNOSTIC_CHILDREN
        and not tensors
        and hasattr(module, "attn_dim")
        and qkv.out_features == 3 * heads * width
        and proj.in_features == heads * width
    )


def _separate_heads(model: nn.Module, name: str, module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the projections (query, key, value, heads) of an attention of transformers, or None."""
    features = _integer(module, NUM_HEADS_ATTRIBUTES) * _integer(module, HEAD_WIDTH_ATTRIBUTES)
    if not features or [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        return None
    layers: dict[str, nn.Module] = dict(model.named_modules())
    prefix = f"{name}." if name else ""
    # The projection of the heads is a child, or belongs to a neighbor `output`
    outputs = [f"{prefix}{child}" for child in OUTPUT_PROJECTIONS] + [f"{name.rpartition('.')[0]}.output.dense"]
    for children in SEPARATE_PROJECTIONS:
        inputs = [f"{prefix}{child}" for child in children]
        output = next((output for output in outputs if output in layers), None)
        if output is None or not all(isinstance(layers.get(layer), nn.Linear) for layer in (*inputs, output)):
            continue
        widths = [layers[layer].out_features for layer in inputs]
        if {*widths, layers[output].in_features} == {features}:
            return (*inputs, output)
    return None


def _integer(module: nn.Module, attributes: Sequence[str]) -> int:
    """Return the first of these attributes that is an integer; 0 without any."""
    values = [getattr(module, attribute, None) for attribute in attributes]
    return next((value for value in values if isinstance(value, int)), 0)


@torch.no_grad()
def remove_heads(model: nn.Module, group: ChannelGroup, removed: Sequence[int]) -> None:
    """Remove heads from an attention, in place; the width of a head and the scale do not change."""
    attention: Any = model.get_submodule(group.name)
    heads = [head for head in range(group.size) if head not in set(removed)]
    [(output, columns)] = group.consumers.items()
    width = columns.shape[1]
    for name, units in group.producers.items():
        # (heads, parts · width) -> (parts, heads, width), where query, key and value come from one layer
        rows = units[heads].view(len(heads), -1, width).transpose(0, 1).flatten()
        layer: Any = model.get_submodule(name)
        rows = rows.to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.index_select(0, rows), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.index_select(0, rows), requires_grad=layer.bias.requires_grad)
        layer.out_features = len(rows)
    proj: Any = model.get_submodule(output)
    remaining = columns[heads].flatten().to(proj.weight.device)
    proj.weight = nn.Parameter(proj.weight.index_select(1, remaining), requires_grad=proj.weight.requires_grad)
    proj.in_features = len(remaining)
    for attributes, value in ((NUM_HEADS_ATTRIBUTES, len(heads)), (TOTAL_WIDTH_ATTRIBUTES, len(remaining))):
        for attribute in attributes:
            if isinstance(getattr(attention, attribute, None), int):
                setattr(attention, attribute, value)
