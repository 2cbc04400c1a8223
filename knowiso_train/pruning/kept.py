"""Which output channels of the original a pruned layer still has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.pruning.trace import Tail
from knowiso_train.pruning.twin import Kept, tensor_shapes

SAMPLED = 8  # rows or columns that have to agree; more only cost time


def kept_outputs(original: nn.Module, pruned: nn.Module, tails: Mapping[str, Tail], kept: Mapping[str, Kept] | None = None) -> dict[str, Tensor]:
    """For each layer that lost output channels, the indices of those that it still has.

    Args:
        original: the network before pruning.
        pruned: the network after it.
        tails: the layers, and the norms that follow them.
        kept: from `recording`; None reads the indices off the weights and norms, which are slices of the original's before any training.

    Raises:
        ShapeError: layers that are no slices of the original's, or a pruned network of other layers.

    Example:
        >>> original, pruned = nn.Linear(3, 4), nn.Linear(3, 2)
        >>> pruned.load_state_dict({"weight": original.weight[[1, 3]], "bias": original.bias[[1, 3]]})
        <All keys matched successfully>
        >>> kept_outputs(nn.ModuleDict({"a": original}), nn.ModuleDict({"a": pruned}), {"a": Tail()})
        {'a': tensor([1, 3])}
    """
    strange = sorted(set(kept or ()) - set(tensor_shapes(original)))
    if strange:
        raise ShapeError(f"kept names what the original has not: {', '.join(strange[:3])}; it is of another network")
    found = {}
    before, after = dict(original.named_modules()), dict(pruned.named_modules())
    for name, tail in tails.items():
        if name not in after:
            raise ShapeError(f"the pruned network has no layer {name!r}; expected the original's layers with fewer channels")
        whole: Any = before[name]
        part: Any = after[name]
        if len(part.weight) == len(whole.weight):
            continue
        if kept is not None and f"{name}.weight" in kept:
            found[name] = _first_axis(kept[f"{name}.weight"], whole.weight)
        elif tail.norm is not None and (by_norm := _by_norm(before[tail.norm], after[tail.norm])) is not None:
            found[name] = by_norm
        else:
            found[name] = kept_channels(name, whole.weight, part.weight)[0]
        if len(found[name]) != len(part.weight):
            raise ShapeError(f"layer {name!r}: {len(part.weight)} output channels, but {len(found[name])} are said to be kept")
    return found


def kept_channels(name: str, original: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input channels of the original that a pruned weight is made of.

    Args:
        name: for messages.
        original: (C_out, C_in, …), a linear layer's or a convolution's weight.
        pruned: (c_out, c_in, …), `original[out][:, in]` with ascending indices.

    Returns:
        Indices (c_out,) and (c_in,). Of equal slices, the first that keeps the order.

    Raises:
        ShapeError: not a slice of the original, as after training.

    Example:
        >>> weight = torch.randn(8, 6, 3, 3)
        >>> out, read = kept_channels("conv", weight, weight[[0, 3, 7]][:, [1, 2, 5]])
        >>> out.tolist(), read.tolist()
        ([0, 3, 7], [1, 2, 5])
    """
    whole, part = (weight.detach().cpu() for weight in (original, pruned))
    whole, part = (weight[..., None] if weight.ndim == 2 else weight.flatten(2) for weight in (whole, part))
    if whole.shape[2:] != part.shape[2:] or len(part) > len(whole) or part.shape[1] > whole.shape[1]:
        raise ShapeError(f"layer {name!r}: a weight of shape {tuple(pruned.shape)} is no slice of the original's {tuple(original.shape)}")
    if part.shape[1] == whole.shape[1]:
        read = torch.arange(whole.shape[1])
        out = _places(whole, part)
    elif len(part) == len(whole):
        out = torch.arange(len(whole))
        read = _places(whole.transpose(0, 1), part.transpose(0, 1))
    else:
        rows = torch.stack([_row(whole, row) for row in part[:SAMPLED]])
        read = _places(whole[rows].transpose(0, 1), part[:SAMPLED].transpose(0, 1))
        out = _places(whole[:, read], part)
    if len(out) != len(part) or len(read) != part.shape[1] or not torch.equal(whole[out][:, read], part):
        raise ShapeError(
            f"layer {name!r}: its weights {tuple(pruned.shape)} are no slice of the original's {tuple(original.shape)}. Refit before any training, "
            "with the network that was pruned as the original; or prune within `recording(model)` and pass what it gives as kept="
        )
    return out, read


def _first_axis(kept: Kept, whole: Tensor) -> Tensor:
    if isinstance(kept, Tensor):
        return kept.flatten(1)[:, 0] // whole[0].numel()
    return torch.arange(len(whole)) if kept[0] is None else torch.tensor(kept[0])


def _by_norm(whole: Any, part: Any) -> Tensor | None:
    """Channels by a norm's four numbers, where they are all different."""
    before, after = (torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], 1).detach() for norm in (whole, part))
    if len(torch.unique(before, dim=0)) != len(before):
        return None
    same = (after[:, None] == before[None]).all(2)
    return same.float().argmax(1) if bool((same.sum(1) == 1).all()) else None


def _places(whole: Tensor, part: Tensor) -> Tensor:
    """Ascending places of the entries of `part` among those of `whole`, both (n, m, t); fewer than asked for where one is not found."""
    at = torch.linspace(0, whole.shape[1] - 1, min(SAMPLED, whole.shape[1])).long()
    many, few = whole[:, at].flatten(1), part[:, at].flatten(1)
    found: list[int] = []
    start = 0
    for entry in few:
        same = (many[start:] == entry).all(1).nonzero().flatten()
        if not len(same):
            break
        found.append(start + int(same[0]))
        start = found[-1] + 1
    return torch.tensor(found, dtype=torch.long)


def _row(whole: Tensor, row: Tensor) -> Tensor:
    return torch.isin(whole, row).all(2).sum(1).argmax()
