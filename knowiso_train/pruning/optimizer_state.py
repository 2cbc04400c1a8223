"""Transfer of the state of optimizers to pruned models."""

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
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import KeptIndices, index_kept

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


class ParameterRemap:
    """Mapping from the original's parameters to those of the pruned model.

    Args:
        before: Parameters of the original by name: the objects that its optimizers hold.
        pruned: Pruned model.
        kept: Kept indices of each tensor that was cut.
        shapes: Shapes of the original parameters. Default: their present shapes.
        trainable: Former values of `requires_grad`. Default: the present values.

    Raises:
        ShapeError: `kept` does not lead from the original's shapes to the pruned ones.

    Warns:
        KnowisoWarning: A new parameter in a layer without a weight of the original.
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
        # A tied parameter is known by the first of its names
        self.names = {id(parameter): name for name, parameter in reversed(list(before.items()))}
        for name, parameter in self.after.items():
            if name in before:
                self._check_shape(name, parameter)
        self.added = [name for name in self.after if name not in before]
        orphans = [name for name in self.added if _layer_weight(name) not in before]
        if orphans:
            warnings.warn(
                f"pruning added {', '.join(orphans)} beside no weight of the original, so that no optimizer has them. "
                "Call add_param_group",
                KnowisoWarning,
                stacklevel=4,
            )

    def remap_optimizer(self, optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
        """Return the parameter groups and the state for the pruned model; the optimizer is not modified.

        Raises:
            OptionError: The optimizer holds none of the original's parameters.
            ShapeError: A state without one value for each entry, which cannot be cut.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if parameters and not any(id(parameter) in self.names for parameter in parameters):
            raise OptionError(
                f"none of the {len(parameters)} parameters of {type(optimizer).__name__} is one of the original's "
                f"{len(self.before)}. Expected the optimized model; if it was pruned in place, pass its "
                "named_parameters() from before pruning"
            )
        state: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        return [self._remap_group(group, optimizer, state) for group in optimizer.param_groups], state

    def restore_requires_grad(self) -> None:
        """Restore `requires_grad`; a new parameter takes the value of its layer's weight."""
        for name, parameter in self.after.items():
            source = name if name in self.before else _layer_weight(name)
            if source in self.before:
                parameter.requires_grad_(self.trainable[source])

    def _remap_group(self, group: dict[str, Any], optimizer: Optimizer, state: dict[Any, Any]) -> dict[str, Any]:
        """Return one parameter group for the pruned model, and add its state to `state`."""
        parameters: list[Any] = []
        labels: list[str] = []
        old_labels = group.get("param_names", [""] * len(group["params"]))
        for old, label in zip(group["params"], old_labels, strict=True):
            name = self.names.get(id(old))
            if name is not None and name not in self.after:
                # The whole parameter was removed
                continue
            new = old if name is None else self.after[name]
            parameters.append(new)
            labels.append(label)
            if old in optimizer.state:
                old_state = optimizer.state[old]
                is_cut = name is not None and name in self.kept
                state[new] = self._cut(old_state, name or "") if is_cut else copy.deepcopy(old_state)
            for added in self.added:
                if name is not None and _layer_weight(added) == name:
                    parameters.append(self.after[added])
                    labels.append(label.removesuffix(name) + added)
        new_group = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        return new_group | {"params": parameters} | ({"param_names": labels} if "param_names" in group else {})

    def _cut(self, value: Any, name: str) -> Any:
        """Return the kept entries of every tensor in the state of one parameter."""
        if isinstance(value, Tensor):
            if value.shape == self.shapes[name]:
                return index_kept(value, self.kept[name])
            if value.numel() == 1:
                return value.detach().clone()
            raise ShapeError(
                f"the optimizer's state of {name!r} has a tensor of shape {tuple(value.shape)}, expected "
                f"{tuple(self.shapes[name])} or one number: it has no value for each entry and cannot be cut. "
                "Make a new optimizer after pruning"
            )
        if isinstance(value, dict):
            return {key: self._cut(entry, name) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._cut(entry, name) for entry in value])
        return copy.deepcopy(value)

    def _check_shape(self, name: str, parameter: Tensor) -> None:
        shape = self.shapes[name]
        # An expanded scalar has the shape without its memory
        expected = index_kept(torch.empty(()).expand(shape), self.kept[name]).shape if name in self.kept else shape
        if expected != parameter.shape:
            raise ShapeError(
                f"{name!r} has shape {tuple(shape)} in the original and {tuple(parameter.shape)} in the pruned model, "
                f"but kept leads to {tuple(expected)}. For a model pruned in place, pass its named_parameters() from "
                "before as the original"
            )


def _layer_weight(name: str) -> str:
    """Return the name of the weight of a parameter's layer."""
    return ".".join([*name.split(".")[:-1], "weight"])


