"""Valid calls of the public functions on small networks."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import knowiso_train as ki

SIDE, IMAGES, BATCH = 8, 60, 20
SHORT = {"solver_options": {"epochs": 1}}  # training of orders above 0


@dataclass
class Call:
    """A function with valid arguments, the networks that it may not change, and those that it changes in place."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    untouched: list[nn.Module] = field(default_factory=list)
    changed: list[nn.Module] = field(default_factory=list)


class Countdown:
    """Number of forwards until an error, which copies of a network share."""

    def __init__(self) -> None:
        self.left: float = math.inf
        self.total = 0

    def __deepcopy__(self, memo: Any) -> Countdown:
        return self


class Interrupted(nn.Module):
    """A layer that raises after a number of forwards of itself and its copies."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.forwards = error, Countdown()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.left -= 1
        self.forwards.total += 1
        if self.forwards.left < 0:
            raise self.error("interrupted")
        return x


def network(seed: int = 0, extra: nn.Module | None = None) -> nn.Sequential:
    """Return a small convolutional classifier with batch norm and buffers."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        extra or nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def loader(labels: bool = False) -> list[Any]:
    """Return batches of noise images, optionally with labels."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator).split(BATCH)
    numbers = torch.arange(IMAGES).remainder(4).split(BATCH)
    return list(zip(images, numbers, strict=True)) if labels else list(images)


def pruned_pair(extra: nn.Module | None = None) -> tuple[nn.Sequential, Any]:
    """Return a network, and itself with some of its inner width removed, whose weights are not refitted."""
    if extra is None:
        return copy.deepcopy(plain_pair())
    original = network(0, extra)
    return original, ki.prune(original, loader(), macs=0.6, refit=False, progress=False).model


@functools.cache
def plain_pair() -> tuple[nn.Sequential, Any]:
    """Return such a pair without another layer, made once."""
    return pruned_pair(nn.ReLU())


def prune_by_importance(**options: Any) -> None:
    """Build an importance, and prune with its scores."""
    importance = ki.IsomorphismImportance(**options)
    ki.prune(options["model"], loader(), macs=0.7, importance=importance, refit=False, progress=False)


def loss_step(**options: Any) -> None:
    """Build a loss, and take one step with it."""
    iso = ki.IsomorphismLoss(**options)
    with iso:
        loss = options["student"](loader()[0][:4]).square().mean() + iso()
        loss.backward()
    options["student"].zero_grad()


def calls(extra: nn.Module | None = None) -> dict[str, Callable[[], Call]]:
    """Return makers of a valid call for every public function."""

    def measure() -> Call:
        a, b = network(1, extra), network(2)
        given = {"source": a, "target": b, "loader": loader(), "layers": ["2", "5"], "order": 0, "progress": False}
        return Call(ki.measure, given | SHORT, [a, b])

    def diagnose() -> Call:
        a, b = network(1, extra), network(2)
        given = {"weak": a, "strong": b, "loader": loader(labels=True), "layers": ["2", "5"], "num_directions": 2}
        return Call(ki.diagnose, given | {"progress": False}, [a, b])

    def stability() -> Call:
        a, b = network(1, extra), network(2)
        given = {"networks": {"a": a, "b": b}, "loader": loader(labels=True), "layers": ["2", "5"]}
        return Call(ki.stability, given | {"progress": False}, [a, b])

    def loss() -> Call:
        a, b = network(1, extra).train(), network(2)
        return Call(loss_step, {"student": a, "teacher": b, "layers": ["2", "5"]}, [b])

    def prune() -> Call:
        model = network(1, extra)
        return Call(ki.prune, {"model": model, "loader": loader(), "macs": 0.7, "progress": False}, [model])

    def refit() -> Call:
        original, pruned = pruned_pair(extra)
        given = {"pruned": pruned, "original": original, "loader": loader(), "progress": False}
        return Call(ki.refit, given, [original], [pruned])

    def finetune() -> Call:
        original, pruned = pruned_pair(extra)
        given = {"pruned": pruned, "original": original, "loader": loader(), "steps": 2, "batch_size": 16}
        return Call(ki.finetune, given | {"progress": False}, [original], [pruned])

    def refine() -> Call:
        a, b = network(1, extra), network(2)
        given = {"model": a, "peers": [b], "loader": loader(), "labeled": loader(True), "validation": loader(True)}
        return Call(ki.refine, given | {"keep_all_peers": True, "progress": False}, [a, b])

    def importance() -> Call:
        model = network(1, extra)
        return Call(prune_by_importance, {"model": model, "loader": loader(), "progress": False}, [model])

    def taps() -> Call:
        model = network(1, extra)
        return Call(ki.FeatureTaps, {"model": model, "layers": ["2"]}, [model])

    def disentangler() -> Call:
        x, y = torch.randn(40, 6, 4, 4), torch.randn(40, 8, 4, 4)
        return Call(lambda **options: ki.Disentangler(**options).fit(x, y), {"order": 0} | SHORT, [])

    def callback() -> Call:
        a, b = network(1, extra), network(2)
        given = {"student": a, "teacher": b, "layers": ["2"], "loader": loader(), "every": 1, "order": 0}
        return Call(lambda **options: ki.IsomorphismCallback(**options).step(), given | SHORT, [a, b])

    return {
        "measure": measure,
        "diagnose": diagnose,
        "stability": stability,
        "loss": loss,
        "prune": prune,
        "refit": refit,
        "finetune": finetune,
        "refine": refine,
        "importance": importance,
        "taps": taps,
        "disentangler": disentangler,
        "callback": callback,
    }


CLASSES = {
    "loss": ki.IsomorphismLoss,
    "disentangler": ki.Disentangler,
    "callback": ki.IsomorphismCallback,
    "importance": ki.IsomorphismImportance,
}


# Functions that run the networks that they are given
INTERRUPTED_TARGETS = (
    "measure",
    "diagnose",
    "stability",
    "loss",
    "prune",
    "refit",
    "finetune",
    "refine",
    "importance",
    "callback",
)
