"""Indices of the channels and entries that pruning kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.pruning._tracing import Epilogue

# Kept entries of one tensor: flat indices in the pruned tensor's shape, or one list of indices per axis, with None for
# an axis that is complete
KeptIndices = Tensor | Sequence[Sequence[int] | None]

# Rows or columns that have to agree for a match; more only cost time
MATCH_SAMPLES = 8


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and floating-point buffers by name, a tied one under each of its names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and floating-point buffer.

    Taken before pruning in place, the shapes can be passed instead of the original model.

    Examples:
        >>> tensor_shapes(nn.Linear(3, 2))
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tuple(tensor.shape) for name, tensor in float_tensors(unwrap_model(model)).items()}


def index_kept(tensor: Tensor, kept: KeptIndices) -> Tensor:
    """Return the kept entries of a tensor of the original's shape: a copy without gradient.

    Args:
        tensor: Values of the original's shape, such as a weight, its momentum or its moving average.
        kept: Flat indices, or one list per axis.

    Raises:
        ShapeError: Indices that do not fit the tensor.

    Examples:
        >>> index_kept(torch.tensor([[10, 11, 12], [13, 14, 15]]), [None, [0, 2]])
        tensor([[10, 12],
                [13, 15]])
    """
    tensor = tensor.detach()
    try:
        if isinstance(kept, Tensor):
            return tensor.flatten()[kept.to(tensor.device)]
        if len(kept) != tensor.ndim:
            raise IndexError(f"{len(kept)} axes")
        for axis, indices in enumerate(kept):
            if indices is not None:
                tensor = tensor.index_select(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    except (IndexError, RuntimeError) as error:
        raise ShapeError(f"kept indices do not fit a tensor of shape {tuple(tensor.shape)}: {error}") from error
    return tensor.clone()


def to_axis_indices(
    entries: Mapping[str, Tensor], original: nn.Module | Mapping[str, Sequence[int]]
) -> dict[str, KeptIndices]:
    """Convert flat indices to one list per axis, for every tensor whose indices are an outer product.

    Args:
        entries: Flat indices into the original's tensors by name, each in the pruned tensor's shape.
        original: Model before pruning, or its `tensor_shapes`.

    Returns:
        One list of indices per axis, None for an axis that is complete. The flat indices of a grouped convolution
        whose groups keep different inputs are returned unchanged.

    Examples:
        >>> to_axis_indices({"weight": torch.tensor([[0, 2], [3, 5]])}, {"weight": (2, 3)})
        {'weight': [None, [0, 2]]}
        >>> to_axis_indices({"weight": torch.tensor([[0, 2], [4, 5]])}, {"weight": (2, 3)})
        {'weight': tensor([[0, 2],
                [4, 5]])}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    kept: dict[str, KeptIndices] = {}
    for name, flat in entries.items():
        axes = _factor_indices(flat, shapes[name])
        kept[name] = flat if axes is None else axis_lists(axes, shapes[name])
    return kept


