"""Cholesky factors of moments that rounding made indefinite, alone and in elimination and importance."""

from __future__ import annotations

import pytest
import timm
import torch
import torch_pruning as tp

import knowiso_train as ki
from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.ops.im2col import conv_columns
from knowiso_train.ops.linalg import jittered_cholesky
from knowiso_train.pruning._elimination import BackwardElimination, Consumer


def rounded_gram(rows: int, columns: int) -> torch.Tensor:
    """Return a Gram matrix of low rank, multiplied in float32."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (x.T @ x).double() / rows


@pytest.mark.parametrize("strength", [1e-3, 1e-10])
def test_the_factor_has_the_requested_jitter_or_a_larger_one(strength: float) -> None:
    gram = rounded_gram(40, 300)
    added = torch.full((300,), strength, dtype=torch.float64)
    assert (torch.linalg.eigvalsh(gram) < 0).any()
    factor = jittered_cholesky(gram, added)
    found = factor @ factor.T - gram
    more = float(found.diagonal().mean() / strength)
    torch.testing.assert_close(found, torch.diag(found.diagonal().mean().expand(300)), rtol=0, atol=1e-9)
    assert more == pytest.approx(1.0, rel=1e-6) if strength == 1e-3 else 10 <= round(more) <= 1e6


def test_values_that_are_not_finite_raise() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        jittered_cholesky(torch.full((2, 2), torch.nan), torch.ones(2))


def test_elimination_of_channels_that_fill_few_dimensions() -> None:
    gram = rounded_gram(40, 300)
    elimination = BackwardElimination(
        [Consumer("wide", gram, torch.randn(300, 4).double(), conv_columns(300), 4.0)], ridge=1e-9
    )
    assert elimination.costs().isfinite().all()
    with pytest.raises(OptionError, match="finite"):
        BackwardElimination(
            [Consumer("wide", gram, torch.randn(300, 4).double(), conv_columns(300), 4.0)], ridge=float("inf")
        )


def test_the_importance_scores_an_untrained_network_on_noise() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(64, 3, 64, 64)
    importance = ki.IsomorphismImportance(model, [images], progress=False)
    with pytest.warns(ki.errors.KnowisoWarning):
        tp.pruner.BasePruner(
            model, images[:1], importance, pruning_ratio=0.5, ignored_layers=[model.get_classifier()]
        ).step()
    assert model(images[:2]).isfinite().all()
