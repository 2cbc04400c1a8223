"""Devices are checked before a network is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import KnowisoError, OptionError
from knowiso_train.experiment.processes import Processes
from knowiso_train.features import checked_device, on_device

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def run_refine(model: nn.Module, twin: nn.Module, device: Any) -> None:
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(48) % 4), 16)
    ki.refine(model, [twin], loader, validation=loader, progress=False, device=device)


def run_in_context(model: nn.Module, twin: nn.Module, device: Any) -> None:
    with on_device(device, model, twin):
        pass


CALLS: dict[str, Callable[[nn.Module, nn.Module, Any], Any]] = {
    "measure": lambda m, t, device: ki.measure(m, t, [IMAGES], "0", order=0, progress=False, device=device),
    "refine": run_refine,
    "context": run_in_context,
}
UNUSABLE = ["meta", torch.device("meta"), 1.5, True, torch.float64, "nowhere", "cuda:99", "", [0], -1]


WITHOUT_DATA: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "measure, source": lambda model, other: ki.measure(model, other, [IMAGES], "0", order=0, progress=False),
    "measure, target": lambda model, other: ki.measure(other, model, [IMAGES], "0", order=0, progress=False),
    "callback": lambda model, other: ki.IsomorphismCallback(model, other, [IMAGES], "0", every=1, order=0).step(),
    "teacher": lambda model, other: ki.IsomorphismLoss(other, model, "0"),
    "peer": lambda model, other: ki.IsomorphismLoss(other, network(3), "0", target="consensus", peers=[model]),
    "refine": lambda model, other: run_refine(other, model, None),
    "prune": lambda model, other: ki.prune(model, [IMAGES], progress=False),
    "images": lambda model, other: ki.prune(other, [IMAGES.to("meta")], progress=False),
}


@pytest.mark.parametrize("call", WITHOUT_DATA)
def test_networks_and_images_on_the_meta_device_are_refused(call: str) -> None:
    with pytest.raises(KnowisoError, match="meta device"):
        WITHOUT_DATA[call](network(1).to("meta"), network(2))


@pytest.mark.parametrize("device", UNUSABLE, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_unusable_devices_raise_before_a_network_is_moved(call: str, device: Any) -> None:
    networks = network(0), network(1)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in networks]
    with pytest.raises(OptionError, match="device"):
        CALLS[call](*networks, device)
    for model, state in zip(networks, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor, state[name])


def test_a_network_on_the_meta_device_stays_there() -> None:
    layer = nn.Linear(2, 2, device="meta")
    with on_device("meta", layer):
        assert layer.weight.is_meta
    with pytest.raises(OptionError, match="discard"), on_device("meta", layer, nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("device", ["meta", "nowhere"])
def test_unusable_devices_of_a_run_raise(device: str) -> None:
    with pytest.raises(OptionError, match="device"):
        Processes(device)


def test_usable_devices_are_returned() -> None:
    assert checked_device(None) is None
    assert checked_device("cpu") == checked_device(torch.device("cpu")) == torch.device("cpu")
