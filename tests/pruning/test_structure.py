"""Kept indices and structural differences: against the results of torch-pruning, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from knowiso_train.errors import ShapeError
from knowiso_train.pruning._structure import StructureDiff, apply_structure, state_shapes, structure_diff
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import index_kept
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
