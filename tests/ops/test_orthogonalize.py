"""Orthogonalized matrices: their singular values and vectors, alone and in batches of several sizes."""

from __future__ import annotations

import pytest
import torch

from knowiso_train.ops import linalg as orthogonal

SHAPES = [
    (1, 1),
    (3, 144),
    (5, 144),
    (60, 576),
    (64, 405),
    (405, 64),
    (32, 128),
    (33, 129),
    (200, 300),
    (8, 20),
    (8, 20),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_stay_and_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonal.orthogonalize(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ found @ right.T
    assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-9
    assert 0.5 < rotated.diagonal().min() <= rotated.diagonal().max() < 1.3


@pytest.mark.parametrize("at_once", [1, 32 * 128 * 3, orthogonal.MAX_BATCH_VALUES])
def test_batches_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(orthogonal, "MAX_BATCH_VALUES", at_once)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    matrices.append(torch.zeros(4, 7, dtype=torch.float64))  # no gradient: stays zero
    for found, matrix in zip(orthogonal._in_batches(matrices), matrices, strict=True):
        torch.testing.assert_close(found, orthogonal.orthogonalize(matrix), rtol=1e-9, atol=1e-12)
