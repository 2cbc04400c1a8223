"""Kept indices and structural differences: against the results of torch-pruning, and by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from knowiso_train.errors import CaptureError, ShapeError
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import index_kept, to_axis_indices
from knowiso_train.pruning.structure import StructureDiff, apply_structure, state_shapes, structure_diff
from tests.helpers.pruned_models import NETWORKS, SIDE, network, prune


@pytest.mark.parametrize("name", NETWORKS)
def test_indices_and_structure_reproduce_the_result_of_torch_pruning(name: str) -> None:
    model = network(name)
    original = copy.deepcopy(model)
    with track_kept_indices(model) as kept:
        prune(model)
    assert len(kept) > 10

    # The entries of each tensor are random numbers, hence equal values prove equal indices
    state = original.state_dict()
    for key, value in model.state_dict().items():
        if key in kept:
            assert value.shape != state[key].shape
            # torch-pruning keeps the same inputs in all groups
            assert isinstance(kept[key], list)
            assert torch.equal(index_kept(state[key], kept[key]), value)
        else:
            assert torch.equal(state[key], value)

    fresh = network(name)
    changes = structure_diff(original, model)
    rebuilt = apply_structure(fresh, changes, state_shapes(model))
    assert rebuilt is fresh
    assert structure_diff(model, rebuilt) == StructureDiff()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(rebuilt(x), model(x))
    assert not torch.allclose(original(x), model(x))


def test_numbers_and_widths_of_heads_are_attributes() -> None:
    model = network("vit_tiny_patch16_224")
    original = copy.deepcopy(model)
    prune(model)
    changed = structure_diff(original, model).attributes
    before, after = original.blocks[0].attn, model.blocks[0].attn
    assert (before.num_heads, after.num_heads) == (3, 1)
    assert after.head_dim < before.head_dim
    assert after.scale == before.scale
    assert changed["blocks.0.attn"] == {"num_heads": 1, "head_dim": after.head_dim, "attn_dim": after.attn_dim}
    assert changed["blocks.0.norm1"]["normalized_shape"] == tuple(model.blocks[0].norm1.weight.shape)
    assert changed["blocks.0.mlp.fc1"] == {
        "in_features": model.blocks[0].mlp.fc1.in_features,
        "out_features": model.blocks[0].mlp.fc1.out_features,
    }


class TestKeptIndices:
    def test_groups_with_different_inputs_keep_flat_indices(self) -> None:
        # Weight (4, 4, 3, 3): two groups of two outputs
        conv = nn.Conv2d(8, 4, 3, groups=2, bias=False)
        number = torch.arange(4 * 4 * 3 * 3).view(4, 4, 3, 3)
        entries = torch.cat([number[:2, [0, 1]], number[2:, [1, 3]]])
        kept = to_axis_indices({"weight": entries}, conv)
        assert torch.equal(kept["weight"], entries)
        expected = torch.cat([conv.weight[:2, [0, 1]], conv.weight[2:, [1, 3]]])
        assert torch.equal(index_kept(conv.weight, kept["weight"]), expected)

    def test_axes_may_have_any_order_or_lose_their_end(self) -> None:
        entries = {"weight": torch.tensor([[5, 3], [2, 0]]), "bias": torch.tensor([0, 1])}
        kept = to_axis_indices(entries, {"weight": (2, 3), "bias": (4,)})
        assert kept == {"weight": [[1, 0], [2, 0]], "bias": [[0, 1]]}

    @pytest.mark.parametrize("indices", [[None, [7]], [None], torch.tensor([[99]])], ids=str)
    def test_indices_that_do_not_fit_raise(self, indices: Any) -> None:
        with pytest.raises(ShapeError, match="do not fit"):
            index_kept(torch.zeros(2, 3), indices)


class TestTracking:
    def test_several_steps_of_several_operations(self) -> None:
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

    def test_groups_with_different_inputs(self) -> None:
        conv = nn.Conv2d(8, 4, 3, groups=2, bias=False)
        original = conv.weight.detach().clone()
        with track_kept_indices(conv) as kept:
            conv.weight = nn.Parameter(torch.cat([part[:, [i, 3]] for i, part in enumerate(conv.weight.data.split(2))]))
            conv.weight = nn.Parameter(conv.weight.index_select(-1, torch.tensor([0, 2])))
        assert isinstance(kept["weight"], Tensor)
        assert torch.equal(index_kept(original, kept["weight"]), conv.weight)

    def test_reused_memory_and_later_changes_of_indices_have_no_effect(self) -> None:
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
            self.replace_by_tensor_in_freed_memory(other)

    @staticmethod
    def replace_by_tensor_in_freed_memory(model: nn.Linear) -> None:
        copied = model.weight.data[:32].clone()
        address = copied.data_ptr()
        del copied
        others = [torch.randn(32, 64) for _ in range(20)]
        reused = [other for other in others if other.data_ptr() == address]
        model.weight = nn.Parameter((reused or others)[0])

    def test_tensors_of_unknown_origin_raise(self) -> None:
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

    def test_an_error_in_the_context_removes_the_mode(self) -> None:
        model = nn.Linear(3, 2)
        with pytest.raises(ShapeError, match="do not fit"), track_kept_indices(model):
            model.weight = nn.Parameter(index_kept(model.weight, [None]))
        assert not _get_current_function_mode_stack()

    def test_added_parameters_are_not_tracked(self) -> None:
        model = nn.Linear(3, 2, bias=False)
        with track_kept_indices(model) as kept:
            model.bias = nn.Parameter(torch.zeros(2))
        assert kept == {}

    def test_tied_weights_are_reported_under_both_names(self) -> None:
        model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
        model[1].weight = model[0].weight
        with track_kept_indices(model) as kept:
            model[0].weight = model[1].weight = nn.Parameter(model[1].weight[:2])
        assert kept.keys() == {"0.weight", "1.weight"}


class TestStructure:
    def test_attributes_keep_their_types(self) -> None:
        before, after = nn.Module(), nn.Module()
        for module, values in (
            (before, ((1, 2), [1, 2], 1, torch.Size([4]), None)),
            (after, ((1, 3), (1, 2), True, torch.Size([2]), 0.5)),
        ):
            module.a, module.b, module.c, module.d, module.e = values
        after.train(False)
        after.f, after.hidden = "new", object()
        changes = structure_diff(before, after)
        assert changes.attributes == {
            "": {"a": (1, 3), "b": (1, 2), "c": True, "d": torch.Size([2]), "e": 0.5, "f": "new"}
        }
        apply_structure(before, changes, {})
        assert (before.b, before.c, before.f, before.training) == ((1, 2), True, "new", True)
        assert type(before.d) is torch.Size

    def test_biases_are_added_and_removed(self) -> None:
        pruned = nn.Sequential(nn.Conv2d(3, 2, 1, bias=True), nn.Linear(2, 2, bias=False))
        fresh = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 2, bias=True)).double()
        fresh[0].weight.requires_grad_(False)
        changes = structure_diff(fresh, pruned)
        assert (changes.added, changes.removed) == (["0.bias"], ["1.bias"])
        apply_structure(fresh, changes, state_shapes(pruned))
        assert state_shapes(fresh) == state_shapes(pruned)
        assert (fresh[0].bias.dtype, fresh[0].weight.requires_grad, fresh[0].bias.requires_grad) == (
            torch.float64,
            False,
            True,
        )

    def test_tied_parameters_stay_tied_and_buffers_persistent(self) -> None:
        fresh = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)])
        fresh[1].weight = fresh[0].weight
        apply_structure(fresh, StructureDiff(), {"0.weight": (2, 3), "1.weight": (2, 3), "2.running_mean": (2,)})
        assert fresh[0].weight is fresh[1].weight
        assert fresh.state_dict()["2.running_mean"].shape == (2,)

    @pytest.mark.parametrize(
        ("changes", "shapes", "message"),
        [
            (StructureDiff({"9": {"a": 1}}), {}, "no module '9'"),
            (StructureDiff({"0": {"forward": 1}}), {}, "'forward' of module '0' is no plain attribute"),
            (StructureDiff({"0": {"weight": 1}}), {}, "'weight' of module '0' is no plain attribute"),
            (StructureDiff({"": {"0": 1}}), {}, "'0' of module '' is no plain attribute"),
            (StructureDiff({"0": {"training": 1}}), {}, "'training'"),
            (StructureDiff({"0": {"_parameters": 1}}), {}, "'_parameters'"),
            (StructureDiff({"0": {"in_features": print}}), {}, "no plain value"),
            (StructureDiff(added=["0.scale"]), {}, "'0.scale' cannot be added"),
            (StructureDiff(added=["0.forward"]), {"0.forward": (2,)}, "'0.forward' cannot be added"),
            (StructureDiff(removed=["7.bias"]), {}, "no module '7'"),
            (StructureDiff(), {"0.gain": (2,)}, "no parameter or buffer '0.gain'"),
        ],
        ids=str,
    )
    def test_unknown_modules_attributes_and_tensors_raise(
        self, changes: StructureDiff, shapes: dict[str, tuple[int, ...]], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            apply_structure(nn.Sequential(nn.Linear(3, 2)), changes, shapes)

    def test_models_of_other_modules_raise(self) -> None:
        with pytest.raises(ShapeError, match="module '1' is ReLU in the original and GELU in the pruned"):
            structure_diff(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Sequential(nn.Linear(3, 2), nn.GELU()))
        with pytest.raises(ShapeError, match="module '1' is absent in the original"):
            structure_diff(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2), nn.GELU()))
