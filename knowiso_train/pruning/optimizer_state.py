"""Transfer of the state of optimizers to pruned networks."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowiso_train.errors import InputTypeError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import KeptIndices, index_kept

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


class ParameterRemap:
    """The pruned network's parameters as successors of the original's.

    Args:
        before: the original's parameters by name, the objects that its optimizers hold.
        pruned: the pruned network.
        kept: what stayed of each tensor that was cut.
        shapes: of the parameters before, where the very objects may have changed since.
        trainable: what `requires_grad` was before, likewise.

    Raises:
        ShapeError: `kept` does not lead from one shape to the other.
    """

    def __init__(
        self,
        before: Mapping[str, nn.Parameter],
        pruned: nn.Module,
        kept: Mapping[str, KeptIndices],
        shapes: Mapping[str, torch.Size] | None = None,
        trainable: Mapping[str, bool] | None = None,
    ) -> None:
        self.before, self.after, self.kept = before, dict(pruned.named_parameters(remove_duplicate=False)), kept
        self.shapes = shapes or {name: parameter.shape for name, parameter in before.items()}
        self.trainable = trainable or {name: parameter.requires_grad for name, parameter in before.items()}
        self.names = {id(parameter): name for name, parameter in reversed(list(before.items()))}
        for name, new in self.after.items():
            if name in before:
                self._check(name, new)
        self.added = [name for name in self.after if name not in before]
        if lost := [name for name in self.added if _sibling(name) not in before]:
            warnings.warn(
                f"pruning added {', '.join(lost)} beside no weight of the original, so no optimizer gets them; use add_param_group",
                KnowisoWarning,
                stacklevel=4,
            )

    def inherit(self, optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
        """Parameter groups and state for the pruned network; neither network nor optimizer is changed."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if held and not any(id(parameter) in self.names for parameter in held):
            raise OptionError(
                f"none of the {len(held)} parameters of {type(optimizer).__name__} is one of the original's {len(self.before)}. "
                "Expected the network that it was made for; where that was pruned in place, its named_parameters() from before pruning"
            )
        state: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        return [self._group(group, optimizer, state) for group in optimizer.param_groups], state

    def freeze(self) -> None:
        """Freeze what was frozen, and what pruning added to a frozen layer."""
        for name, parameter in self.after.items():
            of = name if name in self.before else _sibling(name)
            if of in self.before:
                parameter.requires_grad_(self.trainable[of])

    def _group(self, group: dict[str, Any], optimizer: Optimizer, state: dict[Any, Any]) -> dict[str, Any]:
        parameters: list[Any] = []
        labels: list[str] = []
        old_labels = group.get("param_names", [""] * len(group["params"]))
        for old, label in zip(group["params"], old_labels, strict=True):
            name = self.names.get(id(old))
            if name is not None and name not in self.after:
                continue  # pruned away as a whole
            new = old if name is None else self.after[name]
            parameters.append(new)
            labels.append(label)
            if old in optimizer.state:
                own = optimizer.state[old]
                state[new] = self._cut(own, name) if name is not None and name in self.kept else copy.deepcopy(own)
            for extra in self.added:
                if name is not None and _sibling(extra) == name:
                    parameters.append(self.after[extra])
                    labels.append(label.removesuffix(name) + extra)
        new_group = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        return new_group | {"params": parameters} | ({"param_names": labels} if "param_names" in group else {})

    def _cut(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if value.shape == self.shapes[name]:
                return index_kept(value, self.kept[name])
            if value.numel() == 1:
                return value.detach().clone()
            raise ShapeError(
                f"the optimizer's state of {name!r} holds a tensor of shape {tuple(value.shape)}, expected {tuple(self.shapes[name])} or one number: "
                "it has no value for each entry and cannot be cut. Make a new optimizer after pruning"
            )
        if isinstance(value, dict):
            return {key: self._cut(entry, name) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._cut(entry, name) for entry in value])
        return copy.deepcopy(value)

    def _check(self, name: str, new: Tensor) -> None:
        shape = self.shapes[name]
        expected = index_kept(torch.empty(()).expand(shape), self.kept[name]).shape if name in self.kept else shape
        if expected != new.shape:
            raise ShapeError(
                f"{name!r} has shape {tuple(shape)} in the original and {tuple(new.shape)} in the pruned network, but by `kept` it would be "
                f"{tuple(expected)}. Where a network was pruned in place, pass its named_parameters() from before as the original"
            )


def _sibling(name: str) -> str:
    """The weight of the same layer."""
    return ".".join([*name.split(".")[:-1], "weight"])


