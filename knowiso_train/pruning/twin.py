"""Which entries of the original's tensors a pruned network still holds: as flat indices, and by dimension where they are an outer product."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features import bare

Kept = Tensor | Sequence[Sequence[int] | None]


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
    return {name: tuple(tensor.shape) for name, tensor in float_tensors(bare(model)).items()}


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
    twin = copy.deepcopy(bare(model))
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
        For each tensor of the original that changed: flat indices into the original's, int64, in the pruned tensor's shape.

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
        if not torch.equal(indices.to(values.dtype), values) or len(torch.unique(indices)) != indices.numel() or bool((indices >= numel).any()):
            raise ShapeError(
                f"{name!r} of the twin holds no indices into the original's {tuple(shapes[name])}: prune what index_twin returns, "
                "and neither train nor refit it"
            )
        if tuple(indices.shape) != tuple(shapes[name]) or not torch.equal(indices.flatten(), torch.arange(numel, device=indices.device)):
            kept[name] = indices
    return kept


def kept_indices(entries: Mapping[str, Tensor], original: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, Kept]:
    """Flat indices as one list per dimension wherever they are an outer product, as they nearly always are.

    Args:
        entries: from `kept_entries` or `recording`.
        original: the network before pruning, or its `tensor_shapes`.

    Returns:
        For each name a list with one entry per dimension, the kept indices, ascending or not, or None for a dimension that is whole; the flat indices
        as they came where groups of a convolution keep different inputs.

    Example:
        >>> kept_indices({"weight": torch.tensor([[0, 2], [3, 5]])}, {"weight": (2, 3)})
        {'weight': [None, [0, 2]]}
        >>> kept_indices({"weight": torch.tensor([[0, 2], [4, 5]])}, {"weight": (2, 3)})
        {'weight': tensor([[0, 2],
                [4, 5]])}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    found: dict[str, Kept] = {}
    for name, flat in entries.items():
        by_axis = _axes(flat, shapes[name])
        found[name] = flat if by_axis is None else by_axis
    return found


def take(tensor: Tensor, kept: Kept) -> Tensor:
    """The kept entries of a tensor that has the original's shape; a copy, without gradient.

    Args:
        tensor: of the original's shape: its values, a momentum, an average of its weights.
        kept: flat indices, or one list per dimension.

    Raises:
        ShapeError: indices that do not fit the tensor.

    Example:
        >>> take(torch.tensor([[10, 11, 12], [13, 14, 15]]), [None, [0, 2]])
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
        total = total + (line * math.prod(shape[dim + 1 :])).view([-1 if other == dim else 1 for other in range(len(lines))])
    return total


def by_dimension(lines: Sequence[Tensor], shape: Sequence[int]) -> list[list[int] | None]:
    """Lines of indices as lists, None for a dimension that is whole.

    Example:
        >>> by_dimension([torch.tensor([0, 1]), torch.tensor([0, 2])], (2, 3))
        [None, [0, 2]]
    """
    return [None if (line := found.tolist()) == list(range(size)) else line for found, size in zip(lines, shape, strict=True)]


def _axes(flat: Tensor, shape: Sequence[int]) -> list[list[int] | None] | None:
    if flat.ndim != len(shape) or not flat.numel():
        return None
    lines = [
        flat[tuple(slice(None) if other == dim else 0 for other in range(flat.ndim))] // math.prod(shape[dim + 1 :]) % size
        for dim, size in enumerate(shape)
    ]
    if not torch.equal(flat_indices(lines, shape), flat):
        return None
    return by_dimension(lines, shape)
