"""Device of teacher and peers in trainers."""

from __future__ import annotations

from torch import nn

import knowiso_train as ki
from knowiso_train.integrations._placement import move_frozen_networks


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def test_teacher_and_peers_move_from_the_cpu() -> None:
    peer = network()
    iso = ki.IsomorphismLoss(network(), network(), "1", target="consensus", peers=[peer])
    assert iso.peers == (peer,)
    move_frozen_networks(iso, "meta")
    assert {p.device.type for frozen in (iso.teacher, peer) for p in frozen.parameters()} == {"meta"}
    assert {p.device.type for p in iso.student.parameters()} == {"cpu"}


def test_a_network_on_another_device_stays() -> None:
    iso = ki.IsomorphismLoss(network(), network(), "1")
    iso.teacher.to("meta")
    move_frozen_networks(iso, "cpu")  # a copy from "meta" would raise an error
    assert {p.device.type for p in iso.teacher.parameters()} == {"meta"}
