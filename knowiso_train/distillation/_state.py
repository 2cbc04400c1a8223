"""Checks of the saved state of a loss before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from knowiso_train.errors import FormatError


def check_state(module: nn.Module, state: Any, strict: bool = True) -> None:
    """Check that a state is one of this module, before anything of it is loaded.

    Args:
        module: Module that is to load the state.
        state: Mapping from names to tensors.
        strict: Refuse missing and additional names too, and not only tensors of other shapes.

    Raises:
        FormatError: Other names or shapes.
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


def check_figures(given: Any, present: Tensor, num_old: int) -> None:
    """Check the number of figures that a loss saves beside its maps, before anything of the state is loaded.

    Args:
        given: Figures of the state. None: it has none.
        present: Figures of the loss that is to load them.
        num_old: Largest number of figures of older versions.

    Raises:
        FormatError: Figures of another number of layer pairs.
    """
    if isinstance(given, Tensor) and num_old < len(given) != len(present):
        raise FormatError(
            f"expected the state of a loss with the same layer pairs, which has {len(present)} figures beside those of "
            f"the maps, got {len(given)}. Create the loss with the layers of the saved one"
        )


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else type(value)
