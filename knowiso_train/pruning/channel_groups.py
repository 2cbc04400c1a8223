"""Groups of channels that must be removed together, found by torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, LayerNameError, OptionError
from knowiso_train.features.modules import resolve_layers
from knowiso_train.ops.im2col import is_plain_linear_op
from knowiso_train.pruning.tracing import Epilogue

CONSUMER_PRUNERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
PRODUCER_PRUNERS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_depthwise_conv_out_channels)
CROSS_CHANNEL_NORMS = (nn.LayerNorm, nn.GroupNorm)  # what is left of them changes when a channel goes
Call = Callable[[nn.Module], Any]

# Children with parameters that know nothing of the number of heads
HEAD_AGNOSTIC_CHILDREN = {"qkv", "proj", "q_norm", "k_norm"}


@dataclass(frozen=True)
class ChannelGroup:
    """J units, each of them one channel, one channel of every group of a grouped convolution, or one head.

    Attributes:
        name: of the layer that writes it.
        size: J.
        readers: for each layer that reads it (J, m), the input channels of each unit there; a flatten repeats a
            channel.
        writers: for each layer that writes it (J, m), the output channels of each unit.
        kind: "channels" or "heads".

    Example:
        >>> group = ChannelGroup("0", 3, {"2": torch.tensor([[0], [1], [2]])}, {"0": torch.tensor([[0], [1], [2]])})
        >>> group.masks({"2": 4}, [1])["2"].tolist()
        [True, False, True, True]
    """

    name: str
    size: int
    readers: Mapping[str, Tensor]
    writers: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = "channels"

    def masks(self, inputs: Mapping[str, int], removed: Sequence[int]) -> dict[str, Tensor]:
        """For each reader, of so many input channels, which of them stay when these units go."""
        found = {}
        for name, channels in self.readers.items():
            found[name] = torch.ones(inputs[name], dtype=torch.bool)
            found[name][channels[list(removed)].flatten()] = False
        return found


def unit_columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(J, m · taps): the regressors of each unit, in the order of `ops.patch_rows`; a convolution reads a channel at every tap.

    Args:
        layer: linear, or a convolution of one group.
        inputs: (J, m), the unit's input channels.

    Example:
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
    """Input channels of a convolution, or of a linear layer.

    Example:
        >>> num_input_channels(nn.Linear(3, 2)), num_input_channels(nn.Conv2d(4, 2, 1))
        (3, 4)
    """
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def channel_groups(
    model: nn.Module,
    example: Any,
    tails: Mapping[str, Epilogue],
    ignored: Collection[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[ChannelGroup]:
    """The groups that can go without touching a residual stream: inner widths of blocks, plain chains, concatenated channels, heads.

    Left out are inner channels of attention other than whole heads, residual streams and what a layer norm or group
    norm runs over, the network's
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
    unsteady = {
        name for name, layer in model.named_modules() if tails and is_plain_linear_op(layer) and name not in tails
    }
    heads = head_groups(model)
    graph = dependency_graph(model, example, forward)
    attention = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int) and hasattr(module, "proj")
    ]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = list(graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]))
    for item in items:
        group = _group(item, names)
        if (
            group is None
            or any(_within(name, attention) for name in group.writers)
            or any(tails.get(name, Epilogue()).total is not None for name in group.writers)
            or unsteady.intersection((*group.writers, *group.readers))
        ):
            continue
        found.append(group)
    return [group for group in [*found, *heads] if not any(_within(name, ignored) for name in group.writers)]


