"""An interrupt at any forward pass leaves networks as they were."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import KnowisoError
from tests.fuzz.calls import INTERRUPTED_TARGETS, Call, Interrupted, calls, loader
from tests.fuzz.fuzzer import differences, snapshot

MAX_INTERRUPTS = 10  # of each function


class Residual(nn.Module):
    """A residual block with an inner width that can be pruned, and a layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv1, self.layer, self.conv2 = nn.Conv2d(6, 12, 3, padding=1), layer, nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.layer(self.conv1(x)).relu())


def call_of(target: str, layer: Interrupted) -> Call:
    """Return a valid call of a function, whose networks contain the layer."""
    name, _, blocks = target.partition(", ")
    if not blocks:
        return calls(layer)[name]()
    stem, head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
    model = nn.Sequential(stem, Residual(layer), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    options: dict[str, Any] = {"loader": loader(), "progress": False}
    if name == "prune":
        return Call(ki.prune, {"model": model, "macs": 0.7, "block_steps": 2, **options}, [model])
    pruned = ki.prune(model, macs=0.7, refit=False, **options).model
    arguments = {"pruned": pruned, "original": model, "block_steps": 2, **options}
    return Call(ki.refit, arguments, [model], [pruned])


@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
@pytest.mark.parametrize("target", [*INTERRUPTED_TARGETS, "prune, blocks", "refit, blocks"])
def test_interrupted_call_leaves_networks_as_they_were(target: str) -> None:
    layer = Interrupted(KeyboardInterrupt)
    call = call_of(target, layer)
    made = layer.forwards.total
    call.function(**call.arguments)
    count = layer.forwards.total - made
    assert count
    step = max(1, count // MAX_INTERRUPTS)
    for after in range(0, count, step):
        error = (KeyboardInterrupt, MemoryError)[after // step % 2]
        layer = Interrupted(error)
        call = call_of(target, layer)
        layer.forwards.left = after
        models = [*call.untouched, *call.changed]
        before = snapshot(models)
        # Tracing reports whatever the network raises, except an interrupt
        with pytest.raises(error if error is KeyboardInterrupt else (error, KnowisoError)):
            call.function(**call.arguments)
        assert differences(before, snapshot(models), models) == [], f"at forward {after} of {count}"
