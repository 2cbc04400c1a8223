"""Groups of the heads of attentions, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knowiso_train.pruning._channel_group import ChannelGroup

# Children of an attention with parameters whose shapes do not depend on the number of heads
HEAD_AGNOSTIC_CHILDREN = {"qkv", "proj", "q_norm", "k_norm"}
# Names in attentions of transformers: projections of the input, of the heads, and attributes
SEPARATE_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUTPUT_PROJECTIONS = ("o_proj", "out_proj")
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads")
HEAD_WIDTH_ATTRIBUTES = ("head_dim", "attention_head_size")
TOTAL_WIDTH_ATTRIBUTES = ("attn_dim", "all_head_size", "embed_dim", "inner_dim")


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