def remove_channels(
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
            remove_heads(model, group, gone)
            continue
        graph = graph or dependency_graph(model, example, forward)
        root = model.get_submodule(group.name)
        handler = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
        if isinstance(root, nn.Conv2d) and root.groups > 1 and root.weight.shape[1] == 1:
            handler = tp.prune_depthwise_conv_out_channels
        graph.get_pruning_group(root, handler, sorted(group.writers[group.name][gone].flatten().tolist())).prune(
            record_history=False
        )


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
        if isinstance(layer, (nn.Parameter, *CROSS_CHANNEL_NORMS)):
            return None
        if handler not in CONSUMER_PRUNERS and handler not in PRODUCER_PRUNERS:
            continue
        if layer not in names:
            return None
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] > 1
        convs = max(convs, layer.groups if grouped else 1)
        layers[names[layer]] = layer
        side = writers if handler in PRODUCER_PRUNERS else readers
        side.setdefault(names[layer], []).extend(zip(map(int, item.idxs), map(int, item.root_idxs), strict=True))
    wrong = [
        name for name, pairs in readers.items() if max(index for index, _ in pairs) >= num_input_channels(layers[name])
    ]
    if wrong:  # the tracer has lost its way between the writer and these
        return None
    root = names[items[0].dep.target.module]
    channels = len(items[0].idxs)
    refittable = any(is_plain_linear_op(layers[name]) and getattr(layers[name], "groups", 1) == 1 for name in readers)
    if not refittable or root not in writers or channels % convs:
        return None
    size = channels // convs
    try:
        return ChannelGroup(
            root,
            size,
            {n: _units(pairs, size) for n, pairs in readers.items()},
            {n: _units(pairs, size) for n, pairs in writers.items()},
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
        found = [
            [pattern] if pattern == "" else resolve_layers(model, pattern)
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]
    except LayerNameError as error:
        raise OptionError(f"ignored: no modules of such names in {type(model).__name__}: {error}") from error
    return [name for names in found for name in names]


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") or module == "" for module in modules)


def head_groups(model: nn.Module) -> list[ChannelGroup]:
    """One group for every attention with a joint qkv layer: a unit is a head, read by the output projection.

    Attention that keeps something else per head (position tables, gates, norms over all heads) is left out.

    Example:
        >>> from timm.layers import Attention
        >>> [group] = head_groups(nn.ModuleDict({"attn": Attention(8, num_heads=2)}))
        >>> group.name, group.size, group.readers["attn.proj"].shape, group.writers["attn.qkv"].shape
        ('attn', 2, torch.Size([2, 4]), torch.Size([2, 12]))
    """
    found = []
    for name, module in model.named_modules():
        heads, width = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        if not (
            isinstance(heads, int)
            and isinstance(width, int)
            and isinstance(qkv, nn.Linear)
            and isinstance(proj, nn.Linear)
        ):
            continue
        others = {
            child for child, part in module.named_children() if any(True for _ in part.parameters())
        } - HEAD_AGNOSTIC_CHILDREN
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if (
            others
            or own
            or not hasattr(module, "attn_dim")
            or qkv.out_features != 3 * heads * width
            or proj.in_features != heads * width
        ):
            continue
        columns = torch.arange(heads * width).view(heads, width)
        rows = torch.cat([columns + part * heads * width for part in range(3)], 1)
        found.append(ChannelGroup(name, heads, {f"{name}.proj": columns}, {f"{name}.qkv": rows}, kind="heads"))
    return found


@torch.no_grad()
def remove_heads(model: nn.Module, group: ChannelGroup, gone: Sequence[int]) -> None:
    """Take heads out of an attention, in place; width of a head and scale stay."""
    attention: Any = model.get_submodule(group.name)
    left = [head for head in range(group.size) if head not in set(gone)]
    qkv, proj = attention.qkv, attention.proj
    rows = (
        group.writers[f"{group.name}.qkv"][left].view(len(left), 3, -1).transpose(0, 1).flatten().to(qkv.weight.device)
    )
    columns = group.readers[f"{group.name}.proj"][left].flatten().to(proj.weight.device)
    qkv.weight = nn.Parameter(qkv.weight.index_select(0, rows), requires_grad=qkv.weight.requires_grad)
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(qkv.bias.index_select(0, rows), requires_grad=qkv.bias.requires_grad)
    proj.weight = nn.Parameter(proj.weight.index_select(1, columns), requires_grad=proj.weight.requires_grad)
    qkv.out_features, proj.in_features = len(rows), len(columns)
    attention.num_heads, attention.attn_dim = len(left), len(columns)
