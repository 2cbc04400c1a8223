"""Activation cache: sensitivities equal those of full passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.pruning._channel_groups import channel_groups
from knowiso_train.pruning._ranking import eliminate_channels, output_sensitivities
from knowiso_train.pruning._tracing import ActivationCache, trace_model
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.layer_samples import input_moments
from tests.helpers.prune_models import family


def overwriting() -> tuple[nn.Module, Tensor]:
    """Activations that overwrite what a convolution gave."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval(), torch.randn(
        40, 3, 12, 12
    )


@pytest.mark.parametrize(
    "name", ["overwriting", "test_resnet", "densenet121", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_sensitivities_are_those_of_whole_passes(name: str) -> None:
    model, images = overwriting() if name == "overwriting" else family(name)
    calibration = Calibration([images])
    with torch.no_grad():
        epilogues = trace_model(model, images[:2])
        groups = channel_groups(model, images[:2], epilogues)
        consumers = {name: model.get_submodule(name) for group in groups for name in group.consumers}
        inputs = input_moments(model, calibration, consumers, rows=20, progress=False)
        eliminations = {group.name: eliminate_channels(model, group, inputs, epilogues) for group in groups}
        before = copy.deepcopy(model.state_dict())
        plain_passes, cached_passes = (
            output_sensitivities(model, eliminations, calibration, False, order) for order in ((), list(epilogues))
        )
        assert list(plain_passes) == list(cached_passes) == [group.name for group in groups]
        for group in plain_passes:
            assert cached_passes[group] == pytest.approx(plain_passes[group], rel=1e-4, abs=1e-12)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())

        plain, first = model(images), eliminations[groups[0].name]  # one of them by hand
        other = copy.deepcopy(model)
        for reader, (weight, shift) in first.weights.items():
            layer: Any = other.get_submodule(reader)
            layer.weight.copy_(weight)
            layer.register_forward_hook(
                lambda m, i, out, s=shift: out + (s.view(1, -1, 1, 1) if out.ndim == 4 else s).float()
            )
        ratio = (
            (other(images) - plain).square().sum()
            / (plain - plain.mean(0)).square().sum()
            / first.removal_cost[first.probe_width]
        )
        assert plain_passes[groups[0].name] == pytest.approx(float(ratio), rel=1e-4)


def test_layers_ahead_are_not_asked_and_come_back_after_an_error() -> None:
    model, x = overwriting()
    asked: list[str] = []
    for name in ("0", "2"):
        layer, plain = model.get_submodule(name), model.get_submodule(name).forward
        # A layer may have such a thing of its own
        layer.forward = lambda x, name=name, plain=plain: (asked.append(name), plain(x))[1]
    own = {name: model.get_submodule(name).forward for name in ("0", "2")}
    replay = ActivationCache({name: model.get_submodule(name) for name in ("0", "2", "4")})
    with replay.recording():
        before = model(x)
    assert asked == ["0", "2"]
    with replay.skip_prefix(["4", "2"]):
        assert torch.equal(model(torch.full_like(x, torch.nan)), before)
    assert asked == ["0", "2", "2"]
    with replay.skip_prefix(["4", "unknown"]):
        assert model(torch.full_like(x, torch.nan)).isnan().any()
    with pytest.raises(RuntimeError, match="of this size"), replay.skip_prefix(["4"]):
        raise RuntimeError("no images of this size")
    assert {name: model.get_submodule(name).forward for name in own} == own
    assert not any(module._forward_hooks for module in model.modules())
