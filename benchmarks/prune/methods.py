"""Channel selection methods of bench_prune.py, and the finishes that follow them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.baselines.grail_osscar import OsscarRegression, grail_weights, input_grams, set_weights
from benchmarks.baselines.tp_importances import IMPORTANCES, CalibrationData, prune_with
from benchmarks.baselines.tp_pruner import BudgetPruner, scale_widths
from benchmarks.prune.tasks import Task

FINISHES = ("bare", "statistics", "refit", "blocks")
REFIT_FINISHES = ("refit", "blocks")  # these call ki.refit, from the surviving original weights
BLOCK_STEPS = 60
OURS = "ki.prune"
ITERATIVE_STEPS = 5


@dataclass
class MethodContext:
    """Task, seed, ratio and data that a method may use."""

    task: Task
    seed: int
    ratio: float
    data: CalibrationData
    memory: dict[str, Any] = field(default_factory=dict)  # shared by the methods of a seed

    @property
    def batches(self) -> list[Tensor]:
        return list(self.data.images.split(self.task.batch))

    @property
    def target(self) -> float:
        return self.task.macs(self.task.original) / self.ratio

    def pruner(self, model: nn.Module, space: str = "inner") -> BudgetPruner:
        return BudgetPruner(model, self.task.example, self.task.macs, self.task.spaces[space])

    def cached(self, key: str, make: Callable[[], Any]) -> Any:
        """Return a cached value; compute it at first use."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


@dataclass(frozen=True)
class Method:
    """Channel selection method.

    Attributes:
        name: Name of the method.
        cut: Function that prunes the model in place.
        weights: Function that sets the consumers' weights, before "bare" and "statistics". A refit starts from the
            surviving original weights instead.
        finishes: Finishes that apply.
    """

    name: str
    cut: Callable[[MethodContext, nn.Module], None]
    weights: Callable[[MethodContext, nn.Module], None] | None = None
    finishes: tuple[str, ...] = FINISHES


def isomorphism_importance(model: nn.Module, data: CalibrationData) -> Any:
    """Prepare the importance of the library."""
    batches = list(data.images.split(64))
    return ki.IsomorphismImportance(model, batches, max_images=len(data.images), seed=data.seed, progress=False)


def importance_method(name: str, scope: str, steps: int, space: str) -> Method:
    """Return the method that prunes by an importance."""
    prepare = IMPORTANCES.get(name, isomorphism_importance)

    def cut(context: MethodContext, model: nn.Module) -> None:
        prune_with(context.pruner(model, space), prepare, context.data, context.target, scope, steps)

    pace = "one-shot" if steps == 1 else "iterative"
    return Method(f"{name}, {scope}, {pace}" + ("" if space == "inner" else ", all channels"), cut)


def consumer_grams(context: MethodContext, taps: bool) -> dict[str, Tensor]:
    """Return the Gram matrices of the consumers' inputs in the original network."""
    original = context.task.original
    consumers = list(consumers_of(context).values())
    return context.cached(
        f"grams {taps}", lambda: input_grams(original, consumers, context.batches, taps=taps, seed=context.seed)
    )


def kept_channels(context: MethodContext) -> dict[str, list[int]]:
    """Return the kept channels of each root layer, from the record of the cut."""
    kept = context.memory["kept"]
    widths = {name: context.task.original.get_submodule(name).weight.shape[0] for name in context.task.spaces["inner"]}
    return {name: (kept.get(f"{name}.weight") or [None])[0] or list(range(width)) for name, width in widths.items()}


def consumers_of(context: MethodContext) -> dict[str, str]:
    return context.cached("consumers", lambda: context.pruner(context.task.original).consumers())


def set_consumer_weights(
    context: MethodContext, model: nn.Module, compute_weight: Callable[[str, list[int]], Tensor]
) -> None:
    """Set the weights of all consumers.

    Args:
        context: Context of the method.
        model: Pruned model.
        compute_weight: Function of a root and its kept channels that returns the weight of the root's consumer. A
            consumer that is itself a root has lost outputs too.
    """
    kept, consumers = kept_channels(context), consumers_of(context)
    weights = {name: compute_weight(root, kept[root]) for root, name in consumers.items()}
    set_weights(model, {name: weight[kept[name]] if name in kept else weight for name, weight in weights.items()})


def set_grail_weights(context: MethodContext, model: nn.Module) -> None:
    """Compensate the consumers' weights by GRAIL's ridge map from the kept to all channels."""
    original, matrices, consumers = (
        context.task.original,
        consumer_grams(context, taps=False),
        consumers_of(context),
    )
    set_consumer_weights(
        context,
        model,
        lambda root, kept: grail_weights(
            original.get_submodule(consumers[root]).weight, matrices[consumers[root]], kept
        ),
    )


def osscar_regressions(context: MethodContext) -> dict[str, OsscarRegression]:
    """Return the regression of each root's consumer."""
    original, matrices = context.task.original, consumer_grams(context, taps=True)
    consumers = consumers_of(context)
    return {
        root: OsscarRegression(original.get_submodule(name).weight, matrices[name]) for root, name in consumers.items()
    }


def uniform_widths(context: MethodContext) -> dict[str, int]:
    """Return widths of all roots for the ratio, by bisection on a common factor."""
    task = context.task
    widths = {name: task.original.get_submodule(name).weight.shape[0] for name in task.spaces["inner"]}

    def macs(kept: dict[str, int]) -> float:
        model = copy.deepcopy(task.original)
        context.pruner(model).remove({name: list(range(width)) for name, width in kept.items()})
        return task.macs(model)

    low, high = 0.0, 1.0
    for _ in range(12):
        ratio = (low + high) / 2
        low, high = (low, ratio) if macs(scale_widths(widths, ratio)) <= context.target else (ratio, high)
    return scale_widths(widths, high)


def recorded_widths(context: MethodContext) -> dict[str, int]:
    """Return the widths that ki.prune chose at this ratio and seed."""
    key = f"widths {context.ratio}"
    if key not in context.memory:
        raise LookupError(f"no widths at this ratio and seed: expected a row of {OURS}; run it first")
    return context.memory[key]


def prune_by_osscar(
    widths: Callable[[MethodContext], dict[str, int]], context: MethodContext, model: nn.Module
) -> None:
    """Prune to given widths; channels are chosen by the local search."""
    target_widths = widths(context)
    regressions = context.cached("regressions", lambda: osscar_regressions(context))
    context.pruner(model).remove({root: regressions[root].search(target_widths[root]) for root in regressions})


def set_osscar_weights(context: MethodContext, model: nn.Module) -> None:
    """Set the closed-form weights for the inputs of the original network."""
    regressions = context.cached("regressions", lambda: osscar_regressions(context))
    set_consumer_weights(context, model, lambda root, kept: regressions[root].weights(kept))


def baseline_methods(task: Task) -> list[Method]:
    """Return all screened methods, including the library's importance in torch-pruning's pruners."""
    grid = [
        (name, scope, steps, space)
        for space in task.spaces
        for name in [*task.importances(), "Isomorphism"]
        for scope in ("local", "global")
        for steps in (1, ITERATIVE_STEPS)
        if name != "Random" or steps == 1
    ]
    closed = [
        Method("GRAIL", importance_method("L2", "local", 1, "inner").cut, set_grail_weights, ("bare", "statistics")),
        Method("OSSCAR", partial(prune_by_osscar, uniform_widths), set_osscar_weights),
        Method(f"OSSCAR, {OURS}'s widths", partial(prune_by_osscar, recorded_widths), set_osscar_weights),
    ]
    return closed + [importance_method(*point) for point in grid]
