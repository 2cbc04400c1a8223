"""How bench_prune.py chooses channels, and what may follow the choice."""

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
REFIT_FINISHES = ("refit", "blocks")  # by ki.refit, from the surviving original weights
BLOCK_STEPS = 60
OURS = "ki.prune"
ITERATIVE_STEPS = 5


@dataclass
class MethodContext:
    """One task, seed and ratio: what a method may look at."""

    task: Task
    seed: int
    ratio: float
    data: CalibrationData
    memory: dict[str, Any] = field(default_factory=dict)  # of the seed

    @property
    def batches(self) -> list[Tensor]:
        return list(self.data.images.split(self.task.batch))

    @property
    def target(self) -> float:
        return self.task.macs(self.task.original) / self.ratio

    def cutter(self, model: nn.Module, space: str = "inner") -> BudgetPruner:
        return BudgetPruner(model, self.task.example, self.task.macs, self.task.spaces[space])

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


@dataclass(frozen=True)
class Method:
    """How channels are chosen, and what may follow.

    Attributes:
        name: of the choice.
        cut: prunes the model in place.
        weights: sets weights of the consumers, before "bare" and "statistics"; a refit starts from the surviving
            original weights.
        finishes: that make sense.
    """

    name: str
    cut: Callable[[MethodContext, nn.Module], None]
    weights: Callable[[MethodContext, nn.Module], None] | None = None
    finishes: tuple[str, ...] = FINISHES


def isomorphism_importance(model: nn.Module, data: CalibrationData) -> Any:
    batches = list(data.images.split(64))
    return ki.IsomorphismImportance(model, batches, max_images=len(data.images), seed=data.seed, progress=False)


def importance_method(name: str, scope: str, steps: int, space: str) -> Method:
    prepare = IMPORTANCES.get(name, isomorphism_importance)

    def cut(setting: MethodContext, model: nn.Module) -> None:
        prune_with(setting.cutter(model, space), prepare, setting.data, setting.target, scope, steps)

    pace = "one-shot" if steps == 1 else "iterative"
    return Method(f"{name}, {scope}, {pace}" + ("" if space == "inner" else ", all channels"), cut)


def consumer_grams(setting: MethodContext, taps: bool) -> dict[str, Tensor]:
    """Gram matrices of what the consumers read in the original network."""
    original = setting.task.original
    consumers = list(consumers_of(setting).values())
    return setting.remembered(
        f"grams {taps}", lambda: input_grams(original, consumers, setting.batches, taps=taps, seed=setting.seed)
    )


def kept_channels(setting: MethodContext) -> dict[str, list[int]]:
    """Channels that are left of each root, from the record of the cut."""
    kept = setting.memory["kept"]
    widths = {name: setting.task.original.get_submodule(name).weight.shape[0] for name in setting.task.spaces["inner"]}
    return {name: (kept.get(f"{name}.weight") or [None])[0] or list(range(width)) for name, width in widths.items()}


def consumers_of(setting: MethodContext) -> dict[str, str]:
    return setting.remembered("consumers", lambda: setting.cutter(setting.task.original).consumers())


def set_consumer_weights(setting: MethodContext, model: nn.Module, of: Callable[[str, list[int]], Tensor]) -> None:
    """`of(root, kept)` gives the weights of the root's consumer; a consumer that is a root itself has lost outputs too."""
    kept, consumers = kept_channels(setting), consumers_of(setting)
    found = {name: of(root, kept[root]) for root, name in consumers.items()}
    set_weights(model, {name: weight[kept[name]] if name in kept else weight for name, weight in found.items()})


def set_grail_weights(setting: MethodContext, model: nn.Module) -> None:
    """Consumers' weights compensated by the ridge map from kept to all channels of the original network."""
    original, matrices, consumers = (
        setting.task.original,
        consumer_grams(setting, taps=False),
        consumers_of(setting),
    )
    set_consumer_weights(
        setting,
        model,
        lambda root, kept: grail_weights(
            original.get_submodule(consumers[root]).weight, matrices[consumers[root]], kept
        ),
    )


def osscar_regressions(setting: MethodContext) -> dict[str, OsscarRegression]:
    original, matrices = setting.task.original, consumer_grams(setting, taps=True)
    consumers = consumers_of(setting)
    return {
        root: OsscarRegression(original.get_submodule(name).weight, matrices[name]) for root, name in consumers.items()
    }


def uniform_widths(setting: MethodContext) -> dict[str, int]:
    """Of every root, by bisection on the share that goes."""
    task = setting.task
    widths = {name: task.original.get_submodule(name).weight.shape[0] for name in task.spaces["inner"]}

    def macs(kept: dict[str, int]) -> float:
        model = copy.deepcopy(task.original)
        setting.cutter(model).remove({name: list(range(width)) for name, width in kept.items()})
        return task.macs(model)

    low, high = 0.0, 1.0
    for _ in range(12):
        ratio = (low + high) / 2
        low, high = (low, ratio) if macs(scale_widths(widths, ratio)) <= setting.target else (ratio, high)
    return scale_widths(widths, high)


def recorded_widths(setting: MethodContext) -> dict[str, int]:
    key = f"widths {setting.ratio}"
    if key not in setting.memory:
        raise LookupError(f"there is no row of {OURS} at this ratio and seed to take widths from")
    return setting.memory[key]


def prune_by_osscar(
    widths: Callable[[MethodContext], dict[str, int]], setting: MethodContext, model: nn.Module
) -> None:
    """Channels by the local search, at given widths."""
    chosen = widths(setting)
    found = setting.remembered("problems", lambda: osscar_regressions(setting))
    setting.cutter(model).remove({root: found[root].search(chosen[root]) for root in found})


def set_osscar_weights(setting: MethodContext, model: nn.Module) -> None:
    """The closed form on the original network's inputs."""
    found = setting.remembered("problems", lambda: osscar_regressions(setting))
    set_consumer_weights(setting, model, lambda root, kept: found[root].weights(kept))


def baseline_methods(task: Task) -> list[Method]:
    """All that is screened, ours inside of torch-pruning's pruners too."""
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
