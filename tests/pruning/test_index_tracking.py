"""Tracking of kept indices through indexing operations, reused memory, and tensors of unknown origin."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from knowiso_train.errors import CaptureError, ShapeError
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import index_kept


def test_several_steps_of_several_operations() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    original = copy.deepcopy(model)
    with track_kept_indices(model) as kept:
        model[0].weight = nn.Parameter(model[0].weight.data.clone()[[0, 1, 3]])
        model[0].weight = nn.Parameter(torch.index_select(model[0].weight, 1, torch.tensor([1, 4])))
        model[0].weight = nn.Parameter(model[0].weight.detach()[torch.tensor([True, False, True])])
        model[0].bias.data = model[0].bias.data[torch.tensor([0, 3])]
        model[1].running_mean = torch.cat([model[1].running_mean[:1], model[1].running_mean.narrow(0, 3, 1)])
        model[2].weight = nn.Parameter(model[2].weight.view(2, 2, 2)[:, :, 0].contiguous())
        with torch.no_grad():
            model[2].bias.mul_(2)
    for name in ("0.weight", "0.bias", "1.running_mean", "2.weight"):
        assert torch.equal(index_kept(original.state_dict()[name], kept[name]), model.state_dict()[name])
    assert kept["0.weight"] == [[0, 3], [1, 4]]
    assert kept["1.running_mean"] == [[0, 3]]
    assert kept["2.weight"] == [None, [0, 2]]
    assert "2.bias" not in kept


def test_groups_with_different_inputs() -> None:
    conv = nn.Conv2d(8, 4, 3, groups=2, bias=False)
    original = conv.weight.detach().clone()
    with track_kept_indices(conv) as kept:
        conv.weight = nn.Parameter(torch.cat([part[:, [i, 3]] for i, part in enumerate(conv.weight.data.split(2))]))
        conv.weight = nn.Parameter(conv.weight.index_select(-1, torch.tensor([0, 2])))
    assert isinstance(kept["weight"], Tensor)
    assert torch.equal(index_kept(original, kept["weight"]), conv.weight)


def test_reused_memory_and_later_changes_of_indices_have_no_effect() -> None:
    model = nn.Linear(64, 64)
    with track_kept_indices(model) as kept:
        # Temporaries of an importance: once freed, their memory belongs to the next tensor
        for _ in range(50):
            model.weight.data[:32].clone()
            torch.randn(32, 64)
        index = torch.tensor([1, 2])
        model.bias = nn.Parameter(model.bias.data[index])
        index.zero_()
        half = model.weight.data[:32].clone()
        del half
        model.weight = nn.Parameter(model.weight.data[32:].clone())
    assert kept == {"weight": [list(range(32, 64)), None], "bias": [[1, 2]]}
    other = nn.Linear(64, 64)
    with pytest.raises(CaptureError, match="'weight'"), track_kept_indices(other):
        replace_by_tensor_in_freed_memory(other)


def replace_by_tensor_in_freed_memory(model: nn.Linear) -> None:
    copied = model.weight.data[:32].clone()
    address = copied.data_ptr()
    del copied
    others = [torch.randn(32, 64) for _ in range(20)]
    reused = [other for other in others if other.data_ptr() == address]
    model.weight = nn.Parameter((reused or others)[0])


def test_tensors_of_unknown_origin_raise() -> None:
    for other in (
        lambda w: torch.zeros(2, 2),
        lambda w: (w * 1.0)[:, :2],
        lambda w: torch.cat([w[:1, :2], torch.zeros(1, 2)]),
    ):
        model = nn.Linear(3, 2)
        with (
            pytest.raises(CaptureError, match=r"'weight' changed from shape \(2, 3\) to \(2, 2\)"),
            track_kept_indices(model),
        ):
            model.weight = nn.Parameter(other(model.weight.data))
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    with pytest.raises(CaptureError, match=r"'0.weight'"), track_kept_indices(model):
        model[0].weight = nn.Parameter(model[1].weight[:, :2])


def test_an_error_in_the_context_removes_the_mode() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ShapeError, match="do not fit"), track_kept_indices(model):
        model.weight = nn.Parameter(index_kept(model.weight, [None]))
    assert not _get_current_function_mode_stack()


def test_added_parameters_are_not_tracked() -> None:
    model = nn.Linear(3, 2, bias=False)
    with track_kept_indices(model) as kept:
        model.bias = nn.Parameter(torch.zeros(2))
    assert kept == {}


def test_tied_weights_are_reported_under_both_names() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    with track_kept_indices(model) as kept:
        model[0].weight = model[1].weight = nn.Parameter(model[1].weight[:2])
    assert kept.keys() == {"0.weight", "1.weight"}
