"""Groups whose removal does not fit the network: they are named and left out, and the others are pruned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import KnowisoWarning, OptionError
from knowiso_train.pruning._attention_heads import head_groups, remove_heads
from knowiso_train.pruning._builder import copy_model
from knowiso_train.pruning._channel_groups import channel_groups
from knowiso_train.pruning._group_trial import usable_groups
from knowiso_train.pruning._tracing import trace_model

IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """Two chains of layers around a part that expects a certain width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.d, self.e = nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.middle(self.b(self.a(x).relu())))
        out: Tensor = self.e(self.d(x.relu()).relu())
        return out

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Shaped(Around):
    def middle(self, x: Tensor) -> Tensor:
        return x.view(len(x), 4, -1, *x.shape[2:]).relu().flatten(1, 2)[:, :16]


class Buffered(Around):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(16, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return x * self.scale


class Mixed(Around):
    """A softmax over the channels: to remove one is not to mask it."""

    def middle(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class Unpacked(Around):
    def middle(self, x: Tensor) -> Tensor:
        _batch, channels, _, _ = x.shape
        if channels != 16:
            raise ValueError(f"{channels} channels, expected 16")
        return x.relu()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Shaped, "does not fit its new widths"),
        (Buffered, "does not fit its new widths"),
        (Mixed, "removing channels differs there from masking them"),
        (Unpacked, "channels, expected 16"),
    ],
)
def test_a_group_that_does_not_fit_is_named_and_left_out(kind: type[Around], words: str) -> None:
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(KnowisoWarning, match=rf"layers 'b' of {kind.__name__} keep their widths: .*{words}"):
        pruned = ki.prune(model, [IMAGES], macs=0.7, progress=False)
    assert {width.name for width in pruned.report.widths} == {"a", "c", "d"}
    assert pruned.model.b.out_channels == 16
    assert pruned.report.macs[1] <= 0.7 * pruned.report.macs[0]
    assert pruned.model(IMAGES).shape == model(IMAGES).shape
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(OptionError, match=rf"{kind.__name__} cannot be pruned: .*{words}.*no channels of 'b'"):
        ki.prune(model, [IMAGES], macs=0.7, ignored=["a", "c", "d"], progress=False)


def test_trials_leave_no_trace_on_the_copy() -> None:
    model = Shaped().eval()
    groups = channel_groups(model, IMAGES[:2], trace_model(model, IMAGES[:2]))
    trial = copy_model(model)
    tensors, attributes = trial.state_dict(keep_vars=True), {n: str(m) for n, m in trial.named_modules()}
    with pytest.warns(KnowisoWarning, match="'b'"):
        usable = usable_groups(trial, IMAGES[:2], groups, lambda model, x: model(x))
    assert [group.name for group in usable] == [group.name for group in groups if group.name != "b"]
    after = trial.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, model.state_dict()[name]) for name, value in tensors.items())
    assert attributes == {n: str(m) for n, m in trial.named_modules()}


def test_widths_that_fit_as_multiples_are_pruned_as_multiples() -> None:
    class Paired(Around):
        def middle(self, x: Tensor) -> Tensor:
            return torch.cat([part.relu() for part in x.unflatten(1, (2, -1)).unbind(1)], 1)

    model = Paired().eval()
    with pytest.warns(KnowisoWarning, match="layers 'b' of Paired"):
        ki.prune(model, [IMAGES], macs=0.7, progress=False)
    assert ki.prune(model, [IMAGES], macs=0.5, round_to=2, progress=False).model.b.out_channels < 16


def vision_model(kind: str) -> nn.Module:
    """An image classifier of transformers with two blocks of four heads."""
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 3,
    }
    for part in (config, getattr(config, "vision_config", config)):
        for name, value in sizes.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, value)
    model: nn.Module = AutoModelForImageClassification.from_config(config)
    return model.eval()


def pixels(model: nn.Module, images: Tensor) -> Any:
    return model(pixel_values=images).logits


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip", "data2vec-vision"])
def test_heads_of_transformers_are_removed_as_masked_heads(kind: str) -> None:
    model = vision_model(kind)
    images = torch.randn(4, 3, 32, 32)
    groups = head_groups(model)
    assert [group.size for group in groups] == [4, 4]
    smaller, masked = copy.deepcopy(model), copy.deepcopy(model)
    for group in groups:
        remove_heads(smaller, group, [0, 2])
        [(output, columns)] = group.consumers.items()
        with torch.no_grad():
            masked.get_submodule(output).weight[:, columns[[0, 2]].flatten()] = 0
    torch.testing.assert_close(pixels(smaller, images), pixels(masked, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "beit", "dinov2", "clip"])
@pytest.mark.filterwarnings("ignore::knowiso_train.errors.KnowisoWarning")
def test_image_classifiers_of_transformers_are_pruned(kind: str) -> None:
    model = vision_model(kind)
    result = ki.prune(model, [torch.randn(32, 3, 32, 32)], macs=0.75, forward=pixels, rows=2, progress=False)
    assert result.report.macs[1] <= 0.75 * result.report.macs[0]
    kinds = {width.kind for width in result.report.widths}
    assert "channels" in kinds
    assert pixels(result.model, torch.randn(2, 3, 32, 32)).shape == (2, 3)
