"""Kept indices: conversion, application, composition, and inference from weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from knowiso_train.errors import ShapeError
from knowiso_train.pruning._tracing import Epilogue
from knowiso_train.pruning.kept_indices import (
    compose_kept_indices,
    index_kept,
    infer_kept_channels,
    infer_kept_outputs,
    to_axis_indices,
)


def test_groups_with_different_inputs_keep_flat_indices() -> None:
    # Weight (4, 4, 3, 3): two groups of two outputs
    conv = nn.Conv2d(8, 4, 3, groups=2, bias=False)
    number = torch.arange(4 * 4 * 3 * 3).view(4, 4, 3, 3)
    entries = torch.cat([number[:2, [0, 1]], number[2:, [1, 3]]])
    kept = to_axis_indices({"weight": entries}, conv)
    assert torch.equal(kept["weight"], entries)
    expected = torch.cat([conv.weight[:2, [0, 1]], conv.weight[2:, [1, 3]]])
    assert torch.equal(index_kept(conv.weight, kept["weight"]), expected)


def test_axes_may_have_any_order_or_lose_their_end() -> None:
    entries = {"weight": torch.tensor([[5, 3], [2, 0]]), "bias": torch.tensor([0, 1])}
    kept = to_axis_indices(entries, {"weight": (2, 3), "bias": (4,)})
    assert kept == {"weight": [[1, 0], [2, 0]], "bias": [[0, 1]]}


@pytest.mark.parametrize("indices", [[None, [7]], [None], torch.tensor([[99]])], ids=str)
def test_indices_that_do_not_fit_raise(indices: Any) -> None:
    with pytest.raises(ShapeError, match="do not fit"):
        index_kept(torch.zeros(2, 3), indices)


def test_composed_indices_equal_two_prunings() -> None:
    original = torch.randn(6, 5, 3)
    first: list[list[int] | None] = [[0, 2, 3, 5], None, [1, 2]]
    second: list[list[int] | None] = [[3, 1], [4, 0], None]
    kept = compose_kept_indices(
        {"a": first, "b": [[1]]}, {"a": second, "added": [[0]]}, {"a": original.shape, "b": (2,)}
    )
    assert torch.equal(index_kept(original, kept["a"]), index_kept(index_kept(original, first), second))
    assert kept["a"] == [[5, 2], [4, 0], [1, 2]]
    assert kept["b"] == [[1]]


@pytest.mark.parametrize("outputs", [[0, 3, 7], list(range(12))])
@pytest.mark.parametrize("inputs", [[1, 2, 8], list(range(10))])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_channels_are_inferred_from_the_weight(outputs: list[int], inputs: list[int], kernel: tuple[int, ...]) -> None:
    weight = torch.randn(12, 10, *kernel)
    inferred = infer_kept_channels("layer", weight, weight[outputs][:, inputs])
    assert [indices.tolist() for indices in inferred] == [outputs, inputs]


def test_weights_that_are_no_slice_raise() -> None:
    weight = torch.randn(8, 6, 3, 3)
    for other in (weight[:4, :3] + 0.1, weight[[3, 0]], weight[:4, :, :1], torch.randn(9, 6, 3, 3)):
        with pytest.raises(ShapeError, match=r"'layer'.* no slice of the original's"):
            infer_kept_channels("layer", weight, other)


def batch_norms(pruned: list[int]) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    norms = nn.BatchNorm2d(6), nn.BatchNorm2d(len(pruned))
    nn.init.normal_(norms[0].weight)
    with torch.no_grad():
        norms[1].weight.copy_(norms[0].weight[pruned])
    return norms


def test_outputs_are_inferred_from_the_norm_after_the_weights_were_trained() -> None:
    outputs = [1, 2, 5]
    convs = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 1)
    norms = batch_norms(outputs)
    original, pruned = (nn.ModuleDict({"conv": conv, "norm": norm}) for conv, norm in zip(convs, norms, strict=True))
    assert infer_kept_outputs(original, pruned, {"conv": Epilogue(norm="norm")})["conv"].tolist() == outputs
    # Two channels with equal numbers are ambiguous
    with torch.no_grad():
        norms[0].weight[0] = norms[0].weight[1]
    with pytest.raises(ShapeError, match=r"'conv'.* no slice"):
        infer_kept_outputs(original, pruned, {"conv": Epilogue(norm="norm")})
    kept: dict[str, Any] = {"conv.weight": [outputs, None]}
    assert infer_kept_outputs(original, pruned, {"conv": Epilogue(norm="norm")}, kept)["conv"].tolist() == outputs
    with pytest.raises(ShapeError, match="3 output channels, but kept has 2 indices"):
        infer_kept_outputs(original, pruned, {"conv": Epilogue()}, {"conv.weight": [[1, 2], None]})


@pytest.mark.parametrize("channel", [4, -1])
@pytest.mark.parametrize("flat", [True, False])
def test_kept_outputs_outside_the_layer_raise(channel: int, flat: bool) -> None:
    original, pruned = (nn.ModuleDict({"a": nn.Linear(3, size)}) for size in (4, 2))
    indices = [1, channel]
    flat_kept = torch.tensor([[3 * index + column for column in range(3)] for index in indices])
    kept = {"a.weight": flat_kept if flat else [indices, None]}
    with pytest.raises(ShapeError, match=f"'a': expected kept output channels from 0 to 3, got {channel}"):
        infer_kept_outputs(original, pruned, {"a": Epilogue()}, kept)
