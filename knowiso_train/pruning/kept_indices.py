"""Indices of the channels and entries that pruning kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.pruning.tracing import Epilogue

KeptIndices = Tensor | Sequence[Sequence[int] | None]

MATCH_SAMPLES = 8  # rows or columns that have to agree; more only cost time


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, the ones that pruning cuts; a tied one under each of its names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and floating-point buffer; taken before pruning in place, it stands for the original in `kept_entries`.

    Example:
        >>> tensor_shapes(nn.Linear(3, 2))
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tuple(tensor.shape) for name, tensor in float_tensors(unwrap_model(model)).items()}


def index_twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters and floating-point buffers number their own entries, so that pruning the copy tells which entries stay.

    Integer buffers (batch counts, relative positions) are as in the network. Inputs of the twin are float64.

    Args:
        model: the network, not pruned yet; it is left untouched.

    Returns:
        A deep copy, all numbers float64: exact for every tensor that fits in memory.

    Example:
        >>> twin = index_twin(nn.Linear(3, 2))
        >>> twin.weight.tolist(), twin.bias.tolist()
        ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [0.0, 1.0])
    """
    twin = copy.deepcopy(unwrap_model(model))
    for tensor in {id(tensor): tensor for tensor in float_tensors(twin).values()}.values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        tensor.grad = None
    return twin


