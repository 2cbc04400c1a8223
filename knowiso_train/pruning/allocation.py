"""How wide every channel group becomes: least harm for a given cost of the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import OptionError
from knowiso_train.pruning.cost import LayerCost

Costs = Mapping[str, LayerCost]


def total_cost(costs: Costs, gone: Mapping[str, int]) -> float:
    """Of all layers when so many units of each group are gone."""
    return sum(cost.at(gone) for cost in costs.values())


def allowed_widths(size: int, floor: float, round_to: int) -> list[int]:
    """Descending: the whole, and the multiples of `round_to` that are at least `floor` of it.

    Example:
        >>> allowed_widths(10, 0.25, 4)
        [10, 8, 4]
    """
    least = max(1, math.ceil(floor * size))
    return [size, *(width for width in range(size - 1, least - 1, -1) if width % round_to == 0)]


def allocate(
    harms: Mapping[str, Tensor], costs: Costs, target: float, *, floor: float = 0.125, round_to: int | Mapping[str, int] = 1
) -> dict[str, int]:
    """Widths of least harm at a cost of at most `target`.

    Step by step the group is narrowed that saves most for the harm it does, to the width where its ratio is best, costs counted at the widths that
    the others have by then. With convex harms and costs that add up this is the Lagrangian optimum.

    Args:
        harms: for each group (J + 1,), the harm of having w units left; never falling as w falls. Entry 0 is not used.
        costs: of every layer.
        target: in the unit of the costs.
        floor: least share of a group's units that stays.
        round_to: widths are multiples of it, or the whole; one number, or one for each group.

    Returns:
        Units that stay, for each group.

    Raises:
        OptionError: a target that cannot be reached.

    Example:
        >>> costs = {"a": LayerCost(1.0, 1, 8, {}, {"a": 1.0}), "b": LayerCost(1.0, 1, 8, {}, {"b": 1.0})}
        >>> harms = {"a": torch.arange(8.0, -1, -1), "b": 10 * torch.arange(8.0, -1, -1)}
        >>> allocate(harms, costs, 10.0)
        {'a': 2, 'b': 8}
    """
    widths = {name: len(harm) - 1 for name, harm in harms.items()}
    steps = round_to if isinstance(round_to, Mapping) else dict.fromkeys(widths, round_to)
    choices = {name: allowed_widths(width, floor, steps[name]) for name, width in widths.items()}
    sizes = dict(widths)
    least = total_cost(costs, {name: sizes[name] - choices[name][-1] for name in widths})
    if least > target:
        everything = total_cost(costs, {})
        raise OptionError(
            f"cannot reach a share of {target / everything:.3f} of the cost: with every group at its floor {least / everything:.3f} is left. "
            "Let a larger share stay, lower the floor or round_to, or ignore fewer layers"
        )
    touching = {name: [c for c in costs.values() if name in c.reads or name in c.writes] for name in widths}
    together = {name: {other for other in widths for c in touching[name] if other in c.reads or other in c.writes} for name in widths}
    now, gone = total_cost(costs, {}), dict.fromkeys(widths, 0)
    steepest: dict[str, tuple[Narrowing | None, float]] = {}  # and what one unit saves; they change when a group of a layer in common does
    while now > target:
        found: list[tuple[Narrowing, str]] = []
        for name, width in widths.items():
            if name not in steepest:
                each = _saved(touching[name], gone, name, 1)
                steepest[name] = _narrowing(harms[name], choices[name], width, each, math.inf), each
            best, each = steepest[name]
            if best is not None and (width - best.width) * each > now - target:  # perhaps less would do
                best = _narrowing(harms[name], choices[name], width, each, now - target)
            if best is not None:
                found.append((best, name))
        best, name = min(found, key=lambda pair: pair[0].slope)
        now -= _saved(touching[name], gone, name, widths[name] - best.width)
        gone[name] += widths[name] - best.width
        widths[name] = best.width
        for other in together[name]:
            steepest.pop(other, None)
    return widths


@dataclass(frozen=True)
class Narrowing:
    """To this width, and the harm it does for each unit of cost that it saves."""

    slope: float
    width: int


def _narrowing(harm: Tensor, choices: Sequence[int], width: int, each: float, enough: float) -> Narrowing | None:
    """The best one of a group, no narrower than it takes to save `enough`; None at the floor."""
    grid = torch.tensor([choice for choice in choices if choice < width])
    if not len(grid):
        return None
    saves = (width - grid) * max(each, 1e-30)
    if bool((saves >= enough).any()):
        grid = grid[: int((saves >= enough).float().argmax()) + 1]
    slopes = (harm[grid] - harm[width]) / saves[: len(grid)]
    at = int(slopes.argmin())
    return Narrowing(float(slopes[at]), int(grid[at]))


def _saved(costs: Sequence[LayerCost], gone: Mapping[str, int], name: str, units: int) -> float:
    return sum(cost.at(gone) - cost.at({**gone, name: gone[name] + units}) for cost in costs)