@contextmanager
def preserve_optimizer_state(model: nn.Module, *optimizers: Optimizer) -> Iterator[dict[str, KeptIndices]]:
    """Prune within the context, go on training after it: the same optimizers, schedulers and parameter groups, momenta cut as the weights were.

    Pruning replaces parameters: without this an optimizer goes on stepping the old ones, which no network holds any
        more. What was frozen is frozen
    again, and what was in training mode trains: torch-pruning makes every parameter that it cuts trainable, and leaves
    the network in eval mode.
    Parameters of other modules, such as a loss's own, stay as they are. Anything that holds the network's parameters
    besides the optimizers (DDP, an
    average of the weights) has to be made anew.

    Args:
        model: pruned in place within the context, by any library that cuts by indexing.
        optimizers: over the model's parameters, or some of them; accelerate's wrapper will do. Changed in place when
            the context ends, and not at all
            where it ends with an error.

    Returns:
        A dictionary that is filled when the context ends: for each tensor whose shape changed, which entries stayed, as
        of `kept_indices`.

    Raises:
        InputTypeError: an optimizer that keeps parameters besides its groups (LBFGS, Lookahead, SAM).
        OptionError: an optimizer that holds none of the network's parameters.
        ShapeError: a state that has no value for each entry (Adafactor), so that it cannot be cut.
        CaptureError: weights cut in a way that cannot be followed.

    Warns:
        KnowisoWarning: nothing was pruned; `prune` gives a copy, for which there is `transfer_optimizer_state`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> import torch_pruning as tp
        >>> group = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4)).get_pruning_group(model[0], tp.prune_linear_out_channels, [1])
        >>> with preserve_optimizer_state(model, optimizer) as kept:
        ...     group.prune()
        >>> optimizer.param_groups[0]["params"][0] is model[0].weight
        True
        >>> kept["0.bias"]
        [[0, 2]]
    """
    inner = [_innermost(optimizer) for optimizer in optimizers]
    before = dict(unwrap_model(model).named_parameters(remove_duplicate=False))
    shapes = {name: parameter.shape for name, parameter in before.items()}
    trainable = {name: parameter.requires_grad for name, parameter in before.items()}
    modes = [(module, module.training) for module in unwrap_model(model).modules()]
    with track_kept_indices(model) as kept:
        yield kept
    if not kept:
        warnings.warn(
            "nothing was pruned within carrying(): no weight of the network has another shape. What prunes a copy, such as prune(), leaves the "
            "network as it is: there take carry_optimizer(optimizer, model, pruned.model, pruned.kept)",
            KnowisoWarning,
            stacklevel=3,
        )
    heirs = ParameterRemap(before, unwrap_model(model), kept, shapes, trainable)
    made = [(optimizer, *heirs.inherit(optimizer)) for optimizer in inner]  # all before any is changed
    heirs.freeze()
    for optimizer, groups, state in made:
        for group, new in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: new[key] for key in ("params", "param_names") if key in new})
        optimizer.state.clear()
        optimizer.state.update(state)
    for module, mode in modes:
        module.training = mode


def transfer_optimizer_state(
    optimizer: AnyOptimizer,
    original: nn.Module | Mapping[str, nn.Parameter],
    pruned: nn.Module,
    kept: Mapping[str, KeptIndices],
) -> AnyOptimizer:
    """A new optimizer for a pruned copy: same class, groups and hyper-parameters, the state cut as the weights were.

    For a network that is pruned in place `preserve_optimizer_state` does all of it, and keeps schedulers valid. A
    scheduler of the old optimizer goes on with
    `scheduler.optimizer = new`.

    Args:
        optimizer: of the original; left as it is.
        original: the network before pruning. Where it was pruned in place, `dict(model.named_parameters())` taken
            before.
        pruned: the pruned network. Its parameters that were frozen in the original are frozen again. What pruning
            added, such as a bias, joins the
            group of its layer's weight.
        kept: for each tensor that was cut, what stayed: from `track_kept_indices`, `kept_entries` or `kept_indices`.

    Returns:
        The optimizer. Parameters that are not of the original, such as a loss's own, go on with their state.

    Raises:
        InputTypeError: an optimizer that wraps another, or that keeps parameters besides its groups (LBFGS, Lookahead,
            SAM).
        OptionError: an optimizer that holds none of the original's parameters.
        ShapeError: `kept` does not lead from the original's shapes to the pruned ones, as when the original is given
            after it was pruned; or a state
            that has no value for each entry (Adafactor).

    Example:
        >>> original = nn.Linear(4, 3)
        >>> optimizer = torch.optim.AdamW(original.parameters(), lr=0.1)
        >>> original(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> pruned = nn.Linear(4, 2)
        >>> new = transfer_optimizer_state(optimizer, original, pruned, {"weight": [[0, 2], None], "bias": [[0, 2]]})
        >>> new.state[pruned.weight]["exp_avg"].shape, new.param_groups[0]["lr"]
        (torch.Size([2, 4]), 0.1)
    """
    if _innermost(optimizer) is not optimizer:
        raise InputTypeError(
            f"{type(optimizer).__name__} wraps another optimizer; expected the inner one, or `with carrying(model, optimizer):`"
        )
    before = (
        dict(unwrap_model(original).named_parameters(remove_duplicate=False))
        if isinstance(original, nn.Module)
        else dict(original)
    )
    heirs = ParameterRemap(before, unwrap_model(pruned), kept)
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
        if name not in ("param_groups", "state", "defaults") and any(
            isinstance(entry, (nn.Parameter, Optimizer)) for entry in entries
        ):
            raise InputTypeError(
                f"{type(optimizer).__name__} keeps parameters or an optimizer of its own in {name!r}, which cannot be cut; "
                "carry the inner optimizer, or make a new one after pruning"
            )
    return optimizer