def kept_entries(twin: nn.Module, original: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What a pruned twin has left, tensor by tensor.

    Args:
        twin: made by `index_twin`, then pruned as the network was.
        original: the network before pruning, or its `tensor_shapes`.

    Returns:
        For each tensor of the original that changed: flat indices into the original's, int64, in the pruned tensor's
        shape.

    Raises:
        ShapeError: values that are no indices, as after training the twin.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> twin = index_twin(model)
        >>> twin.weight = nn.Parameter(twin.weight[:, [0, 2]])
        >>> kept_entries(twin, model)
        {'weight': tensor([[0, 2],
                [3, 5]])}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    kept = {}
    for name, tensor in float_tensors(twin).items():
        if name not in shapes:  # a bias that pruning added
            continue
        numel, values = math.prod(shapes[name]), tensor.detach()
        indices = values.long()
        if (
            not torch.equal(indices.to(values.dtype), values)
            or len(torch.unique(indices)) != indices.numel()
            or bool((indices >= numel).any())
        ):
            raise ShapeError(
                f"{name!r} of the twin holds no indices into the original's {tuple(shapes[name])}: prune what index_twin returns, "
                "and neither train nor refit it"
            )
        if tuple(indices.shape) != tuple(shapes[name]) or not torch.equal(
            indices.flatten(), torch.arange(numel, device=indices.device)
        ):
            kept[name] = indices
    return kept


def to_axis_indices(
    entries: Mapping[str, Tensor], original: nn.Module | Mapping[str, Sequence[int]]
) -> dict[str, KeptIndices]:
    """Flat indices as one list per dimension wherever they are an outer product, as they nearly always are.

    Args:
        entries: from `kept_entries` or `recording`.
        original: the network before pruning, or its `tensor_shapes`.

    Returns:
        For each name a list with one entry per dimension, the kept indices, ascending or not, or None for a dimension
        that is whole; the flat indices
        as they came where groups of a convolution keep different inputs.

    Example:
        >>> to_axis_indices({"weight": torch.tensor([[0, 2], [3, 5]])}, {"weight": (2, 3)})
        {'weight': [None, [0, 2]]}
        >>> to_axis_indices({"weight": torch.tensor([[0, 2], [4, 5]])}, {"weight": (2, 3)})
        {'weight': tensor([[0, 2],
                [4, 5]])}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    found: dict[str, KeptIndices] = {}
    for name, flat in entries.items():
        by_axis = _axes(flat, shapes[name])
        found[name] = flat if by_axis is None else by_axis
    return found


def index_kept(tensor: Tensor, kept: KeptIndices) -> Tensor:
    """The kept entries of a tensor that has the original's shape; a copy, without gradient.

    Args:
        tensor: of the original's shape: its values, a momentum, an average of its weights.
        kept: flat indices, or one list per dimension.

    Raises:
        ShapeError: indices that do not fit the tensor.

    Example:
        >>> index_kept(torch.tensor([[10, 11, 12], [13, 14, 15]]), [None, [0, 2]])
        tensor([[10, 12],
                [13, 15]])
    """
    tensor = tensor.detach()
    try:
        if isinstance(kept, Tensor):
            return tensor.flatten()[kept.to(tensor.device)]
        if len(kept) != tensor.ndim:
            raise IndexError(f"{len(kept)} dimensions")
        for dim, indices in enumerate(kept):
            if indices is not None:
                tensor = tensor.index_select(dim, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    except (IndexError, RuntimeError) as error:
        raise ShapeError(f"kept indices do not fit a tensor of shape {tuple(tensor.shape)}: {error}") from error
    return tensor.clone()


def flat_indices(lines: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The outer product of one line of indices per dimension, as flat indices into a tensor of the shape.

    Example:
        >>> flat_indices([torch.tensor([0, 1]), torch.tensor([0, 2])], (2, 3))
        tensor([[0, 2],
                [3, 5]])
    """
    total = torch.zeros((), dtype=torch.long, device=lines[0].device if len(lines) else None)
    for dim, line in enumerate(lines):
        total = total + (line * math.prod(shape[dim + 1 :])).view(
            [-1 if other == dim else 1 for other in range(len(lines))]
        )
    return total


def by_dimension(lines: Sequence[Tensor], shape: Sequence[int]) -> list[list[int] | None]:
    """Lines of indices as lists, None for a dimension that is whole.

    Example:
        >>> by_dimension([torch.tensor([0, 1]), torch.tensor([0, 2])], (2, 3))
        [None, [0, 2]]
    """
    return [
        None if (line := found.tolist()) == list(range(size)) else line
        for found, size in zip(lines, shape, strict=True)
    ]


def _axes(flat: Tensor, shape: Sequence[int]) -> list[list[int] | None] | None:
    if flat.ndim != len(shape) or not flat.numel():
        return None
    lines = [
        flat[tuple(slice(None) if other == dim else 0 for other in range(flat.ndim))]
        // math.prod(shape[dim + 1 :])
        % size
        for dim, size in enumerate(shape)
    ]
    if not torch.equal(flat_indices(lines, shape), flat):
        return None
    return by_dimension(lines, shape)


def infer_kept_outputs(
    original: nn.Module, pruned: nn.Module, tails: Mapping[str, Epilogue], kept: Mapping[str, KeptIndices] | None = None
) -> dict[str, Tensor]:
    """For each layer that lost output channels, the indices of those that it still has.

    Args:
        original: the network before pruning.
        pruned: the network after it.
        tails: the layers, and the norms that follow them.
        kept: from `recording`; None reads the indices off the weights and norms, which are slices of the original's
            before any training.

    Raises:
        ShapeError: layers that are no slices of the original's, or a pruned network of other layers.

    Example:
        >>> original, pruned = nn.Linear(3, 4), nn.Linear(3, 2)
        >>> pruned.load_state_dict({"weight": original.weight[[1, 3]], "bias": original.bias[[1, 3]]})
        <All keys matched successfully>
        >>> infer_kept_outputs(nn.ModuleDict({"a": original}), nn.ModuleDict({"a": pruned}), {"a": Epilogue()})
        {'a': tensor([1, 3])}
    """
    strange = sorted(set(kept or ()) - set(tensor_shapes(original)))
    if strange:
        raise ShapeError(f"kept names what the original has not: {', '.join(strange[:3])}; it is of another network")
    found = {}
    before, after = dict(original.named_modules()), dict(pruned.named_modules())
    for name, tail in tails.items():
        if name not in after:
            raise ShapeError(
                f"the pruned network has no layer {name!r}; expected the original's layers with fewer channels"
            )
        whole: Any = before[name]
        part: Any = after[name]
        if len(part.weight) == len(whole.weight):
            continue
        if kept is not None and f"{name}.weight" in kept:
            found[name] = _first_axis(kept[f"{name}.weight"], whole.weight)
        elif tail.norm is not None and (by_norm := _by_norm(before[tail.norm], after[tail.norm])) is not None:
            found[name] = by_norm
        else:
            found[name] = infer_kept_channels(name, whole.weight, part.weight)[0]
        if len(found[name]) != len(part.weight):
            raise ShapeError(
                f"layer {name!r}: {len(part.weight)} output channels, but {len(found[name])} are said to be kept"
            )
    return found


def infer_kept_channels(name: str, original: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
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
        >>> out, read = infer_kept_channels("conv", weight, weight[[0, 3, 7]][:, [1, 2, 5]])
        >>> out.tolist(), read.tolist()
        ([0, 3, 7], [1, 2, 5])
    """
    whole, part = (weight.detach().cpu() for weight in (original, pruned))
    whole, part = (weight[..., None] if weight.ndim == 2 else weight.flatten(2) for weight in (whole, part))
    if whole.shape[2:] != part.shape[2:] or len(part) > len(whole) or part.shape[1] > whole.shape[1]:
        raise ShapeError(
            f"layer {name!r}: a weight of shape {tuple(pruned.shape)} is no slice of the original's {tuple(original.shape)}"
        )
    if part.shape[1] == whole.shape[1]:
        read = torch.arange(whole.shape[1])
        out = _places(whole, part)
    elif len(part) == len(whole):
        out = torch.arange(len(whole))
        read = _places(whole.transpose(0, 1), part.transpose(0, 1))
    else:
        rows = torch.stack([_row(whole, row) for row in part[:MATCH_SAMPLES]])
        read = _places(whole[rows].transpose(0, 1), part[:MATCH_SAMPLES].transpose(0, 1))
        out = _places(whole[:, read], part)
    if len(out) != len(part) or len(read) != part.shape[1] or not torch.equal(whole[out][:, read], part):
        raise ShapeError(
            f"layer {name!r}: its weights {tuple(pruned.shape)} are no slice of the original's {tuple(original.shape)}. Refit before any training, "
            "with the network that was pruned as the original; or prune within `recording(model)` and pass what it gives as kept="
        )
    return out, read


def _first_axis(kept: KeptIndices, whole: Tensor) -> Tensor:
    if isinstance(kept, Tensor):
        return kept.flatten(1)[:, 0] // whole[0].numel()
    return torch.arange(len(whole)) if kept[0] is None else torch.tensor(kept[0])


def _by_norm(whole: Any, part: Any) -> Tensor | None:
    """Channels by a norm's four numbers, where they are all different."""
    before, after = (
        torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], 1).detach() for norm in (whole, part)
    )
    if len(torch.unique(before, dim=0)) != len(before):
        return None
    same = (after[:, None] == before[None]).all(2)
    return same.float().argmax(1) if bool((same.sum(1) == 1).all()) else None


