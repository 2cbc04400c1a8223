"""Which parameter takes the place of which, and what of an optimiser's state it inherits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowiso_train.errors import KnowisoWarning, OptionError, ShapeError
from knowiso_train.pruning.twin import Kept, take


class Heirs:
    """The pruned network's parameters as successors of the original's.

    Args:
        before: the original's parameters by name, the objects that its optimisers hold.
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
        kept: Mapping[str, Kept],
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
                f"pruning added {', '.join(lost)} beside no weight of the original, so no optimiser gets them; use add_param_group",
                KnowisoWarning,
                stacklevel=4,
            )

    def inherit(self, optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
        """Parameter groups and state for the pruned network; neither network nor optimiser is changed."""
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
                return take(value, self.kept[name])
            if value.numel() == 1:
                return value.detach().clone()
            raise ShapeError(
                f"the optimiser's state of {name!r} holds a tensor of shape {tuple(value.shape)}, expected {tuple(self.shapes[name])} or one number: "
                "it has no value for each entry and cannot be cut. Make a new optimiser after pruning"
            )
        if isinstance(value, dict):
            return {key: self._cut(entry, name) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._cut(entry, name) for entry in value])
        return copy.deepcopy(value)

    def _check(self, name: str, new: Tensor) -> None:
        shape = self.shapes[name]
        expected = take(torch.empty(()).expand(shape), self.kept[name]).shape if name in self.kept else shape
        if expected != new.shape:
            raise ShapeError(
                f"{name!r} has shape {tuple(shape)} in the original and {tuple(new.shape)} in the pruned network, but by `kept` it would be "
                f"{tuple(expected)}. Where a network was pruned in place, pass its named_parameters() from before as the original"
            )


def _sibling(name: str) -> str:
    """The weight of the same layer."""
    return ".".join([*name.split(".")[:-1], "weight"])
