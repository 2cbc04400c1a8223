"""Folding a map into the consumers of a layer is exact, or raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knowiso_train.errors import LayoutError, OptionError, ShapeError
from knowiso_train.refinement import fold


def network(padding: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=padding), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ).double()


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAP = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("padding", "bias"), [(0, True), (1, False)])
def test_folded_outputs_equal_unfolded_outputs(padding: int, bias: bool) -> None:
    net, shift = network(padding), torch.arange(4.0).double() if bias else None
    hidden = torch.einsum("oc,nchw->nohw", MAP, net[0](IMAGES)) + (0 if shift is None else shift[:, None, None])
    torch.testing.assert_close(fold(net, "0", ["1"], MAP, shift, IMAGES)(IMAGES), net[1:](hidden), rtol=1e-6, atol=1e-6)


def test_the_identity_changes_nothing() -> None:
    net = network(1)
    assert torch.equal(fold(net, "0", ["1"], torch.eye(4), None, IMAGES)(IMAGES), net(IMAGES))


def test_inexact_folds_raise() -> None:
    with pytest.raises(OptionError, match="zero padding"):
        fold(network(1), "0", ["1"], MAP, torch.ones(4), IMAGES)
    with pytest.raises(ShapeError, match="k×k"):
        fold(network(), "0", ["1"], torch.ones(4, 4, 3, 3), None, IMAGES)
    with pytest.raises(LayoutError, match="non-linearity"):
        fold(network(), "1", ["3"], torch.randn(5, 5), None, IMAGES)


def test_a_relu_that_never_acts_on_the_example_is_refused() -> None:
    """Exactness is a property of the network, not of the images at hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        net[0].bias.fill_(100.0)
    positive = torch.rand(4, 4, dtype=torch.float64)  # a positive map keeps it inactive too
    with pytest.raises(LayoutError, match="non-linearity"):
        fold(net, "0", ["2"], positive, None, IMAGES)


class TwoConsumers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        return self.one(x) + self.two(x)


def test_a_missing_consumer_is_refused_and_all_of_them_are_exact() -> None:
    torch.manual_seed(0)
    net, x = TwoConsumers(), torch.randn(6, 4)
    with pytest.raises(LayoutError, match="consumer is missing"):
        fold(net, "trunk", ["one"], MAP, None, x)
    folded, wanted = fold(net, "trunk", ["one", "two"], MAP, torch.ones(4), x), net.trunk(x) @ MAP.float().T + 1
    torch.testing.assert_close(folded(x), net.one(wanted) + net.two(wanted), rtol=1e-4, atol=1e-4)


def test_rounding_of_a_deep_float32_network_is_no_reason_to_refuse() -> None:
    torch.manual_seed(0)
    deep = [part for _ in range(30) for part in (nn.Linear(16, 16), nn.BatchNorm1d(16))]
    with torch.no_grad():
        for part in deep:
            part.weight.mul_(3.0)  # rounding grows with depth
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16), *deep).eval()
    folded = fold(net, "0", ["1"], MAP, torch.ones(4), torch.randn(5, 4))
    assert folded[1].weight.dtype == torch.float32


def test_channels_last_and_tokens() -> None:
    """Linear layers map the last axis, for any number of leading axes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    tokens = torch.randn(2, 7, 3, dtype=torch.float64)
    hidden = net[0](tokens) @ MAP.T + 1
    torch.testing.assert_close(fold(net, "0", ["1"], MAP, torch.ones(4), tokens)(tokens), net[1](hidden))


def test_mode_weights_and_random_state_are_not_modified() -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    folded = fold(net, "0", ["1"], MAP, None, IMAGES)
    assert net.training
    assert folded.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