def _places(whole: Tensor, part: Tensor) -> Tensor:
    """Ascending places of the entries of `part` among those of `whole`, both (n, m, t); fewer than asked for where one is not found."""
    at = torch.linspace(0, whole.shape[1] - 1, min(MATCH_SAMPLES, whole.shape[1])).long()
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


def compose_kept_indices(
    first: Mapping[str, KeptIndices], then: Mapping[str, KeptIndices], original: nn.Module | Mapping[str, Sequence[int]]
) -> dict[str, KeptIndices]:
    """What two prunings, one after the other, kept of the original's entries.

    Args:
        first: kept by the first, of the original.
        then: kept by the second, of what the first left.
        original: the network before both, or its `tensor_shapes`.

    Returns:
        As of `to_axis_indices`. Tensors that pruning added are left out.

    Raises:
        ShapeError: a second pruning of something else than the first left.

    Example:
        >>> compose_kept_indices({"weight": [None, [0, 2, 3]]}, {"weight": [[1], [0, 2]]}, {"weight": (2, 4)})
        {'weight': [[1], [0, 3]]}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    flat = {}
    for name in dict.fromkeys([*first, *then]):
        if name not in shapes:
            continue
        left = torch.arange(math.prod(shapes[name])).view(tuple(shapes[name]))
        for kept in (first, then):
            left = index_kept(left, kept[name]) if name in kept else left
        flat[name] = left
    return to_axis_indices(flat, shapes)
