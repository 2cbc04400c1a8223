"""How bench_prune.py chooses channels, and what may follow the choice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.baselines.grail_osscar import Regression, grams, mixed, set_weights
from benchmarks.baselines.tp_importances import IMPORTANCES, Calibration, prune_with
from benchmarks.baselines.tp_pruner import Cutter, uniform
from benchmarks.prune.tasks import Task

FINISHES = ("bare", "statistics", "refit", "blocks")
SOLVED = ("refit", "blocks")  # by ki.refit, from the surviving original weights
BLOCK_STEPS = 60
OURS = "ki.prune"
STEPS = 5


@dataclass
class Setting:
    """One task, seed and ratio: what a method may look at."""

    task: Task
    seed: int
    ratio: float
    data: Calibration
    memory: dict[str, Any] = field(default_factory=dict)  # of the seed

    @property
    def batches(self) -> list[Tensor]:
        return list(self.data.images.split(self.task.batch))

    @property
    def target(self) -> float:
        return self.task.macs(self.task.original) / self.ratio

    def cutter(self, model: nn.Module, space: str = "inner") -> Cutter:
        return Cutter(model, self.task.example, self.task.macs, self.task.spaces[space])

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
    cut: Callable[[Setting, nn.Module], None]
    weights: Callable[[Setting, nn.Module], None] | None = None
    finishes: tuple[str, ...] = FINISHES


def isomorphism(model: nn.Module, data: Calibration) -> Any:
    batches = list(data.images.split(64))
    return ki.IsomorphismImportance(model, batches, max_images=len(data.images), seed=data.seed, progress=False)


def by_importance(name: str, scope: str, steps: int, space: str) -> Method:
    prepare = IMPORTANCES.get(name, isomorphism)

    def cut(setting: Setting, model: nn.Module) -> None:
        prune_with(setting.cutter(model, space), prepare, setting.data, setting.target, scope, steps)

    pace = "one-shot" if steps == 1 else "iterative"
    return Method(f"{name}, {scope}, {pace}" + ("" if space == "inner" else ", all channels"), cut)


def inputs_of_consumers(setting: Setting, taps: bool) -> dict[str, Tensor]:
    """Gram matrices of what the consumers read in the original network."""
    original = setting.task.original
    consumers = list(consumers_of(setting).values())
    return setting.remembered(
        f"grams {taps}", lambda: grams(original, consumers, setting.batches, taps=taps, seed=setting.seed)
    )


def survivors(setting: Setting) -> dict[str, list[int]]:
    """Channels that are left of each root, from the record of the cut."""
    kept = setting.memory["kept"]
    widths = {name: setting.task.original.get_submodule(name).weight.shape[0] for name in setting.task.spaces["inner"]}
    return {name: (kept.get(f"{name}.weight") or [None])[0] or list(range(width)) for name, width in widths.items()}


def consumers_of(setting: Setting) -> dict[str, str]:
    return setting.remembered("consumers", lambda: setting.cutter(setting.task.original).consumers())


def set_consumers(setting: Setting, model: nn.Module, of: Callable[[str, list[int]], Tensor]) -> None:
    """`of(root, kept)` gives the weights of the root's consumer; a consumer that is a root itself has lost outputs too."""
    kept, consumers = survivors(setting), consumers_of(setting)
    found = {name: of(root, kept[root]) for root, name in consumers.items()}
    set_weights(model, {name: weight[kept[name]] if name in kept else weight for name, weight in found.items()})


def grail(setting: Setting, model: nn.Module) -> None:
    """Consumers' weights compensated by the ridge map from kept to all channels of the original network."""
    original, matrices, consumers = (
        setting.task.original,
        inputs_of_consumers(setting, taps=False),
        consumers_of(setting),
    )
    set_consumers(
        setting,
        model,
        lambda root, kept: mixed(original.get_submodule(consumers[root]).weight, matrices[consumers[root]], kept),
    )


def problems(setting: Setting) -> dict[str, Regression]:
    original, matrices = setting.task.original, inputs_of_consumers(setting, taps=True)
    consumers = consumers_of(setting)
    return {root: Regression(original.get_submodule(name).weight, matrices[name]) for root, name in consumers.items()}


def uniform_widths(setting: Setting) -> dict[str, int]:
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
        low, high = (low, ratio) if macs(uniform(widths, ratio)) <= setting.target else (ratio, high)
    return uniform(widths, high)


def our_widths(setting: Setting) -> dict[str, int]:
    key = f"widths {setting.ratio}"
    if key not in setting.memory:
        raise LookupError(f"there is no row of {OURS} at this ratio and seed to take widths from")
    return setting.memory[key]


def osscar(widths: Callable[[Setting], dict[str, int]], setting: Setting, model: nn.Module) -> None:
    """Channels by the local search, at given widths."""
    chosen = widths(setting)
    found = setting.remembered("problems", lambda: problems(setting))
    setting.cutter(model).remove({root: found[root].search(chosen[root]) for root in found})


def osscar_weights(setting: Setting, model: nn.Module) -> None:
    """The closed form on the original network's inputs."""
    found = setting.remembered("problems", lambda: problems(setting))
    set_consumers(setting, model, lambda root, kept: found[root].weights(kept))


def rivals(task: Task) -> list[Method]:
    """All that is screened, ours inside of torch-pruning's pruners too."""
    grid = [
        (name, scope, steps, space)
        for space in task.spaces
        for name in [*task.importances(), "Isomorphism"]
        for scope in ("local", "global")
        for steps in (1, STEPS)
        if name != "Random" or steps == 1
    ]
    closed = [
        Method("GRAIL", by_importance("L2", "local", 1, "inner").cut, grail, ("bare", "statistics")),
        Method("OSSCAR", partial(osscar, uniform_widths), osscar_weights),
        Method(f"OSSCAR, {OURS}'s widths", partial(osscar, our_widths), osscar_weights),
    ]
    return closed + [by_importance(*point) for point in grid]