def flat_indices(axes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the outer product of one index tensor per axis, as flat indices into a tensor of the shape.

    Examples:
        >>> flat_indices([torch.tensor([0, 1]), torch.tensor([0, 2])], (2, 3))
        tensor([[0, 2],
                [3, 5]])
    """
    flat = torch.zeros((), dtype=torch.long, device=axes[0].device if len(axes) else None)
    for axis, indices in enumerate(axes):
        stride = math.prod(shape[axis + 1 :])
        flat = flat + (indices * stride).view([-1 if other == axis else 1 for other in range(len(axes))])
    return flat


def axis_lists(axes: Sequence[Tensor], shape: Sequence[int]) -> list[list[int] | None]:
    """Convert one index tensor per axis to lists, None for an axis that is complete and in order.

    Examples:
        >>> axis_lists([torch.tensor([0, 1]), torch.tensor([0, 2])], (2, 3))
        [None, [0, 2]]
    """
    lists = [indices.tolist() for indices in axes]
    return [None if indices == list(range(size)) else indices for indices, size in zip(lists, shape, strict=True)]


def _factor_indices(flat: Tensor, shape: Sequence[int]) -> list[Tensor] | None:
    """Return one index tensor per axis, or None if the flat indices are no outer product."""
    if flat.ndim != len(shape) or not flat.numel():
        return None
    # Along each axis, the coordinates of the entries whose other coordinates are 0
    axes = []
    for axis, size in enumerate(shape):
        edge = flat[tuple(slice(None) if other == axis else 0 for other in range(flat.ndim))]
        axes.append(edge // math.prod(shape[axis + 1 :]) % size)
    return axes if torch.equal(flat_indices(axes, shape), flat) else None


def compose_kept_indices(
    first: Mapping[str, KeptIndices],
    second: Mapping[str, KeptIndices],
    original: nn.Module | Mapping[str, Sequence[int]],
) -> dict[str, KeptIndices]:
    """Compose the kept indices of two successive prunings into indices of the first original.

    Args:
        first: Indices kept by the first pruning, into the original.
        second: Indices kept by the second pruning, into the result of the first.
        original: Model before both, or its `tensor_shapes`.

    Returns:
        Kept indices as of `to_axis_indices`. Tensors that pruning added are left out.

    Raises:
        ShapeError: Indices of the second that do not fit the result of the first.

    Examples:
        >>> compose_kept_indices({"weight": [None, [0, 2, 3]]}, {"weight": [[1], [0, 2]]}, {"weight": (2, 4)})
        {'weight': [[1], [0, 3]]}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    entries = {}
    for name in dict.fromkeys([*first, *second]):
        if name not in shapes:
            continue
        # Number the original's entries, and prune the numbers twice
        flat = torch.arange(math.prod(shapes[name])).view(tuple(shapes[name]))
        for kept in (first, second):
            flat = index_kept(flat, kept[name]) if name in kept else flat
        entries[name] = flat
    return to_axis_indices(entries, shapes)


def infer_kept_outputs(
    original: nn.Module,
    pruned: nn.Module,
    epilogues: Mapping[str, Epilogue],
    kept: Mapping[str, KeptIndices] | None = None,
) -> dict[str, Tensor]:
    """Return the kept output channels of each layer that lost some.

    Args:
        original: Model before pruning.
        pruned: Model after pruning.
        epilogues: Epilogues of the layers by name.
        kept: Kept indices from `track_kept_indices`. Default: infer them from weights and norms, which are slices of
            the original's before any training.

    Raises:
        ShapeError: Layers that are no slices of the original's, or a pruned model without one of the layers.

    Examples:
        >>> original, pruned = nn.Linear(3, 4), nn.Linear(3, 2)
        >>> pruned.load_state_dict({"weight": original.weight[[1, 3]], "bias": original.bias[[1, 3]]})
        <All keys matched successfully>
        >>> infer_kept_outputs(nn.ModuleDict({"a": original}), nn.ModuleDict({"a": pruned}), {"a": Epilogue()})
        {'a': tensor([1, 3])}
    """
    unknown = sorted(set(kept or ()) - set(tensor_shapes(original)))
    if unknown:
        raise ShapeError(
            f"kept names {', '.join(unknown[:3])}, and the original has no such tensors. Pass the indices of this model"
        )
    outputs = {}
    before, after = dict(original.named_modules()), dict(pruned.named_modules())
    for name, epilogue in epilogues.items():
        if name not in after:
            raise ShapeError(
                f"the pruned model has no layer {name!r}; expected the original's layers with fewer channels"
            )
        weight: Tensor = before[name].weight
        pruned_weight: Tensor = after[name].weight
        if len(pruned_weight) == len(weight):
            continue
        norm = epilogue.norm
        if kept is not None and f"{name}.weight" in kept:
            outputs[name] = _first_axis(kept[f"{name}.weight"], weight)
        elif norm is not None and (channels := _match_norms(before[norm], after[norm])) is not None:
            outputs[name] = channels
        else:
            outputs[name] = infer_kept_channels(name, weight, pruned_weight)[0]
        if len(outputs[name]) != len(pruned_weight):
            raise ShapeError(
                f"layer {name!r} has {len(pruned_weight)} output channels, but kept has {len(outputs[name])} indices"
            )
        outside = [channel for channel in outputs[name].tolist() if not 0 <= channel < len(weight)]
        if outside:
            raise ShapeError(
                f"layer {name!r}: expected kept output channels from 0 to {len(weight) - 1}, got {outside[0]}. Pass "
                "the indices of this model"
            )
    return outputs


def infer_kept_channels(name: str, original: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept output and input channels of a weight that is a slice of the original's.

    Args:
        name: Name of the layer, for error messages.
        original: (C_out, C_in, …) weight of a linear layer or convolution.
        pruned: (c_out, c_in, …) weight `original[outputs][:, inputs]` with ascending indices.

    Returns:
        Indices (c_out,) and (c_in,); of equal slices the first.

    Raises:
        ShapeError: Not a slice of the original, as after training.

    Examples:
        >>> weight = torch.randn(8, 6, 3, 3)
        >>> outputs, inputs = infer_kept_channels("conv", weight, weight[[0, 3, 7]][:, [1, 2, 5]])
        >>> outputs.tolist(), inputs.tolist()
        ([0, 3, 7], [1, 2, 5])
    """
    # (C_out, C_in, k²) and (c_out, c_in, k²)
    full, part = (weight.detach().cpu() for weight in (original, pruned))
    full, part = (weight[..., None] if weight.ndim == 2 else weight.flatten(2) for weight in (full, part))
    if full.shape[2:] != part.shape[2:] or len(part) > len(full) or part.shape[1] > full.shape[1]:
        raise ShapeError(
            f"layer {name!r}: a weight of shape {tuple(pruned.shape)} is no slice of the original's "
            f"{tuple(original.shape)}. Pass the model that was pruned as the original"
        )
    if part.shape[1] == full.shape[1]:
        inputs = torch.arange(full.shape[1])
        outputs = _match_rows(full, part)
    elif len(part) == len(full):
        outputs = torch.arange(len(full))
        inputs = _match_rows(full.transpose(0, 1), part.transpose(0, 1))
    else:
        # Both axes were cut: identify a few rows by their values, then the columns by these rows, then all rows
        rows = torch.stack([_most_similar_row(full, row) for row in part[:MATCH_SAMPLES]])
        inputs = _match_rows(full[rows].transpose(0, 1), part[:MATCH_SAMPLES].transpose(0, 1))
        outputs = _match_rows(full[:, inputs], part)
    complete = len(outputs) == len(part) and len(inputs) == part.shape[1]
    if not complete or not torch.equal(full[outputs][:, inputs], part):
        raise ShapeError(
            f"layer {name!r}: weights {tuple(pruned.shape)} are no slice of the original's {tuple(original.shape)}. "
            "Refit before any training, or prune within track_kept_indices(model) and pass its result as kept="
        )
    return outputs, inputs


def _first_axis(kept: KeptIndices, weight: Tensor) -> Tensor:
    if isinstance(kept, Tensor):
        return kept.flatten(1)[:, 0] // weight[0].numel()
    return torch.arange(len(weight)) if kept[0] is None else torch.tensor(kept[0])


def _match_norms(original: Any, pruned: Any) -> Tensor | None:
    """Return the kept channels of a batch norm by its four numbers per channel, or None if they are ambiguous."""
    before, after = (
        torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], 1).detach()
        for norm in (original, pruned)
    )
    if len(torch.unique(before, dim=0)) != len(before):
        return None
    matches = (after[:, None] == before[None]).all(2)
    return matches.float().argmax(1) if bool((matches.sum(1) == 1).all()) else None


def _match_rows(full: Tensor, part: Tensor) -> Tensor:
    """Return the ascending indices in `full` (N, m, t) of the rows of `part` (n, m, t).

    Rows are compared at `MATCH_SAMPLES` columns. Each takes the first match after the previous one; the search ends at
    the first row without a match.
    """
    columns = torch.linspace(0, full.shape[1] - 1, min(MATCH_SAMPLES, full.shape[1])).long()
    candidates, rows = full[:, columns].flatten(1), part[:, columns].flatten(1)
    indices: list[int] = []
    start = 0
    for row in rows:
        matches = (candidates[start:] == row).all(1).nonzero().flatten()
        if not len(matches):
            break
        indices.append(start + int(matches[0]))
        start = indices[-1] + 1
    return torch.tensor(indices, dtype=torch.long)


def _most_similar_row(full: Tensor, row: Tensor) -> Tensor:
    """Return the index of the row of `full` (N, M, t) that shares the most columns' values with `row` (m, t)."""
    return torch.isin(full, row).all(2).sum(1).argmax()
