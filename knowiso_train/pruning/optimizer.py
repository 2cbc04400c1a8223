"""Pruning between two training steps: the optimiser goes on with the parameters that are left, and with their momenta."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.optim import Optimizer

from knowiso_train.errors import InputTypeError, KnowisoWarning
from knowiso_train.features import bare
from knowiso_train.pruning.optimizer_state import Heirs
from knowiso_train.pruning.record import recording
from knowiso_train.pruning.twin import Kept

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@contextmanager
def carrying(model: nn.Module, *optimizers: Optimizer) -> Iterator[dict[str, Kept]]:
    """Prune within the context, go on training after it: the same optimisers, schedulers and parameter groups, momenta cut as the weights were.

    Pruning replaces parameters: without this an optimiser goes on stepping the old ones, which no network holds any more. What was frozen is frozen
    again, and what was in training mode trains: torch-pruning makes every parameter that it cuts trainable, and leaves the network in eval mode.
    Parameters of other modules, such as a loss's own, stay as they are. Anything that holds the network's parameters besides the optimisers (DDP, an
    average of the weights) has to be made anew.

    Args:
        model: pruned in place within the context, by any library that cuts by indexing.
        optimizers: over the model's parameters, or some of them; accelerate's wrapper will do. Changed in place when the context ends, and not at all
            where it ends with an error.

    Returns:
        A dictionary that is filled when the context ends: for each tensor whose shape changed, which entries stayed, as of `kept_indices`.

    Raises:
        InputTypeError: an optimiser that keeps parameters besides its groups (LBFGS, Lookahead, SAM).
        OptionError: an optimiser that holds none of the network's parameters.
        ShapeError: a state that has no value for each entry (Adafactor), so that it cannot be cut.
        CaptureError: weights cut in a way that cannot be followed.

    Warns:
        KnowisoWarning: nothing was pruned; `prune` gives a copy, for which there is `carry_optimizer`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> import torch_pruning as tp
        >>> group = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4)).get_pruning_group(model[0], tp.prune_linear_out_channels, [1])
        >>> with carrying(model, optimizer) as kept:
        ...     group.prune()
        >>> optimizer.param_groups[0]["params"][0] is model[0].weight
        True
        >>> kept["0.bias"]
        [[0, 2]]
    """
    inner = [_innermost(optimizer) for optimizer in optimizers]
    before = dict(bare(model).named_parameters(remove_duplicate=False))
    shapes = {name: parameter.shape for name, parameter in before.items()}
    trainable = {name: parameter.requires_grad for name, parameter in before.items()}
    modes = [(module, module.training) for module in bare(model).modules()]
    with recording(model) as kept:
        yield kept
    if not kept:
        warnings.warn(
            "nothing was pruned within carrying(): no weight of the network has another shape. What prunes a copy, such as prune(), leaves the "
            "network as it is: there take carry_optimizer(optimizer, model, pruned.model, pruned.kept)",
            KnowisoWarning,
            stacklevel=3,
        )
    heirs = Heirs(before, bare(model), kept, shapes, trainable)
    made = [(optimizer, *heirs.inherit(optimizer)) for optimizer in inner]  # all before any is changed
    heirs.freeze()
    for optimizer, groups, state in made:
        for group, new in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: new[key] for key in ("params", "param_names") if key in new})
        optimizer.state.clear()
        optimizer.state.update(state)
    for module, mode in modes:
        module.training = mode


def carry_optimizer(
    optimizer: AnyOptimizer, original: nn.Module | Mapping[str, nn.Parameter], pruned: nn.Module, kept: Mapping[str, Kept]
) -> AnyOptimizer:
    """A new optimiser for a pruned copy: same class, groups and hyper-parameters, the state cut as the weights were.

    For a network that is pruned in place `carrying` does all of it, and keeps schedulers valid. A scheduler of the old optimiser goes on with
    `scheduler.optimizer = new`.

    Args:
        optimizer: of the original; left as it is.
        original: the network before pruning. Where it was pruned in place, `dict(model.named_parameters())` taken before.
        pruned: the pruned network. Its parameters that were frozen in the original are frozen again. What pruning added, such as a bias, joins the
            group of its layer's weight.
        kept: for each tensor that was cut, what stayed: from `recording`, `kept_entries` or `kept_indices`.

    Returns:
        The optimiser. Parameters that are not of the original, such as a loss's own, go on with their state.

    Raises:
        InputTypeError: an optimiser that wraps another, or that keeps parameters besides its groups (LBFGS, Lookahead, SAM).
        OptionError: an optimiser that holds none of the original's parameters.
        ShapeError: `kept` does not lead from the original's shapes to the pruned ones, as when the original is given after it was pruned; or a state
            that has no value for each entry (Adafactor).

    Example:
        >>> original = nn.Linear(4, 3)
        >>> optimizer = torch.optim.AdamW(original.parameters(), lr=0.1)
        >>> original(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> pruned = nn.Linear(4, 2)
        >>> new = carry_optimizer(optimizer, original, pruned, {"weight": [[0, 2], None], "bias": [[0, 2]]})
        >>> new.state[pruned.weight]["exp_avg"].shape, new.param_groups[0]["lr"]
        (torch.Size([2, 4]), 0.1)
    """
    if _innermost(optimizer) is not optimizer:
        raise InputTypeError(f"{type(optimizer).__name__} wraps another optimiser; expected the inner one, or `with carrying(model, optimizer):`")
    before = dict(bare(original).named_parameters(remove_duplicate=False)) if isinstance(original, nn.Module) else dict(original)
    heirs = Heirs(before, bare(pruned), kept)
    groups, state = heirs.inherit(optimizer)
    heirs.freeze()
    new = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name not in ("defaults", "step"):  # a scheduler binds `step` to the old one
            setattr(new, name, copy.copy(value))
    new.param_groups, new.state = groups, defaultdict(dict, state)
    return new


def _innermost(optimizer: Optimizer) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise InputTypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper
        optimizer = inner
    for name, value in vars(optimizer).items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if name not in ("param_groups", "state", "defaults") and any(isinstance(entry, (nn.Parameter, Optimizer)) for entry in entries):
            raise InputTypeError(
                f"{type(optimizer).__name__} keeps parameters or an optimiser of its own in {name!r}, which cannot be cut; "
                "carry the inner optimiser, or make a new one after pruning"
            )
    return optimizer
