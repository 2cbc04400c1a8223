"""How wide every channel group becomes: least harm for a given cost of the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
            f"cannot reach {target / everything:.3f} of the cost: with every group at its floor {least / everything:.3f} is left. "
            "Ask for less, lower the floor or round_to, or ignore fewer layers"
        )
    grids = {name: torch.tensor(options) for name, options in choices.items()}
    touching = {name: [c for c in costs.values() if name in c.reads or name in c.writes] for name in widths}
    now = total_cost(costs, {})
    while now > target:
        gone = {name: sizes[name] - width for name, width in widths.items()}
        best = math.inf, "", 0
        for name, width in widths.items():
            grid = grids[name][grids[name] < width]
            if not len(grid):
                continue
            each = _saved(touching[name], gone, name, 1)
            enough = (width - grid) * each >= now - target
            grid = grid[: int(enough.float().argmax()) + 1] if bool(enough.any()) else grid  # narrower still would save more than is asked for
            slopes = (harms[name][grid] - harms[name][width]) / ((width - grid) * max(each, 1e-30))
            at = int(slopes.argmin())
            if float(slopes[at]) < best[0]:
                best = float(slopes[at]), name, int(grid[at])
        _, name, narrower = best
        now -= _saved(touching[name], gone, name, widths[name] - narrower)
        widths[name] = narrower
    return widths


def _saved(costs: Sequence[LayerCost], gone: Mapping[str, int], name: str, units: int) -> float:
    return sum(cost.at(gone) - cost.at({**gone, name: gone[name] + units}) for cost in costs)
