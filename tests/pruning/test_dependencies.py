"""Dependency graphs: searches without end, exceptions of torch-pruning and hooks that it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import KnowisoWarning, OptionError
from knowiso_train.pruning._channel_groups import channel_groups
from knowiso_train.pruning._dependencies import PruningGraph
from tests.helpers.prune_models import chain


class Recurrent(nn.Module):
    """Convolutions, and a recurrent layer over the positions."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.recurrent, self.fc = layer(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.b(self.a(x).relu()).relu().flatten(2).transpose(1, 2)
        out: Tensor = self.fc(self.recurrent(tokens)[0][:, -1])
        return out


def focalnet() -> nn.Module:
    from transformers import FocalNetConfig, FocalNetForImageClassification

    return FocalNetForImageClassification(FocalNetConfig(image_size=32, embed_dim=8, depths=[1, 1], num_labels=3))


NETWORKS: dict[str, tuple[Any, int, str]] = {
    "focalnet": (focalnet, 32, "did not end within|more than any layer has|IndexError"),
    "coatnet": (lambda: timm.create_model("test_coatnet", num_classes=3), 160, "more than any layer has"),
    "rnn": (lambda: Recurrent(nn.RNN), 6, "did not end within"),  # type: ignore[arg-type]
    "gru": (lambda: Recurrent(nn.GRU), 6, "IndexError"),  # type: ignore[arg-type]
    "twins": (
        lambda: timm.create_model(
            "twins_svt_small",
            img_size=64,
            num_classes=3,
            embed_dims=(16, 16, 32, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 2),
        ),
        64,
        "ZeroDivisionError",
    ),
    "hiera": (
        lambda: timm.create_model("hiera_tiny_224", img_size=64, num_classes=3, embed_dim=16, stages=(1, 1, 1, 1)),
        64,
        "ZeroDivisionError",
    ),
    # torch-pruning fails on one operation of it, and so on the whole network
    "shufflenet": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=3),
        64,
        "more than any layer has|does not match the channels before and after ViewBackward0",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_without_a_group_are_named_and_the_others_are_pruned(name: str) -> None:
    torch.manual_seed(0)
    build, side, words = NETWORKS[name]
    model, forward = build().eval(), (lambda model, x: model(x))
    with pytest.warns(KnowisoWarning, match=rf"layers '.*' keep their widths: torch-pruning .*({words})"):
        groups = channel_groups(model, torch.randn(2, 3, side, side), {}, forward=forward)
    assert groups
    _, failures = PruningGraph(model, torch.randn(2, 3, side, side), forward).groups()
    assert failures
    assert not {layer for group in groups for layer in group.producers} & set(failures)
    # Where nothing else is left, the reason is the error
    others = [layer for group in groups for layer in group.producers]
    with pytest.raises(OptionError, match=words):
        channel_groups(model, torch.randn(2, 3, side, side), {}, others, forward)


def test_a_recurrent_layer_behind_convolutions() -> None:
    torch.manual_seed(0)
    model = Recurrent(nn.GRU).eval()  # type: ignore[arg-type]
    with pytest.warns(KnowisoWarning, match="layers 'b' keep their widths"):
        pruned = ki.prune(model, [torch.randn(64, 3, 6, 6)], macs=0.8, progress=False)
    assert pruned.model.a.out_channels < 8 == pruned.model.b.out_channels


def test_a_search_of_too_many_steps_names_its_layer() -> None:
    model, images = chain()
    graph = PruningGraph(model, images[:2])
    assert graph.groups()[1] == {}
    graph._budget.max_steps = 3
    groups, failures = graph.groups()
    assert len(groups) == 1
    assert set(failures) == {"conv1", "conv2"}
    assert "layer 'conv1' of Chain (the search did not end within 3 steps)" in str(failures["conv1"])


def test_hooks_are_as_before_where_the_network_raises_in_the_trace() -> None:
    class RaisesWithGradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu())
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients here")
            return out

    model = RaisesWithGradients().eval()
    handle = model.a.register_forward_hook(lambda *_: None)
    before = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(OptionError, match="no gradients here"):
        PruningGraph(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(OptionError, match="no gradients here"):
        ki.prune(model, [torch.randn(8, 3, 4, 4)], progress=False)
    assert {name: dict(module._forward_hooks) for name, module in model.named_modules()} == before
    handle.remove()
