"""Checks of the saved state of a loss before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from knowiso_train.errors import FormatError


def check_state(module: nn.Module, state: Any, strict: bool, num_old_figures: int) -> None:
    """Check that a state is one of this module, before anything of it is loaded.

    Args:
        module: Module that is to load the state, whose extra state is a vector of figures.
        state: Mapping from names to tensors.
        strict: Refuse missing and additional names too, and not only tensors of other shapes.
        num_old_figures: Largest number of figures of older versions.

    Raises:
        FormatError: Other names or shapes, or figures of another number of layer pairs.
    """
    expected, given = module.state_dict(), state if isinstance(state, Mapping) else {}
    names = [name for name in {**expected, **given} if (name in expected and name in given) or strict]
    # Extra states grow from version to version
    wrong = [
        name
        for name in names
        if _shape(expected.get(name)) != _shape(given.get(name))
        and not (name.endswith("_extra_state") and isinstance(given.get(name), Tensor))
    ]
    if wrong or not isinstance(state, Mapping):
        fixed = any(name.startswith("balance.") and name not in given for name in wrong)
        hint = ". A state without balanced weights was saved with a fixed one: give that as weight=" if fixed else ""
        raise FormatError(
            f"expected the state of this {type(module).__name__}, got {type(state).__name__} with other entries "
            f"{wrong[:3]}. Create it with the options of the saved one; accelerate restores objects in the order of "
            f"register_for_checkpointing, which must be that of the saved run{hint}"
        )
    figures, num_figures = given.get("_extra_state"), len(expected["_extra_state"])
    if isinstance(figures, Tensor) and num_old_figures < len(figures) != num_figures:
        raise FormatError(
            f"expected the state of a loss with the same layer pairs, which has {num_figures} figures beside those of "
            f"the maps, got {len(figures)}. Create the loss with the layers of the saved one"
        )


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else type(value)
