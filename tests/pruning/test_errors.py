"""Errors of `ki.prune`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import DataError, InputTypeError, NonFiniteError, OptionError
from tests.helpers.prune_models import chain, little


def test_an_architecture_that_cannot_be_pruned_raises_and_is_not_modified() -> None:
    options = {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 3}
    model = timm.create_model("eva02_tiny_patch14_224", **options).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=type(model).__name__):
        little(model, torch.randn(1, 3, 28, 28))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_without_prunable_groups_raises() -> None:
    model, images = chain()
    with pytest.raises(OptionError, match="nothing to prune"):
        ki.prune(model, [images], ignored=["conv1", "conv2"], progress=False)
    with pytest.raises(OptionError, match="nothing to prune"):
        ki.prune(nn.Sequential(nn.Flatten(), nn.Linear(300, 3)), [images], progress=False)


@pytest.mark.parametrize(
    ("layer", "axes"), [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2)]
)
def test_convolutions_that_are_not_pruned_are_named(layer: Any, axes: int) -> None:
    model = nn.Sequential(layer(3, 8, 3), nn.ReLU(), layer(8, 4, 3))
    with pytest.raises(OptionError, match=rf"nothing to prune.*other than Conv2d and Linear \({layer.__name__}\)"):
        ki.prune(model, [torch.randn(8, 3, *[6] * axes)], progress=False)


def test_arguments_out_of_range_raise() -> None:
    model, images = chain()
    with pytest.raises(OptionError, match="one budget"):
        ki.prune(model, [images], macs=0.5, params=0.5)
    for wrong in (
        {"macs": 1.2},
        {"params": 0.0},
        {"min_width": 0.0},
        {"round_to": 0},
        {"rows": 0},
        {"ridge": -1.0},
        {"importance": "l7"},
    ):
        with pytest.raises(OptionError):
            ki.prune(model, [images], progress=False, **wrong)
    with pytest.raises(OptionError, match="cannot reach"):
        ki.prune(model, [images], macs=0.05, min_width=0.5, progress=False)
    with pytest.raises(OptionError, match="no modules"):
        ki.prune(model, [images], ignored=["layer7"], progress=False)
    with pytest.raises(InputTypeError):
        ki.prune("resnet50", [images])  # type: ignore[arg-type]
    with pytest.raises(DataError):
        ki.prune(model, [], progress=False)
    with pytest.raises(NonFiniteError, match="conv"):
        ki.prune(model, [torch.full_like(images, float("inf"))], progress=False)


def test_convolutions_that_standardize_their_weights_are_left_alone() -> None:
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 8, 3), nn.ReLU(), timm.layers.StdConv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    report = ki.prune(model, [torch.randn(32, 3, 8, 8)], macs=0.95, progress=False).report
    assert [width.name for width in report.widths] == ["2"]
    assert [fit.name for fit in report.layers] == ["4"]


def test_networks_that_cannot_be_traced_raise() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("this network does not like to be looked at")
            out: Tensor = self.b(self.a(x).relu())
            return out

    with pytest.raises(OptionError, match=r"Odd cannot be pruned.*looked at"):
        ki.prune(Odd(), [torch.randn(8, 3, 4, 4)], progress=False)


def test_a_network_without_data_raises() -> None:
    model = chain()[0].to("meta")
    with pytest.raises(OptionError, match="meta device and has no data"):
        ki.prune(model, [torch.randn(4, 3, 8, 8)], macs=0.5, progress=False)


@pytest.mark.parametrize("importance", [np.zeros(3), torch.zeros(3), 3, "taylor"], ids=repr)
def test_objects_that_are_no_importance_raise(importance: Any) -> None:
    model, images = chain()
    with pytest.raises(OptionError, match='importance must be "isomorphism" or an importance of torch-pruning'):
        little(model, images, importance=importance)
