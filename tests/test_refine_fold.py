"""Folding a map into the layers that read it is exact, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knowiso_train.errors import LayoutError, OptionError, ShapeError
from knowiso_train.refinement import fold


def network(padding: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=padding), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAP = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("padding", "bias"), [(0, True), (1, False)])
def test_folded_is_unfolded(padding: int, bias: bool) -> None:
    net, shift = network(padding), torch.arange(4.0).double() if bias else None
    hidden = torch.einsum("oc,nchw->nohw", MAP, net[0](IMAGES)) + (0 if shift is None else shift[:, None, None])
    torch.testing.assert_close(fold(net, "0", ["1"], MAP, shift, IMAGES)(IMAGES), net[1:](hidden), rtol=1e-6, atol=1e-6)


def test_the_identity_changes_nothing() -> None:
    net = network(1)
    assert torch.equal(fold(net, "0", ["1"], torch.eye(4), None, IMAGES)(IMAGES), net(IMAGES))


def test_refused() -> None:
    with pytest.raises(OptionError, match="zero padding"):
        fold(network(1), "0", ["1"], MAP, torch.ones(4), IMAGES)
    with pytest.raises(ShapeError, match="k×k"):
        fold(network(), "0", ["1"], torch.ones(4, 4, 3, 3), None, IMAGES)
    with pytest.raises(LayoutError, match="non-linearity"):
        fold(network(), "1", ["3"], torch.randn(5, 5), None, IMAGES)
