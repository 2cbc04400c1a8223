"""Networks with hooks under copying, pickling, scripting, tracing and export: as without hooks, or a named error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import FeatureTaps, IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.errors import CaptureError, KnowisoError, ScriptError


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def taps(model: nn.Module) -> Iterator[None]:
    with FeatureTaps(model, ["1", "3"], at={"3": "input"}):
        yield


@contextmanager
def loss(model: nn.Module) -> Iterator[None]:
    with IsomorphismLoss(model, network(2), {"1": "1"}) as iso:
        model(images())
        iso()
        yield


@contextmanager
def monitor(model: nn.Module) -> Iterator[None]:
    with IsomorphismLoss(model, network(2), {"1": "1"}) as iso:
        IsomorphismCallback.of(iso, [images(100)]).measure()
        yield


def torch_saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "torch.save": torch_saved,
    "trace": lambda model: torch.jit.trace(model, images()),
    "export": lambda model: torch.export.export(model, (images(),)).module(),
    "fx": torch.fx.symbolic_trace,
}
with_hooks = pytest.mark.parametrize("hooked", [taps, loss, monitor])


@with_hooks
@pytest.mark.parametrize("kind", list(COPIES))
def test_copies_compute_what_the_network_computes(hooked: Any, kind: str) -> None:
    model = network(1).eval()
    expected = model(images())
    with hooked(model):
        copied = COPIES[kind](model)
        assert torch.equal(copied(images()), expected)
        # A graph of torch.fx shares the layers and their hooks
        if kind != "fx":
            with FeatureTaps(model, "1") as captured:
                copied(images())
                with pytest.raises(CaptureError, match="never fired"):
                    captured.collect()
    assert torch.equal(copied(images()), expected)


@with_hooks
def test_a_pickled_network_does_not_need_this_library(hooked: Any) -> None:
    with hooked(model := network(1)):
        assert b"knowiso" not in pickle.dumps(model)


@with_hooks
def test_scripting_is_refused_with_hooks_and_works_without(hooked: Any) -> None:
    model = network(1).eval()
    with hooked(model):
        with pytest.raises(ScriptError, match=r"torch.jit.script .* Leave the `with` block"):
            torch.jit.script(model)
        with pytest.raises(ScriptError, match=r"or a copy of one\. .* before copy.deepcopy"):
            torch.jit.script(copy.deepcopy(model))
    assert torch.equal(torch.jit.script(model)(images()), model(images()))
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(images()), model(images()))


@pytest.mark.parametrize(
    "compiled",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model, images()),
        lambda model: nn.ModuleList([torch.jit.script(model)])[0],
    ],
    ids=["script", "trace", "inside"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: FeatureTaps(model, "1").attach(),
        lambda model: IsomorphismLoss(model, network(2), {"1": "1"}),
        lambda model: IsomorphismLoss(network(2), model, {"1": "1"}),
        lambda model: measure(network(2), model, [images(100)], {"1": "1"}, progress=False),
    ],
    ids=["taps", "student", "teacher", "measure"],
)
def test_layers_of_compiled_networks_are_refused(compiled: Any, use: Any) -> None:
    with pytest.raises(KnowisoError, match=r"layer '1' is compiled by torch.jit .* before torch.jit.script"):
        use(compiled(network(1).eval()))


def test_a_network_with_a_compiled_part_is_tapped_around_it() -> None:
    model = nn.Sequential(torch.jit.script(network(1)), nn.Tanh())
    with FeatureTaps(model, "1") as captured:
        assert torch.equal(model(images()), captured.collect()["1"])


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copied_monitor_measures_the_same(kind: str) -> None:
    with IsomorphismLoss(network(1), network(2), {"1": "1"}) as iso:
        callback = IsomorphismCallback.of(iso, [images(100)])
        copied: Any = COPIES[kind](callback)
        assert copied.measure()["1"].explained == callback.measure()["1"].explained
        assert copied.iso is not iso
        assert not copied.iso.attached