@contextmanager
def preserve_optimizer_state(model: nn.Module, *optimizers: Optimizer) -> Iterator[dict[str, KeptIndices]]:
    """Keep optimizers valid while a model is pruned in place: their parameters, momenta and groups are cut alike.

    Pruning replaces parameters, and without this context an optimizer continues to step the old ones, which the model
    no longer holds. Schedulers stay valid, since the optimizers are the same objects.

    `requires_grad` and the modes of all modules are restored, since torch-pruning makes every cut parameter trainable
    and leaves the model in eval mode. Anything else that holds the parameters (DDP, a moving average of the weights)
    has to be made anew.

    Args:
        model: Model that is pruned in place within the context, by any library that cuts by indexing.
        optimizers: Optimizers of some or all of the model's parameters, or accelerate's wrappers of them. They are
            changed in place at the end of the context, unless it ends with an error.

    Returns:
        A dictionary that is filled when the context ends: kept indices of each tensor whose shape changed, see
        `track_kept_indices`.

    Raises:
        InputTypeError: An optimizer that keeps parameters outside its groups (LBFGS, Lookahead, SAM).
        OptionError: An optimizer that holds none of the model's parameters.
        ShapeError: A state without one value for each entry (Adafactor), which cannot be cut.
        CaptureError: A weight of a new shape whose origin is unknown.

    Warns:
        KnowisoWarning: Nothing was pruned. `prune` returns a copy: use `transfer_optimizer_state` there.

    Examples:
        >>> import torch_pruning as tp
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [1])
        >>> with preserve_optimizer_state(model, optimizer) as kept:
        ...     group.prune()
        >>> optimizer.param_groups[0]["params"][0] is model[0].weight
        True
        >>> kept["0.bias"]
        [[0, 2]]
    """
    unwrapped = [_unwrap_optimizer(optimizer) for optimizer in optimizers]
    before = dict(unwrap_model(model).named_parameters(remove_duplicate=False))
    shapes = {name: parameter.shape for name, parameter in before.items()}
    trainable = {name: parameter.requires_grad for name, parameter in before.items()}
    modes = [(module, module.training) for module in unwrap_model(model).modules()]
    with track_kept_indices(model) as kept:
        yield kept
    if not kept:
        warnings.warn(
            "nothing was pruned within preserve_optimizer_state(): every tensor of the model has its former shape. "
            "After prune(), which returns a copy, call transfer_optimizer_state(optimizer, model, pruned.model, "
            "pruned.kept)",
            KnowisoWarning,
            stacklevel=3,
        )
    remap = ParameterRemap(before, unwrap_model(model), kept, shapes, trainable)
    # An error must occur before any optimizer is changed
    remapped = [(optimizer, *remap.remap_optimizer(optimizer)) for optimizer in unwrapped]
    remap.restore_requires_grad()
    for optimizer, groups, state in remapped:
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
    """Return a new optimizer for a pruned copy: same class, groups and hyperparameters, with the state cut alike.

    For a model that is pruned in place use `preserve_optimizer_state`, which keeps schedulers valid too. A scheduler of
    the old optimizer is moved by `scheduler.optimizer = new`.

    Args:
        optimizer: Optimizer of the original; not modified.
        original: Model before pruning. If it was pruned in place: `dict(model.named_parameters())` from before.
        pruned: Pruned model. Parameters that were frozen in the original are frozen again. A new parameter, such as a
            bias, joins the group of its layer's weight.
        kept: Kept indices of each tensor that was cut, from `prune` or `track_kept_indices`.

    Returns:
        The optimizer. Parameters of other modules, such as those of a loss, keep their state.

    Raises:
        InputTypeError: An optimizer that wraps another, or that keeps parameters outside its groups (LBFGS, Lookahead,
            SAM).
        OptionError: An optimizer that holds none of the original's parameters.
        ShapeError: `kept` does not lead from the original's shapes to the pruned ones, or a state without one value
            for each entry (Adafactor).

    Examples:
        >>> original = nn.Linear(4, 3)
        >>> optimizer = torch.optim.AdamW(original.parameters(), lr=0.1)
        >>> original(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> pruned = nn.Linear(4, 2)
        >>> new = transfer_optimizer_state(optimizer, original, pruned, {"weight": [[0, 2], None], "bias": [[0, 2]]})
        >>> new.state[pruned.weight]["exp_avg"].shape, new.param_groups[0]["lr"]
        (torch.Size([2, 4]), 0.1)
    """
    if _unwrap_optimizer(optimizer) is not optimizer:
        raise InputTypeError(
            f"{type(optimizer).__name__} wraps another optimizer. Pass the inner one, or use "
            "`with preserve_optimizer_state(model, optimizer):`"
        )
    if isinstance(original, nn.Module):
        before = dict(unwrap_model(original).named_parameters(remove_duplicate=False))
    else:
        before = dict(original)
    remap = ParameterRemap(before, unwrap_model(pruned), kept)
    groups, state = remap.remap_optimizer(optimizer)
    remap.restore_requires_grad()
    new = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        # A scheduler binds `step` of the instance to the old optimizer
        if name not in ("defaults", "step"):
            setattr(new, name, copy.copy(value))
    new.param_groups, new.state = groups, defaultdict(dict, state)
    return new


def _unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer within accelerate's wrapper.

    Raises:
        InputTypeError: Not an optimizer, or one that keeps parameters outside its groups.
    """
    if not isinstance(optimizer, Optimizer):
        raise InputTypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    for name, value in vars(optimizer).items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if name not in ("param_groups", "state", "defaults") and any(
            isinstance(entry, (nn.Parameter, Optimizer)) for entry in entries
        ):
            raise InputTypeError(
                f"{type(optimizer).__name__} keeps parameters or an optimizer of its own in {name!r}, which cannot be "
                "cut. Pass the inner optimizer, or make a new one after pruning"
            )
    return optimizer
