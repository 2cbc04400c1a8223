"""Composite of two networks: what training after a layer changes, and the orders that are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from knowiso_train.disentangle.disentangler import Disentangler
from knowiso_train.errors import DataError, OptionError
from knowiso_train.refinement._composite import Composite, train_after

X = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )


def test_only_what_comes_after_the_layer_is_trained() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    train_after(net, net, "2", [(X, Y)], steps=5, lr=0.1)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name[0] in "012"} == set()
    assert changed >= {"3.weight", "3.bias", "4.weight", "5.weight", "5.bias", "4.running_mean", "4.running_var"}
    assert not net.training


def test_frozen_layers_are_not_trained() -> None:
    net = network()
    net[3].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    train_after(net, net, "2", [(X, Y)], steps=2, lr=0.1)
    assert torch.equal(net[3].weight, before["3.weight"])
    assert not torch.equal(net[5].weight, before["5.weight"])
    net[3:].requires_grad_(False)
    with pytest.raises(OptionError, match="expected trainable layers after '2', got frozen ones"):
        train_after(net, net, "2", [(X, Y)], steps=2, lr=0.1)


def test_training_after_a_layer_decreases_the_cross_entropy() -> None:
    net = network().eval()
    before = nn.functional.cross_entropy(net(X), Y)
    train_after(net, net, "2", [(X[:200], Y[:200]), (X[200:], Y[200:])], steps=30, lr=0.1)
    assert nn.functional.cross_entropy(net(X), Y) < 0.7 * before


def test_no_steps_change_nothing_and_no_images_raise() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    train_after(net, net, "2", [(X, Y)], steps=0, lr=0.1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(DataError, match="labeled images gave no images"):
        train_after(net, net, "2", [], steps=1, lr=0.1)


def test_a_composite_trains_its_own_copy_and_neither_peer_nor_maps() -> None:
    net, peer = network().eval(), network().eval()
    maps = Disentangler(order=0).fit(peer[:3](X).detach(), net[:3](X).detach())
    composite = Composite(net, "2", peer, "2", maps, 0)
    before = copy.deepcopy(composite.state_dict()), copy.deepcopy(net.state_dict())
    train_after(composite, composite.model, "2", [(X, Y)], steps=3, lr=0.1)
    changed = {name for name, value in composite.state_dict().items() if not torch.equal(value, before[0][name])}
    assert changed
    assert all(name.startswith(("model.3", "model.4", "model.5")) for name in changed)
    assert all(torch.equal(value, before[1][name]) for name, value in net.state_dict().items())


def test_an_order_that_the_disentangler_lacks_raises() -> None:
    net = network().eval()
    maps = Disentangler(order=0).fit(net[:3](X).detach(), net[:3](X).detach())
    with pytest.raises(OptionError, match="max_order must lie in 0 … 0"):
        Composite(net, "2", net, "2", maps, 1)
